"""Keys of patterns match as in PEFT, by Python's `re`, in time that no key can stretch."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_core.adapters import name_patterns
from slora_core.adapters.name_patterns import PatternError, check_keys, first_keys

MODULES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{i}.{module}" for i in (0, 1, 10, 79) for module in MODULES]

# Pieces of expressions, joined at random: most are valid, and many match something.
PIECES = [
    "model", "layers", r"\.", ".", "0", "1", r"\d", r"\d+", "[01]", "[^.]+", "q_proj", "proj", "_",
    "mlp", "self_attn", "(q|o)", "|", ".*", ".*?", "(", ")", "(?:", "^", "$", r"\w*", "{1,3}", "?",
    r"\b", "+", "(?i:Q_PROJ)", "(?=q)", r"\1", "a{,3}", "[[:alpha:]]", r"\-", r"\_",
]  # fmt: skip


def _pefts_first_keys(keys: list[str], names: list[str]) -> dict[str, str]:
    def first(name: str) -> str | None:
        return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)

    return {name: key for name in names if (key := first(name)) is not None}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), max_size=4))
def test_what_is_taken_matches_as_in_python(keys: list[str]) -> None:
    taken = []
    for key in dict.fromkeys(keys):
        try:
            check_keys([key])
        except PatternError:
            continue
        taken.append(key)
    assert first_keys(taken, NAMES) == _pefts_first_keys(taken, NAMES)


@pytest.mark.parametrize(
    "key",
    [
        "([a-z_.0-9]+)+X",
        "(([a-z_.0-9]+)+)+X",
        "(.*)*(.*)*(.*)*X",
        "(a|a|[a-z_.0-9])*X",
        "([a-z_.0-9]{0,40}){0,20}X",
        "(.{0,20}){0,20}X",
    ],
)
def test_no_key_takes_long(key: str) -> None:
    names = [f"model.layers.{i}.{module}" for i in range(80) for module in MODULES]
    started = time.process_time()
    check_keys([key])
    assert first_keys([key], names) == {}
    # Where `re` backtracks, one name of these takes longer than the age of the world.
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("(q_proj", "must be a regular expression that RE2 can match.*missing"),
        ("q_proj(?=x)", "without lookaround and backreferences.*invalid perl operator"),
        (r"(q)_\1", r"invalid escape sequence: .*1"),
        ("[[:alpha:]]", "otherwise than PEFT"),
        ("a{,3}", "otherwise than PEFT"),
        (r"\pL", r"no regular expression of Python's re, by which PEFT reads it: bad escape"),
        ("\ud800", "names of modules are ASCII"),
        # Python's `re` takes a third of a second over each of these.
        ("(?i:[\0-\U0010ffff])" * 100, "names of modules are ASCII"),
        ("((((a{99}){99}){99}){99})", "bad repetition|invalid repetition"),
        ("q" * 1025, "has 1025 characters; at most 1024"),
    ],
)
def test_keys_that_are_refused(key: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason) as error:
        check_keys([key])
    assert error.value.key == key


def test_number_and_size_are_bounded() -> None:
    with pytest.raises(PatternError, match="1025 keys; at most 1024"):
        check_keys([str(i) for i in range(1025)])
    with pytest.raises(PatternError, match="131200 characters; at most 131072"):
        check_keys(["q" * 400 + str(i) for i in range(100, 1000)][:325] + ["q" * 225])
    with pytest.raises(PatternError, match="too large as regular expressions"):
        check_keys([f"([a-z_.0-9]{{0,40}}){{0,20}}X{i}" for i in range(30)])


LETTERS = st.sampled_from(["model", "layers", "q_proj", "down_proj", "mlp", "0", "1", "79", "x"])
DOTS = st.sampled_from([".", r"\.", "..", "_", ""])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "^"]),
            st.lists(st.tuples(LETTERS, DOTS), min_size=1, max_size=5),
            st.sampled_from(["q_proj", "self_attn.q_proj", "proj", "", "."]),
            st.sampled_from(["", "$"]),
        ).map(lambda key: key[0] + "".join(map("".join, key[1])) + key[2] + key[3]),
        max_size=4,
        unique=True,
    )
)
def test_keys_that_are_names_match_as_in_python(keys: list[str]) -> None:
    check_keys(keys)
    assert first_keys(keys, NAMES) == _pefts_first_keys(keys, NAMES)


KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
KINDS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
# Of the largest model.
ALL_NAMES = [f"model.layers.{i}.{kind}" for i in range(126) for kind in KINDS]


@pytest.mark.parametrize("form", ["{}", "^{}", "^{}$"])
@pytest.mark.parametrize("is_escaped", [False, True])
def test_a_key_for_every_module_of_the_largest_model_is_taken(form: str, is_escaped: bool) -> None:
    """EVA writes these."""
    keys = [form.format(re.escape(name) if is_escaped else name) for name in ALL_NAMES]
    check_keys(keys)
    assert first_keys(keys, ALL_NAMES) == dict(zip(ALL_NAMES, keys, strict=True))


class CountedExpression:
    num_matches = 0

    def __init__(self, expression) -> None:
        self._expression = expression

    def match(self, text: bytes):
        CountedExpression.num_matches += 1
        return self._expression.match(text)


@pytest.mark.parametrize("key", ["x{}.j", "x{}.proj", "x." * 60 + "{}.j", "model.layers.{}.z.proj"])
def test_names_that_are_of_no_module_are_compared_with_few(monkeypatch, key: str) -> None:
    compiled = name_patterns._compiled
    monkeypatch.setattr(name_patterns, "_compiled", lambda key: CountedExpression(compiled(key)))
    monkeypatch.setattr(CountedExpression, "num_matches", 0)
    keys = [key.format(i) for i in range(1024)]
    check_keys(keys)
    assert first_keys(keys, ALL_NAMES) == {}
    # Each with each of 882 modules would be 900,000.
    assert CountedExpression.num_matches < 250_000


def test_the_most_that_is_taken_is_matched_in_a_second() -> None:
    """Random keys of one length with one module's names, each a dot or a letter at each place."""
    letters = "model.layers.1z.self_attn.q_"
    rng = random.Random(0)
    keys = ["".join(rng.choice((".", c)) for c in letters) + "proj" for _ in range(1024)]
    check_keys(keys)
    started = time.process_time()
    first_keys(keys, [*ALL_NAMES, *(f"language_model.{name}" for name in ALL_NAMES)])
    assert time.process_time() - started < 2.0
