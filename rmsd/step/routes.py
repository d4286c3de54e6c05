"""Two routes from a step's answers to its candidates: the trainer's own forwards, or what the engine records.

Both take the step's micro-batches as they are written and yield each with its candidates.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from rmsd_kernels import TokenScores

from ..answers.engines import engine_gap
from ..answers.rollout import Rollouts, hidden_states
from . import training as step
from .wishes import Logprobs, Wishes, recorded_wishes, wishes


class Written(NamedTuple):
    """A micro-batch's answers."""

    rows: list[dict]
    teacher_ids: list[list[int]]  # B prompts as the teacher reads them
    rollouts: Rollouts


@dataclass
class Scored:
    """A micro-batch that the judge can be asked about."""

    rows: list[dict]
    rollouts: Rollouts
    scores: TokenScores | Logprobs  # each (B, L)
    candidates: Tensor  # (B, T) int64, -1 for none
    wishes: Wishes  # each (B, T)
    teacher_hidden: Callable[[Tensor], Tensor]  # (B, L, H), at least where a `keep` of (B, L) bool needs it


def scored_by_trainer(trainer, micro_batches: Iterable[Written]) -> Iterator[Scored]:
    """Both models read every answer, as soon as it is written: all scores of every token, both models' whole
    distributions at the candidates, and the hidden states that the loss needs of the teacher."""
    args = trainer.args
    for rows, teacher_ids, rollouts in micro_batches:
        rollouts.student_hidden = hidden_states(trainer.student, rollouts, trainer.pad_id)
        teacher_hidden = trainer.teacher.hidden(teacher_ids, rollouts, trainer.pad_id)
        student, teacher = (rollouts.student_hidden, trainer.student_head()), (teacher_hidden, trainer.teacher.head)
        ids, mask = rollouts.completion_ids, rollouts.completion_mask
        scores, candidates = step.score(trainer.loss, *student, *teacher, ids, mask)
        wished = wishes(*student, *teacher, candidates, args.temperature, args.vocab_topk)
        if rollouts.recorded and args.temperature == 1.0:
            recorded = rollouts.recorded.logprob[mask]
            trainer.metrics.own["engine_gap"] = engine_gap(recorded, scores.student_logprob[mask])
        yield Scored(rows, rollouts, scores, candidates, wished, lambda keep, hidden=teacher_hidden: hidden)


def scored_by_engine(trainer, micro_batches: Iterable[Written]) -> Iterator[Scored]:
    """The engine records the student's log-probabilities as it writes, then takes the teacher's weights and records
    theirs as it reads: no forward of the student, and one of the teacher over what is kept, once the judge has
    answered. All micro-batches are written before the first is read, so that weights change once a step."""
    engine, teacher, pad_id = trainer.engine, trainer.teacher, trainer.pad_id
    micro_batches = list(micro_batches)
    for _, _, rollouts in micro_batches:
        if rollouts.recorded is None:  # the rows' own completions
            rollouts.recorded = engine.read(rollouts.prompt_ids, rollouts)
    if teacher.kind != "live":
        with teacher.active() as model:
            engine.sync(model)
    for rows, teacher_ids, rollouts in micro_batches:
        student, told = rollouts.recorded, engine.read(teacher_ids, rollouts)
        scores = Logprobs(student.logprob, told.logprob)
        candidates = step.widest_gaps(trainer.loss, *scores, rollouts.completion_mask)
        wished = recorded_wishes(student, told, rollouts.completion_ids, candidates)
        yield Scored(
            rows, rollouts, scores, candidates, wished, partial(teacher.kept_hidden, teacher_ids, rollouts, pad_id)
        )


def engine_gaps(recorded: Logprobs, scores: TokenScores) -> dict[str, float]:
    """What `scored_by_engine` can be held to: its log-probabilities of the kept tokens, (R,) each, beside those of the
    forwards that the tokens are trained by.

    Raises:
        RuntimeError: as `engine_gap`, by name of the model whose weights the engine did not hold.
    """
    return {
        "engine_gap": engine_gap(recorded.student_logprob, scores.student_logprob),
        "engine_teacher_gap": engine_gap(recorded.teacher_logprob, scores.teacher_logprob, "teacher"),
    }
