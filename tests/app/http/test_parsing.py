import json

import pytest

from app.http.parsing import parse_body
from app.http.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from slora_core.errors import InvalidRequestError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
MODELS = {
    "chat": (ChatCompletionRequest, CHAT),
    "completion": (CompletionRequest, COMPLETION),
    "load": (LoadAdapterRequest, {"lora_name": "a", "lora_path": "/a"}),
    "unload": (UnloadAdapterRequest, {"lora_name": "a"}),
}


def parse(kind, **changes):
    model, fields = MODELS[kind]
    return parse_body(model, json.dumps({**fields, **changes}).encode())


def refused(kind, **changes):
    with pytest.raises(InvalidRequestError) as caught:
        request = parse(kind, **changes)
        # Ranges are the engine's own check.
        limit = request.max_tokens
        request.sampling_params(1 if limit is None else limit, seed=0)
    return caught.value


@pytest.mark.parametrize("kind", MODELS)
def test_minimal_body(kind):
    parse(kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000, b"9" * 5000],
)
def test_no_json_object(kind, body):
    with pytest.raises(InvalidRequestError, match="JSON"):
        parse_body(MODELS[kind][0], body)


@pytest.mark.parametrize("kind", MODELS)
def test_unknown_field_is_named(kind):
    error = refused(kind, temprature=0)
    assert "unknown field temprature" in str(error)
    assert error.param == "temprature"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("chat", "model"),
        ("chat", "messages"),
        ("completion", "model"),
        ("completion", "prompt"),
        ("load", "lora_name"),
        ("load", "lora_path"),
        ("unload", "lora_name"),
    ],
)
def test_missing_field_is_named(kind, name):
    # null is an absent field.
    error = refused(kind, **{name: None})
    assert (str(error), error.param) == (f"{name} is missing", name)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", [0]),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 2),
        ("seed", "1"),
        ("seed", 2**63),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("stop", {}),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 7),
        ("stop_token_ids", [5] * 129),
        ("stream", "yes"),
        ("stream", 1),
        ("ignore_eos", 1),
        ("model", 5),
        ("model", ["m"]),
    ],
)
def test_wrong_value_names_its_field(kind, name, value):
    assert refused(kind, **{name: value}).param == name


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_not_json(constant):
    body = f'{{"model": "m", "prompt": "x", "temperature": {constant}}}'.encode()
    with pytest.raises(InvalidRequestError, match=f"{constant} is not a JSON number"):
        parse_body(CompletionRequest, body)


def test_number_beyond_every_float():
    body = b'{"model": "m", "prompt": "x", "temperature": 1e999}'
    with pytest.raises(InvalidRequestError, match="temperature: .* finite") as caught:
        parse_body(CompletionRequest, body)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("half", [b"\\ud83d", b"\\uDC4B", b"\xed\xa0\x80"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("completion", b'{"model": "m", "prompt": "HALF"}'),
        ("completion", b'{"model": "HALF", "prompt": "x"}'),
        ("completion", b'{"model": "m", "prompt": "x", "stop": ["HALF"]}'),
        ("completion", b'{"model": "m", "prompt": "x", "HALF": 1}'),
        ("chat", b'{"model": "m", "messages": [{"role": "user", "content": "HALF"}]}'),
        ("load", b'{"lora_name": "a", "lora_path": "/HALF"}'),
        ("unload", b'{"lora_name": "HALF"}'),
    ],
)
def test_half_a_surrogate_pair(kind, body, half):
    with pytest.raises(InvalidRequestError, match="not valid JSON") as caught:
        parse_body(MODELS[kind][0], body.replace(b"HALF", half))
    str(caught.value).encode()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be", "latin-1"])
def test_a_body_is_utf_8(encoding):
    body = '{"model": "m", "prompt": "é\\ud83d"}'.encode(encoding)
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        parse_body(CompletionRequest, body)


def test_a_whole_surrogate_pair_and_a_byte_order_mark():
    body = b'{"model": "m", "prompt": "\\ud83d\\udc4b"}'
    for mark in (b"", b"\xef\xbb\xbf"):
        assert parse_body(CompletionRequest, mark + body).prompt == ["👋"]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("both", "n", 2),
        ("both", "n", True),
        ("both", "presence_penalty", 0.5),
        ("both", "frequency_penalty", -1),
        ("both", "logit_bias", {"5": 1}),
        ("both", "user", 5),
        ("completion", "best_of", 2),
        ("completion", "echo", True),
        ("completion", "suffix", "x"),
        ("completion", "logprobs", 0),
        ("chat", "logprobs", True),
        ("chat", "top_logprobs", 3),
        ("chat", "tools", [{"type": "function"}]),
        ("chat", "tool_choice", "required"),
        ("chat", "response_format", {"type": "json_object"}),
        ("chat", "reasoning_effort", "low"),
    ],
)
def test_unsupported_parameter_is_named(kind, name, value):
    for each in ("chat", "completion") if kind == "both" else (kind,):
        error = refused(each, **{name: value})
        assert error.param == name
        assert "not supported" in str(error)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("both", {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}),
        ("both", {"user": "me", "stop": None, "metadata": {"a": "b"}}),
        ("completion", {"best_of": 1, "echo": False, "suffix": None, "logprobs": None}),
        ("chat", {"logprobs": False, "tools": None, "response_format": {"type": "text"}}),
        ("chat", {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}),
    ],
)
def test_parameters_that_change_nothing(kind, fields):
    for each in ("chat", "completion") if kind == "both" else (kind,):
        assert parse(each, **fields) == parse(each)


