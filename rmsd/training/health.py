"""Whether a run is going wrong: signs of health counted on the device, and a watch over the log's entries."""

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..answers.teacher import FILE as TEACHER_FILE
from ..answers.teacher import Teacher
from ..models.transfer import to_device
from .checkpoint import last_whole_checkpoint, step_of

log = logging.getLogger("rmsd")

ACTIONS = ("stop", "rollback", "warn")
NGRAM = 4
START = 3  # steps whose mean is a sign's value at the start
WINDOW = 5  # steps whose mean is its value now: 8 answers a step are few, and one of them may be odd


def repeated_ngrams(
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool
) -> tuple[Tensor, Tensor]:
    """Of all answers' n-grams of `NGRAM` tokens: how many stood earlier in the same answer, and how many there are."""
    if completion_ids.shape[1] < NGRAM:
        return completion_mask.new_zeros((), dtype=torch.int64), completion_mask.new_zeros((), dtype=torch.int64)
    whole = completion_mask.unfold(1, NGRAM, 1).all(-1)
    # A hash of each n-gram, in int64 that overflows: of a batch's some thousands, two alike by chance are one in 10^12.
    powers = to_device([pow(0x9E3779B97F4A7C15, i, 2**63) for i in range(NGRAM)], completion_ids.device)
    hashed = ((completion_ids + 1).unfold(1, NGRAM, 1) * powers).sum(-1)
    none = torch.iinfo(torch.int64).max
    hashed = hashed.masked_fill(~whole, none).sort(1).values
    repeated = (hashed[:, 1:] == hashed[:, :-1]) & (hashed[:, 1:] != none)
    return repeated.sum(), whole.sum()


class Sign(NamedTuple):
    """A number of the log's entries, and what it may not pass, from its value at the start."""

    name: str
    limit: Callable[[float], float]
    means: str  # what passing it shows
    falls: bool = False  # the limit is the least, not the most

    def passes(self, value: float, limit: float) -> bool:
        return value < limit if self.falls else value > limit


def _risen(part: float) -> Callable[[float], float]:
    """Of a share: so far from where it began to 1. One that begins high could not rise by a fixed amount."""
    return lambda start: start + part * (1.0 - start)


# The limits lie between what runs that were well and runs that collapsed have shown: docs/real.md.
SIGNS = (
    Sign("tail_mass", _risen(0.25), "the student's probability leaves its vocab_topk largest entries"),
    Sign("student_entropy", lambda start: start + 3.0, "the student is no longer sure of what it writes"),
    Sign("repetition", _risen(0.3), "answers repeat themselves"),
    # From above 0.4 on nothing passes: a length limit that cuts most answers of a model that is well, as the demo's
    # does, cuts nearly all of them in some five steps of eight answers each.
    Sign("clipped_share", lambda start: start + 0.6, "answers no longer end"),
    Sign("divergence", lambda start: 3.0 * start + 0.5, "the student leaves its teacher instead of nearing it"),
    Sign("anchor_divergence", lambda start: start + 1.0, "the model drifts where it should stay as it was"),
    Sign("loss", lambda start: -0.01, "the loss rewards leaving the teacher", falls=True),
)


class Collapse(NamedTuple):
    """A sign beyond its limit."""

    sign: Sign
    step: int
    value: float
    start: float
    well: int  # the last step with an entry at which the sign was not yet halfway to its limit, a loss from 0


class Collapsed(RuntimeError):
    """A run was stopped; one line says why and what to do."""


def find_collapse(history: Sequence[dict], signs: Sequence[Sign] = SIGNS) -> Collapse | None:
    """Whether a sign in the log's last entry has passed its limit. What is asked is all in the log, which travels in
    checkpoints: a resumed run finds what the uninterrupted one would have."""
    for sign in signs:
        if sign.name not in history[-1]:
            continue
        steps = [entry["step"] for entry in history if sign.name in entry]
        first = steps[0]
        start = mean_of(history, sign.name, first, first + START)
        limit = sign.limit(start)
        now = mean_of(history, sign.name, steps[-1] - WINDOW + 1, steps[-1] + 1)
        if steps[-1] < first + START + WINDOW - 1 or not sign.passes(now, limit):
            continue
        well, value = steps.pop(), now
        halfway = limit / 2 if sign.falls else (start + limit) / 2  # a loss falls in every run that is well
        while well >= first + START and sign.passes(value, halfway):
            well = steps.pop()
            value = mean_of(history, sign.name, well - WINDOW + 1, well + 1)
        return Collapse(sign, history[-1]["step"], now, start, well)
    return None


