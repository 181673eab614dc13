import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_core.text.detokenizer import REPLACEMENT, Detokenizer, IncrementalDecoder, StopMatcher
from slora_core.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import VOCAB_SIZE, byte_ids, make_tokenizer

TEXTS = [
    "hello world",
    "你好，世界。人工智能正在改变世界。" * 5,
    "👩‍👩‍👧‍👦 family 👋🏽 wave 🇫🇷 flag " * 4,
    "naïve café Ω≈ç√∫ ﷽ x̂",
]


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))).decode


def pieces_of(decode, ids, sizes):
    decoder = IncrementalDecoder(decode)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(decoder.push(ids[start : start + size]))
        start += size
    pieces.append(decoder.push(ids[start:]))
    return pieces, decoder.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_one_byte_at_a_time_gives_whole_characters(decode, text):
    ids = byte_ids(text.encode())
    pieces, rest = pieces_of(decode, ids, [1] * len(ids))
    assert "".join(pieces) == text
    assert rest == ""
    assert all(REPLACEMENT not in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_chunking_of_any_bytes_equals_decode_at_once(decode, data):
    # Bytes near characters of 2 to 4 bytes are drawn often, so that broken ones are frequent.
    byte = st.one_of(st.integers(0, 255), st.sampled_from(list("é你👋a".encode())))
    ids = data.draw(
        st.lists(st.one_of(byte.map(lambda b: b + 3), st.integers(0, VOCAB_SIZE - 1)), max_size=150)
    )
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=150))
    pieces, rest = pieces_of(decode, ids, sizes)
    assert "".join(pieces) + rest == decode(ids)


def test_text_comes_without_delay(decode):
    decoder = IncrementalDecoder(decode)
    for byte in b"plain text":
        assert decoder.push(byte_ids(bytes([byte]))) == chr(byte)


def test_unfinished_character_at_the_end_is_flushed(decode):
    decoder = IncrementalDecoder(decode)
    assert decoder.push(byte_ids("a👋".encode()[:3])) == "a"
    assert decoder.finish() == REPLACEMENT


@pytest.mark.parametrize("unit", [b"text ", "你".encode(), b"\x80", b"\xf0"])
def test_cost_is_linear(decode, unit):
    num_decoded = 0

    def counting_decode(ids):
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode(ids)

    ids = byte_ids(unit * (2000 // len(unit)))
    decoder = IncrementalDecoder(counting_decode)
    for token_id in ids:
        decoder.push([token_id])
    assert num_decoded < 64 * len(ids)


def matched(text, stop, sizes):
    matcher = StopMatcher(stop)
    out, start = "", 0
    for size in [*sizes, len(text)]:
        if not matcher.matched:
            out += matcher.push(text[start : start + size])
        start += size
    return (out, True) if matcher.matched else (out + matcher.finish(), False)


def test_stop_string_is_cut_and_the_text_before_kept():
    assert matched("one END two", ["END"], []) == ("one ", True)
    assert matched("one EN two", ["END"], []) == ("one EN two", False)
    assert matched("no stop EN", ["END"], [3, 3, 3]) == ("no stop EN", False)


def test_only_what_may_become_a_stop_string_is_held():
    matcher = StopMatcher(["\n\nUser:", "##"])
    assert matcher.push("hi\n") == "hi"
    assert matcher.push("\nUs") == ""
    assert matcher.push("a #") == "\n\nUsa "
    assert matcher.push("x") == "#x"
    assert matcher.push("end##more") == "end"
    assert matcher.matched


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=40),
)
def test_stop_does_not_depend_on_the_chunks(text, stop, sizes):
    # The stop string that is complete first: the shortest start of the text that ends with one.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if ends:
        longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
        expected = (text[: ends[0] - longest], True)
    else:
        expected = (text, False)
    assert matched(text, stop, sizes) == expected


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), max_size=40),
    min_tokens=st.integers(0, 41),
)
def test_stop_strings_do_not_count_before_min_tokens(text, stop, sizes, min_tokens):
    def last_bytes(ids):
        return bytes(byte_ids(bytes(range(256))).index(i) for i in ids).decode()

    detokenizer = Detokenizer(last_bytes, stop, min_tokens)
    given, start = "", 0
    for size in [*sizes, len(text)]:
        given += detokenizer.push(byte_ids(text[start : start + size].encode()))
        start += size
    given += detokenizer.finish()
    ends = range(min_tokens + 1, len(text) + 1)
    end = next((end for end in ends if text[:end].endswith(tuple(stop))), None)
    assert detokenizer.stopped == (end is not None)
    if end is None:
        assert (given, detokenizer.num_tokens) == (text, len(text))
    else:
        longest = max(len(s) for s in stop if text[:end].endswith(s))
        assert (given, detokenizer.num_tokens) == (text[: end - longest], end)


def test_tokens_after_a_stop_string_are_not_counted(decode):
    detokenizer = Detokenizer(decode, ["STOP"])
    assert detokenizer.push(byte_ids(b"go ST")) == "go "
    assert detokenizer.push(byte_ids(b"OP and more")) == ""
    assert detokenizer.stopped
    assert detokenizer.num_tokens == len("go STOP")
    assert detokenizer.push(byte_ids(b"x")) == ""
    assert detokenizer.finish() == ""


def test_held_text_comes_at_the_end(decode):
    detokenizer = Detokenizer(decode, ["STOP"])
    assert detokenizer.push(byte_ids(b"an ST")) == "an "
    assert detokenizer.finish() == "ST"
    assert not detokenizer.stopped


def test_stop_string_in_the_middle_of_a_character_run(decode):
    detokenizer = Detokenizer(decode, ["。"])
    text = "".join(detokenizer.push([i]) for i in byte_ids("你好。世界".encode()))
    assert (text, detokenizer.stopped) == ("你好", True)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_demo_model_streams_every_text(text):
    from app.models.demo import ensure_demo_model

    tokenizer = Tokenizer(ensure_demo_model())
    ids = tokenizer.encode(text * 20)
    pieces, rest = pieces_of(tokenizer.decode, ids, [1] * len(ids))
    assert "".join(pieces) + rest == text * 20
