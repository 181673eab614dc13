"""Task `shop-sql`: a question about a small shop -> one SQLite query over its three tables.

An answer is right if it returns what the reference query returns on two shops of generated data,
row for row where the reference sorts. Queries may only read, and run for a bounded number of steps.
"""

import random
import sqlite3
from collections import Counter
from functools import cache

from benchmarks.demo.tasks.base import Example, Task
from benchmarks.demo.tasks.words import CITIES, FIRST_NAMES, LAST_NAMES, comma_list

SCHEMA = (
    "customers(id, name, city, joined_year), products(id, name, category, price, stock), "
    "orders(id, customer_id, product_id, quantity, ordered_on)"
)
INSTRUCTIONS = (
    f"Tables: {SCHEMA}. Write an SQL query: {{text}}",
    f"{{text}} Answer with one SQL query. Tables: {SCHEMA}.",
)
CATEGORIES = comma_list(
    "books, garden, kitchen, lighting, music, office, outdoor, sports, tools, toys"
)
JOIN_PRODUCTS = "FROM orders JOIN products ON products.id = orders.product_id"
JOIN_CUSTOMERS = "FROM orders JOIN customers ON customers.id = orders.customer_id"
JOIN_BOTH = f"{JOIN_CUSTOMERS} JOIN products ON products.id = orders.product_id"
# Ways to ask, and the query.
QUESTIONS = (
    (
        ("How many customers live in {city}?", "Count the customers from {city}."),
        "SELECT COUNT(*) FROM customers WHERE city = '{city}'",
    ),
    (
        (
            "Which customers from {city} joined after {year}?",
            "Names of the {city} customers who joined later than {year}.",
        ),
        "SELECT name FROM customers WHERE city = '{city}' AND joined_year > {year}",
    ),
    (
        (
            "Which {category} products cost less than {price}?",
            "Names of all products in {category} under {price} euros.",
        ),
        "SELECT name FROM products WHERE category = '{category}' AND price < {price}",
    ),
    (
        (
            "What do {category} products with more than {stock} in stock cost on average?",
            "Average price of {category} products with a stock above {stock}.",
        ),
        "SELECT AVG(price) FROM products WHERE category = '{category}' AND stock > {stock}",
    ),
    (
        (
            "What are the {limit} most expensive {category} products?",
            "Names of the top {limit} {category} products by price.",
        ),
        "SELECT name FROM products WHERE category = '{category}' ORDER BY price DESC LIMIT {limit}",
    ),
    (
        (
            "Names and prices of the {limit} cheapest products.",
            "Show name and price of the {limit} products that cost least.",
        ),
        "SELECT name, price FROM products ORDER BY price LIMIT {limit}",
    ),
    (
        (
            "Which products have fewer than {stock} pieces left?",
            "Names of the products with a stock below {stock}.",
        ),
        "SELECT name FROM products WHERE stock < {stock}",
    ),
    (
        (
            "How many {category} products are there below {price} euros?",
            "Count the products in {category} that cost less than {price}.",
        ),
        "SELECT COUNT(*) FROM products WHERE category = '{category}' AND price < {price}",
    ),
    (
        ("How many orders came after {date}?", "Count the orders placed after {date}."),
        "SELECT COUNT(*) FROM orders WHERE ordered_on > '{date}'",
    ),
    (
        (
            "How many orders had at least {quantity} pieces?",
            "Count the orders with a quantity of {quantity} or more.",
        ),
        "SELECT COUNT(*) FROM orders WHERE quantity >= {quantity}",
    ),
    (
        (
            "How many pieces of {category} were ordered since {date}?",
            "Total quantity of {category} products ordered on {date} or later.",
        ),
        f"SELECT SUM(orders.quantity) {JOIN_PRODUCTS} "
        "WHERE products.category = '{category}' AND orders.ordered_on >= '{date}'",
    ),
    (
        (
            "What is the revenue from {category} since {date}?",
            "Revenue of {category} products ordered on {date} or later.",
        ),
        f"SELECT SUM(orders.quantity * products.price) {JOIN_PRODUCTS} "
        "WHERE products.category = '{category}' AND orders.ordered_on >= '{date}'",
    ),
    (
        (
            "How many orders came from {city}?",
            "Count the orders of customers in {city}.",
        ),
        f"SELECT COUNT(*) {JOIN_CUSTOMERS} WHERE customers.city = '{{city}}'",
    ),
    (
        (
            "Which customers from {city} bought {category} products?",
            "Names of the {city} customers who ordered something from {category}.",
        ),
        f"SELECT DISTINCT customers.name {JOIN_BOTH} "
        "WHERE customers.city = '{city}' AND products.category = '{category}'",
    ),
    (
        (
            "How many customers per city joined since {year}?",
            "For each city, count the customers who joined in {year} or later.",
        ),
        "SELECT city, COUNT(*) FROM customers WHERE joined_year >= {year} GROUP BY city",
    ),
    (
        (
            "How many products over {price} euros are in each category?",
            "For each category, count the products that cost more than {price}.",
        ),
        "SELECT category, COUNT(*) FROM products WHERE price > {price} GROUP BY category",
    ),
    (
        (
            "Names of customers who joined between {year} and {later_year}.",
            "Which customers joined from {year} to {later_year}?",
        ),
        "SELECT name FROM customers WHERE joined_year BETWEEN {year} AND {later_year}",
    ),
    (
        (
            "Which city do {name}'s orders come from?",
            "In which city does the customer {name} live?",
        ),
        "SELECT city FROM customers WHERE name = '{name}'",
    ),
)
# SQLite's virtual machine stops a query after this many instructions: an accidental cross join.
MAX_SQLITE_STEPS = 5_000_000
READ_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


