"""How a step's prompt tokens are divided between the oldest prompt and those behind it.

Arithmetic over numbers of tokens; it knows no requests. Called by the prefill planner.

With a budget of B tokens and a fraction f, the oldest prompt gets at least B - floor(f x B) of each
step until it is computed. So one of n tokens behind which others arrive for ever takes at most
ceil(n / (B - floor(f x B))) steps, where alone it takes ceil(n / B): 1 / (1 - f) times as many.
Prompts become the oldest in the order in which they started, so one that is overtaken by whatever
is shorter still takes at most the sum of such steps of those that started before it and its own.
"""

from collections.abc import Iterable
from typing import NamedTuple, Self


def oldest_share(budget: int, fraction: float) -> int:
    """Tokens of a step that are the oldest prompt's, at least one, whoever else wants them."""
    return budget - int(fraction * budget)


class RoomBeside(NamedTuple):
    """What a step has for the prompts behind the oldest one; what they leave is the oldest's."""

    num_tokens: int
    # Prompts of fewer tokens may take from it; None: all.
    below: int | None

    @classmethod
    def of(cls, num_oldest: int, budget: int, fraction: float) -> Self:
        """Beside an oldest prompt with so many tokens to compute.

        Where it does not end in this step it makes room for shorter ones alone: what a longer one
        took would delay the oldest, and the longer one would end no sooner.
        """
        share = oldest_share(budget, fraction)
        if num_oldest <= share:
            return cls(budget - num_oldest, None)
        return cls(budget - share, num_oldest)

    def admits(self, length: int) -> bool:
        return self.below is None or length < self.below

    def is_filled_by(self, lengths: Iterable[int]) -> bool:
        """Whether one prompt more than these could use none of it, nor use it better.

        Those that take more than a whole room do not count: what is shorter goes before them.
        """
        fitting = (length for length in lengths if length <= self.num_tokens)
        return sum(length for length in fitting if self.admits(length)) >= self.num_tokens


def whole_pages(start: int, num_tokens: int, page_tokens: int) -> int:
    """Of `num_tokens` from `start` on, as many as end with a page; 0 where no page ends.

    A chunk that ends in the middle of a page would keep that page from others with the same prefix,
    and the rest of its prompt from their pages. Nor are there chunks of a few tokens then.
    """
    return max(0, (start + num_tokens) // page_tokens * page_tokens - start)
