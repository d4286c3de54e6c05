"""Where a table that a command makes stands in a page of the documentation."""

import re
from pathlib import Path

from . import keeping


def fill(page: Path, sections: dict[str, str]) -> None:
    """Puts each text between its markers of the page, `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page lacks them.
    """
    text = page.read_text(encoding="utf-8")
    for name, made in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{page} has no place for {name!r}: write {begin} and {end} where it belongs")
        text = re.sub(f"{begin}.*{end}", lambda _, t=f"{begin}\n{made}\n{end}": t, text, flags=re.DOTALL)
    keeping.write(page, text)
