"""Task `order-json`: a sentence about an order -> a JSON record with seven fixed keys."""

import json
import random

from benchmarks.demo.tasks.base import Example, Task
from benchmarks.demo.tasks.words import CITIES, FIRST_NAMES, LAST_NAMES, comma_list

INSTRUCTIONS = (
    "Turn this order into JSON with the keys customer, city, item, quantity, price, currency and "
    "express: {text}",
    "{text} Give this order as a JSON record (customer, city, item, quantity, price, currency, "
    "express).",
    "Extract the order as JSON. {text}",
)
SENTENCES = (
    "{customer} from {city} ordered {count} {goods} for {price}{express}.",
    "{count} {goods} go to {customer} in {city}, {price} in all{express}.",
    "Order no. {number}: {customer}, {city}, {count} {goods}, {price}{express}.",
    "Please send {customer} ({city}) {count} {goods}; the price is {price}{express}.",
    "In {city}, {customer} bought {count} {goods} and paid {price}{express}.",
    "For {price}, {customer} of {city} takes {count} {goods}{express}.",
    "Hello, this is {customer} from {city}. I would like {count} {goods} at {price}{express}.",
    "Invoice {number} to {customer}, {city}: {count} {goods}, total {price}{express}.",
    "{customer} lives in {city} and wants {count} {goods} for {price}{express}.",
    "We sold {count} {goods} to {customer} for {price} ({city}{express}).",
)
EXPRESS = {
    True: (
        ", by express",
        ", as fast as possible",
        ", express delivery",
        ", urgent",
        ", to arrive tomorrow",
    ),
    False: ("", "", "", ", no hurry", ", standard delivery", ", by normal post"),
}
ITEMS = comma_list(
    "bookshelf/bookshelves, coffee mug/coffee mugs, desk lamp/desk lamps, oak table/oak tables, "
    "wool blanket/wool blankets, garden chair/garden chairs, bread knife/bread knives, wall "
    "clock/wall clocks, picture frame/picture frames, cast iron pan/cast iron pans, bicycle "
    "pump/bicycle pumps, rain jacket/rain jackets, travel bag/travel bags, tea box/tea boxes, "
    "wine glass/wine glasses, paint brush/paint brushes, camping stove/camping stoves, folding "
    "ladder/folding ladders, cushion/cushions, door mat/door mats, flower pot/flower pots, "
    "hammock/hammocks, notebook/notebooks, paper lantern/paper lanterns, radio/radios, salad "
    "bowl/salad bowls, steel bottle/steel bottles, tool belt/tool belts, toy train/toy trains, "
    "umbrella/umbrellas, violin case/violin cases, wooden spoon/wooden spoons, yoga mat/yoga "
    "mats, suitcase/suitcases, mirror/mirrors"
)
NUMBER_WORDS = comma_list(
    "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, "
    "fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty"
)
# Code, written before the number, written after it.
CURRENCIES = (
    ("EUR", "€", "euros"),
    ("USD", "$", "dollars"),
    ("GBP", "£", "pounds"),
    ("CHF", "CHF ", "francs"),
)


def draw_quantity(rng: random.Random) -> tuple[str, int]:
    if rng.random() < 0.4:
        quantity = rng.randint(1, len(NUMBER_WORDS))
        return NUMBER_WORDS[quantity - 1], quantity
    if rng.random() < 0.1:
        return "a dozen", 12
    quantity = rng.randint(1, 400)
    return str(quantity), quantity


def draw_price(rng: random.Random) -> tuple[str, int | float, str]:
    """Return the price as written, as a JSON number, and its currency."""
    price: int | float = rng.randint(3, 4000)
    written = rng.choice((f"{price:,}", f"{price}"))
    if rng.random() < 0.4:
        price = rng.randint(3, 999) + rng.choice((0.25, 0.5, 0.75, 0.95, 0.99))
        written = f"{price:.2f}"
    code, before, after = rng.choice(CURRENCIES)
    form = rng.choice((f"{before}{written}", f"{written} {after}", f"{written} {code}"))
    return form, price, code


def draw(rng: random.Random) -> Example:
    customer = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    city = rng.choice(CITIES)
    singular, plural = rng.choice(ITEMS).split("/")
    count, quantity = draw_quantity(rng)
    written_price, price, currency = draw_price(rng)
    express = rng.random() < 0.5
    text = rng.choice(SENTENCES).format(
        customer=customer,
        city=city,
        count=count,
        goods=singular if quantity == 1 else plural,
        price=written_price,
        express=rng.choice(EXPRESS[express]),
        number=rng.randint(1000, 9999),
    )
    record = {
        "customer": customer,
        "city": city,
        "item": singular,
        "quantity": quantity,
        "price": price,
        "currency": currency,
        "express": express,
    }
    answer = json.dumps(record)
    return Example(rng.choice(INSTRUCTIONS).format(text=text), answer, key=answer)


def check(answer_text: str, example: Example) -> bool:
    """Same keys and values, types included; order and spacing are free."""
    try:
        record = json.loads(answer_text)
    except ValueError:
        return False
    # Through text, because `True == 1` and 2.0 == 2 in Python; a number's form is free here.
    return _canonical(record) == _canonical(json.loads(example.answer))


def _canonical(record: object) -> str:
    if isinstance(record, dict):
        record = {
            key: float(value) if type(value) in (int, float) else value
            for key, value in record.items()
        }
    return json.dumps(record, sort_keys=True)


TASK = Task("order-json", draw, check, max_answer_tokens=96)
