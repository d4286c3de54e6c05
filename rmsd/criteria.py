"""What ranks the candidates: the kernels' criteria, which they select by in the same launch, and more from the same
scores, at no cost beside them; and the contrast, which says whether a candidate hangs on what its context says."""

import difflib
import math

import torch
from torch import Tensor

from rmsd_kernels import TokenScores, criterion_score
from rmsd_kernels.reference import CRITERIA as FUSED

MORE = ("supported", "opposed", "entropy_rise", "entropy_fall", "tip")
CRITERIA = (*FUSED, *MORE)


def check_criterion(criterion: str) -> None:
    """Raises ValueError for none of CRITERIA."""
    if criterion not in CRITERIA:
        near = difflib.get_close_matches(str(criterion), CRITERIA, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}{hint}")


def scored_by(criterion: str, scores: TokenScores, mask: Tensor) -> Tensor:
    """(B, L), of which candidates are the largest; NaN where the divergence is not finite, so never selected.

    Args:
        criterion: the kernels' own, or
            "supported": log q(y) - log p(y), only where the context supports the written token (EDGE-OPD);
            "opposed": the same where it opposes it;
            "entropy_rise", "entropy_fall": the entropy gap by its sign, where the told teacher is less or more certain;
            "tip": h + d - h d, h the student's entropy and d the divergence, each as a share of the sequence's largest.
        scores: each (B, L).
        mask: (B, L) bool: what the student wrote.
    """
    if criterion in FUSED:
        return criterion_score(scores, criterion)
    gap, entropy_gap = scores.teacher_logprob - scores.student_logprob, scores.teacher_entropy - scores.student_entropy
    if criterion == "tip":
        entropy, divergence = (_of_largest(score, mask) for score in (scores.student_entropy, scores.divergence))
        score = entropy + divergence - entropy * divergence
    else:
        score = {"supported": gap, "opposed": -gap, "entropy_rise": entropy_gap, "entropy_fall": -entropy_gap}[
            criterion
        ]
    return score.where(scores.divergence.isfinite(), math.nan)


def _of_largest(score: Tensor, mask: Tensor) -> Tensor:
    """As shares of each sequence's largest that is finite."""
    usable = score.where(mask & score.isfinite(), 0.0)
    if not usable.shape[-1]:
        return usable
    return score.clamp_min(0.0) / usable.amax(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


def contrast_of(student: Tensor, teacher: Tensor, contrast: Tensor) -> Tensor:
    """Nats, (...,), from log-probabilities of (..., 2), of the promoted and of the written token: the student's, the
    teacher's, and the teacher's under a contrast context. The written one counts where the teacher wants it gone."""
    promoted = teacher[..., 0] - contrast[..., 0]
    unwritten = contrast[..., 1] - teacher[..., 1]
    return torch.where(teacher[..., 1] < student[..., 1], promoted.maximum(unwritten), promoted)


@torch.no_grad()
def contrast_at(
    student_logits: Tensor,  # (R, V)
    teacher_logits: Tensor,  # (R, V)
    contrast_logits: Tensor,  # (R, V): the teacher's under a contrast context
    sampled_ids: Tensor,  # (R,) int64
    temperature: float = 1.0,
) -> Tensor:
    """(R,) fp32: `contrast_of` the token that the teacher most wants to promote, argmax q (log q - log p), and of the
    sampled one."""
    logprobs = [(x.float() / temperature).log_softmax(-1) for x in (student_logits, teacher_logits, contrast_logits)]
    wish = (logprobs[1].exp() * (logprobs[1] - logprobs[0])).nan_to_num(0.0)  # 0 log 0 is 0
    ids = torch.stack([wish.argmax(-1), sampled_ids], -1)
    return contrast_of(*(x.gather(-1, ids) for x in logprobs))
