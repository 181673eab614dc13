from app.routing.conversation import (
    NUM_NAMING_TOKENS,
    conversation_of_chat,
    conversation_of_prompt,
)

SYSTEM = {"role": "system", "content": "be brief"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_every_turn_of_a_chat_has_its_name():
    first = conversation_of_chat([SYSTEM, user("hi")], {})
    turns = [SYSTEM, user("hi"), assistant("hello"), user("how are you?")]
    assert conversation_of_chat(turns, {}) == first
    others = [
        conversation_of_chat([SYSTEM, user("ho")], {}),
        conversation_of_chat([user("hi")], {}),
        conversation_of_chat([SYSTEM, user("hi")], {"enable_thinking": False}),
        conversation_of_chat([SYSTEM, assistant("hi")], {}),
    ]
    assert len({first, *others}) == 5


def test_a_prompt_is_named_by_its_first_whole_pages():
    prompt = list(range(1000))
    assert conversation_of_prompt(prompt[:15], 16) == ""
    name = conversation_of_prompt(prompt[:16], 16)
    assert name and conversation_of_prompt(prompt[:31], 16) == name
    assert conversation_of_prompt(prompt[:32], 16) != name
    long = conversation_of_prompt(prompt[:NUM_NAMING_TOKENS], 16)
    assert conversation_of_prompt(prompt, 16) == long
    assert conversation_of_prompt([7, *prompt[1:]], 16) != long


def test_text_that_no_encoding_has_is_named_too():
    assert conversation_of_chat([user("\ud800")], {})