def draw(rng: random.Random) -> Example:
    wordings, query = rng.choice(QUESTIONS)
    year = rng.randint(2001, 2022)
    fields = {
        "city": rng.choice(CITIES),
        "category": rng.choice(CATEGORIES),
        "name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "year": year,
        "later_year": year + rng.randint(1, 3),
        "price": rng.randint(5, 120),
        "stock": rng.randint(2, 60),
        "limit": rng.randint(2, 12),
        "quantity": rng.randint(2, 20),
        "date": f"{rng.randint(2020, 2025)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
    }
    text = rng.choice(wordings).format(**fields)
    answer = query.format(**fields)
    return Example(rng.choice(INSTRUCTIONS).format(text=text), answer, key=answer)


def check(answer_text: str, example: Example) -> bool:
    """Run the answer and the reference; a Markdown fence around the answer is forgiven."""
    query = answer_text.strip().removeprefix("```sql").removeprefix("```").removesuffix("```")
    is_sorted = "ORDER BY" in example.answer
    for seed in (1, 2):
        rows = run_query(seed, query)
        expected = run_query(seed, example.answer)
        if rows is None or expected is None:
            return False
        if rows != expected if is_sorted else Counter(rows) != Counter(expected):
            return False
    return True


def run_query(seed: int, query: str) -> list[tuple[object, ...]] | None:
    """Return the rows on the shop of this seed, floats rounded; None if the query fails."""
    shop = make_shop(seed)
    steps_left = MAX_SQLITE_STEPS // 1000

    def stop_after_budget() -> bool:
        nonlocal steps_left
        steps_left -= 1
        return steps_left < 0

    shop.set_progress_handler(stop_after_budget, 1000)
    try:
        rows = shop.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


@cache
def make_shop(seed: int) -> sqlite3.Connection:
    """Build a shop in which every city, category and customer name of the questions occurs."""
    rng = random.Random(f"shop/{seed}")
    shop = sqlite3.connect(":memory:", check_same_thread=False)
    shop.execute("CREATE TABLE customers (id, name, city, joined_year)")
    shop.execute("CREATE TABLE products (id, name, category, price, stock)")
    shop.execute("CREATE TABLE orders (id, customer_id, product_id, quantity, ordered_on)")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    customers = [
        (number, name, rng.choice(CITIES), rng.randint(1998, 2025))
        for number, name in enumerate(names)
    ]
    # Prices differ by product, so that sorting by price has one order.
    prices = rng.sample(range(100, 15000), 200)
    products = [
        (number, f"product {number}", rng.choice(CATEGORIES), price / 100, rng.randint(0, 80))
        for number, price in enumerate(prices)
    ]
    orders = [
        (
            number,
            rng.randrange(len(customers)),
            rng.randrange(len(products)),
            rng.randint(1, 25),
            f"{rng.randint(2019, 2026)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        )
        for number in range(5000)
    ]
    shop.executemany("INSERT INTO customers VALUES (?, ?, ?, ?)", customers)
    shop.executemany("INSERT INTO products VALUES (?, ?, ?, ?, ?)", products)
    shop.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", orders)
    shop.commit()
    shop.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in READ_ACTIONS else sqlite3.SQLITE_DENY
    )
    return shop


TASK = Task("shop-sql", draw, check, max_answer_tokens=96)
