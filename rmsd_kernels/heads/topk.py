"""The student's k largest logits where the vocabulary is split: what each shard sends, and what is made of it.

The k largest of the whole row are among the shards' own k largest. So a shard sends those candidates, and of everything
else the log-sum-exps; from that every rank has the divergence, and its derivatives by what its own shard sent.
"""

import math

import torch
from torch import Tensor

from ..options import Options
from ..reference import divergence_terms, logsumexp, topk_support
from .merge import less_lse, scaled_pair, split_in_two

_INF = math.inf


def shard_candidates(
    student_logits: Tensor,  # (n, V_i)
    teacher_logits: Tensor,  # (n, V_i)
    num_candidates: int,  # at most V_i
    width: int,  # of the partial, at least num_candidates
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Partial (n, 8 + 2 * width): log-sum-exps of the shard and of what is not a candidate (student, teacher, student,
    teacher), each as two numbers, then both models' logits, as projected, at the candidates: the shard's largest
    student logits. NaN fills up a shard that has fewer than `width`. And the candidates' ids (n, num_candidates) int64,
    rising."""
    support = topk_support(student_logits, num_candidates) if num_candidates else student_logits > _INF
    ids = support.to(torch.uint8).topk(num_candidates, dim=-1).indices.sort(-1).values
    pair = scaled_pair(student_logits, teacher_logits, options)
    lses = [_precise_lse(logits) for logits in (*pair, *(logits.scatter(-1, ids, -_INF) for logits in pair))]
    numbers = torch.stack([half for lse in lses for half in split_in_two(lse, student_logits.dtype)], -1)
    fill = student_logits.new_full((len(ids), width - num_candidates), math.nan)
    candidates = [student_logits.gather(-1, ids), fill, teacher_logits.gather(-1, ids), fill]
    return torch.cat([numbers, *candidates], -1), ids


def _precise_lse(logits: Tensor) -> Tensor:
    """(n,) in fp64, off by the relative error of a sum and not of a logit; NaN or +inf where the row holds one."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:1], -_INF, dtype=torch.float64)
    peak = logits.amax(-1, keepdim=True)
    total = (logits - peak.where(peak > -_INF, 0.0).where(peak == peak, math.nan)).exp().sum(-1)
    return peak.squeeze(-1).double() + total.double().log()


class MergedTopK:
    """The divergence over the k largest of P shards' candidates, and its derivatives by what the shards sent.

    partials: (P, n, 8 + 2 * width) fp64; counts: how many candidates each shard has.
    """

    def __init__(self, partials: Tensor, counts: list[int], options: Options):
        lses = partials[..., 0:8:2] + partials[..., 1:8:2]
        lses, rests, candidates = lses[..., :2], lses[..., 2:], partials[..., 8:]
        width = candidates.shape[-1] // 2
        column = torch.arange(width, device=partials.device)
        # (C,) with C = P * width, shard after shard: ids rise along it
        real = torch.cat([column < count for count in counts])
        student, teacher = (half.transpose(0, 1).flatten(1) for half in candidates.split(width, -1))  # (n, C)
        # NaN sorts behind -inf, and a stable sort gives ties to the lower id.
        order = (-student).where(real, math.nan).sort(dim=-1, stable=True).indices[:, : options.vocab_topk]
        support = torch.zeros_like(student, dtype=torch.bool).scatter(1, order, True)
        self.student_lse, self.teacher_lse = lses.logsumexp(0).unbind(-1)
        valid = self.student_lse.isfinite() & self.teacher_lse.isfinite()
        student, teacher = student.where(real, -_INF), teacher.where(real, -_INF)
        student, teacher = (logits.where(valid.unsqueeze(-1), 0.0) for logits in (student, teacher))
        student, teacher = scaled_pair(student, teacher, options)
        student_lse, teacher_lse = self.student_lse.where(valid, 0.0), self.teacher_lse.where(valid, 0.0)
        student_rest, teacher_rest = rests.where(valid.unsqueeze(-1), 0.0).permute(2, 1, 0)  # (n, P) each

        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (student, student_lse, student_rest)]
            result = _divergence_of_candidates(*leaves, teacher, teacher_lse, teacher_rest, support, options)
            finite = valid & result.isfinite()
            grads = torch.autograd.grad(result.where(finite, 0.0).sum(), leaves, materialize_grads=True)
        self.divergence = result.detach().where(valid, math.nan)
        by_candidate, by_lse, by_rest = (grad.nan_to_num(0.0, 0.0, 0.0) for grad in grads)
        probability = (student - student_lse.unsqueeze(-1)).exp()
        by_candidate = by_candidate + probability * by_lse.unsqueeze(-1)
        self.by_candidate = by_candidate.view(len(student), -1, width)  # (n, P, width), by scaled logit
        # By any other logit of shard i: p_j (d/d lse + d/d rest_i e^(lse - rest_i)). Below e^-700 a rest has no slope.
        share = student_rest - student_lse.unsqueeze(-1)
        by_rest = torch.where(share > -700, by_rest * (-share.clamp_min(-700)).exp(), 0.0)
        self.by_other = by_lse.unsqueeze(-1) + by_rest  # (n, P), times p_j


