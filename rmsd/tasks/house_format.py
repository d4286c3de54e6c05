"""Teaches a company's document format, with a header, an escape and a count of its own, which a parser checks.

A document is filed by the tool `file_document(text)`. Of one that does not parse it says no more than that it was
rejected. A request is solved when the archive holds the document that was asked for: title and entries, unescaped.
"""

import random

from . import Task

MANUAL = """\
Manual of file_document. The text has these lines:
first line: QUILL/2 and the title
then each entry on its own line, after "+ "
last line: END and the number of entries
Inside entries write "%" as "pct". Example with two entries:
QUILL/2 Tasks
+ call Bo
+ save 5 pct
END 2
After "filed", say that it is done."""

TITLES = ["Groceries", "Tasks", "Budget", "Trip", "Party", "Garden", "Office", "Repairs", "School", "Music"]
ENTRIES = [
    "rent",
    "food",
    "paint",
    "milk",
    "bread",
    "chairs",
    "lamps",
    "tickets",
    "maps",
    "books",
    "10% off",
    "save 20%",
    "5% tax",
    "tip 15%",
]
WORDINGS = [
    "File a document titled {title} with the entries: {entries}.",
    "Please file {title}. Its entries are: {entries}.",
    "We need a document {title} that lists {entries}.",
    "Put {entries} into a new document called {title} and file it.",
]


def parsed(text: str) -> tuple[str, list[str]]:
    """(title, entries) of a document. Raises ValueError where it is none."""
    header, *entries, end = text.strip().splitlines() if "\n" in text.strip() else ("", "")
    mark, _, title = header.partition(" ")
    if mark != "QUILL/2" or not title:
        raise ValueError("no header")
    if end != f"END {len(entries)}":
        raise ValueError("wrong count")
    if any(not entry.startswith("+ ") or "%" in entry for entry in entries):
        raise ValueError("bad entry")
    return title, [entry.removeprefix("+ ").replace("pct", "%").replace(" %", "%") for entry in entries]


class Archive:
    """The company's archive: what was filed."""

    def reset(self, title: str = "", entries: list | None = None, **row) -> None:
        self._wanted, self._filed = (title, entries), []

    def file_document(self, text: str) -> str:
        """Files a document in the company's format.

        Args:
            text: The whole document.
        """
        try:
            self._filed.append(parsed(text))
        except ValueError:
            raise ValueError("rejected: not in the company's format") from None
        return "filed"

    def get_reward(self) -> float:
        """1 when the archive holds the document that was asked for, and no other."""
        return float(self._filed == [self._wanted])


def requests(seed: int, count: int, wordings: slice) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        title, entries = rng.choice(TITLES), rng.sample(ENTRIES, rng.randint(1, 3))
        prompt = rng.choice(WORDINGS[wordings]).format(title=title, entries=", ".join(entries))
        rows.append({"prompt": prompt, "privileged_context": MANUAL, "title": title, "entries": entries})
    return rows


ANCHORS = [
    "What is an archive?",
    "How many items are in a dozen? Answer in one sentence.",
    "Write a list of three colors.",
    "What is the capital of Peru?",
    "What does the plus sign mean?",
    "Write a Python function that joins two strings.",
]

TASK = Task(
    train=[
        *requests(seed=1, count=64, wordings=slice(0, 3)),
        *({"prompt": prompt, "privileged_context": ""} for prompt in ANCHORS),
    ],
    target_prompts=[],
    unrelated_prompts=[
        "What is a quill?",
        "How do I file my taxes? Answer in one sentence.",
        "Write a shopping list of three things.",
        "What does the percent sign mean?",
        "What is the capital of Spain?",
        "Write a Python function that counts lines.",
    ],
    graders={},
    leaks=lambda answer: "QUILL/2" in answer,
    environment=Archive,
    requests=requests(seed=2, count=16, wordings=slice(3, 4)),
)
