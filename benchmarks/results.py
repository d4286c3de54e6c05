"""Trains a recipe by each method on each seed and prints the tables of docs/results.md.

    python -m benchmarks.results recipes/house_tool.yaml --seeds 1 2 3 --runs runs/results

Each method has its own learning rate, the best of a few tried on one seed (docs/results.md). The LLM judge is SmolLM2
behind llama.cpp's server on loopback (xllamacpp, in the dev extra), or a server of yours: --set judge.base_url=...
A run that is there already is read, one that was interrupted is continued; of another recipe or other --set than is
asked for, it is refused, and --runs names another folder.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

from rmsd.run.recipe import load_recipe
from rmsd.training.record import read_lines

from . import keeping

SERVER = Path(__file__).parents[1] / "tests" / "llama_server.py"
METHODS = {
    "RMSD, context judge": ("rmsd", []),
    "RMSD, magnitude judge": ("mag", ["judge.kind=magnitude"]),
    "RMSD, LLM judge": ("llm", ["judge.kind=llm", "judge.model=smollm2", "judge.on_error=skip", "judge.timeout=300"]),
    "OPSD": ("opsd", ["method=opsd", "train.learning_rate=1.2e-4"]),
}
# Of a run's recipe: where it is kept and whom it asks, which are another's on each start of a server.
NOT_ASKED = ("output_dir", "resume", "judge.base_url", "judge.cache")


@contextlib.contextmanager
def judge_server(runs: Path):
    """Overrides that name a server of the judge's model, which serves while this is open."""
    environment = {**os.environ, "SERVER_KEY": "none"}
    server = subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    address = next((line.strip() for line in server.stdout if line.startswith("http://")), None)
    if address is None:
        raise RuntimeError(f"{SERVER} did not start: pip install xllamacpp")
    try:
        yield [f"judge.base_url={address}/v1", f"judge.cache={runs / 'judge'}"]
    finally:
        server.stdin.close()
        server.wait()


@keeping.killed_as_interrupted()
def train(recipe: str, run: Path, overrides: list[str]) -> None:
    has_server = any(override.startswith("judge.base_url=") for override in overrides)
    wants_server = "judge.kind=llm" in overrides and not has_server
    server = judge_server(run.parent) if wants_server else contextlib.nullcontext([])
    with server as judge:
        command = [sys.executable, "-m", "rmsd", "train", recipe, f"output_dir={run}", "resume=true"]
        subprocess.run([*command, *overrides, *judge], check=True)


def evaluations(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]


def table(columns: list[str], runs: dict[tuple[str, int], list[dict]]) -> str:
    """Markdown: a row a run, at its end, and a mean a method; before training in the first. A blank where a run has not
    measured a column, as after a resume with other evaluate.samples."""
    lines = [
        "| method | seed | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    first = next(iter(runs.values()))[0]
    lines.append(_row("before training", "any", first, columns))
    for name in dict.fromkeys(method for method, _ in runs):
        of_method = {seed: found[-1] for (method, seed), found in runs.items() if method == name}
        lines += [_row(name, str(seed), last, columns) for seed, last in of_method.items()]
        measured = {column: [last[column] for last in of_method.values() if column in last] for column in columns}
        means = {column: mean(values) for column, values in measured.items() if values}
        lines.append(_row(f"**{name}**", "mean", means, columns))
    return "\n".join(lines)


def _row(name: str, seed: str, marks: dict, columns: list[str]) -> str:
    cells = (f"{round(marks[c], 3) + 0.0:.3f}" if c in marks else "" for c in columns)
    return f"| {name} | {seed} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=[short for short, _ in METHODS.values()])
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="section.key=value")
    options = parser.parse_args()
    asked = {
        (name, seed): [*overrides, f"seed={seed}", *options.overrides]
        for name, (short, overrides) in METHODS.items()
        for seed in options.seeds
        if short in (options.methods or [short])
    }
    for (name, seed), overrides in asked.items():  # before hours are spent
        run = options.runs / f"{METHODS[name][0]}-{seed}"
        keeping.check(run, load_recipe(options.recipe, overrides), but=NOT_ASKED)
    last_step = load_recipe(options.recipe, options.overrides).train.get("max_steps")
    runs = {}
    for (name, seed), overrides in asked.items():
        run = options.runs / f"{METHODS[name][0]}-{seed}"
        found = evaluations(run)
        if not found or found[-1]["step"] != last_step:
            train(options.recipe, run, overrides)
            found = evaluations(run)
        runs[name, seed] = found
    columns = [name for name in next(iter(runs.values()))[0] if name not in ("kind", "step", "epoch")]
    print(table(columns, runs))


if __name__ == "__main__":
    main()
