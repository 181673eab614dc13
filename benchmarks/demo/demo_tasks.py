"""The five tasks of the shipped demo adapters, their examples and their checks.

Deterministic and light (standard library only): training, the evaluation over HTTP and the tests
draw the same held-out examples from here. It knows no model.
"""

from benchmarks.demo.tasks import dates, measures, orders, shop_sql, tickets
from benchmarks.demo.tasks.base import Example, Task, make_examples

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (dates, tickets, orders, shop_sql, measures)
}
DEFAULT_HELD_OUT_COUNT = 120
HELD_OUT_SEED = 1


def held_out_examples(task_name: str, count: int = DEFAULT_HELD_OUT_COUNT) -> list[Example]:
    """The examples that accuracy is measured on; a smaller count gives the first of them."""
    return make_examples(TASKS[task_name], count, HELD_OUT_SEED, held_out=True)


def training_examples(task_name: str, count: int, seed: int = 0) -> list[Example]:
    """Examples none of whose keys is held out."""
    return make_examples(TASKS[task_name], count, seed, held_out=False)


def messages(example: Example) -> list[dict[str, str]]:
    """The chat that asks for the example's answer."""
    return [{"role": "user", "content": example.prompt}]


def check(task_name: str, answer_text: str, example: Example) -> bool:
    """Say whether a model's text is a right answer."""
    return TASKS[task_name].check(answer_text, example)
