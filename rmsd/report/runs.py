"""Reads run directories, and groups runs that differ in nothing but their seed."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

METHODS = {"rmsd": "RMSD", "opsd": "OPSD"}
JUDGES = {"llm": "LLM"}
# Beginnings of keys that say where or how often a run wrote, or which seed it had, not what it did.
_INCIDENTAL = ("seed", "output_dir", "resume", "judge.cache", "judge.replay", "train.save_", "train.logging_")
_INCIDENTAL += ("train.disable_tqdm", "train.recorded_rollouts", "train.report_to", "train.run_name", "train.hub_")
_INCIDENTAL += ("train.push_to_hub",)


@dataclass
class Run:
    """One training run as its directory tells it."""

    path: Path
    recipe: dict[str, Any]
    train: list[dict[str, float]]  # in order of step, one entry a step
    evals: list[dict[str, float]]  # likewise
    rollouts: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)  # what was unreadable

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "rmsd"))

    @property
    def judge(self) -> str:
        judge = self.recipe.get("judge")
        return str(judge.get("kind", "context")) if isinstance(judge, dict) else "context"

    @property
    def seed(self) -> Any:
        return self.recipe.get("seed")


class Spread(NamedTuple):
    """A metric over the runs that have a finite value of it."""

    mean: float
    low: float
    high: float
    runs: int  # how many have one

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        return cls(sum(values) / len(values), min(values), max(values), len(values)) if values else None


@dataclass
class Series:
    """Runs of one configuration under different seeds: a line with its band."""

    label: str
    runs: list[Run]

    @property
    def members(self) -> str:
        """How many, as "3 seeds"; as "3 runs" where two of them had one seed or did not say."""
        seeds = {str(run.seed) for run in self.runs if run.seed is not None}
        noun = "seed" if len(seeds) == len(self.runs) else "run"
        return f"{len(self.runs)} {noun}{'s' * (len(self.runs) > 1)}"

    def curve(self, kind: str, name: str) -> list[tuple[int, Spread]]:
        """Each step that some run logged, in order, with the metric over the runs that did."""
        values = defaultdict(list)
        for run in self.runs:
            for line in getattr(run, kind):
                if (value := line.get(name)) is not None:
                    values[line["step"]].append(value)
        return [(step, Spread.of(v)) for step, v in sorted(values.items())]

    def ends(self, name: str, last: bool) -> list[float]:
        """The metric in each run's first or last evaluation; a run evaluated once has only a first."""
        lines = [run.evals[-1 if last else 0] for run in self.runs if len(run.evals) > last]
        return [line[name] for line in lines if line.get(name) is not None]


def read_run(path: str | Path) -> Run:
    """Reads a run directory.

    Raises:
        FileNotFoundError: it does not exist or holds no metrics.jsonl.
        ValueError: no line of metrics.jsonl can be read, or recipe.yaml is no YAML mapping.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"run directory {path} does not exist")
    if not (path / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{path} holds no run: it has no metrics.jsonl (name the output_dir of a training run)")
    notes: list[str] = []
    lines = [line for line in _lines(path / "metrics.jsonl", notes) if _is_step(line)]
    if not lines:
        raise ValueError(f"{path / 'metrics.jsonl'} has no readable line: the run ended before its first step")
    recipe = _recipe(path / "recipe.yaml", notes)
    rollouts = _rollouts(path / "rollouts.jsonl", notes)
    return Run(path, recipe, _by_step(lines, "train"), _by_step(lines, "eval"), rollouts, notes)


def group(runs: Sequence[Run]) -> list[Series]:
    """One series for each method, judge and remaining configuration, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(configuration(run.recipe), sort_keys=True), []).append(run)
    named = [(_name(members[0]), members) for members in groups.values()]
    series = []
    for name, members in named:
        # Only where two would bear one name does the rest of the recipe have to tell them apart.
        alike = [configuration(others[0].recipe) for other, others in named if other == name]
        own = configuration(members[0].recipe)
        told = [(key.removeprefix("train."), own.get(key, "not set")) for key in differing(alike)]
        # Of a long value, a path as a rule, the end tells more than the beginning.
        ends = [f" · {key} {value if len(value) <= 40 else '…' + value[-39:]}" for key, value in told]
        series.append(Series(name + "".join(ends), members))
    return series


