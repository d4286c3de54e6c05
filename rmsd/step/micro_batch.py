"""A micro-batch: the one thing that travels through a step, filled in as it goes.

    write           rollouts            answers to the prompts, by an engine, or the rows' own
    score           scores, candidates, wishes (and teacher_hidden, where the trainer's forwards score)
    judge           questions, host_scores, kept, judge_seconds
    settle          keep, parts (and teacher_hidden, where the engine scored; untold_hidden, where unkept_kl asks)
    train           reads them, one part after the other

Each is a plain function of a MicroBatch and of what else it needs (writing, scoring, judging and training.py);
training.trainer calls them in this order.

Where more would go:

- Rollouts of several turns are `Rollouts` like any other. `attention_mask` is true on tool turns, which both models
  read; `completion_mask` is false there, so that nothing scores, selects or trains on them.
- A watch over the model's health: `training.metrics.StepMetrics.count` sees every settled micro-batch once, with
  scores and tail masses still on the device. Whatever is summed there costs no sync until the log entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmsd_kernels import TokenScores

from ..answers.environments import Episode
from ..answers.prompts import Prompt, Prompts
from ..answers.rollout import Rollouts
from ..judge import Question
from .wishes import Logprobs, Wishes


@dataclass(frozen=True, eq=False)
class TrainPart:
    """Sequences that share a forward and backward of the student; both tensors on the host."""

    sequences: Tensor  # (B',) int64, of the micro-batch's
    keep: Tensor  # (B', L') bool: theirs, up to the last kept token


# Trains on one token, with a loss of 0 and zero gradients. For a batch that keeps nothing, and for a process with fewer
# parts than another, which waits for it in every layer's forward and backward.
NO_PART = TrainPart(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))


@dataclass(eq=False)
class MicroBatch:
    """B rows of the data set, and what the step makes of them: see the module. What is None is not known yet."""

    rows: list[dict]
    prompt_ids: list[list[int]]  # B prompts as the student reads them
    teacher_prompt_ids: list[list[int]]  # B prompts as the teacher reads them

    teacher_prompts: list[Prompt] | None = None  # the same as texts or messages, for a judge
    # B prompts with the contrast context, None for an anchor; no list where no judge asks what it would wish then.
    contrast_prompt_ids: list[list[int] | None] | None = None

    rollouts: Rollouts | None = None  # B answers of L tokens at most
    episodes: list[Episode] | None = None  # of answers of several turns, what happened in them
    guided: list[int] | None = None  # rows whose answer the told teacher wrote; None where it writes none at all

    scores: TokenScores | Logprobs | None = None  # each (B, L)
    candidates: Tensor | None = None  # (B, T) int64, -1 for none
    wishes: Wishes | None = None  # each (B, T)
    teacher_hidden: Tensor | None = None  # (B, L, H), at least where `keep` needs it
    untold_hidden: Tensor | None = (
        None  # (B, L, H), the teacher's under the student's own prompt, where that is held to
    )
    # Nats a token between log-probabilities that an engine recorded and those of the trainer's forwards.
    engine_gaps: dict[str, float] = field(default_factory=dict)

    questions: list[Question] | None = None
    host_scores: dict[str, Tensor] | None = None  # those of `scores` that a reader is shown, (B, L) each, on the host
    kept: list[list[int]] | None = None  # positions of each rollout, as the judge ranks them
    judge_seconds: float = 0.0

    keep: Tensor | None = None  # (B, L) bool, on the host
    parts: list[TrainPart] | None = None

    @classmethod
    def of(cls, rows: list[dict], prompts: Prompts) -> MicroBatch:
        """Rows of answers.data; nothing is written yet."""
        batch = cls(rows, list(map(prompts.student, rows)), [])
        batch.tell(prompts)
        return batch

    def tell(self, prompts: Prompts) -> None:
        """Makes the teacher's prompts of the rows as they are now."""
        self.teacher_prompts = list(map(prompts.told, self.rows))
        self.teacher_prompt_ids = list(map(prompts.teacher, self.rows))
        self.contrast_prompt_ids = prompts.contrasts and list(map(prompts.contrast, self.rows))

    @property
    def contrasted(self) -> list[int]:
        """Rows that the teacher reads under a contrast context too."""
        return [i for i, ids in enumerate(self.contrast_prompt_ids or ()) if ids is not None]

    def inputs(self, part: TrainPart | None = None) -> dict:
        """What transformers' Trainer hands from `get_batch_samples` to `training_step` and `compute_loss`. It counts
        FLOPs by `input_ids`."""
        return {"input_ids": self.rollouts.completion_ids, "micro_batch": self, "part": part}