def test_parameters_that_are_kept():
    for kind in ("chat", "completion"):
        request = parse(kind, seed=5, top_k=-1, stream=True, stream_options={"include_usage": True})
        assert (request.seed, request.top_k, request.stream) == (5, -1, True)
        assert request.stream_options.include_usage is True


def test_stream_options_without_stream():
    assert "only with stream" in str(refused("chat", stream_options={"include_usage": True}))


def test_unknown_stream_option():
    error = refused("chat", stream=True, stream_options={"usage": True})
    assert "stream_options.usage" in str(error)
    error = refused("chat", stream=True, stream_options={"include_obfuscation": True})
    assert "stream_options.include_obfuscation" in str(error)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_forms_of_a_prompt(prompt, expected):
    assert parse("completion", prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], 5, {}, [1, "a"], [1.5], [True], [[True]], ["a", []], ["a"] * 129],
)
def test_wrong_prompt(prompt):
    assert refused("completion", prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [5],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x", "colour": "red"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": ""}] * 2049,
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 2049}],
    ],
)
def test_wrong_messages(messages):
    error = refused("chat", messages=messages)
    assert error.param == "messages"
    assert "messages" in str(error)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"str": 1}, "unknown field str", "str"),
        ({"list[TextPart]": 1}, "unknown field list[TextPart]", "list[TextPart]"),
        ({"messages": [{"role": "user", "content": "", "str": 1}]}, "messages[0].str", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "str": 1}]}]},
            "unknown field messages[0].content[0].str",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text is missing",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content: must be a string or a list of text parts, given 5",
            "messages",
        ),
    ],
)
def test_the_path_of_a_wrong_field(fields, message, param):
    error = refused("chat", **fields)
    assert message in str(error) and error.param == param


def test_many_messages_and_parts_are_taken():
    message = {"role": "user", "content": [{"type": "text", "text": "x"}] * 2048}
    request = parse("chat", messages=[message, *CHAT["messages"] * 2047])
    assert len(request.messages) == 2048


@pytest.mark.parametrize(
    "messages", [[{}] * 2048, [{"role": "user", "content": [{}] * 2048}], [{}] * 100_000]
)
def test_the_first_of_many_errors_is_all_that_is_looked_for(messages):
    assert refused("chat", messages=messages).__cause__.error_count() <= 3


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_object_with_very_many_fields(kind):
    wide = {f"f{i}": 1 for i in range(2000)}
    for fields in (wide, {"stream_options": wide}, {"metadata": {"a": wide}}):
        assert "has 20" in str(refused(kind, **fields))


def test_unsupported_message_field_is_named():
    messages = [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]
    assert refused("chat", messages=messages).param == "messages[0].tool_calls"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse("chat", messages=[{"role": "developer", "content": parts}])
    assert request.messages[0].as_template_input() == {"role": "system", "content": "ab"}


def test_an_answer_can_be_sent_back():
    from app.http.schemas import AssistantMessage

    answer = AssistantMessage(content="hello").model_dump()
    openai_extras = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [*CHAT["messages"], {**answer, **openai_extras}]
    assert len(parse("chat", messages=messages).messages) == 2


def test_limit_under_either_name():
    assert parse("chat").token_limit is None
    assert parse("chat", max_tokens=5).token_limit == 5
    assert parse("chat", max_completion_tokens=6).token_limit == 6
    assert "differ" in str(refused("chat", max_tokens=5, max_completion_tokens=6))


def test_a_wrong_value_is_told():
    assert str(refused("chat", max_completion_tokens=0)).endswith("or equal to 1, given 0")
    assert str(refused("chat", top_k="many")).endswith('given "many"')


def test_sampling_params_carry_every_field():
    request = parse(
        "completion",
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        seed=-3,
        ignore_eos=True,
        stop_token_ids=[5],
        stop="x",
    )
    params = request.sampling_params(max_tokens=9, seed=1)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 4, 0.1)
    assert (params.seed, params.ignore_eos, params.max_tokens) == (-3, True, 9)
    assert (params.stop_token_ids, params.stop) == ((5,), ("x",))
    assert parse("chat").sampling_params(1, seed=7).seed == 7
    assert parse("chat", top_k=-1).sampling_params(1, seed=7).top_k == 0
