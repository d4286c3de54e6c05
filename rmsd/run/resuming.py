"""What a resumed run may change, and what it may not: said by name, before anything is loaded."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ..training.checkpoint import holds_optimizer
from ..training.config import RMSDConfig
from .recipe import Recipe

# What made the state that a checkpoint holds (weights, optimizer, teacher), or the order of the rows that it counts.
_MADE_BY = (
    "model",
    "dtype",
    "lora",
    "quantization",
    "task",
    "data",
    "rollouts",
    "seed",
    "train.teacher",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.fsdp",
)
_OPTIMIZER = ("train.optim", "train.optim_args", "train.optim_target_modules")
_PATHS = ("data", "rollouts")
_BY_ITS_OWN_STATE = ("reduce_lr_on_plateau", "greedy")  # schedules whose rate does not follow from the step alone


def check_resumed(recipe: Recipe, checkpoint: Path) -> None:
    """Holds a recipe to the one that its folder was begun with. All other keys may change, and are heeded from the
    checkpoint on: rates, schedule, steps, losses, judge, evaluation.

    Raises:
        ValueError: a key differs that a resumed run would not heed, there is nothing left to train, or the run had
            drifted further than the recipe allows.
    """
    steps, done = recipe.train.get("max_steps", -1), int(checkpoint.name.rpartition("-")[2])
    if 0 < steps < done:
        raise ValueError(f"{checkpoint} is of step {done}: train.max_steps={steps} leaves nothing to train")
    _check_drift(recipe, checkpoint)
    begun = recipe.output_dir / "recipe.yaml"
    if not begun.exists():
        return
    before, now = yaml.safe_load(begun.read_text(encoding="utf-8")), recipe.model_dump(mode="json")
    fixed = [*_MADE_BY, *(_OPTIMIZER if holds_optimizer(checkpoint) else ())]
    kinds = [_value(values, "train.lr_scheduler_type") for values in (before, now)]
    if any(str(kind) in _BY_ITS_OWN_STATE for kind in kinds):
        fixed += ["train.lr_scheduler_type", "train.learning_rate"]
    for key in fixed:
        was, wanted = (_value(values, key) for values in (before, now))
        if was != wanted:
            raise ValueError(
                f"resume=true cannot change {key}: the run was begun with {_shown(was)}, the recipe says "
                f"{_shown(wanted)}; set it back, or begin a new run from model={checkpoint}"
            )


def _check_drift(recipe: Recipe, checkpoint: Path) -> None:
    """Trainer looks at nothing before it has made a step, and DriftLimit not before the next evaluation."""
    most = recipe.evaluate.max_drift
    if recipe.task is None or most is None:
        return
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    last = next((entry for entry in reversed(history) if "eval_drift" in entry), None)
    if last and not last["eval_drift"] <= most:  # nor is no number
        raise ValueError(
            f"the run was stopped at step {last['step']}: drift is {last['eval_drift']:.3f} nats a token, more than "
            f"evaluate.max_drift={most:g}: raise it to train on; {checkpoint} holds the weights"
        )


def save_recipe(recipe: Recipe) -> None:
    """Writes the recipe into its folder, whole or not at all: one cut off by a full disk would be held against the next
    resume."""
    path = recipe.output_dir / "recipe.yaml"
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    partial.replace(path)


def _value(recipe: dict[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    if not section:
        value = recipe.get(name)
        return str(Path(value).resolve()) if value and name in _PATHS else value
    field = next(field for field in dataclasses.fields(RMSDConfig) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = recipe.get(section, {}).get(name, default)
    return getattr(value, "value", value)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def check_output_dir(folder: Path) -> None:
    """
    Raises:
        OSError: the run's folder cannot be one, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Every process of a run looks at once: a name that they shared would be gone when the second removes it.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"output_dir {folder} cannot be written to: {error.strerror}; name another folder") from error
