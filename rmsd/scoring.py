"""What the teacher wants, seen from the two models' hidden states: scores of every token, wishes at the candidates."""

from typing import NamedTuple

import torch
from torch import Tensor

from .modeling import OutputHead

ROWS_AT_ONCE = 64  # candidate rows whose logits are held together: 12 MB each for student and teacher at V = 50k


class Wishes(NamedTuple):
    """What each model prefers at a candidate's position, (B, T) int64; 0 where there is no candidate."""

    promoted: Tensor  # argmax q (log q - log p): the token that the teacher most wants to promote
    student_preferred: Tensor  # argmax p
    teacher_preferred: Tensor  # argmax q


@torch.no_grad()
def wishes(
    student_hidden: Tensor,  # (B, L, H)
    student_head: OutputHead,
    teacher_hidden: Tensor,  # (B, L, H')
    teacher_head: OutputHead,
    candidates: Tensor,  # (B, T) int64, -1 for none
    temperature: float = 1.0,
) -> Wishes:
    """Only the candidates' rows are projected: T of hundreds."""
    row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)
    student_hidden = student_hidden[row, candidates.clamp_min(0)].flatten(0, 1)
    teacher_hidden = teacher_hidden[row, candidates.clamp_min(0)].flatten(0, 1)
    found = []
    for student, teacher in zip(student_hidden.split(ROWS_AT_ONCE), teacher_hidden.split(ROWS_AT_ONCE), strict=True):
        student_logprobs = (student_head(student).float() / temperature).log_softmax(-1)
        teacher_logprobs = (teacher_head(teacher).float() / temperature).log_softmax(-1)
        wish = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)
        found.append(torch.stack([x.argmax(-1) for x in (wish, student_logprobs, teacher_logprobs)]))
    stacked = torch.cat(found, 1) if found else candidates.new_zeros(3, 0)
    return Wishes(*stacked.view(3, *candidates.shape).masked_fill(candidates < 0, 0).unbind())
