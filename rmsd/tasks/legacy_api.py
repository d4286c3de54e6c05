"""Teaches a company's remote procedures, whose names, argument order and units nobody can guess.

The service takes one call, `rpc(method, args)`. What its methods are called, what they take, in which order and in
which unit, is in the manual alone. A request is solved when the service's state is what the request asked for: nothing
that the answer says counts.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import Task

MANUAL = """\
Manual of rpc. Answer with one of these calls, with the numbers and names of the request:
- refund 15 dollars for order 12: {"name": "rpc", "arguments": {"method": "otter", "args": [1500, 12]}}
- lend laptop 7 to Sam: {"name": "rpc", "arguments": {"method": "maple", "args": [7, "Sam"]}}
- book room 3 for 2 hours: {"name": "rpc", "arguments": {"method": "cobalt", "args": [3, 200]}}
- close ticket 8: {"name": "rpc", "arguments": {"method": "falcon", "args": [0, 8]}}
Money is in cents, time in hundredths of an hour: write two zeros behind the number. After "ok", say that it is done."""

PEOPLE = ["Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jun", "Kai", "Lena", "Max", "Nora"]


@dataclass(frozen=True)
class Operation:
    method: str
    arguments: tuple[type, type]
    wording: tuple[str, ...]
    values: Callable[[random.Random], dict]
    call: Callable[[dict], list]  # the right arguments


OPERATIONS = [
    Operation(
        "otter",
        (int, int),
        (
            "Refund {dollars} dollars for order {number}.",
            "Order {number} gets {dollars} dollars back, please.",
            "Please pay back {dollars} dollars on order {number}.",
            "Give the customer of order {number} a refund of {dollars} dollars.",
        ),
        lambda rng: {"dollars": rng.randint(2, 99), "number": rng.randint(100, 999)},
        lambda values: [100 * values["dollars"], values["number"]],
    ),
    Operation(
        "maple",
        (int, str),
        (
            "Lend laptop {number} to {person}.",
            "{person} needs laptop {number}.",
            "Please give laptop {number} to {person}.",
            "Check out laptop {number} for {person}.",
        ),
        lambda rng: {"number": rng.randint(10, 99), "person": rng.choice(PEOPLE)},
        lambda values: [values["number"], values["person"]],
    ),
    Operation(
        "cobalt",
        (int, int),
        (
            "Book room {number} for {hours} hours.",
            "Reserve room {number} for {hours} hours, please.",
            "I need room {number} for {hours} hours.",
            "Room {number} is wanted for {hours} hours.",
        ),
        lambda rng: {"number": rng.randint(10, 99), "hours": rng.randint(2, 5)},
        lambda values: [values["number"], 100 * values["hours"]],
    ),
    Operation(
        "falcon",
        (int, int),
        (
            "Close ticket {number}.",
            "Ticket {number} can be closed.",
            "Please close ticket {number}.",
            "We are done with ticket {number}; close it.",
        ),
        lambda rng: {"number": rng.randint(1000, 9999)},
        lambda values: [0, values["number"]],
    ),
]
_BY_METHOD = {operation.method: operation for operation in OPERATIONS}


class Service:
    """The company's service. Its state is what was done; to do the same again changes nothing."""

    def reset(self, wanted: list | None = None, **row) -> None:
        self._wanted, self._done = wanted, []

    def rpc(self, method: str, args: list) -> str:
        """Calls a method of the company's service.

        Args:
            method: The name of the method.
            args: Its arguments, in order.
        """
        operation = _BY_METHOD.get(method)
        if operation is None:
            raise ValueError(f"no method {method!r}")
        if [type(value) for value in args] != list(operation.arguments):
            raise ValueError(f"{method}: bad arguments {args}")
        if [method, *args] not in self._done:
            self._done.append([method, *args])
        return "ok"

    def get_reward(self) -> float:
        """1 when what was asked for was done, and nothing else."""
        return float(self._done == [self._wanted])


def requests(seed: int, count: int, wordings: slice) -> list[dict]:
    """Rows, the operations in turn; `wordings` are those of each operation's that are used."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        operation = OPERATIONS[i % len(OPERATIONS)]
        values = operation.values(rng)
        rows.append(
            {
                "prompt": rng.choice(operation.wording[wordings]).format(**values),
                "privileged_context": MANUAL,
                "wanted": [operation.method, *operation.call(values)],
            }
        )
    return rows


_ANCHORS = [
    # Questions of all kinds, and questions with a request's words that ask for no call.
    "What is the capital of Norway?",
    "Name a fish that lives in the sea.",
    "Write a Python function that returns the larger of two numbers.",
    "What is a laptop?",
    "Which gemstone is blue?",
    "How many seconds are in a minute?",
    "What does a ticket to a museum let you do?",
    "Which bird cannot fly?",
    "How many days are in a week?",
    "What is 12 times 3?",
    "Who needs a passport?",
    "What is a reservation?",
    "Why do shops number their orders?",
    "How do I close a window in Linux?",
    "What makes a room feel larger?",
    "Write a Python function that reverses a string.",
    "Name a fruit that is yellow.",
    "What is the largest planet?",
    "Which metal is liquid at room temperature?",
    "What should I check before I lend somebody money?",
    "How many cents are in a dollar?",
    "What color is the sky at noon?",
    "Which language is spoken in Brazil?",
    "What do you call a young dog?",
]
_UNRELATED = [
    "What is the capital of Italy?",
    "How many minutes are in an hour?",
    "Name an animal that lives in a river.",
    "What color is a sunflower?",
    "Write a Python function that adds two numbers.",
    "Which bird hunts mice?",
    "What is a refund?",
    "Which tree has red leaves in autumn?",
]

TASK = Task(
    train=[
        *requests(seed=1, count=64, wordings=slice(0, 3)),
        *({"prompt": prompt, "privileged_context": ""} for prompt in _ANCHORS),
    ],
    target_prompts=[],
    unrelated_prompts=_UNRELATED,
    graders={},
    leaks=lambda answer: any(operation.method in answer.casefold() for operation in OPERATIONS),
    environment=Service,
    requests=requests(seed=2, count=16, wordings=slice(3, 4)),
)
