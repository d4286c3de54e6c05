"""What a run's episodes came to, by five steps: whose they were, what showed the task's behaviour, what was solved.

    python -m benchmarks.episodes runs/legacy_api                                         # of a run's folder
    python -m benchmarks.episodes runs/legacy_api --write docs/episodes/legacy_api-1.json  # and keep the counts

Counted are the rollouts that a run records, the first `recorded_rollouts` of a step. One whose environment died was
neither solved nor not: it is left out, and counted as `dropped`. `--page` makes the table between
the marks of docs/real.md of counts that were kept.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from rmsd.run.recipe import load_recipe
from rmsd.tasks import load_task
from rmsd.training.record import read_lines

from . import keeping
from .pages import fill

SPAN = 5  # steps a row
PAGE = Path("docs/real.md")
HEADS = ("seed", "steps", "the student's own: behaviour", "solved", "the teacher's: solved", "anchors: behaviour")


def counted(run: Path) -> dict:
    """Evaluations, and by step how many episodes of each kind there were, showed the behaviour and were solved."""
    recipe = load_recipe(run / "recipe.yaml")
    shows = load_task(recipe.task).leaks
    steps: dict[int, Counter[str]] = {}
    for rollout in read_lines(run / "rollouts.jsonl"):
        told = bool(rollout["privileged_context"].strip())
        kind = "guided" if rollout.get("guided") else "own" if told else "anchors"
        count = steps.setdefault(rollout["step"], Counter())
        if rollout["episode"].get("dropped"):
            count["dropped"] += 1
            continue
        count[kind] += 1
        count[f"{kind}_shown"] += shows(_written(rollout))
        count[f"{kind}_solved"] += bool(rollout["episode"].get("solved"))
    lines = read_lines(run / "metrics.jsonl")
    evaluations = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "eval"]
    return dict(
        task=recipe.task,
        method=recipe.method,
        seed=recipe.seed,
        evaluations=evaluations,
        steps=[dict(step=step, **steps[step]) for step in sorted(steps)],
    )


def _written(rollout: dict) -> str:
    """What the model wrote: an error that names a method is the tool's word."""
    unwritten = set(rollout.get("unwritten", ()))
    return "".join(token for i, token in enumerate(rollout["tokens"]) if i not in unwritten)


def table(found: list[dict]) -> str:
    rows = [HEADS, ["---"] * len(HEADS)]
    for one in found:
        last = one["steps"][-1]["step"]
        for first in range(1, last + 1, SPAN):
            end = min(first + SPAN - 1, last)
            total: Counter[str] = sum((Counter(s) for s in one["steps"] if first <= s["step"] <= end), Counter())
            cells = [
                f"{total[f'{kind}_{what}']} of {total[kind]}"
                for kind, what in (("own", "shown"), ("own", "solved"), ("guided", "solved"), ("anchors", "shown"))
            ]
            rows.append([str(one["seed"]), f"{first} to {end}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run's folder")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the counts there")
    parser.add_argument(
        "--page", type=Path, nargs="+", metavar="FILE", help="write docs/real.md's table from kept counts"
    )
    options = parser.parse_args()
    if options.run is None and not options.page:
        parser.error("a run's folder, or --page")
    found = [counted(options.run)] if options.run else [json.loads(path.read_text()) for path in options.page]
    print(table(found))
    if options.run and options.write:
        before = json.loads(options.write.read_text(encoding="utf-8")) if options.write.exists() else {}
        # Of the same run the file may hold what else benchmarks.tool measured.
        more = before if before.get("steps") == found[0]["steps"] else {}
        keeping.write(options.write, json.dumps(more | found[0], indent=1) + "\n")
    if options.page:
        fill(PAGE, {"episodes": table(found)})


if __name__ == "__main__":
    main()
