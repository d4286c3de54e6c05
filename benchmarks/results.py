"""Trains a recipe by each method on each seed and prints the table of docs/results.md.

    python -m benchmarks.results recipes/house_tool.yaml --seeds 1 2 3 --runs runs/results

A run that is there already is read, one that was interrupted is continued.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean

from rmsd.recipe import load_recipe
from rmsd.record import read_lines

METHODS = {
    "RMSD, context judge": ("rmsd", []),
    "RMSD, magnitude judge": ("mag", ["judge.kind=magnitude"]),
    "OPSD": ("opsd", ["method=opsd"]),
}


def train(recipe: str, run: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "rmsd", "train", recipe, f"output_dir={run}", "resume=true", *overrides]
    subprocess.run(command, check=True)


def evaluations(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]


def table(columns: list[str], names: list[str], runs: dict[tuple[str, int], list[dict]]) -> str:
    """Markdown: a row a run, before and after, and a mean a method."""
    lines = [
        "| method | seed | " + " | ".join(f"{name} before → after" for name in columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for name in names:
        of_method = {seed: found for (method, seed), found in runs.items() if method == name}
        for seed, found in of_method.items():
            cells = (f"{found[0][column]:.2f} → {found[-1][column]:.3f}" for column in columns)
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
        means = (f"**{mean(found[-1][column] for found in of_method.values()):.3f}**" for column in columns)
        lines.append(f"| {name} | mean | " + " | ".join(means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_args()
    last_step = load_recipe(options.recipe, options.overrides).train.get("max_steps")
    runs = {}
    for name, (short, overrides) in METHODS.items():
        for seed in options.seeds:
            run = options.runs / f"{short}-{seed}"
            found = evaluations(run)
            if not found or found[-1]["step"] != last_step:
                train(options.recipe, run, [*overrides, f"seed={seed}", *options.overrides])
                found = evaluations(run)
            runs[name, seed] = found
    columns = [name for name in next(iter(runs.values()))[0] if name not in ("kind", "step", "epoch")]
    print(table(columns, list(METHODS), runs))


if __name__ == "__main__":
    main()
