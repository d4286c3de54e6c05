"""What the steps since the last log entry counted: kept on the device, brought to the host once an entry."""

import torch
from torch import Tensor

from rmsd_kernels import TokenScores

from .rollout import Rollouts

_SUMS = ("rollout_tokens", "empty_rollouts", "candidates", "kept_tokens", "kept_sequences")


class StepMetrics:
    """Sums over micro-batches, the steps of a log entry, and ranks; and `own`, numbers of this rank alone."""

    def __init__(self):
        self._sums: Tensor | None = None
        self.own: dict[str, float] = {}
        self.skipped_steps = 0  # in the whole run, on every rank alike

    def count(
        self, rollouts: Rollouts, scores: TokenScores, candidates: Tensor, tail_mass: Tensor, keep: Tensor
    ) -> None:
        mask = rollouts.completion_mask
        finite = mask & scores.divergence.isfinite()
        keep = keep.to(mask.device, non_blocking=True)
        numbers = (
            mask.sum(), (~mask.any(1)).sum(), (candidates >= 0).sum(), keep.sum(), keep.any(1).sum(),
            scores.divergence.where(finite, 0.0).sum(), finite.sum(), tail_mass.sum(),
        )  # fmt: skip
        numbers = torch.stack([number.float() for number in numbers])
        self._sums = numbers if self._sums is None else self._sums + numbers

    def add_seconds(self, name: str, seconds: float) -> None:
        self.own[name] = self.own.get(name, 0.0) + seconds

    def drain(self, accelerator, nonfinite_rows: Tensor) -> dict[str, float]:
        """The entry's numbers, the same on every rank but for its own; counting starts anew. All ranks call it.
        `nonfinite_rows` and skipped_steps go on counting."""
        sums = self._sums if self._sums is not None else torch.zeros(len(_SUMS) + 3, device=nonfinite_rows.device)
        *numbers, divergence, tokens, tail_mass, nonfinite = accelerator.reduce(
            torch.cat([sums, nonfinite_rows.float().view(1)])
        ).tolist()
        counts = dict(zip(_SUMS, numbers, strict=True))
        entry = {
            **counts,
            "divergence": divergence / max(tokens, 1.0),  # the mean over tokens
            "tail_mass": tail_mass / max(counts["candidates"], 1.0),  # the mean over candidates
            "nonfinite_rows": nonfinite,
            "skipped_steps": self.skipped_steps,
            **self.own,
        }
        self._sums, self.own = None, {}
        return entry
