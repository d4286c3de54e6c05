"""Trains a real model for 30 steps by each method, at the default learning rate and at three times it, and prints what
became of it: what it learned, what it kept, and its signs of health.

    python -m benchmarks.real                      # or `make real`
    python -m benchmarks.real --seeds 0 1 2 --only rmsd rmsd-3x
    python -m benchmarks.real --replay             # runs nothing; the limits of health beside runs that are kept

Every run is `rmsd train recipes/qwen_coder_pinapple.yaml` with the changes that RUNS lists. A run that is there is
read, and one that was interrupted is continued. With --set it is a trial, with a folder of its own, and docs/real stays
as it is. On one AVX2 core a step takes about a minute.
"""

import argparse
import gc
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import mean

from rmsd.answers.prompts import encode
from rmsd.answers.rollout import eos_ids_of, generate, pad_id_of
from rmsd.models.loading import load_model
from rmsd.run import human_eval
from rmsd.run.recipe import load_recipe
from rmsd.tasks import house_tool, pinapple
from rmsd.training.config import LORA_LEARNING_RATE
from rmsd.training.health import SIGNS, START, WINDOW, find_collapse, mean_of
from rmsd.training.record import read_lines

from . import keeping
from .pages import fill

RECIPE, TASK = "recipes/qwen_coder_pinapple.yaml", "benchmarks/hinted.py"
THRICE = f"train.learning_rate={3 * LORA_LEARNING_RATE:g}"
# The one phrasing of the hint that this model obeys, as `rmsd preflight` finds; anchors in place of other hints.
OBEYED = [
    "task=benchmarks/obeyed.py",
    THRICE,
    "train.lr_scheduler_type=constant_with_warmup",
    "train.warmup_steps=2",
    "train.sampling_temperature=0.7",
]
# A task that this model obeys when it is told, with the demo's settings: what is taught is a word nobody has seen.
TOOL = [
    "task=house_tool",
    THRICE,
    "train.max_steps=40",
    "train.lr_scheduler_type=constant_with_warmup",
    "train.warmup_steps=2",
    "train.divergence=jsd",
    "train.vocab_topk=null",
    "train.threshold=0.1",
    "train.sampling_temperature=0.5",
    "train.max_completion_length=24",
]
RUNS = {
    "rmsd": [],
    "opsd": ["method=opsd"],
    "rmsd-3x": [THRICE],
    "opsd-3x": ["method=opsd", THRICE],
    # As `rmsd-3x`, whose rate falls to 0 over its few steps, but for that.
    "rmsd-constant": [THRICE, "train.lr_scheduler_type=constant"],
    "rmsd-guided": ["train.guided_rollouts=0.25"],
    "rmsd-obeyed": [*OBEYED, "train.divergence=forward_kl"],
    "rmsd-obeyed-reverse": OBEYED,
    "tool-opsd": [*TOOL, "method=opsd"],
    "tool-rmsd": TOOL,
    "tool-rmsd-context": [*TOOL, "judge.kind=context"],
    # What the watch is for: the mass outside the top k left out of the loss. The run is to stop by itself.
    "rmsd-drop": [THRICE, "train.tail=drop"],
}
DEFAULT = list(RUNS)[:4]
FACTS = {  # which the base model knows, by the word of a right answer
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Japan?": "Tokyo",
    "Which language is spoken in Brazil?": "Portuguese",
    "Which ocean lies between Europe and America?": "Atlantic",
    "What is the chemical symbol for gold?": "Au",
    "Who wrote Hamlet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Vinci",
    "Who developed the theory of relativity?": "Einstein",
}
QUESTIONS = (*FACTS, "What fruit is Hawaii famous for?")
KEPT = (  # of a log entry
    "step",
    "loss",
    "divergence",
    "student_entropy",
    "tail_mass",
    "repetition",
    "clipped_share",
    "kept_tokens",
    "rollout_tokens",
    "grad_norm",
    "learning_rate",
)
COUNTED = ("told", "told_with_word", "anchors", "anchors_with_word")
DOCS = Path("docs/real")
KEPT_RUNS = Path("tests/data/health")
SET = "a trial: its marks are kept in RUNS/marks, and no page is written"  # of `--set`, wherever it is taken
# What training itself ends in: marks of the method. A full disk, a judge that is gone are none.
ENDS = ("training has collapsed", "the gradient was not finite")


