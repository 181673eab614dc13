"""Task `measure-kv`: measures in free text and mixed units -> one line in mm, g and ml.

The line holds what the text tells, in a fixed order: `length_mm=1200 mass_g=25000`.
"""

import random
from decimal import Decimal

from benchmarks.demo.tasks.base import Example, Task, equals_answer
from benchmarks.demo.tasks.words import comma_list

INSTRUCTIONS = (
    "Write these measures as key=value in mm, g and ml: {text}",
    "Normalize the measures in this text: {text}",
    "{text} List the measures as key=value pairs in millimetres, grams and millilitres.",
    "Extract the dimensions in base units. {text}",
)
SENTENCES = (
    "A {thing}, {measures}.",
    "The {thing} is {measures}.",
    "New in stock: {thing} ({measures}).",
    "We need a {thing}: {measures}.",
    "{thing}, {measures}",
    "Offer {number}: one {thing}, {measures}, delivered within {days} days.",
    "Customer {number} returned a {thing}: {measures}.",
)
# Unit, how many of the answer's unit it is, smallest and largest value in it.
LENGTH_UNITS = (
    ("m", 1000, 1, 9),
    ("metres", 1000, 1, 9),
    ("cm", 10, 3, 400),
    ("centimetres", 10, 3, 400),
    ("mm", 1, 5, 4000),
    ("millimetres", 1, 5, 4000),
)
MASS_UNITS = (
    ("kg", 1000, 1, 80),
    ("kilograms", 1000, 1, 80),
    ("kilos", 1000, 1, 80),
    ("g", 1, 20, 5000),
    ("grams", 1, 20, 5000),
)
VOLUME_UNITS = (
    ("l", 1000, 1, 300),
    ("litres", 1000, 1, 300),
    ("cl", 10, 2, 95),
    ("ml", 1, 5, 2000),
    ("millilitres", 1, 5, 2000),
)
# Key of the answer, ways to say it, units.
MEASURES = (
    ("length_mm", ("{} long", "length {}", "with a length of {}"), LENGTH_UNITS),
    ("width_mm", ("{} wide", "width {}", "{} across"), LENGTH_UNITS),
    ("height_mm", ("{} high", "{} tall", "height {}"), LENGTH_UNITS),
    ("mass_g", ("weighing {}", "weight {}", "with a mass of {}"), MASS_UNITS),
    ("volume_ml", ("holding {}", "capacity {}", "with a volume of {}"), VOLUME_UNITS),
)
THINGS = comma_list(
    "crate, bathtub, aquarium, suitcase, barrel, toolbox, planter, bucket, cupboard, trunk, tank, "
    "basket, jar, kettle, cool box, letterbox, mixing bowl, watering can, backpack, drawer"
)


def draw_value(rng: random.Random, units: tuple[tuple[str, int, int, int], ...]) -> tuple[str, int]:
    """Return a measure as text, say "1.25 m", and the whole number it is in the answer's unit."""
    unit, factor, smallest, largest = rng.choice(units)
    decimals = rng.randint(0, {1: 0, 10: 1, 1000: 2}[factor])
    value = Decimal(rng.randint(smallest * 10**decimals, largest * 10**decimals)).scaleb(-decimals)
    gap = rng.choice((" ", " ", "")) if len(unit) <= 2 else " "
    return f"{value}{gap}{unit}", int(value * factor)


def draw(rng: random.Random) -> Example:
    chosen = sorted(rng.sample(range(len(MEASURES)), rng.randint(1, 4)))
    phrases, pairs = [], []
    for key, wordings, units in (MEASURES[index] for index in chosen):
        text, number = draw_value(rng, units)
        phrases.append(rng.choice(wordings).format(text))
        pairs.append(f"{key}={number}")
    rng.shuffle(phrases)
    *first, last = phrases
    joiner = rng.choice((" and ", ", ", " and "))
    text = rng.choice(SENTENCES).format(
        thing=rng.choice(THINGS),
        measures=joiner.join([", ".join(first), last]) if first else last,
        number=rng.randint(100, 9999),
        days=rng.randint(2, 14),
    )
    answer = " ".join(pairs)
    return Example(rng.choice(INSTRUCTIONS).format(text=text), answer, key=answer)


TASK = Task("measure-kv", draw, equals_answer, max_answer_tokens=72)
