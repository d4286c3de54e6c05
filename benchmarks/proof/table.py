"""docs/proof.md's table, from the marks that docs/proof holds."""

import json
import random
from pathlib import Path
from statistics import mean

from ..pages import fill
from ..real import problems_of
from .methods import METHODS, PROBLEMS, RATE_SEED, STEPS, ordered
from .run import DOCS, TARGET

COLUMNS = {
    "target exists": lambda marks: marks["evaluations"][-1]["target_sampled"],
    "target only": lambda marks: marks["evaluations"][-1][TARGET],
    "specificity": lambda marks: marks["evaluations"][-1]["specificity"],
    "drift": lambda marks: marks["evaluations"][-1]["drift"],
    "HumanEval": lambda marks: _share(marks),
    "steps to 80%": lambda marks: marks["steps_to_80"],
    "tokens trained on": lambda marks: marks["tokens_trained"],
    "minutes": lambda marks: marks["seconds"] / 60,
}


def _share(marks: dict) -> float | None:
    """Of all problems; the first few are not to be averaged with that."""
    if problems_of(marks) != PROBLEMS:
        return None
    return int(marks["human_eval"].partition(" ")[0]) / PROBLEMS


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95% of the means of as many values drawn from these."""
    drawn = random.Random(0)
    means = sorted(mean(drawn.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def cell(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    digits = 0 if max(found) >= 20 else 2
    shown = f"{mean(found):,.{digits}f}"
    if len(found) > 1:
        low, high = interval(found)
        shown = f"{shown} [{low:,.{digits}f}, {high:,.{digits}f}]"
    return shown if len(found) == len(values) else f"{shown} ({len(found)} of {len(values)})"


def table(folder: Path = DOCS) -> str:
    """Markdown: a row a method of `STEPS` steps, the mean over its seeds and a 95% bootstrap interval of that."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rows = [["method", "rate", "seeds", *COLUMNS], ["---"] * (len(COLUMNS) + 3)]
    for name in ordered():
        for steps in sorted({marks["steps"] for marks in every}):
            mine = [m for m in every if m["method"] == name and m["steps"] == steps and m["seed"] != RATE_SEED]
            if not mine:
                continue
            well = [marks for marks in mine if not marks["ended"]]
            title = METHODS[name].title + ("" if steps == STEPS else f", {steps} steps")
            stopped = f", {len(mine) - len(well)} stopped" if len(well) < len(mine) else ""
            rates = ", ".join(f"{rate:g}" for rate in sorted({marks["rate"] for marks in mine}))
            rows.append(
                [title, rates, f"{len(mine)}{stopped}", *(cell([of(m) for m in well]) for of in COLUMNS.values())]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def rewrite() -> None:
    fill(DOCS.with_suffix(".md"), {"table": table()})
