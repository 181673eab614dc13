"""What a demo task is, and the split into training and held-out examples.

Knows no task. The split is a property of an example's key, not of a list or a seed: what was held
out once is held out for every seed and every count, so the two sides cannot meet.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

# One key in eight is held out.
HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Example:
    """One request and its answer.

    `key` is the content that may not be on both sides of the split: two prompts that say the same
    thing in other words share it.
    """

    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Task:
    """A kind of request whose answers a program can check.

    `check(answer_text, example)` says whether an answer is right, `max_answer_tokens` bounds what
    an evaluation lets the model write.
    """

    name: str
    draw: Callable[[random.Random], Example]
    check: Callable[[str, Example], bool]
    max_answer_tokens: int


def is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def make_examples(task: Task, count: int, seed: int, held_out: bool) -> list[Example]:
    """Draw `count` examples with different prompts (held out: different keys) from one side.

    The same arguments give the same list, on every machine and Python version.
    """
    rng = random.Random(f"{task.name}/{seed}/{'held_out' if held_out else 'train'}")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = task.draw(rng)
        if is_held_out(example.key) == held_out:
            examples.setdefault(example.key if held_out else example.prompt, example)
    return list(examples.values())


def equals_answer(answer_text: str, example: Example) -> bool:
    """The strictest check: the answer and nothing else."""
    return answer_text.strip() == example.answer
