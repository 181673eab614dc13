"""The demo tasks: deterministic, split without overlap, and checked by programs that can say no."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks.demo.demo_tasks import (
    DEFAULT_HELD_OUT_COUNT,
    TASKS,
    check,
    held_out_examples,
    messages,
    training_examples,
)
from benchmarks.demo.tasks import dates, measures, orders, shop_sql, tickets
from benchmarks.demo.tasks.base import is_held_out

NAMES = list(TASKS)


def test_five_tasks_with_at_least_500_held_out_examples():
    assert NAMES == ["date-iso", "ticket-route", "order-json", "shop-sql", "measure-kv"]
    assert sum(len(held_out_examples(name)) for name in NAMES) >= 500
    assert DEFAULT_HELD_OUT_COUNT >= 110


@pytest.mark.parametrize("name", NAMES)
def test_training_and_held_out_share_nothing(name):
    train = training_examples(name, 8000, seed=0) + training_examples(name, 2000, seed=7)
    held_out = held_out_examples(name, 200)
    assert not {e.key for e in train} & {e.key for e in held_out}
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert all(is_held_out(e.key) for e in held_out)
    assert not any(is_held_out(e.key) for e in train)
    assert len({e.key for e in held_out}) == 200


@pytest.mark.parametrize("name", NAMES)
def test_examples_vary(name):
    examples = training_examples(name, 2000)
    assert len({e.prompt for e in examples}) == 2000
    assert len({e.answer for e in examples}) >= (8 if name == "ticket-route" else 1000)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_examples_and_a_smaller_count_is_a_prefix(name):
    assert training_examples(name, 50, seed=3) == training_examples(name, 50, seed=3)
    assert training_examples(name, 50, seed=3) != training_examples(name, 50, seed=4)
    assert held_out_examples(name, 20) == held_out_examples(name, 120)[:20]


def test_examples_do_not_depend_on_the_hash_seed_of_python():
    code = (
        "from benchmarks.demo.demo_tasks import TASKS, held_out_examples;"
        "print([held_out_examples(name, 3) for name in TASKS])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_right_and_another_ones_is_wrong(name):
    examples = held_out_examples(name, 60)
    for example in examples:
        assert check(name, example.answer, example)
        assert check(name, f" {example.answer}\n", example)
        assert not check(name, "", example)
        assert not check(name, f"The answer is {example.answer}", example)
        assert not check(name, example.prompt, example)
    wrong = [
        check(name, other.answer, example)
        for example, other in zip(examples, examples[1:], strict=False)
        if other.answer != example.answer
    ]
    # Two SQL queries may return the same on both shops, say two empty results.
    assert sum(wrong) <= len(wrong) * (0.1 if name == "shop-sql" else 0)


def test_messages_are_one_question_of_the_user():
    (example,) = held_out_examples("date-iso", 1)
    assert messages(example) == [{"role": "user", "content": example.prompt}]


def test_every_written_form_of_a_date():
    forms = dates.written_forms(dates.datetime.date(2024, 3, 22))
    assert len(set(forms)) == 15
    for form in ("March 22nd, 2024", "the twenty-second of March, 2024", "22.3.24", "03/22/24"):
        assert form in forms
    assert dates.written_forms(dates.datetime.date(2003, 5, 30))[4].startswith("the thirtieth")
    ordinals = [dates.ordinal(day) for day in (1, 2, 3, 4, 11, 12, 13, 21, 31)]
    assert ordinals == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "31st"]


def test_measures_are_in_the_answer_exactly():
    factors = {"m": 1000, "metres": 1000, "cm": 10, "centimetres": 10, "mm": 1, "millimetres": 1}
    for example in held_out_examples("measure-kv", 100):
        assert re.fullmatch(r"[a-z]+_(mm|g|ml)=\d+( [a-z]+_(mm|g|ml)=\d+)*", example.answer)
        height = re.search(r"height_mm=(\d+)", example.answer)
        said = re.search(r"([\d.]+) ?([a-z]+) (?:high|tall)", example.prompt)
        if height and said:
            number = round(float(said[1]) * factors[said[2]], 6)
            assert number == int(height[1])
    keys = [key for key, _, _ in measures.MEASURES]
    assert len(set(keys)) == 5


def test_order_check_compares_values_and_types():
    (example,) = held_out_examples("order-json", 1)
    record = json.loads(example.answer)
    assert " ".join(record) == "customer city item quantity price currency express"
    reordered = dict(reversed(record.items()))
    assert orders.check(json.dumps(reordered, indent=2), example)
    assert not orders.check(json.dumps({**record, "express": int(record["express"])}), example)
    assert not orders.check(json.dumps({**record, "quantity": str(record["quantity"])}), example)
    assert not orders.check(json.dumps({**record, "note": ""}), example)
    assert not orders.check(json.dumps([record]), example)


def test_every_ticket_names_a_queue_once():
    queues = {example.answer for example in held_out_examples("ticket-route", 120)}
    assert queues == set(tickets.PROBLEMS)
    texts = [text for problems in tickets.PROBLEMS.values() for text in problems]
    assert len(texts) == len(set(texts))


def test_sql_check_accepts_any_query_with_the_same_rows():
    example = next(
        e for e in held_out_examples("shop-sql") if e.answer.startswith("SELECT COUNT(*) FROM orde")
    )
    assert shop_sql.check(f"```sql\n{example.answer};\n```", example)
    assert shop_sql.check(example.answer.replace("COUNT(*)", "COUNT(orders.id)"), example)
    assert shop_sql.check(example.answer.replace("SELECT", "select"), example)
    assert not shop_sql.check(example.answer.replace("COUNT(*)", "COUNT(*) + 1"), example)


def test_sql_check_minds_the_order_where_the_question_sorts():
    example = next(e for e in held_out_examples("shop-sql") if "DESC LIMIT" in e.answer)
    assert not shop_sql.check(example.answer.replace(" DESC", ""), example)
    as_list = f"SELECT * FROM ({example.answer}) ORDER BY name"
    assert not shop_sql.check(as_list, example)


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE orders",
        "INSERT INTO orders VALUES (1, 1, 1, 1, '2020-01-01')",
        "ATTACH 'other.db' AS other",
        "PRAGMA table_info(orders)",
        "SELECT 1; SELECT 2",
        "SELECT COUNT(*) FROM orders a, orders b, orders c",
        "not sql",
        "SELECT '\x00'",
    ],
)
def test_sql_that_does_more_than_read_or_never_ends_is_wrong(query):
    assert shop_sql.run_query(1, query) is None
    assert shop_sql.run_query(1, "SELECT COUNT(*) FROM orders") == [(5000,)]


def test_sql_answers_are_mostly_not_empty():
    examples = held_out_examples("shop-sql", 200)
    rows = [shop_sql.run_query(1, example.answer) for example in examples]
    assert all(result is not None for result in rows)
    assert sum(1 for result in rows if result) >= 0.9 * len(rows)