def mean_of(history: Sequence[dict], name: str, first: int, end: int) -> float:
    """Of the entries of steps in [first, end); NaN, which passes no limit, of none."""
    values = [entry[name] for entry in history if name in entry and first <= entry["step"] < end]
    return sum(values) / len(values) if values else math.nan


class CollapseWatch(TrainerCallback):
    """Ends training where a sign of collapse shows, or says so, as `on_collapse` has it.

    Args:
        teacher: the trainer's.
        log_entry: takes a log entry, as Trainer.log.
    """

    def __init__(self, teacher: Teacher, log_entry: Callable[[dict], None]):
        self.teacher, self.log_entry = teacher, log_entry
        self.found: Collapse | None = None
        self.warned: set[str] = set()

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if self.found is None:
            return
        # A checkpoint brings its rates; from here on those written hold the halves.
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2  # not initial_lr: where the same trainer resumes, it is halved once more
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        for name in ("base_lrs", "_last_lr"):  # the second is what is logged
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate / 2 for rate in getattr(scheduler, name)])
        rolled_back_from, self.found = self.found.step, None
        self.log_entry({"rolled_back_from": rolled_back_from})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.found or not logs or not ("loss" in logs or any(name.startswith("eval_") for name in logs)):
            return
        found = find_collapse(state.log_history)
        if found is None:
            return
        if args.on_collapse == "warn":
            if found.sign.name not in self.warned:
                log.warning("%s", describe(found, args))
                self.warned.add(found.sign.name)
            return
        self.found = found
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.found:
            control.should_evaluate = control.should_save = False

    def checkpoint_to_go_on_from(self, args, state) -> Path:
        """Of a run that has collapsed for the first time and wants to be rolled back; later checkpoints are removed,
        so that a resumed run does not take them.

        Raises:
            Collapsed: for every other.
        """
        line, well = describe(self.found, args), self.found.well
        checkpoint = last_whole_checkpoint(args.output_dir, well + 1)
        if args.on_collapse == "rollback":
            if any("rolled_back_from" in entry for entry in state.log_history):
                line += "; it was rolled back before"
            elif checkpoint and self.teacher.changed and not (checkpoint / TEACHER_FILE).exists():
                line += "; the teacher has changed since that checkpoint, so there is no rolling back"
            elif checkpoint:
                log.warning("%s; going on from %s at half the learning rate", line, checkpoint.name)
                if args.should_save:
                    for later in checkpoint.parent.glob("checkpoint-*"):
                        if step_of(later) > step_of(checkpoint):
                            shutil.rmtree(later)
                return checkpoint
        if checkpoint and checkpoint != last_whole_checkpoint(args.output_dir):  # which would be stopped again
            line += f"; for resume=true to go on from {checkpoint.name}, remove those after it"
        self.found = None  # the run is over: another that is started with this trainer is not rolled back
        raise Collapsed(line)


def describe(found: Collapse, args) -> str:
    """One line: the step, the sign, its value beside the start's, the last checkpoint from before, what to change."""
    checkpoint = last_whole_checkpoint(args.output_dir, found.well + 1)
    kept = f"{checkpoint} is from before" if checkpoint else "no checkpoint is from before"
    if args.tail == "drop" and args.vocab_topk is not None:
        change = "set tail=bucket: drop leaves the mass outside the vocab_topk out of the loss"
    else:
        change = f"lower learning_rate, now {args.learning_rate:g}, or add anchor rows"
    return (
        f"training has collapsed at step {found.step}: {found.sign.name} is {found.value:.3g} ({WINDOW} steps' mean), "
        f"{found.start:.3g} at the start: {found.sign.means}; it began after step {found.well}, {kept}; {change}"
    )
