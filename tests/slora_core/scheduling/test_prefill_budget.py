"""How a step's prompt tokens are divided, as numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_core.scheduling.prefill_budget import RoomBeside, oldest_share, whole_pages

budgets = st.integers(1, 10_000)
fractions = st.floats(0.0, 1.0, exclude_max=True)


@pytest.mark.parametrize(
    "num_oldest,budget,fraction,room",
    [
        # A long prompt leaves half of the step, to shorter ones.
        (7261, 512, 0.5, (256, 7261)),
        (7261, 452, 0.25, (113, 7261)),
        # All that it does not need, to any.
        (12, 512, 0.5, (500, None)),
        (256, 512, 0.5, (256, None)),
        (257, 512, 0.5, (256, 257)),
        # First come, first served.
        (7261, 512, 0.0, (0, 7261)),
        (12, 512, 0.0, (500, None)),
        # A step of one token is the oldest's.
        (7261, 1, 0.99, (0, 7261)),
    ],
)
def test_room_beside_the_oldest(num_oldest: int, budget: int, fraction: float, room) -> None:
    assert RoomBeside.of(num_oldest, budget, fraction) == room


@given(budgets, budgets, fractions)
def test_the_oldest_gets_its_share_and_nothing_is_left(
    num_oldest: int, budget: int, fraction: float
) -> None:
    share = oldest_share(budget, fraction)
    room = RoomBeside.of(num_oldest, budget, fraction)
    assert max(1, (1 - fraction) * budget - 1e-6) <= share <= budget
    assert budget - room.num_tokens == min(num_oldest, share)
    assert room.admits(num_oldest) == (num_oldest <= share), "the oldest ends in this step"
    assert room.admits(num_oldest - 1)


@given(st.integers(1, 10_000), budgets, fractions, st.integers(0, 64))
def test_a_prompt_that_others_join_for_ever_ends(
    num_tokens: int, budget: int, fraction: float, num_decodes: int
) -> None:
    """Of steps in which decodes and shorter prompts take all they may."""
    budget += num_decodes
    left, num_steps = num_tokens, 0
    while left:
        for_prompts = budget - num_decodes
        left -= min(left, for_prompts - RoomBeside.of(left, for_prompts, fraction).num_tokens)
        num_steps += 1
    share = oldest_share(budget - num_decodes, fraction)
    assert num_steps == -(-num_tokens // share)
    # What it takes alone, 1 / (1 - fraction) times, and a step that is not full.
    assert num_steps <= num_tokens / (budget - num_decodes) / (1 - fraction) + 1


def test_what_fills_a_room() -> None:
    room = RoomBeside(100, 5000)
    assert not room.is_filled_by([])
    assert not room.is_filled_by([60, 39])
    assert room.is_filled_by([60, 40]) and room.is_filled_by([60, 99])
    # Shorter ones may stand behind prompts that take more than the room.
    assert not room.is_filled_by([4000, 101, 99])
    assert room.is_filled_by([4000, 100])
    # Nor does a prompt count that is not shorter than the oldest.
    assert not RoomBeside(100, 80).is_filled_by([80, 99])
    assert RoomBeside(100, None).is_filled_by([80, 99])
    assert RoomBeside(0, 5000).is_filled_by([])


@pytest.mark.parametrize(
    "start,num_tokens,whole",
    [(0, 40, 32), (0, 48, 48), (0, 15, 0), (16, 16, 16), (10, 6, 6), (10, 5, 0), (10, 30, 22)],
)
def test_whole_pages(start: int, num_tokens: int, whole: int) -> None:
    assert whole_pages(start, num_tokens, 16) == whole
