"""What the teacher wants at the candidates: from the two models' hidden states, or from what an engine recorded."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..answers.rollout import Recorded
from ..criteria import contrast_of
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
    # fp32 nats by which a wish hangs on what the context says (judge.Candidate), NaN where the answer was not read
    # under a contrast context. None: no answer was.
    contrast: Tensor | None = None


@torch.no_grad()
def wishes(
    student: Reading,  # of B answers of L tokens
    teacher: Reading,
    candidates: Tensor,  # (B, T) int64, -1 for none
    temperature: float = 1.0,
    vocab_topk: int | None = None,
    *,
    contrast_hidden: Tensor | None = None,  # (B, L, H), the teacher's under the contrast contexts
    completion_ids: Tensor | None = None,  # (B, L) int64, for the contrast
) -> Wishes:
    """Only the candidates' rows are projected: T of hundreds."""
    row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)

    def at_candidates(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor[row, candidates.clamp_min(0)].flatten(0, 1).split(ROWS_AT_ONCE)

    found, tails, contrasts = [], [], []
    if contrast_hidden is not None:
        contrast_rows, written_ids = at_candidates(contrast_hidden), at_candidates(completion_ids)
    readings = zip(at_candidates(student.hidden), at_candidates(teacher.hidden), strict=True)
    for i, (student_hidden, teacher_hidden) in enumerate(readings):
        student_logprobs = (student.head(student_hidden).float() / temperature).log_softmax(-1)
        teacher_logprobs = (teacher.head(teacher_hidden).float() / temperature).log_softmax(-1)
        wish = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)
        wish.nan_to_num_(0.0)  # 0 log 0 is 0
        found.append(torch.stack([x.argmax(-1) for x in (wish, student_logprobs, teacher_logprobs)]))
        if vocab_topk is None or vocab_topk >= wish.shape[-1]:
            tails.append(student_logprobs.new_zeros(len(wish)))
        else:
            top = student_logprobs.topk(vocab_topk, sorted=False).values
            tails.append((1.0 - top.exp().sum(-1)).clamp_min(0.0))
        if contrast_hidden is not None:
            contrast_logprobs = (teacher.head(contrast_rows[i]).float() / temperature).log_softmax(-1)
            ids = torch.stack([wish.argmax(-1), written_ids[i]], -1)
            pairs = (x.gather(-1, ids) for x in (student_logprobs, teacher_logprobs, contrast_logprobs))
            contrasts.append(contrast_of(*pairs))
    stacked = torch.cat(found, 1) if found else candidates.new_zeros(3, 0)
    missing = candidates < 0

    def each(parts: list[Tensor]) -> Tensor:
        numbers = torch.cat(parts) if parts else candidates.new_zeros(0, dtype=torch.float32)
        return numbers.view(candidates.shape).masked_fill(missing, 0.0)

    return Wishes(
        *stacked.view(3, *candidates.shape).masked_fill(missing, 0).unbind(),
        each(tails),
        None if contrast_hidden is None else each(contrasts),
    )


def recorded_wishes(
    student: Recorded,
    teacher: Recorded,
    completion_ids: Tensor,  # (B, L) int64
    candidates: Tensor,  # (B, T) int64, -1 for none
    contrast: Recorded | None = None,  # the teacher's under the contrast contexts
) -> Wishes:
    """`promoted` is found among the teacher's likeliest tokens alone. Where a record lacks a token, its probability is
    taken to be that of the last it holds: the true one is no larger, so wish and contrast are at least as strong."""
    row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)

    def at_candidates(*tensors: Tensor) -> list[Tensor]:
        return [tensor[row, candidates.clamp_min(0)] for tensor in tensors]

    own_ids, own_logprob, student_ids, student_top = at_candidates(completion_ids, *student)
    own_told, teacher_ids, teacher_top = at_candidates(*teacher)
    found = _at_most(teacher_ids, own_ids, own_logprob, student_ids, student_top)
    wish = (teacher_top.exp() * (teacher_top - found)).nan_to_num(0.0)  # 0 log 0 is 0
    best = wish.argmax(-1, keepdim=True)
    promoted, missing = teacher_ids.gather(-1, best), candidates < 0
    nats = None
    if contrast is not None:
        own_other, other_ids, other_top = at_candidates(*contrast)
        other = _at_most(promoted, own_ids, own_other, other_ids, other_top)
        of_promoted = found.gather(-1, best), teacher_top.gather(-1, best), other
        of_written = own_logprob, own_told, own_other
        pairs = (torch.cat([a, b.unsqueeze(-1)], -1) for a, b in zip(of_promoted, of_written, strict=True))
        nats = contrast_of(*pairs).masked_fill(missing, 0.0)
    chosen = (promoted.squeeze(-1), student_ids[..., 0], teacher_ids[..., 0])
    return Wishes(*(ids.masked_fill(missing, 0) for ids in chosen), tail_mass=None, contrast=nats)


def _at_most(
    ids: Tensor,  # (B, T, n) int64, asked for
    own_ids: Tensor,  # (B, T) int64, the sampled tokens
    own_logprob: Tensor,  # (B, T), which is known too, however unlikely they were
    top_ids: Tensor,  # (B, T, k) int64
    top_logprob: Tensor,  # (B, T, k)
) -> Tensor:
    """(B, T, n) log-probabilities by a record, or else that of the last it holds."""
    known_ids = torch.cat([top_ids, own_ids.unsqueeze(-1)], -1)
    known = torch.cat([top_logprob, own_logprob.unsqueeze(-1)], -1)
    same = ids.unsqueeze(-1) == known_ids.unsqueeze(-2)  # (B, T, n, k + 1)
    found = known.unsqueeze(-2).where(same, -torch.inf).amax(-1)
    return found.where(same.any(-1), top_logprob[..., -1:])
