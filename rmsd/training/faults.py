"""Faults that a run survives, or that end it in one clear line."""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from ..loss import RMSDLoss
from ..words import first_line
from .checkpoint import last_whole_checkpoint
from .metrics import StepMetrics

log = logging.getLogger("rmsd")


class NonfiniteGradients(TrainerCallback):
    """Skips an optimiser step whose gradient holds a NaN or an infinity; counts it as `skipped_steps` in the log. On a
    resume this count, that of nonfinite_rows and that of skips in a row go on from the log's; all else that an
    interrupted run of the same trainer had counted since its last entry is dropped, for its steps are made again.

    Args:
        metrics: counts `skipped_steps`.
        loss: counts `nonfinite_rows`.
        accelerator: says which process this is, and whether a loss scaler skips such steps.

    Raises:
        FloatingPointError: after more than `max_skipped_steps` in a row.
    """

    def __init__(self, metrics: StepMetrics, loss: RMSDLoss, accelerator):
        self.metrics, self.loss, self.accelerator = metrics, loss, accelerator
        self.in_a_row = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.metrics.begin()
        self.in_a_row = skipped_in_a_row(state.log_history, state.global_step)
        counted = next((entry for entry in reversed(state.log_history) if "skipped_steps" in entry), None)
        if counted is None:
            return
        self.metrics.skipped_steps = counted["skipped_steps"]
        # The log has the sum over ranks, so one rank goes on from it.
        first = self.accelerator.is_main_process
        self.loss.nonfinite_rows.fill_(int(counted["nonfinite_rows"]) if first else 0)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.accelerator.scaler is not None:
            return  # under fp16 the loss scaler skips such steps itself, and expects some
        # The host waits here, once a step. An optimizer of any kind leaves its state alone only where it is given no
        # gradient, and that is the host's to decide.
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if torch.isfinite(getattr(norm, "full_tensor", lambda: norm)()):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.metrics.skipped_steps += 1
        if self.in_a_row > args.max_skipped_steps:
            raise FloatingPointError(
                f"the gradient was not finite {self.in_a_row} steps in a row, up to step {state.global_step + 1} "
                f"(max_skipped_steps={args.max_skipped_steps}): lower learning_rate or max_grad_norm, then resume=true"
            )
        log.warning("step %d is skipped: its gradient is not finite", state.global_step + 1)
        # Without gradients an optimiser leaves parameters, their decay and its own state alone.
        model.zero_grad(set_to_none=True)


def skipped_in_a_row(history: Sequence[dict], step: int) -> int:
    """Steps up to `step` that were skipped one after the other, by the log's entries; of an entry of several steps, not
    all of which were, it is not known which, and the last are taken for well."""
    counted = [(0, 0), *((entry["step"], entry["skipped_steps"]) for entry in history if "skipped_steps" in entry)]
    skipped = 0
    if counted[-1][0] == step:  # what came after the last entry is not known either
        for (first, before), (last, after) in reversed([*itertools.pairwise(counted)]):
            if after - before < last - first:
                break
            skipped += last - first
    return skipped


@contextlib.contextmanager
def saving(output_dir: str | Path, step: int):
    """Says of an error while a checkpoint is written what is left.

    Raises:
        OSError: in one line.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        last = last_whole_checkpoint(output_dir)
        left = f"{last.name} is whole: resume=true goes on from it" if last else "there is no other"
        # torch.save says of a full disk only "unexpected pos 64 vs 0".
        free = f"{shutil.disk_usage(output_dir).free / 2**20:.1f} MB of disk free"
        raise OSError(f"checkpoint-{step} in {output_dir} could not be written ({reason}; {free}); {left}") from error
