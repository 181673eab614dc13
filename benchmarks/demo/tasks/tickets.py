"""Task `ticket-route`: a support ticket -> the code of the queue that handles it.

The codes are the made-up company's own: nothing in a text tells them, so a model that was not
trained for this company cannot know them. Held-out tickets combine known problems, goods, places
and openings in ways that training never showed.
"""

import random

from benchmarks.demo.tasks.base import Example, Task, equals_answer
from benchmarks.demo.tasks.words import CITIES, FIRST_NAMES, comma_list

INSTRUCTIONS = (
    "Route this support ticket: {text}",
    "Which queue handles this ticket? {text}",
    "{text} Which queue is this for?",
    "Support ticket: {text} Answer with the queue code.",
)
OPENINGS = (
    "",
    "Hello, ",
    "Hi team, ",
    "Good morning, ",
    "Dear support, ",
    "Hi, {name} here. ",
    "Sorry to bother you again. ",
    "This is urgent: ",
)
CLOSINGS = (
    "",
    " Please help.",
    " Thanks, {name}",
    " Can someone call me back?",
    " I am in {city} this week.",
    " What should I do?",
    " My customer number is {number}.",
)
PRODUCTS = comma_list(
    "router, printer, headset, tablet, laptop, monitor, webcam, docking station, scanner, "
    "keyboard, smart speaker, phone"
)
PROBLEMS = {
    "FIN-21": (
        "I was charged twice for the {product} on order {number}.",
        "The invoice for my {product} shows the wrong amount.",
        "My refund for the {product} of {number} euros has not arrived.",
        "Why is there VAT on invoice {number}? We are exempt.",
        "You debited my card again although I paid for the {product}.",
        "I need a corrected bill for the {product} with our {city} address.",
        "The direct debit for invoice {number} bounced, how do I pay now?",
        "The discount code for the {product} was not applied to my bill.",
    ),
    "NET-40": (
        "The {product} drops the wifi connection every {number} minutes.",
        "Since this morning there is no internet in our {city} office.",
        "The VPN times out when I work from {city}.",
        "My {product} cannot reach any website, the DNS seems broken.",
        "Downloads are very slow, {number} kilobit per second at best.",
        "The {product} finds the network but gets no IP address.",
        "Video calls to {city} freeze because of packet loss.",
        "The wireless signal does not reach the {product} upstairs.",
    ),
    "ACC-13": (
        "I forgot my password and the reset mail never comes.",
        "My account is locked after {number} tries to sign in.",
        "I cannot log in to the {product} portal with my new phone.",
        "The two-factor code is always rejected at login.",
        "Please change the e-mail address of my login, {name} left the company.",
        "Single sign-on sends me back to the login page of the {city} site.",
        "A new colleague, {name}, needs a user account for the {product} app.",
        "My username from {city} is not recognised any more.",
    ),
    "SHP-52": (
        "Parcel {number} with my {product} has not arrived.",
        "The tracking page says my {product} is still in {city}.",
        "You delivered the {product} to the wrong address in {city}.",
        "The courier left the {product} in the rain and nobody signed.",
        "When will order {number} leave your warehouse?",
        "My {product} was sent to {city} but I moved last month.",
        "Only one of two boxes of shipment {number} came.",
        "Can I collect the {product} at a pick-up point in {city}?",
    ),
    "HWR-34": (
        "The screen of the {product} is cracked.",
        "My {product} makes a grinding noise and smells burnt.",
        "The {product} does not switch on, the battery seems dead.",
        "A key on the {product} is stuck after {number} days of use.",
        "The {product} overheats and turns itself off.",
        "The power supply of the {product} is broken.",
        "The hinge of my {product} came off.",
        "The fan of the {product} rattles since we moved to {city}.",
    ),
    "LEG-60": (
        "I want to cancel my contract for the {product} at the end of the month.",
        "How long is the notice period of contract {number}?",
        "Please send the terms and conditions that we signed for the {product}.",
        "I withdraw from the purchase of the {product} within fourteen days.",
        "Under the privacy law I ask for a copy of all data you hold on {name}.",
        "Our lawyer in {city} needs the data processing agreement.",
        "We want to transfer contract {number} to our {city} company.",
        "Does the warranty clause cover a {product} bought in {city}?",
    ),
    "SAL-77": (
        "We would like a quote for {number} units of the {product}.",
        "Is there a volume discount on the {product} for schools?",
        "Which {product} do you recommend for an office of {number} people?",
        "Can I see a demo of the {product} in {city}?",
        "Do you still sell the older {product}, and what does it cost?",
        "We plan to buy {number} licences, who can advise us?",
        "I want to upgrade from the basic {product} to the pro model.",
        "Is the {product} in stock at your shop in {city}?",
    ),
    "SEC-99": (
        "I got a phishing mail in your name that asks for my {product} password.",
        "Someone in {city} signed in to my account, it was not me.",
        "Our {product} shows a ransom note and all files are encrypted.",
        "I found a security hole in the {product} portal, where do I report it?",
        "A stranger called as {name} from your support and wanted remote access.",
        "The antivirus found malware in the {product} update.",
        "My stolen {product} still has access to {number} customer records.",
        "Our customer list from {city} was leaked on the internet.",
    ),
}


def draw(rng: random.Random) -> Example:
    queue = rng.choice(tuple(PROBLEMS))
    fields = {
        "product": rng.choice(PRODUCTS),
        "number": rng.randint(3, 9999),
        "city": rng.choice(CITIES),
        "name": rng.choice(FIRST_NAMES),
    }
    opening, problem, closing = (rng.choice(part) for part in (OPENINGS, PROBLEMS[queue], CLOSINGS))
    template = opening + problem + closing
    text = template.format(**fields)
    # The number alone does not make a ticket another one.
    key = template.format(**{**fields, "number": "#"})
    return Example(rng.choice(INSTRUCTIONS).format(text=text), queue, key)


TASK = Task("ticket-route", draw, equals_answer, max_answer_tokens=12)
