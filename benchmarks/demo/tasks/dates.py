"""Task `date-iso`: a sentence with a date in any of fifteen forms -> the date as YYYY-MM-DD.

House conventions that the text alone does not tell: dots mean day first, slashes month first, and
a year of two digits lies in 1950 to 2049.
"""

import datetime
import random

from benchmarks.demo.tasks.base import Example, Task, equals_answer
from benchmarks.demo.tasks.words import CITIES, FIRST_NAMES, comma_list

INSTRUCTIONS = (
    "Give the date in this text in ISO 8601: {text}",
    "Which date is meant here? Answer as YYYY-MM-DD. {text}",
    "Convert the date to ISO format: {text}",
    "{text} What is that date in ISO 8601?",
)
SENTENCES = (
    "The invoice for order {number} is due on {date}.",
    "{name} was born on {date} in {city}.",
    "We will meet in {city} on {date} at {hour}:30.",
    "Please renew the passport before {date}.",
    "The lease of flat {number} ends {date}.",
    "On {date}, {name} moved into room {number}.",
    "{name} wrote that the shipment left {city} on {date}.",
    "The warranty of device {number} runs out on {date}.",
    "Flight {number} to {city} departs on {date}.",
    "As of {date} there were {number} members.",
    "{name} starts at the {city} office on {date}.",
    "Submit the {number} forms no later than {date}.",
    "The museum in {city} opened its doors on {date}.",
    "The last backup was made on {date} by {name}.",
    "Our contract with {name} was signed on {date}.",
    "The hearing is set for {date} at {hour} o'clock.",
    "Dated {date}, the letter from {city} never arrived.",
    "{name} paid {number} euros on {date}.",
    "Tickets go on sale {date} at {hour}:00.",
    "{date}",
)
MONTHS = comma_list(
    "January, February, March, April, May, June, July, August, September, October, November, "
    "December"
)
WEEKDAYS = comma_list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
TENS = ("", "", "twent", "thirt")
UNITS = comma_list("first, second, third, fourth, fifth, sixth, seventh, eighth, ninth")
TEENS = comma_list(
    "tenth, eleventh, twelfth, thirteenth, fourteenth, fifteenth, sixteenth, seventeenth, "
    "eighteenth, nineteenth"
)
FIRST_DAY = datetime.date(1950, 1, 1)
LAST_DAY = datetime.date(2049, 12, 31)


def ordinal(day: int) -> str:
    ending = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def ordinal_word(day: int) -> str:
    if day < 10:
        return UNITS[day - 1]
    if day < 20:
        return TEENS[day - 10]
    tens, unit = divmod(day, 10)
    return f"{TENS[tens]}ieth" if unit == 0 else f"{TENS[tens]}y-{UNITS[unit - 1]}"


def written_forms(date: datetime.date) -> tuple[str, ...]:
    # Not strftime: its names follow the machine's locale.
    month = MONTHS[date.month - 1]
    weekday = WEEKDAYS[date.weekday()]
    day, year, short_year = date.day, date.year, f"{date.year % 100:02d}"
    return (
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"{month} {ordinal(day)}, {year}",
        f"the {ordinal(day)} of {month} {year}",
        f"the {ordinal_word(day)} of {month}, {year}",
        f"{weekday}, {month} {day}, {year}",
        f"{weekday} {day} {month} {year}",
        f"{day:02d}.{date.month:02d}.{year}",
        f"{day}.{date.month}.{short_year}",
        f"{date.month}/{day}/{year}",
        f"{date.month:02d}/{day:02d}/{short_year}",
        f"{year}/{date.month:02d}/{day:02d}",
        f"{month[:3]} {day} '{short_year}",
        f"{day}-{month[:3]}-{short_year}",
        f"{day:02d} {month[:3].upper()} {year}",
    )


def draw(rng: random.Random) -> Example:
    date = FIRST_DAY + datetime.timedelta(days=rng.randrange((LAST_DAY - FIRST_DAY).days + 1))
    text = rng.choice(SENTENCES).format(
        date=rng.choice(written_forms(date)),
        name=rng.choice(FIRST_NAMES),
        city=rng.choice(CITIES),
        number=rng.randint(2, 9999),
        hour=rng.randint(8, 19),
    )
    answer = date.isoformat()
    return Example(rng.choice(INSTRUCTIONS).format(text=text), answer, key=answer)


TASK = Task("date-iso", draw, equals_answer, max_answer_tokens=16)
