"""Rows of logits to the backend that serves them: after the checks of the public functions, before the operators.

The functions from logits and those from hidden states meet here. Logits are (N, V) or (B, L, V).
"""

import torch
from torch import Tensor

from . import ops, reference
from .options import Options
from .reference import TokenScores


def _as_blv(logits: Tensor) -> Tensor:
    """(N, V) | (B, L, V) -> (B, L, V) with unit stride along V; copies only where a row is not contiguous."""
    logits = logits.unsqueeze(0) if logits.ndim == 2 else logits
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _as_bl(tensor: Tensor) -> Tensor:
    return (tensor.unsqueeze(0) if tensor.ndim == 1 else tensor).contiguous()


@torch.no_grad()
def scores_of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sampled_ids: Tensor,  # int, of the leading shape
    options: Options,
) -> TokenScores:
    sampled_ids = sampled_ids.long()
    if options.backend == "torch":
        scores = reference.token_scores(student_logits, teacher_logits, sampled_ids, **options.of_scores())
        return TokenScores(*(score.float() for score in scores))
    scores = ops.scores(_as_blv(student_logits), _as_blv(teacher_logits), _as_bl(sampled_ids), *options)
    return TokenScores(*scores.view(7, *sampled_ids.shape).unbind())


@torch.no_grad()
def scores_and_candidates_of_rows(
    student_logits: Tensor,  # (B, L, V)
    teacher_logits: Tensor,
    sampled_ids: Tensor,  # (B, L) int
    mask: Tensor,  # (B, L) bool
    num_candidates: int,
    criterion: str,
    threshold: float,
    options: Options,
) -> tuple[TokenScores, Tensor]:
    if options.backend == "torch":
        scores = scores_of_rows(student_logits, teacher_logits, sampled_ids, options)
        score = reference.criterion_score(scores, criterion)
        return scores, reference.select_tokens(score, mask, num_tokens=num_candidates, threshold=threshold)
    rows = _as_blv(student_logits), _as_blv(teacher_logits), sampled_ids.long().contiguous(), mask.contiguous()
    scores, index = ops.scores_and_candidates(*rows, num_candidates, criterion, threshold, *options)
    return TokenScores(*scores.unbind()), index


def divergence_of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Tensor | None,  # (R,) int64 of the flattened leading axis, -1 for none; None for all
    options: Options,
) -> Tensor:
    """(R,), differentiable in `student_logits`."""
    if options.backend != "torch":
        return ops.divergence(_as_blv(student_logits), _as_blv(teacher_logits.detach()), rows, *options)[0]
    student_logits, teacher_logits = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    if rows is not None:
        if student_logits.shape[0] == 0:
            return student_logits.sum() + student_logits.new_zeros(rows.shape, dtype=torch.float32)
        student_logits, teacher_logits = student_logits[rows.clamp_min(0)], teacher_logits[rows.clamp_min(0)]
    result = reference.token_divergence(student_logits, teacher_logits, **options.of_divergence())
    return result if rows is None else torch.where(rows >= 0, result, 0.0)


def gradient_of_rows(
    grad_divergence: Tensor,  # (n,)
    student_logits: Tensor,  # (n, V)
    teacher_logits: Tensor,
    options: Options,
) -> Tensor:
    """Gradient of `divergence_of_rows` by all of (n, V) student logits. Written out, without autograd, where there are
    kernels: torch.compile cannot trace autograd.grad inside a backward."""
    if options.backend == "torch":

        def divergence(logits):
            return divergence_of_rows(logits, teacher_logits, None, options)

        return torch.func.vjp(divergence, student_logits)[1](grad_divergence)[0]
    logits = _as_blv(student_logits), _as_blv(teacher_logits)
    _, stats = ops.divergence(*logits, None, *options)
    return ops.divergence_backward(grad_divergence, *logits, None, stats, *options)[0]
