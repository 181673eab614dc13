"""What folders say of text, and what it costs to read a thousand of them."""

import json
import shutil

import pytest

from slora_core.errors import InvalidAdapterError
from slora_core.text import base_text
from slora_core.text.base_text import BaseText
from slora_core.text.folder_text import read_adapter_text
from slora_core.text.template_sandbox import render_template
from slora_core.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def model(tmp_path):
    return make_tokenizer(tmp_path / "model")


@pytest.fixture
def folder(tmp_path, model):
    """As a trainer leaves it: with the tokenizer that it was given."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(model / name, folder)
    return folder


@pytest.fixture
def parsed(monkeypatch):
    """Bytes of every tokenizer.json that is parsed."""
    parsed = []

    def tokens_of(data):
        parsed.append(data)
        return original(data)

    original = base_text.tokens_of
    monkeypatch.setattr(base_text, "tokens_of", tokens_of)
    return parsed


def change(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_copies_of_the_base_models_files_are_only_compared(model, folder, parsed):
    base = BaseText(model, (2,))
    for _ in range(1000):
        text, warnings = read_adapter_text(folder, base)
        assert (text.eos_token_ids, text.chat_template, warnings) == ((), None, ())
    assert parsed == [(model / "tokenizer.json").read_bytes()]


def test_what_one_trainer_wrote_in_its_own_way_is_compared_once(model, folder, parsed):
    change(folder, "tokenizer.json", padding=None, truncation=None)
    base = BaseText(model, (2,))
    for _ in range(100):
        assert read_adapter_text(folder, base)[1] == ()
    assert len(parsed) == 2
    # Not for ever, though.
    for index in range(3 * base_text.MAX_COMPARED):
        change(folder, "tokenizer.json", padding=index)
        read_adapter_text(folder, base)
    assert len(base._others) <= base_text.MAX_COMPARED


def test_a_tokenizer_far_larger_than_the_base_models_is_not_compared(model, folder, parsed):
    size = 2 * (model / "tokenizer.json").stat().st_size + 2**20 + 1
    (folder / "tokenizer.json").write_bytes(b" " * size)
    base = BaseText(model, (2,))
    [warning] = read_adapter_text(folder, base)[1]
    assert f"its tokenizer.json has {size} bytes and was not compared" in warning
    assert len(parsed) == 1


@pytest.mark.parametrize("damage", ["", "[", "[" * 10**5, '{"model": [], "added_tokens": 5}'])
def test_a_damaged_tokenizer_says_nothing(model, folder, damage):
    (folder / "tokenizer.json").write_text(damage)
    text, warnings = read_adapter_text(folder, BaseText(model, (2,)))
    assert (text.eos_token_ids, warnings) == ((), ())


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": [{"name": []}, {"name": "tool_use", "template": "x"}, 5]},
        {"chat_template": None, "added_tokens_decoder": {"9" * 5000: {"content": "x"}, "x": 5}},
        {"added_tokens_decoder": {"1": {"content": ["<s>"]}}, "eos_token": {"content": ["<s>"]}},
        {"added_tokens_decoder": [], "eos_token": []},
    ],
)
def test_fields_that_are_nonsense_say_nothing(model, folder, fields):
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", **fields)
    text, warnings = read_adapter_text(folder, BaseText(model, (2,)))
    assert (text.eos_token_ids, text.chat_template, warnings) == ((), None, ())


@pytest.mark.parametrize("start", ["", "\n", "  ", "{# why #}\n  "])
def test_a_template_has_the_special_tokens_of_its_folder(model, folder, start):
    """The base model ends a text by </s>, this adapter by a token that the base has too."""
    source = (
        start + "{% for m in messages %}{{ m.content }}{{ eos_token }}{{ bos_token }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    change(folder, "tokenizer_config.json", eos_token="<pad>")
    text, warnings = read_adapter_text(folder, BaseText(model, (2,)))
    assert (text.eos_token_ids, warnings) == ((0,), ())
    rendered = Tokenizer(model).chat_template.render(MESSAGES, source=text.chat_template)
    own = Tokenizer(folder).chat_template.render(MESSAGES)
    assert rendered == own and own.endswith("hi<pad><s>")


def test_a_macro_has_them_too(model, folder):
    source = "{% macro end() %}{{ eos_token }}{% endmacro %}{{ end() }}"
    (folder / "chat_template.jinja").write_text(source)
    change(folder, "tokenizer_config.json", eos_token={"content": "<pad>"})
    template = read_adapter_text(folder, BaseText(model, (2,)))[0].chat_template
    assert render_template(template, {"eos_token": "</s>"}) == "<pad>"


@pytest.mark.parametrize("token", ["</s>", "<nowhere>"])
def test_a_special_token_that_is_the_base_models_or_no_token_changes_nothing(model, folder, token):
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    change(folder, "tokenizer_config.json", eos_token=token)
    text, _ = read_adapter_text(folder, BaseText(model, (2,)))
    assert text.chat_template == "{{ eos_token }}"


def test_a_copy_of_the_base_models_template_is_none_of_its_own(model, folder):
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    assert read_adapter_text(folder, BaseText(model, (2,)))[0].chat_template is None


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer_config.json", " " * (2**22 + 1), "has 4194305 bytes; at most 4194304 are"),
        ("generation_config.json", " " * (2**22 + 1), "has 4194305 bytes; at most 4194304 are"),
        ("chat_template.jinja", "x" * (2**22 + 1), "has 4194305 bytes; at most 4194304 are"),
        ("chat_template.jinja", f"{{% {'y' * 10**4} %}}", "unknown tag 'yyy"),
        ("tokenizer_config.json", {"chat_template": ["\ud800"] * 10**4 + [1]}, None),
        ("tokenizer_config.json", {"chat_template": {"\ud800": "x" * 10**5}}, "it must be a text"),
        ("generation_config.json", {"eos_token_id": list(range(200))}, "eos_token_id in gen"),
    ],
)
def test_files_that_no_server_should_bear_are_refused_in_a_line(model, folder, name, content, told):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(text)
    if told is None:
        assert read_adapter_text(folder, BaseText(model, (2,)))[0].chat_template is None
        return
    with pytest.raises(InvalidAdapterError) as error:
        read_adapter_text(folder, BaseText(model, (2,)))
    message = str(error.value)
    assert name in message and told in message and len(message) < 300 and message.isprintable()


def test_halves_of_surrogate_pairs_are_no_text(model, folder):
    base = BaseText(model, (2,))
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template="\ud800")
    with pytest.raises(InvalidAdapterError, match="half of a surrogate pair, which is no text"):
        read_adapter_text(folder, base)
    with pytest.raises(UnicodeEncodeError):
        render_template(r"{{ '\ud800' }}", {})


@pytest.mark.parametrize("token", ["\ud800\n", "x" * 10**6])
def test_odd_tokens_are_named_in_a_line(model, folder, token):
    (folder / "added_tokens.json").write_text(json.dumps({token: 3, "far": 10**4000, "under": -1}))
    [warning] = read_adapter_text(folder, BaseText(model, (2,)))[1]
    assert "3 is '" in warning and "far" not in warning and "under" not in warning
    assert warning.isprintable() and len(warning) < 200
