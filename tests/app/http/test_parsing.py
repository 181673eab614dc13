import inspect
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
        ("min_tokens", -1),
        ("min_tokens", 2.5),
        ("min_tokens", True),
        ("stop", [""]),
        ("stop", ["x", ""]),
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
        ("both", "skip_special_tokens", False),
        ("both", "include_stop_str_in_output", True),
        ("both", "detokenize", False),
        ("both", "use_beam_search", True),
        ("both", "best_of", 2),
        ("both", "length_penalty", 0.5),
        ("both", "early_stopping", True),
        ("both", "repetition_penalty", 1.1),
        ("both", "truncate_prompt_tokens", 100),
        ("both", "prompt_logprobs", 0),
        ("both", "priority", 1),
        ("both", "response_format", {"type": "json_object"}),
        ("both", "guided_json", {"type": "object"}),
        ("both", "structured_outputs", {"regex": "a"}),
        ("both", "return_token_ids", True),
        ("both", "kv_transfer_params", {"do_remote_decode": True}),
        ("both", "cache_salt", "x"),
        ("both", "request_id", "x"),
        ("both", "bad_words", ["x"]),
        ("both", "allowed_token_ids", [5]),
        ("both", "vllm_xargs", {"a": 1}),
        ("chat", "add_generation_prompt", False),
        ("chat", "continue_final_message", True),
        ("chat", "add_special_tokens", True),
        ("chat", "echo", True),
        ("chat", "chat_template", "{{ messages }}"),
        ("chat", "documents", [{"title": "a", "text": "b"}]),
        ("chat", "mm_processor_kwargs", {"a": 1}),
        ("chat", "include_reasoning", False),
        ("completion", "prompt_embeds", "x"),
        ("completion", "echo", True),
        ("completion", "suffix", "x"),
        ("completion", "logprobs", 0),
        ("chat", "logprobs", True),
        ("chat", "top_logprobs", 3),
        ("chat", "tools", [{"type": "function"}]),
        ("chat", "tool_choice", "required"),
        ("chat", "reasoning_effort", "low"),
    ],
)
def test_unsupported_parameter_is_named(kind, name, value):
    for each in ("chat", "completion") if kind == "both" else (kind,):
        error = refused(each, **{name: value})
        assert error.param == name
        assert f"{name}=" in str(error) and "not supported" in str(error)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("both", {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}),
        ("both", {"user": "me", "stop": None, "metadata": {"a": "b"}}),
        ("completion", {"best_of": 1, "echo": False, "suffix": None, "logprobs": None}),
        ("chat", {"logprobs": False, "tools": None, "response_format": {"type": "text"}}),
        ("chat", {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}),
        ("both", {"stop": ""}),
        ("both", {"stop": []}),
        ("both", {"skip_special_tokens": True, "spaces_between_special_tokens": True}),
        ("chat", {"add_generation_prompt": True, "continue_final_message": False}),
        ("both", {"include_stop_str_in_output": False, "detokenize": True, "echo": False}),
        ("both", {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0}),
        ("both", {"early_stopping": False, "priority": 0, "return_token_ids": False}),
        ("both", {"truncate_prompt_tokens": None, "prompt_logprobs": None, "cache_salt": None}),
        ("both", {"guided_json": None, "guided_regex": None, "guided_choice": None}),
        ("both", {"guided_grammar": None, "kv_transfer_params": None, "logits_processors": None}),
        ("both", {"response_format": {"type": "text"}, "min_tokens": 0, "min_p": None}),
        ("chat", {"documents": None, "mm_processor_kwargs": None, "chat_template_kwargs": None}),
        ("chat", {"documents": [], "add_special_tokens": False, "chat_template_kwargs": {}}),
        ("completion", {"add_special_tokens": True, "min_tokens": 0.0}),
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


# Every field of vLLM 0.26's two requests at its default, but for messages and prompt.
VLLM_DEFAULTS = {
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "max_tokens": None,
    "n": 1,
    "presence_penalty": 0.0,
    "response_format": None,
    "seed": None,
    "stop": [],
    "stream": False,
    "stream_options": None,
    "temperature": None,
    "top_p": None,
    "user": None,
    "use_beam_search": False,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "length_penalty": 1.0,
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "echo": False,
    "structured_outputs": None,
    "priority": 0,
    "request_id": None,
    "return_tokens_as_token_ids": None,
    "return_token_ids": None,
    "return_token_offsets": False,
    "cache_salt": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "vllm_xargs": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
}
VLLM_CHAT_DEFAULTS = {
    **VLLM_DEFAULTS,
    "logprobs": False,
    "top_logprobs": 0,
    "max_completion_tokens": None,
    "tools": None,
    "tool_choice": "none",
    "reasoning_effort": None,
    "include_reasoning": True,
    "parallel_tool_calls": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "media_io_kwargs": None,
    "mm_processor_kwargs": None,
    "return_prompt_text": None,
    "return_assistant_tokens_mask": False,
}
VLLM_COMPLETION_DEFAULTS = {
    **VLLM_DEFAULTS,
    "logprobs": None,
    "suffix": None,
    "prompt_embeds": None,
    "add_special_tokens": True,
}


