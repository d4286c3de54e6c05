"""The learning suite: pre-trains a base model, tunes every method's learning rate on lessons of its own, runs every
method on the lessons that count, and writes docs/learning.md's tables and figures.

    python -m benchmarks.learning.run            # 237 runs: about an hour on two cores
    python -m benchmarks.learning.run --headline # 40 of them: RMSD and OPSD at the rates found; prints
    python -m benchmarks.learning.run --quick    # minutes: fewer seeds, methods and steps, the same code; prints

Each run is a JSON file under runs/learning; one that is there is not run again.
"""

import argparse
import hashlib
import json
import os
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from . import base, corpus, lesson, methods, muon, report
from .ablations import ABLATED, GROUPS

RUNS = Path("runs/learning")
STEPS, CONTINUATION, EVERY = 150, 100, 15
EARLY, QUICK_STEPS = 60, 60
TUNING_SEEDS, SEEDS = [8, 9, 10], [0, 1, 2, 3, 4]  # another thing is taught by each
RATES = {
    "sft": [1e-4, 3e-4, 1e-3],
    "rl": [3e-4],  # a reward that is never earned teaches the same at any rate
    "distil": [1e-4, 3e-4, 1e-3],
}
CONTINUED = [name for name in methods.METHODS if name not in ("sft_templates", "rl")]
# What the tuning chose (docs/learning.md), for runs without it.
HEADLINE = {"opsd": 3e-4, "rmsd_context": 1e-4, "opsd_anchors": 1e-3, "rmsd_context_anchors": 3e-4}
QUICK = {"sft_own": 3e-4, **{name: rate for name, rate in HEADLINE.items() if name != "opsd_anchors"}}


def job(method: str, seed: int, learning_rate: float, label: str = "", **options) -> dict:
    options = {**methods.METHODS[method], "steps": STEPS, "every": EVERY, "learning_rate": learning_rate, **options}
    return dict(label=label or method, method=method, seed=seed, options=options)


def tuning(names: list[str], seeds: list[int]) -> list[dict]:
    return [
        job(name, seed, rate, every=STEPS)
        for name in names
        for rate in RATES[methods.METHODS[name]["kind"]]
        for seed in seeds
    ]


def told(seeds: list[int]) -> list[dict]:
    """Marks of the base model reading the hint, a lesson each."""
    model, world = base.load(RUNS)
    lessons = {seed: lesson.Lesson(world, seed).told() for seed in seeds}
    return [{"seed": seed, **lesson.Exam(model, taught)(model)} for seed, taught in lessons.items()]


def compared(names: list[str], rates: dict[str, float], seeds: list[int]) -> list[dict]:
    return [job(name, seed, rates[name]) for name in names for seed in seeds]


def continued(names: list[str], rates: dict[str, float], seeds: list[int]) -> list[dict]:
    return [
        job(name, seed, rates[name], label=f"{name}+", continuation=CONTINUATION) for name in names for seed in seeds
    ]


def ablations(rates: dict[str, float], seeds: list[int]) -> list[dict]:
    jobs = []
    for group, settings in GROUPS.items():
        for setting, options in settings.items():
            label = f"{group}: {setting}"
            jobs += [job(ABLATED, seed, rates[ABLATED], label=label, **options) for seed in seeds]
    return jobs


def quick() -> list[dict]:
    """OPSD beside RMSD, and a supervised baseline, at rates found by the whole suite."""
    return [job(name, seed, rate, steps=QUICK_STEPS) for name, rate in QUICK.items() for seed in SEEDS[:2]]


def best_rates(results: list[dict]) -> dict[str, float]:
    """By method the rate with the largest product of target, facts and skills at the end, in the tuning lessons' mean:
    what is wanted is the target and nothing else lost. Ties go to the lower rate."""
    scores: dict[tuple[str, float], list[float]] = {}
    for result in results:
        last = result["marks"][-1]
        score = last["target_only"] * last["facts"] * last["skills"]
        scores.setdefault((result["method"], result["options"]["learning_rate"]), []).append(score)
    best: dict[str, tuple[float, float]] = {}
    for (method, rate), values in sorted(scores.items(), key=lambda item: item[0]):
        mean = sum(values) / len(values)
        if method not in best or mean > best[method][0]:
            best[method] = (mean, rate)
    return {method: rate for method, (_, rate) in best.items()}


def run_all(jobs: list[dict], processes: int) -> list[dict]:
    """Results of the jobs, in order, from disk where they are there."""
    missing = list({_path(job): job for job in jobs if not _path(job).exists()}.values())
    started = time.monotonic()
    # A process a core and a thread a process: two threads would wait for each other at every small product.
    with get_context("spawn").Pool(processes, initializer=_one_thread) as pool:
        for done, path in enumerate(pool.imap_unordered(_run, missing), 1):
            print(f"{done}/{len(missing)} {path.stem}, {time.monotonic() - started:.0f} s", flush=True)
    return [{**job, "marks": json.loads(_path(job).read_text())} for job in jobs]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(job: dict) -> Path:
    model, world = base.load(RUNS)
    options = dict(job["options"])
    taught = lesson.Lesson(world, job["seed"], anchors=options.pop("anchors", False))
    marks = methods.train(model, taught, **options)
    path = _path(job)
    path.with_suffix(".partial").write_text(json.dumps(marks))
    path.with_suffix(".partial").rename(path)
    return path


def _path(job: dict) -> Path:
    """By what is run, not by its label: settings that several comparisons share are run once."""
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (base, corpus, muon, lesson, methods)]
    asked = json.dumps([job["method"], job["seed"], job["options"], *sources], sort_keys=True)
    return RUNS / f"{job['method']}-{job['seed']}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four methods, two seeds, 60 steps; prints only")
    parser.add_argument("--headline", action="store_true", help="RMSD and OPSD, five seeds, continued; prints only")
    parser.add_argument("--ablations", action="store_true", help="these too, after the rest")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    RUNS.mkdir(parents=True, exist_ok=True)
    base.load(RUNS)
    if options.quick:
        results = run_all(quick(), options.processes)
        print(report.main_table(results))
        return
    if options.headline:
        jobs = compared(list(HEADLINE), HEADLINE, SEEDS) + continued(list(HEADLINE), HEADLINE, SEEDS)
        print(report.told_table(told(SEEDS)), report.main_table(run_all(jobs, options.processes)), sep="\n\n")
        return
    tuned = run_all(tuning(list(methods.METHODS), TUNING_SEEDS), options.processes)
    rates = best_rates(tuned)
    print("learning rates:", rates, flush=True)
    results = run_all(compared(list(methods.METHODS), rates, SEEDS), options.processes)
    report.write(report.compared(told(SEEDS), tuned, rates, results, EARLY))
    after = run_all(continued(CONTINUED, rates, SEEDS), options.processes)
    report.write(report.continued(results, after))
    if options.ablations:
        report.write(report.ablated(run_all(ablations(rates, SEEDS[:3]), options.processes)))


if __name__ == "__main__":
    main()
