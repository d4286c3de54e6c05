"""Runs what is missing, one after the other, and writes each run's marks as it ends."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rmsd.run.recipe import load_recipe
from rmsd.training.config import LORA_LEARNING_RATE
from rmsd.training.record import read_lines

from .. import keeping, real
from . import baselines
from .methods import METHODS, QUICK_STEPS, RATE_SEED, RATES, SEEDS, Job, ordered

DOCS = Path("docs/proof")
TARGET = "target_only_sampled"


def score(marks: dict) -> float:
    """What a rate is chosen by: what was learned, less what was forgotten, at the end."""
    last = marks["evaluations"][-1]
    return last[TARGET] * last["specificity"] * math.exp(-last["drift"])


def chosen_rate(method: str, marks_of=None) -> float | None:
    """The better of RATES on the seed that is there for it; None while one of its runs is missing."""
    marks_of = marks_of or kept_marks
    found = {rate: marks_of(Job(method, rate, RATE_SEED)) for rate in RATES}
    if any(marks is None for marks in found.values()):
        return None
    # A run that collapsed has no last evaluation to be judged by.
    return max(found, key=lambda rate: -1.0 if found[rate]["ended"] else score(found[rate]))


def jobs(
    names: list[str] | None = None,
    seeds: Iterable[int] = SEEDS,
    marks_of: Callable[[Job], dict | None] | None = None,
) -> Iterator[Job]:
    """What is to be run, in order of worth: of each method its rates first, then the seeds at the better one. Asked for
    one at a time, since which rate is better is known only then."""
    for name in ordered(names):
        yield from (Job(name, rate, RATE_SEED) for rate in RATES)
        for seed in seeds:
            if (rate := chosen_rate(name, marks_of)) is not None:
                yield Job(name, rate, seed)


def quick_jobs() -> list[Job]:
    return [Job(name, LORA_LEARNING_RATE, 0, QUICK_STEPS) for name in ("rmsd_contrast", "opsd")]


def kept(job: Job, runs: Path, overrides: list[str]) -> Path:
    """The file of a job's marks."""
    return real.marks_folder(DOCS, runs, overrides) / f"{job.name}{real.trial(overrides)}.json"


def kept_marks(job: Job, runs: Path = Path(), overrides: list[str] | None = None) -> dict | None:
    path = kept(job, runs, overrides or [])
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@keeping.killed_as_interrupted()
def run(job: Job, runs: Path, model: str, problems: int, overrides: list[str]) -> dict:
    """The job's marks; trained, evaluated and written where they are not there, and asked more of HumanEval where they
    hold fewer problems."""
    path, folder = kept(job, runs, overrides), runs / f"{job.name}{real.trial(overrides)}"
    settings = [f"model={model}", *job.overrides(), *overrides]
    keeping.check(folder, load_recipe(real.RECIPE, settings), keys=["model"])
    if job.seed == RATE_SEED:
        problems = 0  # half an hour of a core that neither the choice of a rate nor a table takes account of
    if (marks := kept_marks(job, runs, overrides)) is not None:
        if not marks["ended"] and problems > real.problems_of(marks) and (folder / "model").exists():
            keeping.write(path, _text({**marks, **real.checked(folder, model, problems)}))
            return kept_marks(job, runs, overrides)
        return marks
    kind = METHODS[job.method].kind
    runs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    ended = None
    try:
        if not (folder / "model").exists():
            if kind == "recipe":
                ended = real.train(folder, settings)
            else:
                baselines.train(kind, load_recipe(real.RECIPE, settings), folder)
    finally:
        seconds = spent(folder, time.monotonic() - began)
    after = {} if ended else real.checked(folder, model, problems)
    marks = marks_of(job, folder, ended, seconds, after)
    keeping.write(path, _text(marks))
    return marks


def _text(marks: dict) -> str:
    return json.dumps(marks, indent=1, ensure_ascii=False) + "\n"


def spent(folder: Path, seconds: float) -> float:
    """Seconds of training in all, over interruptions."""
    path = folder / "seconds"
    total = seconds + (float(path.read_text()) if path.exists() else 0.0)
    keeping.write(path, f"{total:.0f}")
    return total


def marks_of(job: Job, folder: Path, ended: str | None, seconds: float, after: dict) -> dict:
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [
        {k: real._rounded(v) for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "eval"
    ]
    last = evaluations[-1][TARGET]
    reached = next((one["step"] for one in evaluations if last and one[TARGET] >= 0.8 * last), None)
    return dict(
        method=job.method,
        title=METHODS[job.method].title,
        rate=job.rate,
        seed=job.seed,
        steps=job.steps,
        ended=ended,
        steps_to_80=reached,
        # Where a method selects no tokens it trains on all that were written; SFT writes none.
        tokens_trained=sum(line.get("kept_tokens", 0) for line in steps) or None,
        seconds=round(seconds),
        tail_mass=[real._rounded(line["tail_mass"]) for line in steps if "tail_mass" in line],
        evaluations=evaluations,
        **after,
    )
