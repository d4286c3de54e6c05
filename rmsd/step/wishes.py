"""What the teacher wants at the candidates: from the two models' hidden states, or from what an engine recorded."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..answers.rollout import Recorded
from ..models.heads import Reading

ROWS_AT_ONCE = 64  # candidate rows whose logits are held together: 12 MB each for student and teacher at V = 50k


class Logprobs(NamedTuple):
    """What of TokenScores an engine's records tell, (B, L) fp32 each."""

    student_logprob: Tensor
    teacher_logprob: Tensor


class Wishes(NamedTuple):
    """What each model prefers at a candidate's position, (B, T) each; 0 where there is no candidate."""

    promoted: Tensor  # int64, argmax q (log q - log p): the token that the teacher most wants to promote
    student_preferred: Tensor  # int64, argmax p
    teacher_preferred: Tensor  # int64, argmax q
    # fp32, the student's mass outside its `vocab_topk` largest logits: what a truncated loss overlooks. None: unknown.
    tail_mass: Tensor | None


@torch.no_grad()
def wishes(
    student: Reading,  # of B answers of L tokens
    teacher: Reading,
    candidates: Tensor,  # (B, T) int64, -1 for none
    temperature: float = 1.0,
    vocab_topk: int | None = None,
) -> Wishes:
    """Only the candidates' rows are projected: T of hundreds."""
    row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)
    student_rows, teacher_rows = (
        reading.at(row, candidates.clamp_min(0)).hidden.flatten(0, 1).split(ROWS_AT_ONCE)
        for reading in (student, teacher)
    )
    found, tails = [], []
    for student_hidden, teacher_hidden in zip(student_rows, teacher_rows, strict=True):
        student_logprobs = (student.head(student_hidden).float() / temperature).log_softmax(-1)
        teacher_logprobs = (teacher.head(teacher_hidden).float() / temperature).log_softmax(-1)
        wish = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)
        found.append(torch.stack([x.argmax(-1) for x in (wish, student_logprobs, teacher_logprobs)]))
        if vocab_topk is None or vocab_topk >= wish.shape[-1]:
            tails.append(student_logprobs.new_zeros(len(wish)))
        else:
            top = student_logprobs.topk(vocab_topk, sorted=False).values
            tails.append((1.0 - top.exp().sum(-1)).clamp_min(0.0))
    stacked = torch.cat(found, 1) if found else candidates.new_zeros(3, 0)
    tail_mass = torch.cat(tails) if tails else candidates.new_zeros(0, dtype=torch.float32)
    missing = candidates < 0
    return Wishes(
        *stacked.view(3, *candidates.shape).masked_fill(missing, 0).unbind(),
        tail_mass.view(candidates.shape).masked_fill(missing, 0.0),
    )


def recorded_wishes(
    student: Recorded,
    teacher: Recorded,
    completion_ids: Tensor,  # (B, L) int64
    candidates: Tensor,  # (B, T) int64, -1 for none
) -> Wishes:
    """`promoted` is found among the teacher's likeliest tokens alone. Where the student's record lacks one, its p is
    taken to be that of the last it holds: the true p is no larger, so the wish is at least as strong."""
    row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)
    records = completion_ids, *student, *teacher[1:]
    own_ids, own_logprob, student_ids, student_top, teacher_ids, teacher_top = (
        tensor[row, candidates.clamp_min(0)] for tensor in records
    )
    # The sampled token's log-probability is known too, however unlikely it was.
    known_ids = torch.cat([student_ids, own_ids.unsqueeze(-1)], -1)
    known = torch.cat([student_top, own_logprob.unsqueeze(-1)], -1)
    same = teacher_ids.unsqueeze(-1) == known_ids.unsqueeze(-2)  # (B, T, k, k + 1)
    found = known.unsqueeze(-2).where(same, -torch.inf).amax(-1)
    found = found.where(same.any(-1), student_top[..., -1:])
    wish = (teacher_top.exp() * (teacher_top - found)).nan_to_num(0.0)  # 0 log 0 is 0
    promoted = teacher_ids.gather(-1, wish.argmax(-1, keepdim=True)).squeeze(-1)
    chosen = (promoted, student_ids[..., 0], teacher_ids[..., 0])
    return Wishes(*(ids.masked_fill(candidates < 0, 0) for ids in chosen), tail_mass=None)
