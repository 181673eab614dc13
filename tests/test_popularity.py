"""The popularity patterns have the shapes that tests and benchmarks rely on."""

from collections import Counter

import pytest

from tests.popularity import PATTERNS, draw_adapters


@pytest.mark.parametrize("pattern", PATTERNS)
def test_draws_are_in_range_and_repeatable(pattern: str) -> None:
    drawn = draw_adapters(pattern, 500, 20, seed=3)
    assert len(drawn) == 500
    assert set(drawn) <= set(range(20))
    assert drawn == draw_adapters(pattern, 500, 20, seed=3)


def test_fixed_patterns() -> None:
    assert set(draw_adapters("identical", 30, 8)) == {0}
    assert draw_adapters("distinct", 8, 8) == list(range(8))


def test_skew_grows_with_the_pattern() -> None:
    shares = [
        Counter(draw_adapters(pattern, 4000, 50, seed=1))[0] / 4000
        for pattern in ("uniform", "zipf", "skewed")
    ]
    # Sums of 1 / k ** exponent for k to 50 are 50, 4.5 and 2.33.
    assert shares == pytest.approx([1 / 50, 1 / 4.5, 1 / 2.33], abs=0.03)