def trial(overrides: list[str]) -> str:
    """What ends the name of a run with a caller's own overrides, and of its marks, so that it is never taken for a run
    without, or with others."""
    return f"-set-{hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]}" if overrides else ""


def marks_folder(docs: Path, runs: Path, overrides: list[str]) -> Path:
    """Where marks are kept: of a trial beside its run."""
    return runs / "marks" if overrides else docs


@keeping.killed_as_interrupted()
def train(run: Path, overrides: list[str], recipe: str = RECIPE) -> str | None:
    """The line that it ended in, where training went wrong.

    Raises:
        RuntimeError: it ended for another reason. Asked for again, it goes on.
    """
    command = [sys.executable, "-m", "rmsd", "train", recipe, f"output_dir={run}", "resume=true"]
    with (run.parent / f"{run.name}.log").open("w") as output:
        done = subprocess.run([*command, *overrides], stdout=output, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines()
    said = [line.removeprefix("rmsd: ") for line in lines if line.startswith("rmsd: ")]
    if said and said[-1].startswith(ENDS):
        return said[-1]
    raise RuntimeError(f"{run} ended with {done.returncode}: {(said or lines or ['no word'])[-1]}")


def check(model, tokenizer, count: int) -> dict:
    """What the model answers, and how many of HumanEval's first problems it solves."""
    eos_ids = eos_ids_of(model, tokenizer)
    prompts = [encode(tokenizer, question) for question in QUESTIONS]
    options = dict(max_new_tokens=32, pad_id=pad_id_of(tokenizer, eos_ids), eos_ids=eos_ids, temperature=0.0)
    said = generate(model, prompts, **options)
    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(said.completion_ids, said.completion_mask, strict=True)
    ]
    checked = {"answers": dict(zip(QUESTIONS, texts, strict=True))}
    if count:
        asked = human_eval.problems(count)
        passed = human_eval.pass_at_1(model, tokenizer, asked)["humaneval"]
        checked["human_eval"] = f"{round(passed * len(asked))} of {len(asked)}"
    return checked


def checked(run: Path, name: str, count: int) -> dict:
    """Of the run's model, or of the base model `name` where the run has none; kept beside it, with that name, as one
    folder of runs may see several base models."""
    path = run / f"check-{count}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("model") != name:
        model, tokenizer = load_model(name)
        if (run / "model").exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, run / "model").merge_and_unload()
        found = {"model": name, **check(model.eval(), tokenizer, count)}
        keeping.write(path, json.dumps(found, indent=1))
        del model
        gc.collect()
    return {key: value for key, value in found.items() if key != "model"}


