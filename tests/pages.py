"""The project's pages, and the examples in them that tests run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def snippet(name: str, marker: str) -> str:
    """The Python block behind `<!-- test: marker -->`."""
    found = re.search(rf"<!-- test: {re.escape(marker)} -->\n```python\n(.*?)```", page(name), re.DOTALL)
    assert found, f"{name} has no example {marker!r}"
    return found[1]
