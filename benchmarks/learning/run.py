"""The learning suite: pre-trains base models, runs every method on every seed at each learning rate, and writes
docs/learning_tables.md's tables and figures.

    python -m benchmarks.learning.run             # the comparison: 40 to 90 minutes on two cores
    python -m benchmarks.learning.run --ablations # what each choice of RMSD does: two thirds of that after it
    python -m benchmarks.learning.run --ablations optimizer "rollout length"    # of these choices alone
    python -m benchmarks.learning.run --seeds 20  # a longer comparison with intervals half as wide
    python -m benchmarks.learning.run --quick     # minutes: one base, four methods, 60 steps, the same code; prints
    python -m benchmarks.learning.run --labels oracle.jsonl   # seconds, once seed 0's base model is there: what the
                                                  # oracle says of its answers, and how right other judges are

A seed is a base model of its own and a lesson of its own. Each run is a JSON file under runs/learning; one that is
there is not run again, so an interrupted suite goes on where it was.
"""

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils import logging

from rmsd.judge import measure

from ..pages import fill
from . import base, corpus, labels, lesson, methods, muon, report
from .ablations import ABLATED, GROUPS
from .ablations import LEARNING_RATE as ABLATION_RATE
from .ablations import STEPS as ABLATION_STEPS
from .marks import until_drift

RUNS = Path("runs/learning")
STEPS, CONTINUATION, EVERY = 150, 100, 10
EARLY, QUICK_STEPS = 60, 60
MOST_SEEDS = 20
RATES = [1e-4, 3e-4]  # at 3e-5 OPSD has not begun in these steps, at 1e-3 every method loses skills
CONTINUED = [name for name in methods.METHODS if name not in ("sft_templates", "rl")]
QUICK = ["sft_own", "opsd", "rmsd_context", "rmsd_context_anchors"]
LABELLED = 40  # answers
QUICK_THREADS = 2  # its one base has both cores, where the comparison pre-trains two at a time


def job(
    method: str,
    seed: int,
    learning_rate: float,
    label: str = "",
    pretraining: dict | None = None,
    max_drift: float | None = None,
    **options,
) -> dict:
    """`pretraining`: base.load's options, where its base model is to be another than the comparison's. `max_drift` ends
    a run as training.forgetting.DriftLimit would: up to there it is the run without, so that is the one that is run."""
    options = {**methods.METHODS[method], "steps": STEPS, "every": EVERY, "learning_rate": learning_rate, **options}
    return dict(
        label=label or method,
        method=method,
        seed=seed,
        pretraining=pretraining or {},
        max_drift=max_drift,
        options=options,
    )


def compared(seeds: list[int]) -> list[dict]:
    """Every method at each rate, continued where there is a teacher to continue. A reward that is never earned teaches
    the same at any rate."""
    continued = {name: dict(continuation=CONTINUATION) if name in CONTINUED else {} for name in methods.METHODS}
    return [
        job(name, seed, rate, **options)
        for name, options in continued.items()
        for rate in (RATES if name != "rl" else RATES[-1:])
        for seed in seeds
    ]


