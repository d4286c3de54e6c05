"""The learning suite: pre-trains base models, tunes every method's learning rate on lessons of its own, runs every
method on the lessons that count, and writes docs/learning.md's tables and figures.

    python -m benchmarks.learning.run             # the comparison: up to an hour on two cores
    python -m benchmarks.learning.run --ablations # what each choice of RMSD does: half an hour after it
    python -m benchmarks.learning.run --seeds 20  # a longer comparison with intervals half as wide
    python -m benchmarks.learning.run --quick     # minutes: one base, four methods, 60 steps, the same code; prints

A seed is a base model of its own and a lesson of its own. Each run is a JSON file under runs/learning; one that is
there is not run again, so an interrupted suite goes on where it was.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from . import base, corpus, lesson, methods, muon, report
from .ablations import ABLATED, GROUPS
from .ablations import STEPS as ABLATION_STEPS

RUNS = Path("runs/learning")
STEPS, CONTINUATION, EVERY = 150, 100, 10
EARLY, QUICK_STEPS = 60, 60
MOST_SEEDS = 20
TUNING_SEEDS = [20, 21]  # lessons that no comparison teaches, on the first two bases
RATES = [3e-5, 1e-4, 3e-4]
ANCHORED_RATES = [1e-4, 3e-4, 1e-3]  # what anchors undo leaves room for a higher one
RL_RATES = [3e-4]  # a reward that is never earned teaches the same at any rate
FASTER, FASTER_OF = 3e-4, ["opsd", "rmsd_context", "rmsd_oracle"]  # the published setting at one rate for all
CONTINUED = [name for name in methods.METHODS if name not in ("sft_templates", "rl")]
QUICK = ["sft_own", "opsd", "rmsd_context", "rmsd_context_anchors"]


def job(method: str, seed: int, learning_rate: float, label: str = "", **options) -> dict:
    options = {**methods.METHODS[method], "steps": STEPS, "every": EVERY, "learning_rate": learning_rate, **options}
    return dict(label=label or method, method=method, seed=seed, options=options)


def tuning(seeds: list[int]) -> list[dict]:
    return [
        job(name, seed, rate, every=STEPS)
        for name, options in methods.METHODS.items()
        for rate in (RL_RATES if name == "rl" else ANCHORED_RATES if "anchors" in options else RATES)
        for seed in seeds
    ]


def compared(rates: dict[str, float], seeds: list[int]) -> list[dict]:
    """The methods that `rates` names, continued where there is a teacher to continue."""
    continued = {name: dict(continuation=CONTINUATION) if name in CONTINUED else {} for name in rates}
    return [job(name, seed, rates[name], **options) for name, options in continued.items() for seed in seeds]


def ablations(rates: dict[str, float], seeds: list[int]) -> list[dict]:
    jobs = []
    for group, settings in GROUPS.items():
        for setting, options in settings.items():
            method = options.get("of", ABLATED)
            options = {name: value for name, value in options.items() if name != "of"}
            options |= dict(steps=ABLATION_STEPS, every=ABLATION_STEPS // 2, label=f"{group}: {setting}")
            jobs += [job(method, seed, rates[method], **options) for seed in seeds]
    return jobs


def quick() -> list[dict]:
    """OPSD beside RMSD, and a supervised baseline, on one base, at a rate that shows something in so few steps."""
    return [job(name, seed, FASTER, steps=QUICK_STEPS) for name in QUICK for seed in (0, MOST_SEEDS)]


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


def told(seed: int) -> dict:
    """Marks of the seed's base model, made if need be, when it reads the hint: the teacher before any continuation."""
    model, world = _base(seed)
    return {"seed": seed, **lesson.Exam(model, lesson.Lesson(world, seed).told())(model)}


def run_all(jobs: list[dict], processes: int) -> list[dict]:
    """Results of the jobs, in order, from disk where they are there; a continued run's after the same without."""
    missing = list({_path(job): job for job in jobs if not _path(job).exists()}.values())
    for done, (path, seconds) in enumerate(each(_run, missing, processes), 1):
        print(f"{done}/{len(missing)} {path.stem}, {seconds:.0f} s", flush=True)
    found = [(job, json.loads(_path(job).read_text())) for job in jobs]
    return [
        {**job, "label": job["label"] + suffix, "marks": marks[suffix]}
        for suffix in ("", "+")
        for job, marks in found
        if suffix in marks
    ]


def each(work: Callable, items: list, processes: int):
    """(result, seconds since the first began) of each item, as they are done, in processes of one thread each: two
    threads would wait for each other at every small product."""
    started = time.monotonic()
    with get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for result in pool.imap_unordered(work, items):
            yield result, time.monotonic() - started


def _base(seed: int):
    return base.load(RUNS, seed % MOST_SEEDS)


def _run(job: dict) -> Path:
    model, world = _base(job["seed"])
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
    parser.add_argument("--quick", action="store_true", help="four methods, two lessons, 60 steps; prints only")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, MOST_SEEDS + 1), metavar="N")
    parser.add_argument("--ablations", action="store_true", help="one choice at a time, in place of the comparison")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # in this process too: their number decides a base model's last bits
    RUNS.mkdir(parents=True, exist_ok=True)
    started, seeds = time.monotonic(), list(range(min(options.seeds, 3) if options.ablations else options.seeds))
    if options.quick:
        _base(0)
        print(report.main_table(run_all(quick(), options.processes)))
        return
    teachers = sorted((marks for marks, _ in each(told, seeds, options.processes)), key=lambda marks: marks["seed"])
    tuned = run_all(tuning(TUNING_SEEDS), options.processes)
    rates = best_rates(tuned)
    print("learning rates:", rates, flush=True)
    if options.ablations:
        report.write(report.ablated(run_all(ablations(rates, seeds), options.processes)))
    else:
        results = run_all(compared({name: rates[name] for name in methods.METHODS}, seeds), options.processes)
        report.write(report.compared(teachers, tuned, rates, results, EARLY))
        results = run_all(compared(dict.fromkeys(FASTER_OF, FASTER), seeds), options.processes)
        report.write({"faster": report.main_table(results), "faster paired": report.paired_table(results)})
    print(f"the suite took {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
