"""The comparison forgives near ties only, and sees every other difference."""

from pathlib import Path

import pytest

from tests import oracle as oracle_module
from tests.factories import make_adapter, make_model
from tests.oracle import GreedyOracle, assert_same_greedy, comparisons

PROMPT = [5, 9, 77]


@pytest.fixture(autouse=True)
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """These comparisons are not those that the test run reports."""
    monkeypatch.setattr(comparisons, "num_compared", 0)
    monkeypatch.setattr(comparisons, "num_forgiven", 0)


@pytest.fixture
def oracle(tmp_path: Path) -> GreedyOracle:
    model_dir = make_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model_dir, seed=1)
    return GreedyOracle(model_dir, {"adapter": adapter})


def _second_best(oracle: GreedyOracle, text: list[int], index: int) -> tuple[int, float]:
    """The runner-up at a position of a text, and how far it is behind."""
    values, tokens = oracle.logits([*PROMPT, *text[:index]])[-1].topk(2)
    return tokens[1].item(), (values[0] - values[1]).item()


def test_base_and_adapter_do_not_mix(oracle: GreedyOracle) -> None:
    base = oracle.generate(PROMPT, 12)
    changed = oracle.generate(PROMPT, 12, "adapter")
    assert base != changed
    oracle._texts.clear()
    assert oracle.generate(PROMPT, 12) == base
    assert oracle.generate(PROMPT, 12, "adapter") == changed


def test_logits_agree_with_generate(oracle: GreedyOracle) -> None:
    for adapter in (None, "adapter"):
        text = oracle.generate(PROMPT, 10, adapter)
        logits = oracle.logits([*PROMPT, *text], adapter)[len(PROMPT) - 1 : -1]
        assert logits.argmax(-1).tolist() == text


@pytest.mark.parametrize("index", [0, 5])
def test_a_clear_difference_fails(oracle: GreedyOracle, index: int) -> None:
    text = oracle.generate(PROMPT, 10)
    other, gap = _second_best(oracle, text, index)
    assert gap > 1e-3
    with pytest.raises(AssertionError, match=f"token {index} is {other} instead of"):
        assert_same_greedy(oracle, PROMPT, [*text[:index], other, *text[index + 1 :]], text)


def test_a_text_that_ends_early_fails(oracle: GreedyOracle) -> None:
    text = oracle.generate(PROMPT, 10)
    for actual in (text[:-1], [*text, 3], []):
        with pytest.raises(AssertionError, match="one text ends where the other goes on"):
            assert_same_greedy(oracle, PROMPT, actual, text)


def test_a_near_tie_is_forgiven_once_and_what_follows_is_checked(
    oracle: GreedyOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = oracle.generate(PROMPT, 8)
    other, _ = _second_best(oracle, text, 4)
    branch = [*text[:4], other]
    branch += oracle.generate([*PROMPT, *branch], 3)
    # Widen the clause to this gap instead of searching for a tie; of the text that is compared, as
    # logits of a shorter one may be rounded otherwise.
    best, second = oracle.logits([*PROMPT, *branch])[len(PROMPT) + 3, [text[4], other]]
    monkeypatch.setattr(oracle_module, "NEAR_TIE", (best - second).item() + 1e-6)
    assert_same_greedy(oracle, PROMPT, branch, text)
    assert (comparisons.num_compared, comparisons.num_forgiven) == (1, 1)

    worst = oracle.logits([*PROMPT, *branch[:6]])[-1].argmin().item()
    with pytest.raises(AssertionError, match="not greedy after the near tie at token 4"):
        assert_same_greedy(oracle, PROMPT, [*branch[:6], worst, branch[7]], text)