def differing(configurations: Sequence[dict[str, str]]) -> list[str]:
    """The keys whose values are not the same in all of them."""
    keys = sorted({key for one in configurations for key in one})
    return [key for key in keys if len({one.get(key) for one in configurations}) > 1]


def flatten(mapping: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 30}} as {"train.max_steps": 30}."""
    flat = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def configuration(recipe: dict) -> dict[str, str]:
    """The recipe, flat, without what may differ between the runs of a series."""
    return {key: str(value) for key, value in flatten(recipe).items() if not key.startswith(_INCIDENTAL)}


def _name(run: Run) -> str:
    method = METHODS.get(run.method, run.method)
    return method if run.method == "opsd" else f"{method} · {judge_name(run)} judge"


def judge_name(run: Run) -> str:
    return JUDGES.get(run.judge, run.judge)


def _recipe(path: Path, notes: list[str]) -> dict:
    if not path.is_file():
        notes.append("recipe.yaml is missing: method and judge are taken to be the defaults")
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must be a mapping of keys to values")
    return recipe


def _lines(path: Path, notes: list[str]) -> list[dict]:
    """Every readable line. What is not, a kill's torn last line above all, is noted and left out."""
    lines, torn, skipped = [], False, 0
    # Split at "\n" alone: splitlines() would also cut at a U+2028 inside a JSON string.
    texts = [text for text in path.read_bytes().split(b"\n") if text.strip()]
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("not an object")
            lines.append(line)
        except (ValueError, RecursionError):
            torn = torn or number == len(texts)
            skipped += number < len(texts)
    if torn:
        notes.append(f"the last line of {path.name} is torn, as when a run is killed while writing; it is left out")
    if skipped:
        notes.append(f"{skipped} unreadable line{'s' * (skipped > 1)} of {path.name} left out")
    return lines


def _is_step(line: dict) -> bool:
    return type(line.get("step")) is int and line.get("kind") in ("train", "eval")


def number(value: Any) -> float | None:
    """A finite number of plottable size, or None."""
    return value if isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e30 else None


def _by_step(lines: list[dict], kind: str) -> list[dict]:
    """The later line of a step wins: a resumed run makes its last steps again."""
    steps = {
        line["step"]: {name: number(value) for name, value in line.items()} for line in lines if line["kind"] == kind
    }
    return [steps[step] for step in sorted(steps)]


def _rollouts(path: Path, notes: list[str]) -> list[dict]:
    if not path.is_file():
        notes.append("rollouts.jsonl is missing: there are no answers to show")
        return []
    rollouts, malformed = [], 0
    for line in _lines(path, notes):
        if not _is_rollout(line):
            malformed += 1
            continue
        # A resumed run goes back: what it had written of the steps it makes again is superseded.
        if rollouts and line["step"] < rollouts[-1]["step"]:
            rollouts = [rollout for rollout in rollouts if rollout["step"] < line["step"]]
        rollouts.append(line)
    if malformed:
        notes.append(f"{malformed} malformed line{'s' * (malformed > 1)} of {path.name} left out")
    return rollouts


def _is_rollout(line: dict) -> bool:
    tokens = line.get("tokens")
    if type(line.get("step")) is not int or not isinstance(tokens, list):
        return False
    columns = [line.get(name) for name in ("student_logprob", "teacher_logprob")]
    columns += [line["divergence"]] if "divergence" in line else []  # an engine that scores does not know it
    positions = [line.get("candidates"), line.get("kept"), line.get("unwritten", [])]
    return (
        all(isinstance(line.get(name), str) for name in ("prompt", "privileged_context"))
        and isinstance(line.get("teacher_prompt", ""), str)
        and all(isinstance(token, str) for token in tokens)
        and all(isinstance(column, list) and len(column) == len(tokens) for column in columns)
        and all(isinstance(ps, list) and all(type(p) is int and 0 <= p < len(tokens) for p in ps) for ps in positions)
        and all(isinstance(line.get(name, {}), dict) for name in ("preferred", "contrast", "episode"))
    )
