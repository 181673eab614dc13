"""Stop strings: what is cut, what is held back, and which tokens count."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_core.text.detokenizer import Detokenizer, StopMatcher
from slora_core.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import byte_ids, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


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
def test_stop_strings_do_not_count_before_min_tokens(tokenizer, text, stop, sizes, min_tokens):
    detokenizer = Detokenizer(tokenizer.decoder(), stop, min_tokens)
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


def test_tokens_after_a_stop_string_are_not_counted(tokenizer):
    detokenizer = Detokenizer(tokenizer.decoder(), ["STOP"])
    assert detokenizer.push(byte_ids(b"go ST")) == "go "
    assert detokenizer.push(byte_ids(b"OP and more")) == ""
    assert detokenizer.stopped
    assert detokenizer.num_tokens == len("go STOP")
    assert detokenizer.push(byte_ids(b"x")) == ""
    assert detokenizer.finish() == ""


def test_held_text_comes_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer.decoder(), ["STOP"])
    assert detokenizer.push(byte_ids(b"an ST")) == "an "
    assert detokenizer.finish() == "ST"
    assert not detokenizer.stopped


def test_stop_string_in_the_middle_of_a_character_run(tokenizer):
    detokenizer = Detokenizer(tokenizer.decoder(), ["。"])
    text = "".join(detokenizer.push([i]) for i in byte_ids("你好。世界".encode()))
    assert (text, detokenizer.stopped) == ("你好", True)