def _divergence_of_candidates(
    student: Tensor,  # (n, C) scaled logits
    student_lse: Tensor,  # (n,)
    student_rest: Tensor,  # (n, P)
    teacher: Tensor,
    teacher_lse: Tensor,
    teacher_rest: Tensor,
    support: Tensor,  # (n, C) bool
    options: Options,
) -> Tensor:
    """(n,) by reference.token_divergence's rules."""
    inside_student, inside_teacher = student.masked_fill(~support, -_INF), teacher.masked_fill(~support, -_INF)
    unreachable = torch.zeros_like(student_lse, dtype=torch.bool)
    if options.tail == "renorm":
        unreachable = (inside_teacher == -_INF).all(-1)
        inside_student = inside_student.masked_fill(unreachable.unsqueeze(-1), 0.0)
        inside_teacher = inside_teacher.masked_fill(unreachable.unsqueeze(-1), 0.0)
        student_lse, teacher_lse = logsumexp(inside_student), logsumexp(inside_teacher)
    elif options.tail == "bucket":
        outside_student = torch.cat([student.masked_fill(support, -_INF), student_rest], -1)
        outside_teacher = torch.cat([teacher.masked_fill(support, -_INF), teacher_rest], -1)
        inside_student = torch.cat([inside_student, logsumexp(outside_student).unsqueeze(-1)], -1)
        inside_teacher = torch.cat([inside_teacher, logsumexp(outside_teacher).unsqueeze(-1)], -1)
    log_p, log_q = inside_student - student_lse.unsqueeze(-1), inside_teacher - teacher_lse.unsqueeze(-1)
    terms = divergence_terms(log_p, log_q, options.divergence, options.beta)
    return terms.sum(-1).masked_fill(unreachable, _INF)


def shard_topk_gradient(
    student_logits: Tensor,  # (n, V_i)
    student_lse: Tensor,  # (n,) of the whole row, fp64
    by_other: Tensor,  # (n,) this shard's, of MergedTopK
    by_candidate: Tensor,  # (n, k_i)
    ids: Tensor,  # (n, k_i) int64
    options: Options,
) -> Tensor:
    """(n, V_i) gradient of the whole row's divergence by the shard's scaled logits."""
    student, _ = scaled_pair(student_logits, student_logits, options)
    # p_j by_other as one exponential: by_other is as large as Q / P in a forward KL, and fp32 may hold neither factor.
    size = less_lse(student, student_lse - by_other.abs().log()).exp()
    grad = size * by_other.sign().to(student.dtype).unsqueeze(-1)
    return grad.scatter(-1, ids, by_candidate.to(grad.dtype))