def marks(run: Path, name: str, seed: int, ended: str | None, after: dict) -> dict:
    lines = read_lines(run / "metrics.jsonl")
    steps = [{key: _rounded(line[key]) for key in KEPT if key in line} for line in lines if line["kind"] == "train"]
    task = house_tool.TASK if is_tool(name) else pinapple.TASK
    counts = written(run, task.leaks)
    steps = [step | counts.get(step["step"], {}) for step in steps]  # of a step that ended the run there is no entry
    evaluations = [{k: _rounded(v) for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "eval"]
    return dict(run=name, seed=seed, overrides=RUNS[name], ended=ended, evaluations=evaluations, steps=steps, **after)


def is_tool(name: str) -> bool:
    return RUNS[name][: len(TOOL)] == TOOL


def written(run: Path, has_word: Callable[[str], bool]) -> dict[int, dict[str, int]]:
    """By step, of the student's rollouts: how many had a hint and how many of those write the word, and of anchors."""
    counts: dict[int, Counter[str]] = {}
    for rollout in read_lines(run / "rollouts.jsonl"):
        kind = "told" if rollout["privileged_context"].strip() else "anchors"
        writes = has_word("".join(rollout["tokens"]))
        counts.setdefault(rollout["step"], Counter()).update({kind: 1, f"{kind}_with_word": int(writes)})
    return {step: dict(of_step) for step, of_step in counts.items()}


def word_table(found: list[dict]) -> str:
    """Markdown: of the runs that are told what is obeyed, how many rollouts of five steps write the word."""
    rows = [("run", "seed", "steps", "rows with a hint", "anchors", "kept tokens a step"), ["---"] * 6]
    for one in found:
        if not is_tool(one["run"]) and RUNS[one["run"]][: len(OBEYED)] != OBEYED:
            continue
        for first in range(0, len(one["steps"]), 5):
            steps = one["steps"][first : first + 5]
            total = {kind: sum(step.get(kind, 0) for step in steps) for kind in (*COUNTED, "kept_tokens")}
            shares = [f"{total[f'{kind}_with_word']} of {total[kind]}" for kind in ("told", "anchors")]
            span = f"{steps[0]['step']} to {steps[-1]['step']}"
            rows.append([one["run"], str(one["seed"]), span, *shares, f"{total['kept_tokens'] / len(steps):.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


COLUMNS = (
    "run",
    "seed",
    "steps",
    "target",
    "specificity",
    "drift",
    "tail mass",
    "repetition",
    "entropy",
    "HumanEval",
    "facts",
)


def table(found: list[dict], base: dict) -> str:
    """Markdown, a row a run. Of a sign of health: the mean of the first steps and of the last."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    blank = [""] * 3
    targets = {f"{one[0]['target_greedy']:.2f}" for one in map(itemgetter("evaluations"), found) if one}
    before = ", ".join(sorted(targets))
    rows.append(["before training", "", "0", before, *blank, "", "", base.get("human_eval", ""), _facts(base)])
    for one in found:
        last = one["evaluations"][-1] if one["evaluations"] and not one["ended"] else {}
        graded = [f"{last[name]:.2f}" if name in last else "" for name in ("target_greedy", "specificity", "drift")]
        signs = [_from_to(one["steps"], name) for name in ("tail_mass", "repetition", "student_entropy")]
        steps = f"{one['steps'][-1]['step']}{', stopped' if one['ended'] else ''}"
        rows.append([one["run"], str(one["seed"]), steps, *graded, *signs, one.get("human_eval", ""), _facts(one)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _from_to(steps: list[dict], name: str) -> str:
    values = [entry[name] for entry in steps if name in entry]
    return f"{mean(values[:START]):.3f} to {mean(values[-WINDOW:]):.3f}" if values else ""


def _facts(one: dict) -> str:
    answers = one.get("answers", {})
    asked = [question for question in FACTS if question in answers]
    return f"{sum(FACTS[question] in answers[question] for question in asked)} of {len(asked)}" if asked else ""


def problems_of(marks: dict) -> int:
    """Of HumanEval, that a model was asked: 20 of "13 of 20"."""
    return int(marks.get("human_eval", "0").rpartition(" ")[2])


def write(found: list[dict], base: dict, folder: Path, suffix: str = "") -> None:
    """The JSON of every run, and of the base model."""
    for one in found:
        path = folder / f"{one['run']}-{one['seed']}{suffix}.json"
        one = _with_kept_mark(one, path)
        text = json.dumps({**one, "steps": None}, indent=1, ensure_ascii=False)
        steps = ",\n  ".join(json.dumps(entry) for entry in one["steps"])
        text = text.replace('"steps": null', f'"steps": [\n  {steps}\n ]')
        keeping.write(path, text + "\n")
    path = folder / "base.json"
    keeping.write(path, json.dumps(_with_kept_mark(base, path), indent=1, ensure_ascii=False) + "\n")


def _with_kept_mark(made: dict, path: Path) -> dict:
    """With HumanEval's mark from the file, where that is of the same model and of more problems: who asks for none this
    time does not take it back."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    is_same = all(before.get(name) == made.get(name) for name in ("answers", "steps", "evaluations"))
    return {**made, "human_eval": before["human_eval"]} if is_same and problems_of(before) > problems_of(made) else made


def rewrite() -> None:
    """docs/real.md's tables, from what docs/real/ holds."""
    base = json.loads((DOCS / "base.json").read_text(encoding="utf-8")) if (DOCS / "base.json").exists() else {}
    found = [json.loads(path.read_text(encoding="utf-8")) for path in DOCS.glob("*.json") if path.stem != "base"]
    found.sort(key=lambda one: (list(RUNS).index(one["run"]), one["seed"]))
    fill(DOCS.with_suffix(".md"), {"table": table(found, base), "word": word_table(found)})


def replayed(path: Path) -> list[str]:
    """A row of the table of docs/real.md's limits: the sign's start and its furthest mean of five steps, of a run that
    is kept for the tests, and where it would have been stopped."""
    run = json.loads(path.read_text(encoding="utf-8"))
    steps = run["steps"]
    found = next(filter(None, (find_collapse(steps[: i + 1]) for i in range(len(steps)))), None)
    cells = []
    for sign in SIGNS:
        at = [entry["step"] for entry in steps if sign.name in entry]
        if not at:
            cells.append("")
            continue
        start = mean_of(steps, sign.name, at[0], at[0] + START)
        means = [mean_of(steps, sign.name, step - WINDOW + 1, step + 1) for step in at if step >= at[0] + START]
        cells.append(f"{start:.3f}, {(min if sign.falls else max)(means):.3f}")
    return [path.stem, *cells, f"step {found.step}, {found.sign.name}" if found else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=DEFAULT, metavar="RUN", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--model", default=load_recipe(RECIPE).model, help="a folder, in place of the recipe's name")
    parser.add_argument("--human-eval", type=int, default=20, metavar="N", help="problems; 0 for none")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="section.key=value", help=SET)
    parser.add_argument("--no-write", action="store_true", help="print alone; docs/real stays")
    parser.add_argument("--replay", action="store_true", help="run nothing; the watch's limits beside the kept runs")
    options = parser.parse_args()
    if options.replay:
        heads = ["run", *(sign.name for sign in SIGNS), "stopped"]
        for row in (heads, ["---"] * len(heads), *map(replayed, sorted(KEPT_RUNS.glob("*.json")))):
            print("| " + " | ".join(row) + " |")
        return
    try:
        if options.human_eval:
            human_eval.problems(0)
        base = checked(options.runs / "base", options.model, options.human_eval)
    except FileNotFoundError as error:
        print(f"skipped, nothing is run: {error}")
        return
    found, suffix = [], trial(options.overrides)
    for name, seed in product(options.only, options.seeds):  # before hours are spent
        asked = load_recipe(RECIPE, [f"model={options.model}"])
        keeping.check(options.runs / f"{name}-{seed}{suffix}", asked, keys=["model"])
    for seed in options.seeds:
        for name in options.only:
            run = options.runs / f"{name}-{seed}{suffix}"
            said = run / "ended"  # a run that went wrong has no model, and is not to go wrong again
            ended = said.read_text(encoding="utf-8") if said.exists() else None
            if not ended and not (run / "model").exists():
                overrides = [f"model={options.model}", f"task={TASK}", f"seed={seed}", *RUNS[name], *options.overrides]
                if ended := train(run, overrides):
                    keeping.write(said, ended)
            after = {} if ended else checked(run, options.model, options.human_eval)
            found.append(marks(run, name, seed, ended, after))
            print(table(found[-1:], base).splitlines()[-1], ended or "", flush=True)
            if not options.no_write:
                write(found, base, marks_folder(DOCS, options.runs, options.overrides), suffix)
                if not options.overrides:
                    rewrite()
    print(table(found, base))


if __name__ == "__main__":
    main()
