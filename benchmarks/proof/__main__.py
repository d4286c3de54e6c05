"""See the package."""

import argparse
from functools import partial
from pathlib import Path

from rmsd.run import human_eval
from rmsd.run.recipe import load_recipe

from .. import real
from . import __doc__ as usage
from . import baselines
from .methods import METHODS, PROBLEMS, SEEDS, ordered
from .run import chosen_rate, jobs, kept_marks, quick_jobs, run
from .table import rewrite, table


def main() -> None:
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two runs of 30 steps")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--plan", action="store_true", help="run nothing: say what is there")
    parser.add_argument("--table", action="store_true", help="run nothing: write docs/proof.md's table")
    parser.add_argument(
        "--model", default=load_recipe(real.RECIPE).model, help="a folder, in place of the recipe's name"
    )
    parser.add_argument(
        "--human-eval",
        type=int,
        default=PROBLEMS,
        metavar="N",
        help="problems; 0 for none. The table shows a run's share of all of them, once it was asked them",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/proof"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="section.key=value", help=real.SET)
    options = parser.parse_args()
    if options.table:
        rewrite()
        return
    marks_of = partial(kept_marks, runs=options.runs, overrides=options.overrides)
    asked = quick_jobs() if options.quick else jobs(options.only, options.seeds, marks_of)
    if options.plan:
        plan = [asked] if options.quick else [jobs([name], options.seeds, marks_of) for name in ordered(options.only)]
        for of_method in plan:
            for job in of_method:
                print(job.name, "done" if marks_of(job) else "to run")
            if not options.quick and chosen_rate(job.method, marks_of) is None:
                for seed in options.seeds:
                    print(f"{job.method}-RATE-{seed} to run, at the better of the two rates")
        return
    if any(METHODS[name].kind.startswith("rl") for name in ([] if options.quick else ordered(options.only))):
        baselines.check_packages()
    if options.human_eval:
        human_eval.problems(0)  # before hours are spent
        print("before training:", real.checked(options.runs / "base", options.model, options.human_eval)["human_eval"])
    for job in asked:
        marks = run(job, options.runs, options.model, options.human_eval, options.overrides)
        print(f"{job.name}: {marks['ended'] or marks['evaluations'][-1]}", flush=True)
        if not options.overrides:
            rewrite()
    if not options.overrides:
        print(table())


if __name__ == "__main__":
    main()
