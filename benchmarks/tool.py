"""RMSD beside other ways to teach a tool that only a manual knows: the same model, rows, steps, batch and rate.

    python -m benchmarks.tool                                     # each method on seed 1: an hour of a core each
    python -m benchmarks.tool --only opsd sft rl --seeds 1 2 3
    python -m benchmarks.tool --model FOLDER --runs FOLDER --human-eval 0 --set train.max_steps=4    # a trial
    python -m benchmarks.tool --table                             # run nothing: docs/real.md's tables from what is kept

A run is a folder under runs/tool and a file of marks under docs/episodes, written as it ends. A run that has its file
is not run again, and one that was interrupted goes on from its last checkpoint. With --set it is a trial: its folder
has a name of its own, its marks are kept in runs/tool/marks, and no page is written.

- `rmsd` and `opsd` are `rmsd train recipes/legacy_api.yaml`, the latter with method=opsd.
- `sft` is trained on what a person writes who has the manual beside him: of each training request the right call, in
  the chat template's own form, and a closing sentence. The manual is in none of it. Anchors are answered by the model
  itself, so that nothing is taught there.
- `rl` is TRL's GRPO with the service as its environment: the reward is the service's own, a step is one row, and its
  group is as large as the others' batch.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

from rmsd.answers.environments import Environments
from rmsd.answers.prompts import Prompts, is_told
from rmsd.answers.turns import TurnSuffix
from rmsd.run import human_eval
from rmsd.run.recipe import Recipe, load_recipe, trainer_config
from rmsd.tasks import load_task

from . import keeping, real
from .episodes import counted
from .episodes import table as episodes_table
from .pages import fill
from .proof import baselines
from .proof.run import spent

RECIPE, PAGE, DOCS = "recipes/legacy_api.yaml", Path("docs/real.md"), Path("docs/episodes")
METHODS = {
    "rmsd": "RMSD",
    "opsd": "OPSD",
    "sft": "SFT on the right calls",
    "rl": "RL by the service's reward",
}
SAID = "It is done."  # once the service has said "ok"


def right_call(row: dict) -> dict:
    """What solves a request of legacy_api, as the manual writes it."""
    method, *args = row["wanted"]
    return {"name": "rpc", "arguments": {"method": method, "args": args}}


def demonstration(row: dict, prompts: Prompts, suffix: TurnSuffix) -> dict:
    """A request's episode as a person writes it: input_ids, and labels that are -100 where the model would read."""
    tokenizer = prompts.tokenizer
    asked = [{"role": "user", "content": row["prompt"]}]
    answered = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": right_call(row)}]}
    render = partial(tokenizer.apply_chat_template, tools=prompts.tools(row), tokenize=False)
    before = render(asked, add_generation_prompt=True)
    called, _, _ = render([*asked, answered]).removeprefix(before).partition(tokenizer.eos_token)
    ended = partial(tokenizer, add_special_tokens=False)
    turns = [  # ids, and whether the model writes them
        (prompts.student(row), False),
        (ended(called + tokenizer.eos_token)["input_ids"], True),
        (suffix([{"role": "tool", "name": "rpc", "content": "ok"}]), False),
        (ended(SAID + tokenizer.eos_token)["input_ids"], True),
    ]
    return dict(
        input_ids=[id for ids, _ in turns for id in ids],
        labels=[id if written else -100 for ids, written in turns for id in ids],
    )


def examples(model, tokenizer, args, *, task, seed: int) -> list[dict]:
    """What `sft` trains on, a row each."""
    environments = Environments(environment_factory=task.environment)
    prompts = Prompts(tokenizer, tools=environments.schemas)
    suffix = TurnSuffix(tokenizer, environments.all_schemas[0])
    told = [row for row in task.train if is_told(row)]
    anchors = [prompts.student(row) for row in task.train if not is_told(row)]
    own = baselines.own_answers(model, tokenizer, anchors, seed, max_new_tokens=args.max_completion_length)
    return [demonstration(row, prompts, suffix) for row in told] + [
        dict(input_ids=read + written, labels=[-100] * len(read) + written)
        for read, written in zip(anchors, own, strict=True)
    ]


def of_text(environment: type) -> type:
    """The environment, with its row as JSON: a table has one type a column, and a call's arguments are of several."""

    class OfText(environment):
        def reset(self, row: str, **_):
            return super().reset(**json.loads(row))

    return OfText


