"""Whatever a file holds is one short line in a message."""

import json

import pytest

from slora_core.quoting import MAX_NAME, MAX_VALUE, plain, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("base_model.model.lm_head.weight", "base_model.model.lm_head.weight"),
        ("\ud800", r"\ud800"),
        ("a\nb\u2028", r"a\nb\u2028"),
        ("▁zeit 时间 it's", "▁zeit 时间 it's"),
        ("\x1b[2J\u202e", r"\x1b[2J\u202e"),
        ("x" * MAX_NAME, "x" * MAX_NAME),
        ("x" * 10**6, "x" * (MAX_NAME - 3) + "..."),
        ("\ud800" * 10**6, (r"\ud800" * MAX_NAME)[: MAX_NAME - 3] + "..."),
        ("", ""),
    ],
)
def test_names(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        ({"a": "\ud800\n"}, r'{"a": "\ud800\n"}'),
        ([0] * 10**5, json.dumps([0] * 100)[: MAX_VALUE - 3] + "..."),
        (float("nan"), "NaN"),
    ],
)
def test_values(value: object, shown: str) -> None:
    assert quoted(value) == shown


def test_a_deeply_nested_value_is_described() -> None:
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert quoted(value) == "a deeply nested value"