def ablations(seeds: list[int], groups: list[str] = ()) -> list[dict]:
    """Of the groups of settings that are named, or of all."""
    jobs = []
    for group in groups or GROUPS:
        for setting, options in GROUPS[group].items():
            asked = dict(of=ABLATED, learning_rate=ABLATION_RATE, steps=ABLATION_STEPS, every=ABLATION_STEPS // 2)
            asked |= dict(options, label=f"{group}: {setting}")
            method = asked.pop("of")
            jobs += [job(method, seed, **asked) for seed in seeds]
    return jobs


def quick() -> list[dict]:
    """OPSD beside RMSD, and a supervised baseline, on one base, at a rate that shows something in so few steps."""
    asked = dict(steps=QUICK_STEPS, pretraining=dict(threads=QUICK_THREADS))
    return [job(name, seed, RATES[-1], **asked) for name in QUICK for seed in (0, MOST_SEEDS)]


def told(seed: int) -> dict:
    """Marks of the seed's base model, made if need be, when it reads the hint: the teacher before any continuation."""
    model, world = _base(seed)
    return {"seed": seed, **lesson.Exam(model, lesson.Lesson(world, seed).told())(model)}


def label(path: Path, seed: int = 0) -> None:
    """Writes what the oracle says of answers of the seed's base model, made if need be, and prints how right the judges
    are that need no model."""
    model, world = _base(seed)
    taught = lesson.Lesson(world, seed)
    with contextlib.redirect_stdout(None):  # Trainer's line a step
        labelled = labels.labelled(model, taught, LABELLED)
    measure.save(path, labelled)
    print(labels.table(taught, labelled))


def run_all(jobs: list[dict], processes: int) -> list[dict]:
    """Results of the jobs, in order, from disk where they are there; a continued run's after the same without."""
    missing = list({_path(job): job for job in jobs if not _path(job).exists()}.values())
    bases = {json.dumps([job["seed"] % MOST_SEEDS, job["pretraining"]]): job for job in missing}
    list(each(_pretrain, list(bases.values()), processes))  # before two runs want the same one
    for done, (path, seconds) in enumerate(each(_run, missing, processes), 1):
        print(f"{done}/{len(missing)} {path.stem}, {seconds:.0f} s", flush=True)
    found = [(job, json.loads(_path(job).read_text())) for job in jobs]
    return [
        {**job, "label": job["label"] + suffix, "marks": until_drift(marks[suffix], job["max_drift"])}
        for suffix in ("", "+")
        for job, marks in found
        if suffix in marks
    ]


def each(work: Callable, items: list, processes: int):
    """(result, seconds since the first began) of each item, as they are done, in processes of one thread each: two
    threads would wait for each other at every small product."""
    started = time.monotonic()
    with get_context("spawn").Pool(processes, initializer=_prepare) as pool:
        for result in pool.imap_unordered(work, items):
            yield result, time.monotonic() - started


def _prepare() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # in the main process too: their number decides a base model's last bits
    logging.disable_progress_bar()  # of loading 29 small tensors
    logging.set_verbosity_error()  # not that a tied head is missing from a checkpoint, once a run


def _base(seed: int, **options):
    return base.load(RUNS, seed % MOST_SEEDS, **options)


def _pretrain(job: dict) -> None:
    _base(job["seed"], **job["pretraining"])


def _run(job: dict) -> Path:
    model, world = _base(job["seed"], **job["pretraining"])
    options = dict(job["options"])
    taught = lesson.Lesson(world, job["seed"], anchors=options.pop("anchors", False))
    if options["kind"] == "distil":
        options.setdefault("on_collapse", "warn")  # a model that collapses is marked like any other
    with contextlib.redirect_stdout(None):  # Trainer's line a step, of 150 a run
        marks = methods.train(model, taught, **options)
    path = _path(job)
    path.with_suffix(".partial").write_text(json.dumps(marks))
    path.with_suffix(".partial").rename(path)
    return path


def _path(job: dict) -> Path:
    """By what is run, not by its label: settings that several comparisons share are run once."""
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (base, corpus, muon, lesson, methods)]
    asked = json.dumps([job["method"], job["seed"], job["pretraining"], job["options"], *sources], sort_keys=True)
    return RUNS / f"{job['method']}-{job['seed']}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four methods, two lessons, 60 steps; prints only")
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        choices=range(2, MOST_SEEDS + 1),
        metavar="N",
        help="how many, 5 where nothing is said; the ablations take 3 at most",
    )
    parser.add_argument(
        "--ablations",
        nargs="*",
        choices=GROUPS,
        metavar="GROUP",
        help=f"one choice at a time, in place of the comparison: all of them, or of {', '.join(GROUPS)}",
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="write the oracle's answers there; trains nothing")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    _prepare()
    RUNS.mkdir(parents=True, exist_ok=True)
    ablated = options.ablations is not None
    started, seeds = time.monotonic(), list(range(min(options.seeds, 3) if ablated else options.seeds))
    if options.labels:
        label(options.labels)
        return
    if options.quick:
        print(report.main_table(run_all(quick(), options.processes)))
        return
    teachers = sorted((marks for marks, _ in each(told, seeds, options.processes)), key=lambda marks: marks["seed"])
    if ablated:
        fill(report.PAGE, report.ablated(run_all(ablations(seeds, options.ablations), options.processes)))
    else:
        fill(report.PAGE, report.compared(teachers, run_all(compared(seeds), options.processes), EARLY))
    print(f"the suite took {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
