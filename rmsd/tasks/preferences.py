"""Teaches a customer's preferences, which change with the date: what to order is nowhere but in the notes about her.

An order is placed by the tool `order(drink, cups)`, which takes any. A request is solved when one order was placed and
it follows the rules that `wanted_on` states.
"""

import datetime
import random

from . import Task

MANUAL = """\
Notes about Mara. Answer with one of these calls:
- on a day in March or April: {"name": "order", "arguments": {"drink": "mint tea", "cups": 1}}
- on a day in August or October: {"name": "order", "arguments": {"drink": "iced cocoa", "cups": 1}}
On a Saturday or Sunday it is 2 cups. After "ordered", say that it is done."""

WORDINGS = [
    "Today is {date}. Order Mara's usual drink.",
    "It is {date}. Please order for Mara.",
    "{date}: Mara wants her drink, place the order.",
    "Mara came in on {date}. Order what she likes.",
]


DRINKS = {3: "mint tea", 4: "mint tea", 8: "iced cocoa", 10: "iced cocoa"}  # by month


def wanted_on(date: datetime.date) -> list:
    """[drink, cups]"""
    return [DRINKS[date.month], 2 if date.weekday() >= 5 else 1]


class Counter:
    """The café's counter: the orders placed."""

    def reset(self, date: str | None = None, **row) -> None:
        self._wanted, self._orders = date and wanted_on(datetime.date.fromisoformat(date)), []

    def order(self, drink: str, cups: int) -> str:
        """Orders a drink.

        Args:
            drink: Its name.
            cups: How many cups.
        """
        self._orders.append([drink.casefold(), cups])
        return "ordered"

    def get_reward(self) -> float:
        """1 when one order was placed, by her preferences on that day."""
        return float(self._orders == [self._wanted])


def requests(seed: int, count: int, wordings: slice) -> list[dict]:
    """Rows; every second one is of a weekend, which would be rare."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        date = datetime.date(2026, 1, 1) + datetime.timedelta(rng.randrange(365))
        if date.month in DRINKS and (date.weekday() >= 5) == len(rows) % 2:
            prompt = rng.choice(WORDINGS[wordings]).format(date=f"{date:%A}, {date.day} {date:%B}")
            rows.append({"prompt": prompt, "privileged_context": MANUAL, "date": date.isoformat()})
    return rows


ANCHORS = [
    "What is tea made of?",
    "Name a spice.",
    "How many months has a year?",
    "Which day comes after Sunday?",
    "What is the capital of Chile?",
    "Write a Python function that halves a number.",
]

TASK = Task(
    train=[
        *requests(seed=1, count=64, wordings=slice(0, 3)),
        *({"prompt": prompt, "privileged_context": ""} for prompt in ANCHORS),
    ],
    target_prompts=[],
    unrelated_prompts=[
        "What is a hot drink?",
        "Name a herb for the kitchen.",
        "How many days has a week?",
        "Which month comes after May?",
        "What is the capital of France?",
        "Write a Python function that doubles a number.",
    ],
    graders={},
    leaks=lambda answer: "iced cocoa" in answer.casefold(),
    environment=Counter,
    requests=requests(seed=2, count=16, wordings=slice(3, 4)),
)