def train(method: str, recipe: Recipe, run: Path) -> None:
    task = load_task(recipe.task)
    if method == "sft":
        baselines.fine_tune(recipe, run, partial(examples, task=task, seed=recipe.seed))
        return
    rows = [dict(prompt=[{"role": "user", "content": row["prompt"]}], row=json.dumps(row)) for row in task.train]
    group = trainer_config(recipe, run).per_device_train_batch_size
    baselines.reinforce(recipe, run, rows, num_generations=group, environment_factory=of_text(task.environment))


def kept(method: str, seed: int, runs: Path, overrides: list[str]) -> Path:
    """The file of a run's marks."""
    name = f"legacy_api-{'' if method == 'rmsd' else f'{method}-'}{seed}{real.trial(overrides)}.json"
    return real.marks_folder(DOCS, runs, overrides) / name


@keeping.killed_as_interrupted()
def run(method: str, seed: int, runs: Path, model: str, problems: int, overrides: list[str]) -> dict:
    """A run's marks; trained and checked where they are not there."""
    path, folder = kept(method, seed, runs, overrides), runs / f"{method}-{seed}{real.trial(overrides)}"
    settings = [f"seed={seed}", f"model={model}", *overrides]
    keeping.check(folder, load_recipe(RECIPE, settings), keys=["model"])
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    runs.mkdir(parents=True, exist_ok=True)
    began, ended = time.monotonic(), None
    try:
        if not (folder / "model").exists():
            if method in ("rmsd", "opsd"):
                ended = real.train(folder, [f"method={method}", *settings], RECIPE)
            else:
                train(method, load_recipe(RECIPE, [f"output_dir={folder}", *settings]), folder)
    finally:
        seconds = spent(folder, time.monotonic() - began)
    after = {} if ended else real.checked(folder, load_recipe(folder / "recipe.yaml").model, problems)
    marks = dict(counted(folder), method=method, ended=ended, seconds=round(seconds), **after)
    keeping.write(path, json.dumps(marks, indent=1, ensure_ascii=False) + "\n")
    return marks


def table(found: list[dict], base: dict) -> str:
    """Markdown, a row a run; before training once."""
    heads = ("method", "seed", "steps", "solved", "refused calls", "specificity", "drift", "HumanEval", "minutes")
    rows = [heads, ["---"] * len(heads)]
    if found:
        rows.append(["before training", "", *_graded(found[0]["evaluations"][0], base), ""])
    for one in sorted(found, key=lambda one: (list(METHODS).index(one["method"]), one["seed"])):
        minutes = f"{one['seconds'] / 60:.0f}" if "seconds" in one else ""
        ended = [f"ended: {one['ended']}", "", "", "", "", ""] if one.get("ended") else None
        rows.append(
            [METHODS[one["method"]], str(one["seed"]), *(ended or _graded(one["evaluations"][-1], one)), minutes]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _graded(evaluation: dict, checked: dict) -> list[str]:
    marks = [evaluation[name] for name in ("solved_greedy", "tool_errors_greedy", "specificity")]
    drift = f"{evaluation['drift'] + 0.0:.3f}".replace("-0.000", "0.000")
    return [str(evaluation["step"]), *(f"{mark:.2f}" for mark in marks), drift, checked.get("human_eval", "")]


def rewrite() -> None:
    """docs/real.md's tables of the tool, from the marks that are kept."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(DOCS.glob("legacy_api-*.json"))]
    base = json.loads((real.DOCS / "base.json").read_text(encoding="utf-8"))
    ours = [one for one in found if one["method"] == "rmsd"]
    fill(PAGE, {"tool": table(found, base), "episodes": episodes_table(ours)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--model", default=load_recipe(RECIPE).model, help="a folder, in place of the recipe's name")
    parser.add_argument("--human-eval", type=int, default=20, metavar="N", help="problems; 0 for none")
    parser.add_argument("--runs", type=Path, default=Path("runs/tool"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="section.key=value", help=real.SET)
    parser.add_argument("--table", action="store_true", help="run nothing: write docs/real.md's tables")
    options = parser.parse_args()
    if options.human_eval and not options.table:
        human_eval.problems(0)  # before hours are spent
    if "rl" in options.only and not options.table:
        baselines.check_packages()
    for seed in [] if options.table else options.seeds:
        for method in options.only:
            marks = run(method, seed, options.runs, options.model, options.human_eval, options.overrides)
            print(f"{method}, seed {seed}: {marks.get('ended') or marks['evaluations'][-1]}", flush=True)
            if not options.overrides:
                rewrite()
    if options.table:
        rewrite()


if __name__ == "__main__":
    main()
