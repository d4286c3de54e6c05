"""What the steps since the last log entry counted: kept on the device, brought to the host once an entry."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rmsd_kernels import TokenScores

from ..answers.tools import ERRORS
from ..judge import LLMJudge
from ..models.transfer import to_device
from ..step.judging import told_text
from ..step.micro_batch import MicroBatch
from .health import repeated_ngrams

# Means: their sums, and the counts that divide them, which are no entry's numbers where they have a "_" before them.
_MEANS = {
    "divergence": "_scored_tokens",
    "student_entropy": "_scored_tokens",
    "anchor_divergence": "_anchor_tokens",
    "tail_mass": "candidates",
    "repetition": "_ngrams",
    "clipped_share": "_rollouts",
    "solved": "_graded",
}


def told(batch: MicroBatch) -> dict[str, int]:
    """What a micro-batch's episodes come to: the model's turns and calls, calls that were not made as they were meant,
    those of the rollouts that are graded and solved, and rollouts that are dropped for their environment died."""
    counts = sum((episode.counts for episode in batch.episodes), Counter())
    return {
        "turns": counts["turns"],
        "calls": counts["calls"],
        "tool_errors": sum(counts[name] for name in ERRORS),
        "dropped_rollouts": sum(bool(episode.died) for episode in batch.episodes),
        "solved": sum(bool(episode.solved) for episode in batch.episodes),
        "_graded": sum(episode.solved is not None for episode in batch.episodes),
    }


class StepMetrics:
    """Sums over micro-batches, the steps of a log entry, and ranks; and `own`, numbers of this rank alone."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._unkept: Tensor | None = None
        self.steps = 0  # since the last entry
        self.own: dict[str, float] = {}
        self._gaps: dict[str, tuple[float, int]] = {}  # of an engine: a sum of nats, and of how many tokens
        self._asked: dict[str, int] = {}
        self.skipped_steps = 0  # in the whole run, on every rank alike

    def count(self, batch: MicroBatch, eos_ids: Sequence[int]) -> None:
        """Of a settled micro-batch; `eos_ids` end an answer. What is unknown, a divergence of Logprobs or a
        tail_mass of None, is no number of the entry."""
        mask, scores, tail_mass = batch.rollouts.completion_mask, batch.scores, batch.wishes.tail_mass
        keep = to_device(batch.keep, mask.device)
        ids = batch.rollouts.completion_ids
        ended = (torch.isin(ids, to_device(torch.tensor(eos_ids, dtype=ids.dtype), ids.device)) & mask).any(1)
        if batch.episodes is not None:  # whose earlier turns have ended
            cut = [bool(episode.counts["cut"]) for episode in batch.episodes]
            ended = ~to_device(cut, ids.device)
        repeated, ngrams = repeated_ngrams(ids, mask)
        self.add_gaps(batch.engine_gaps, int(batch.rollouts.on_host.completion_mask.sum()))
        self.add_seconds("judge_seconds", batch.judge_seconds)
        numbers = {
            "rollout_tokens": mask.sum(),
            "empty_rollouts": (~mask.any(1)).sum(),
            "candidates": (batch.candidates >= 0).sum(),
            "kept_tokens": keep.sum(),
            "kept_sequences": keep.any(1).sum(),
            "repetition": repeated,
            "_ngrams": ngrams,
            "clipped_share": (mask.any(1) & ~ended).sum(),
            "_rollouts": mask.any(1).sum(),
        }
        if batch.guided is not None:
            numbers["guided_rollouts"] = mask.new_tensor(len(batch.guided), dtype=torch.int64)
        if batch.episodes is not None:
            numbers |= {name: mask.new_tensor(number, dtype=torch.int64) for name, number in told(batch).items()}
        if isinstance(scores, TokenScores):
            finite = mask & scores.divergence.isfinite()
            divergence = scores.divergence.where(finite, 0.0)
            anchors = to_device([not told_text(row).strip() for row in batch.rows], mask.device).unsqueeze(1)
            numbers |= {
                "divergence": divergence.sum(),
                "student_entropy": scores.student_entropy.where(finite, 0.0).sum(),
                "_scored_tokens": finite.sum(),
                "anchor_divergence": (divergence * anchors).sum(),
                "_anchor_tokens": (finite & anchors).sum(),
            }
        if tail_mass is not None:
            numbers["tail_mass"] = tail_mass.sum()
        self._sums = {name: self._sums.get(name, 0.0) + number.float() for name, number in numbers.items()}

    def add_unkept_kl(self, share: Tensor) -> None:
        """A part's share of a step's mean, times the number of ranks."""
        self._unkept = share if self._unkept is None else self._unkept + share

    def add_seconds(self, name: str, seconds: float) -> None:
        self.own[name] = self.own.get(name, 0.0) + seconds

    def add_gaps(self, gaps: dict[str, float], tokens: int) -> None:
        """Means over so many tokens."""
        for name, gap in gaps.items():
            total, count = self._gaps.get(name, (0.0, 0))
            self._gaps[name] = total + gap * tokens, count + tokens

    def add_asked(self, llm: LLMJudge) -> None:
        """Requests to a model that judges, and tokens that it read and wrote, since the last time."""
        asked = {"judge_requests": llm.stats["requests"], "judge_tokens": llm.tokens}
        for name, number in asked.items():
            self.own[name] = self.own.get(name, 0) + number - self._asked.get(name, 0)
        self._asked = asked

    def begin(self) -> None:
        """Counting starts anew."""
        self._sums, self.own, self._gaps, self._unkept, self.steps = {}, {}, {}, None, 0

    def drain(self, accelerator, nonfinite_rows: Tensor) -> dict[str, float]:
        """The entry's numbers, the same on every rank but for its own; counting starts anew. All ranks call it.
        `nonfinite_rows` and skipped_steps go on counting."""
        sums = {**self._sums, "nonfinite_rows": nonfinite_rows.float()}
        if self._unkept is not None:  # of as many sequences as the loss, over the ranks and the entry's steps
            sums["unkept_kl"] = self._unkept / (accelerator.num_processes * self.steps)
        sums = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values()))).tolist(), strict=True))
        for name, count in (("anchor_divergence", "_anchor_tokens"), ("solved", "_graded")):
            if not sums.get(count, 1.0):
                del sums[name]  # of none it is no number
        means = {name: sums[name] / max(sums[count], 1.0) for name, count in _MEANS.items() if name in sums}
        entry = {name: number for name, number in sums.items() if not name.startswith("_")}
        gaps = {name: total / count for name, (total, count) in self._gaps.items()}
        entry |= {**means, "skipped_steps": self.skipped_steps, **self.own, **gaps}
        self.begin()
        return entry
