"""A text is refused by its beginning only where the whole has too many tokens, and then at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from slora_core.text import bounded_encoding
from slora_core.text.bounded_encoding import BoundedEncoder
from tests.tiny_tokenizer import make_tokenizer


def byte_level(tmp_path_factory):
    return Tokenizer.from_file(str(make_tokenizer(tmp_path_factory.mktemp("bytes")) / TOKENIZER))


def swallowing_spaces(tmp_path_factory):
    """As Phi's: special tokens take the spaces beside them."""
    backend = byte_level(tmp_path_factory)
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, special=True)])
    return backend


def metaspace(tmp_path_factory):
    """As Llama 2's: no words, unknown bytes as tokens of their own."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abX<|end>", "▁a", "ab", "▁▁"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Fuse()
    return backend


def words_or_unknown(tmp_path_factory):
    """Whole words, spaces dropped, and one token for whatever is unknown."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "ab": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


TOKENIZER = "tokenizer.json"
KINDS = [byte_level, swallowing_spaces, metaspace, words_or_unknown]
PIECES = st.sampled_from(
    [
        "a",
        "ab",
        "X",
        " ",
        "   ",
        "\n",
        "hello",
        " world",
        "<|end|>",
        "</s>",
        "é",
        "中",
        "'s",
        "1",
        ".",
    ]
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def backend(request, tmp_path_factory):
    return request.param(tmp_path_factory)


@pytest.fixture(autouse=True)
def short_beginnings(monkeypatch):
    monkeypatch.setattr(bounded_encoding, "MIN_CHARS", 8)
    monkeypatch.setattr(bounded_encoding, "CHARS_PER_TOKEN", 1)


def is_right(backend, text, max_tokens):
    """Whether a text is encoded in full, or refused where it must be."""
    expected = backend.encode(text).ids
    found = BoundedEncoder(backend).encode(text, max_tokens)
    return found == expected if found is not None else len(expected) > max_tokens


@example(pieces=["   ", "<|end|>"], repeats=1, max_tokens=1)
@example(pieces=["a", "<|end|>"], repeats=1, max_tokens=2)
@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=60), repeats=st.integers(1, 9), max_tokens=st.integers(1, 40)
)
def test_nothing_is_refused_that_fits(backend, pieces, repeats, max_tokens):
    assert is_right(backend, "".join(pieces) * repeats, max_tokens)
    assert is_right(backend, "".join(piece * repeats for piece in pieces), max_tokens)


@pytest.mark.parametrize(
    "text", ["<|end|>" + " " * 999, " " * 999 + "</s>", "X" * 999, "é" * 999, "a " * 999, " " * 999]
)
@pytest.mark.parametrize("max_tokens", [1, 3, 100])
def test_texts_of_few_tokens_and_many_characters(backend, text, max_tokens):
    assert is_right(backend, text, max_tokens)


def encoded_chars(backend, text, max_tokens):
    """How many characters are given to the tokenizer, and what comes of it."""
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(backend, name)

        def encode_batch(self, texts, **options):
            seen.extend(map(len, texts))
            return backend.encode_batch(texts, **options)

    encoder = BoundedEncoder(Counting())
    seen.clear()
    return encoder.encode(text, max_tokens), sum(seen)


def test_a_beginning_is_enough(tmp_path_factory):
    backend = byte_level(tmp_path_factory)
    for text in ("hello " * 10_000, "a" * 60_000, " " * 60_000, "中" * 20_000):
        token_ids, num_chars = encoded_chars(backend, text, 1000)
        assert token_ids is None and num_chars <= 4000, text[:6]


def test_a_text_that_fits_is_encoded_once(tmp_path_factory):
    backend = byte_level(tmp_path_factory)
    text = "hello world " * 50
    token_ids, num_chars = encoded_chars(backend, text, 1000)
    assert token_ids == backend.encode(text).ids and num_chars == len(text)
