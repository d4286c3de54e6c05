"""What is said of a recipe's key or value that cannot be: which key was meant, and how a section is written."""

import difflib
import json
from collections.abc import Sequence

# As other trainers and papers name them.
_ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "rank": "r",
    "warmup_ratio": "warmup_steps",  # of which transformers takes a share too
}
# Arguments of transformers that no run here heeds, and what is used in their place.
NOT_HEEDED = {
    "resume_from_checkpoint": "resume=true goes on from the last whole checkpoint in output_dir",
    "do_train": "`rmsd train` trains",
    "do_eval": "a task's recipe is evaluated; see evaluate.every",
    "do_predict": "`rmsd eval` evaluates a trained model",
    "label_smoothing_factor": "the teacher's distribution is the label",
    "label_names": "rows have no labels",
    "prediction_loss_only": "an evaluation asks questions; it has no loss",
    "per_device_eval_batch_size": "an evaluation's answers are written 16 at a time",
    "eval_accumulation_steps": "an evaluation keeps numbers alone",
}


def unknown(key: str, known: Sequence[str], own: Sequence[str]) -> str:
    """What is said of a key that no recipe has. `own` are the keys of `known` that are this project's, or that it gives
    another default: they are meant before transformers' many."""
    if near := nearest(key, known, own):
        return f"unknown key {key!r}; did you mean {near!r}?"
    of_train = "; the rest of `train` is transformers.TrainingArguments'" if key.startswith("train.") else ""
    return f"unknown key {key!r}; `rmsd keys` lists them{of_train}"


def nearest(key: str, known: Sequence[str], own: Sequence[str]) -> str | None:
    """The key that was meant: right but for its section, by an alias, by some of its words, or spelled alike."""
    ordered = [*own, *(name for name in known if name not in set(own))]
    last = _last(key)
    for wanted in dict.fromkeys((last, _ALIASES.get(last, last))):
        if same := next((name for name in ordered if _last(name) == wanted), None):
            return same
    words = set(last.split("_"))
    if close := difflib.get_close_matches(key, known, 1, 0.8):
        return close[0]
    holding = [name for name in ordered if words <= set(_last(name).split("_"))]
    if holding:
        return holding[0]
    if section := next((name for name in ordered if "." not in name and name in words), None):
        return section
    close = difflib.get_close_matches(last, [_last(name) for name in ordered], 1, 0.75)
    return next((name for name in ordered if _last(name) == close[0]), None) if close else None


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def not_a_section(key: str, value: object, fields: dict) -> str:
    """What is said of a value where a section belongs."""
    first = next(iter(fields))
    kind = fields.get("kind")
    if isinstance(value, str) and kind is not None and value in getattr(kind.annotation, "__args__", ()):
        example = f"{key}.kind={value}"
    else:
        example = f"{key}.{first}={json.dumps(fields[first].default)}"
    inside = example.partition(".")[2].replace("=", ": ")
    return f"{key} is a section of keys, not {value!r}: write {example}, or in the file `{key}: {{{inside}}}`"