@pytest.mark.parametrize(
    ("kind", "fields"), [("chat", VLLM_CHAT_DEFAULTS), ("completion", VLLM_COMPLETION_DEFAULTS)]
)
def test_every_field_of_vllm_at_its_default(kind, fields):
    assert parse(kind, **fields) == parse(kind)


@pytest.mark.parametrize(
    ("kind", "name", "given", "kept"),
    [
        ("both", "max_tokens", 128.0, 128),
        ("chat", "max_completion_tokens", 128.0, 128),
        ("both", "min_tokens", 2.0, 2),
        ("both", "seed", -5.0, -5),
        ("both", "top_k", 40.0, 40),
        ("both", "stop_token_ids", [5.0, 6], [5, 6]),
        ("completion", "prompt", [5.0, 6], [[5, 6]]),
        ("completion", "prompt", [[5.0], [6]], [[5], [6]]),
    ],
)
def test_a_float_without_a_fraction_is_an_integer(kind, name, given, kept):
    for each in ("chat", "completion") if kind == "both" else (kind,):
        value = getattr(parse(each, **{name: given}), name)
        assert json.dumps(value) == json.dumps(kept)


@pytest.mark.parametrize("value", [128.5, "128.0", 1e999])
def test_other_numbers_are_no_integers(value):
    body = json.dumps({**COMPLETION, "max_tokens": value}).replace("Infinity", "1e999")
    with pytest.raises(InvalidRequestError, match="max_tokens.* integer"):
        parse_body(CompletionRequest, body.encode())


def test_min_tokens_above_max_tokens():
    error = refused("completion", min_tokens=6, max_tokens=5)
    assert error.param == "min_tokens"
    assert str(error) == "min_tokens is 6; it must be 0 to max_tokens, which is 5"
    request = parse("completion", min_tokens=5, max_tokens=5)
    assert request.sampling_params(5, seed=0).min_tokens == 5


def test_names_of_participants_reach_the_template():
    messages = [
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "developer", "content": "x", "name": None},
    ]
    given = [m.as_template_input() for m in parse("chat", messages=messages).messages]
    assert given == [
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "system", "content": "x"},
    ]
    assert refused("chat", messages=[{**messages[0], "name": 5}]).param == "messages"


@pytest.mark.parametrize("extra", [{}, {"tool_calls": []}, {"tool_calls": None}])
@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_an_assistant_without_content(extra, content):
    message = {"role": "assistant", **content, **extra}
    request = parse("chat", messages=[message, *CHAT["messages"]])
    assert request.messages[0].as_template_input() == {"role": "assistant", "content": ""}


def test_arguments_of_the_chat_template():
    kwargs = {"enable_thinking": False, "documents_shown": [1, {"a": None}]}
    assert parse("chat", chat_template_kwargs=kwargs).chat_template_kwargs == kwargs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"messages": []}, "may not have messages"),
        ({"tokenize": True}, "may not have tokenize"),
        ({"add_generation_prompt": False}, "may not have add_generation_prompt"),
        ({"chat_template": "x"}, "may not have chat_template"),
        ({"bos_token": "x"}, "may not have bos_token"),
        ({"a b": 1}, "has 'a b', which is no name"),
        ({"": 1}, "has '', which is no name"),
        ({"text": "x" * 5000}, "has 5012 bytes; it must have 4096 at most"),
        ([], "valid dictionary"),
        ("enable_thinking", "valid dictionary"),
    ],
)
def test_wrong_arguments_of_the_chat_template(kwargs, message):
    error = refused("chat", chat_template_kwargs=kwargs)
    assert error.param == "chat_template_kwargs" and message in str(error)


def test_no_name_of_what_renders_a_template_is_left_to_a_request():
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in parameters.keys() - {"kwargs"}:
        assert refused("chat", chat_template_kwargs={name: 1}).param == "chat_template_kwargs"


def test_usage_in_every_event():
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = parse("chat", stream=True, stream_options=options)
    assert request.include_usage and request.continuous_usage
    assert not parse("chat", stream=True, stream_options={"include_usage": True}).continuous_usage
    assert not parse("chat").continuous_usage
    error = refused("chat", stream=True, stream_options={"continuous_usage_stats": 1})
    assert error.param == "stream_options"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("load", {"lora_int_id": 7, "is_3d_lora_weight": False, "pinned": False}),
        ("load", {"lora_int_id": None, "base_model_name": None, "pinned": None}),
        ("load", {"lora_int_id": 7.0}),
        ("unload", {"lora_int_id": 7}),
        ("unload", {"lora_int_id": None}),
    ],
)
def test_fields_of_other_servers_adapters(kind, fields):
    assert parse(kind, **fields) == parse(kind)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("load", "pinned", True),
        ("load", "is_3d_lora_weight", True),
        ("load", "lora_int_id", "7"),
        ("load", "base_model_name", 5),
        ("unload", "lora_int_id", True),
    ],
)
def test_fields_of_adapters_that_would_change_something(kind, name, value):
    with pytest.raises(InvalidRequestError) as caught:
        parse(kind, **{name: value})
    assert caught.value.param == name
