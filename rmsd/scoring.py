"""What the teacher wants, seen from the two models' hidden states: scores of every token, wishes at the candidates."""

from typing import NamedTuple

import torch
from torch import Tensor

from .modeling import OutputHead

ROWS_AT_ONCE = 64  # candidate rows whose logits are held together: 12 MB each for student and teacher at V = 50k


class Wishes(NamedTuple):
    """What each model prefers at a candidate's position, (B, T) each; 0 where there is no candidate."""

    promoted: Tensor  # int64, argmax q (log q - log p): the token that the teacher most wants to promote
    student_preferred: Tensor  # int64, argmax p
    teacher_preferred: Tensor  # int64, argmax q
    tail_mass: (
        Tensor  # fp32, the student's mass outside its `vocab_topk` largest logits: what a truncated loss overlooks
    )


@torch.no_grad()
def wishes(
    student_hidden: Tensor,  # (B, L, H)
    student_head: OutputHead,
    teacher_hidden: Tensor,  # (B, L, H')
    teacher_head: OutputHead,
    candidates: Tensor,  # (B, T) int64, -1 for none
    temperature: float = 1.0,
    vocab_topk: int | None = None,
) -> Wishes:
    """Only the candidates' rows are projected: T of hundreds."""
    row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)
    student_hidden = student_hidden[row, candidates.clamp_min(0)].flatten(0, 1)
    teacher_hidden = teacher_hidden[row, candidates.clamp_min(0)].flatten(0, 1)
    found, tails = [], []
    for student, teacher in zip(student_hidden.split(ROWS_AT_ONCE), teacher_hidden.split(ROWS_AT_ONCE), strict=True):
        student_logprobs = (student_head(student).float() / temperature).log_softmax(-1)
        teacher_logprobs = (teacher_head(teacher).float() / temperature).log_softmax(-1)
        wish = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)
        found.append(torch.stack([x.argmax(-1) for x in (wish, student_logprobs, teacher_logprobs)]))
        if vocab_topk is None or vocab_topk >= wish.shape[-1]:
            tails.append(student_logprobs.new_zeros(len(wish)))
        else:
            top = student_logprobs.topk(vocab_topk, sorted=False).values
            tails.append((1.0 - top.exp().sum(-1)).clamp_min(0.0))
    stacked = torch.cat(found, 1) if found else candidates.new_zeros(3, 0)
    tail_mass = torch.cat(tails) if tails else student_hidden.new_zeros(0, dtype=torch.float32)
    missing = candidates < 0
    return Wishes(
        *stacked.view(3, *candidates.shape).masked_fill(missing, 0).unbind(),
        tail_mass.view(candidates.shape).masked_fill(missing, 0.0),
    )
