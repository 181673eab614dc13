import asyncio
import json

import pytest

from slora_core.errors import InvalidRequestError, UnsupportedModelError
from slora_core.text.tokenizer import LONG_TEXT_CHARS, Tokenizer
from tests.tiny_tokenizer import byte_ids, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_round_trip(tokenizer):
    text = "hello world, 你好 👋🏽"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    ids = asyncio.run(tokenizer.encode_chat(messages))
    expected = "user: hi"
    assert ids[0] == 1 and ids.count(1) == 2
    assert tokenizer.decode(ids) == expected + "assistant: "


def test_long_text_is_encoded_on_a_thread(tokenizer):
    text = "ab " * LONG_TEXT_CHARS
    assert asyncio.run(tokenizer.encode_async(text)) == tokenizer.encode(text)


def test_template_that_raises_is_the_callers_error(tokenizer):
    with pytest.raises(InvalidRequestError, match="unknown role tool") as caught:
        asyncio.run(tokenizer.encode_chat([{"role": "tool", "content": "x"}]))
    assert caught.value.param == "messages"


def test_missing_template(tmp_path):
    tokenizer = Tokenizer(make_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        asyncio.run(tokenizer.encode_chat([{"role": "user", "content": "x"}]))


def test_special_tokens_are_left_out_of_text(tokenizer):
    assert tokenizer.decode([1, *byte_ids(b"hi"), 2]) == "hi"


def test_truncation_in_the_file_is_ignored(tmp_path):
    path = make_tokenizer(tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(spec))
    assert len(Tokenizer(tmp_path).encode("abcdef")) == 6


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no usable tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.slow
def test_demo_model_chat():
    from app.models.demo import ensure_demo_model

    tokenizer = Tokenizer(ensure_demo_model())
    ids = asyncio.run(tokenizer.encode_chat([{"role": "user", "content": "hi"}]))
    assert tokenizer.decode(ids).endswith("assistant\n")
