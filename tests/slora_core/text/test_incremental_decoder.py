"""Pieces of text as tokens come: whole characters, after the prompt, at a cost that is linear."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from slora_core.text.incremental_decoder import REPLACEMENT, IncrementalDecoder
from slora_core.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import VOCAB_SIZE, byte_ids, make_tokenizer

TEXTS = [
    "hello world",
    "你好，世界。人工智能正在改变世界。" * 5,
    "👩‍👩‍👧‍👦 family 👋🏽 wave 🇫🇷 flag " * 4,
    "naïve café Ω≈ç√∫ ﷽ x̂",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


WORDS = ["▁Once", "▁upon", "▁a", "▁time", "▁", "s", "▁▁"]
LLAMA_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
LLAMA_IDS = {token: index for index, token in enumerate(LLAMA_TOKENS)}


@pytest.fixture(scope="module")
def llama():
    """As the tokenizers of Llama 2 and Mistral decode."""
    backend = Backend(models.BPE(vocab=LLAMA_IDS, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1, right=0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def llama_ids(*tokens):
    """Words as they are, all else as bytes."""
    ids = []
    for token in tokens:
        if token in LLAMA_IDS:
            ids.append(LLAMA_IDS[token])
        else:
            ids += [LLAMA_IDS[f"<0x{byte:02X}>"] for byte in token.encode()]
    return ids


def llama_decoder(backend, prompt_ids=()):
    return IncrementalDecoder(backend, prompt_ids, {1, 2})


def pieces_of(decoder, ids, sizes):
    pieces, start = [], 0
    for size in sizes:
        pieces.append(decoder.push(ids[start : start + size]))
        start += size
    pieces.append(decoder.push(ids[start:]))
    return pieces, decoder.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_one_byte_at_a_time_gives_whole_characters(tokenizer, text):
    ids = byte_ids(text.encode())
    pieces, rest = pieces_of(tokenizer.decoder(), ids, [1] * len(ids))
    assert "".join(pieces) == text
    assert rest == ""
    assert all(REPLACEMENT not in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_chunking_of_any_bytes_equals_decode_at_once(tokenizer, data):
    # Bytes near characters of 2 to 4 bytes are drawn often, so that broken ones are frequent.
    byte = st.one_of(st.integers(0, 255), st.sampled_from(list("é你👋a".encode())))
    ids = data.draw(
        st.lists(st.one_of(byte.map(lambda b: b + 3), st.integers(0, VOCAB_SIZE - 1)), max_size=150)
    )
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=150))
    pieces, rest = pieces_of(tokenizer.decoder(), ids, sizes)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.sampled_from([*WORDS, "é", "ก", "👋"]), max_size=30),
    output=st.lists(st.sampled_from([*WORDS, "é", "ก", "👋", "</s>"]), max_size=30),
    size=st.integers(1, 5),
)
def test_prompt_and_text_concatenate(llama, prompt, output, size):
    prompt_ids, output_ids = llama_ids(*prompt), llama_ids(*output)
    decoder = llama_decoder(llama, prompt_ids)
    sizes = [size] * (len(output_ids) // size)
    pieces, rest = pieces_of(decoder, output_ids, sizes)
    whole = llama.decode(prompt_ids + output_ids)
    if prompt == [""] or not llama.decode(prompt_ids):
        # A prompt without text: the text is one of its own.
        assert "".join(pieces) + rest in (llama.decode(output_ids), whole)
    else:
        assert llama.decode(prompt_ids) + "".join(pieces) + rest == whole


def test_a_space_after_the_prompt_is_kept(llama):
    decoder = llama_decoder(llama, llama_ids("<s>", "▁Once", "▁upon", "▁a"))
    assert decoder.push(llama_ids("▁time")) == " time"
    assert decoder.push(llama_ids("▁a", "s")) == " as"


@pytest.mark.parametrize("prompt", [(), ("<s>",), ("▁Once", "</s>")])
def test_a_text_of_its_own_begins_without_the_space(llama, prompt):
    """After a special token too, as the turns of a chat begin."""
    decoder = llama_decoder(llama, llama_ids(*prompt))
    assert decoder.push(llama_ids("▁time", "▁a")) == "time a"


@pytest.mark.parametrize("num_characters", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("character", ["é", "ก", "👋"])
def test_a_prompt_that_ends_with_characters_of_bytes(llama, character, num_characters):
    """However many there are: where the context begins within one, it is cut to whole ones."""
    decoder = llama_decoder(llama, llama_ids("▁a", *[character] * num_characters))
    ids = llama_ids("▁time", character)
    assert "".join(decoder.push([i]) for i in ids) == f" time{character}"


@pytest.mark.parametrize("start", [(), ("▁a",), ("▁a", "👋"), ("▁a", *"กกกกกก")])
@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character(llama, start, num_bytes):
    emoji = llama_ids("👋")
    decoder = llama_decoder(llama, llama_ids(*start) + emoji[:num_bytes])
    assert "".join(decoder.push([i]) for i in emoji[num_bytes:] + llama_ids("▁time")) == "👋 time"
    assert decoder.finish() == ""


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_a_character_that_stays_unfinished_is_the_prompts(llama, tokenizer, num_bytes):
    emoji = llama_ids("👋")[:num_bytes]
    decoder = llama_decoder(llama, llama_ids("▁a") + emoji)
    assert decoder.push(llama_ids("▁time")) == " time"
    assert llama_decoder(llama, llama_ids("▁a") + emoji).finish() == ""
    decoder = tokenizer.decoder(byte_ids(b"a" + "👋".encode()[:num_bytes]))
    assert decoder.push(byte_ids("b你".encode())) == "b你"


def test_invalid_bytes_after_a_character_of_bytes_lose_nothing_else(llama):
    decoder = llama_decoder(llama, llama_ids("▁a"))
    ids = [*llama_ids("é"), *llama_ids("👋")[:3], *llama_ids("▁time", "s")]
    pieces = [decoder.push([token_id]) for token_id in ids] + [decoder.finish()]
    assert pieces[1] == "é" and "".join(pieces).endswith(" times")
    assert set("".join(pieces)) == set("é times" + REPLACEMENT)


def test_text_comes_without_delay(tokenizer):
    decoder = tokenizer.decoder()
    for byte in b"plain text":
        assert decoder.push(byte_ids(bytes([byte]))) == chr(byte)


def test_what_is_whole_does_not_wait_for_what_is_not(tokenizer):
    assert tokenizer.decoder().push(byte_ids("ab👋".encode()[:-1])) == "ab"


def test_unfinished_character_at_the_end_is_flushed(tokenizer, llama):
    decoder = tokenizer.decoder()
    assert decoder.push(byte_ids("a👋".encode()[:3])) == "a"
    assert decoder.finish() == REPLACEMENT
    decoder = llama_decoder(llama, llama_ids("▁Once"))
    assert decoder.push(llama_ids("▁a") + llama_ids("👋")[:3]) == " a"
    assert decoder.finish() == REPLACEMENT * 3


class CountingBackend:
    """Counts the tokens that are decoded apart from the stream."""

    def __init__(self, backend):
        self.backend = backend
        self.num_decoded = 0

    def decode(self, token_ids, skip_special_tokens):
        self.num_decoded += len(token_ids)
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)


class CountingStream:
    """`DecodeStream`, which takes no other class for the tokenizer."""

    def __init__(self, stream):
        self.stream = stream

    def step(self, counting, token_id):
        return self.stream.step(counting.backend, token_id)


@pytest.mark.parametrize("unit", [b"text ", "你".encode(), b"\x80", b"\xf0"])
def test_cost_is_linear(tokenizer, unit, monkeypatch):
    monkeypatch.setattr(
        IncrementalDecoder,
        "_stream_after",
        lambda self, context, make=IncrementalDecoder._stream_after: CountingStream(
            make(self, context)
        ),
    )
    backend = CountingBackend(tokenizer._backend)
    ids = byte_ids(unit * (2000 // len(unit)))
    decoder = IncrementalDecoder(backend)
    longest = 0
    for token_id in ids:
        decoder.push([token_id])
        longest = max(longest, len(decoder._held))
    # What is held is decoded once more at each step.
    assert backend.num_decoded < 16 * len(ids) and longest <= 64


def test_two_thousand_words_of_llama_are_linear_too(llama):
    decoder = llama_decoder(llama, llama_ids("▁Once"))
    for index in range(2000):
        assert decoder.push(llama_ids("▁time")) == " time"
        assert len(decoder._held) == 0 and len(decoder._context) == 1, index


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_demo_model_streams_every_text(text):
    from app.models.demo import ensure_demo_model

    tokenizer = Tokenizer(ensure_demo_model())
    ids = tokenizer.encode(text * 20)
    pieces, rest = pieces_of(tokenizer.decoder(), ids, [1] * len(ids))
    assert "".join(pieces) + rest == text * 20
