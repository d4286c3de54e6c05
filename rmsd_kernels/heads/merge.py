"""What one shard of the vocabulary knows of a row, and how the shards' numbers make the whole row's.

No process group here: a partial is a small tensor, and merging takes P of them stacked. Merges are computed in fp64 and
in rank order, so every rank gets the same bits. With shard i's log-sum-exp l_i, the row's l and w_i = e^(l_i - l),

    reverse KL = sum_i w_i (KL_i + (l_i - l)_student - (l_i - l)_teacher)        w_i of the student
    forward KL = the same with the roles exchanged
    entropy    = sum_i w_i (H_i - (l_i - l))

where KL_i and H_i are of the shard's own, normalised distributions: what `token_scores` of the shard gives.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..dispatch import scores_of_rows
from ..options import Options
from ..reference import TokenScores, divergence_terms, log_mixture, scaled_logits

_INF = math.inf


def scaled_pair(student_logits: Tensor, teacher_logits: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Both rows after scale, softcap and temperature."""
    transform = dict(logit_scale=options.logit_scale, softcap=options.softcap)
    return (
        scaled_logits(student_logits, options.temperature, **transform),
        scaled_logits(teacher_logits, options.teacher_temperature, **transform),
    )


class ShardScores(NamedTuple):
    """What a shard knows of TokenScores, row for row in its order: of the shard's own distributions, and the sampled
    token's scaled logits in place of its log-probabilities. Tensors are (n,) of one shard, (P, n) of all."""

    student_logit: Tensor
    teacher_logit: Tensor
    divergence: Tensor  # a KL: 0 where the first distribution has no mass in the shard, +inf where only the second
    student_lse: Tensor  # -inf without mass
    teacher_lse: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def shard_scores(
    student_logits: Tensor,  # (n, V_i) fp32 | fp64, maybe V_i = 0; written to where a row has no mass
    teacher_logits: Tensor,  # (n, V_i)
    sampled_ids: Tensor,  # (n,) int64 within the shard; any id of it where another shard holds the token
    options: Options,
) -> ShardScores:
    if student_logits.shape[-1] == 0:
        zero = student_logits.new_zeros(len(student_logits))
        none = torch.full_like(zero, -_INF)
        return ShardScores(none, none, zero, none, none, zero, zero)
    column = sampled_ids.unsqueeze(-1)
    tokens = scaled_pair(student_logits.gather(-1, column), teacher_logits.gather(-1, column), options)

    options = options._replace(vocab_size=student_logits.shape[-1])

    def scan() -> TokenScores:
        arguments = student_logits, teacher_logits, torch.zeros_like(sampled_ids)
        if options.backend == "torch":  # whose scores of fp64 logits stay fp64 until they are merged
            return reference.token_scores(*arguments, **options.of_scores())
        return scores_of_rows(*arguments, options)

    # Looking for rows without mass takes three more passes; a host that can see the result looks only if need be.
    looks = student_logits.device.type == "cpu" and not torch.compiler.is_compiling()
    scores = scan() if looks else None
    if looks and scores.student_lse.isfinite().all():  # NaN where either model has no mass
        student_empty = teacher_empty = torch.zeros_like(sampled_ids, dtype=torch.bool)
    else:
        peaks = scaled_pair(student_logits.amax(-1, keepdim=True), teacher_logits.amax(-1, keepdim=True), options)
        # The Triton kernels count less than this as -inf (tiles.EMPTY): a shard of it is no distribution to them.
        least = -6.9e19 if options.backend == "triton" else -_INF
        student_empty, teacher_empty = (peak <= least for peak in peaks)
        # A shard without mass is no distribution, yet the other model's numbers are wanted: lend it some.
        # In place: the chunk's logits are nobody else's, and a copy would be as large.
        student_logits.masked_fill_(student_empty, 0.0)
        teacher_logits.masked_fill_(teacher_empty, 0.0)
        scores = scan()
        student_empty, teacher_empty = student_empty.squeeze(-1), teacher_empty.squeeze(-1)
    numerator, denominator = student_empty, teacher_empty
    if options.divergence == "forward_kl":
        numerator, denominator = teacher_empty, student_empty
    student_token, teacher_token = (token.squeeze(-1) for token in tokens)
    return ShardScores(
        student_logit=student_token,
        teacher_logit=teacher_token,
        divergence=scores.divergence.masked_fill(denominator, _INF).masked_fill(numerator, 0.0),
        student_lse=scores.student_lse.masked_fill(student_empty, -_INF),
        teacher_lse=scores.teacher_lse.masked_fill(teacher_empty, -_INF),
        student_entropy=scores.student_entropy,
        teacher_entropy=scores.teacher_entropy,
    )


def _mean_over_shards(values: Tensor, shift: Tensor) -> Tensor:
    """(P, n) -> (n,): by the shards' mass, e^shift of the row's."""
    return torch.where(shift > -_INF, shift.exp() * values, 0.0).sum(0)


def merged_divergence(divergences: Tensor, student_shift: Tensor, teacher_shift: Tensor, divergence: str) -> Tensor:
    """(n,) of a KL, from (P, n) fp64: the shards' divergences, and their log-sum-exps less the row's."""
    first, second = (student_shift, teacher_shift) if divergence != "forward_kl" else (teacher_shift, student_shift)
    merged = _mean_over_shards(divergences + first - second, first)
    # Infinite also where the shard's mass underflows: e^(l_i - l) may be 0, but a finite logit has mass.
    return merged.masked_fill((divergences == _INF).any(0), _INF)


def merged_scores(shards: ShardScores, owner: Tensor, divergence: str) -> TokenScores:
    """fp64 (P, n) and (P, n) bool, which shard holds the sampled token -> the whole row's scores, fp64.
    The divergence of a jsd is not among them: see `shard_jsd`."""
    student_lse, teacher_lse = shards.student_lse.logsumexp(0), shards.teacher_lse.logsumexp(0)
    student_shift, teacher_shift = shards.student_lse - student_lse, shards.teacher_lse - teacher_lse
    scores = TokenScores(
        student_logprob=shards.student_logit.masked_fill(~owner, -_INF).amax(0) - student_lse,
        teacher_logprob=shards.teacher_logit.masked_fill(~owner, -_INF).amax(0) - teacher_lse,
        divergence=merged_divergence(shards.divergence, student_shift, teacher_shift, divergence),
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        student_entropy=_mean_over_shards(shards.student_entropy - student_shift, student_shift),
        teacher_entropy=_mean_over_shards(shards.teacher_entropy - teacher_shift, teacher_shift),
    )
    valid = student_lse.isfinite() & teacher_lse.isfinite() & owner.any(0)
    return TokenScores(*(torch.where(valid, score, math.nan) for score in scores))


def shard_jsd(
    student_logits: Tensor,  # (n, V_i)
    teacher_logits: Tensor,  # (n, V_i)
    student_lse: Tensor,  # (n,) of the whole row, fp64
    teacher_lse: Tensor,  # (n,)
    options: Options,
) -> Tensor:
    """(n,): the sum of the shard's summands of the jsd. A mixture needs both distributions normalised, so this is no
    function of what the shard knows alone."""
    log_p, log_q = _logprobs(student_logits, teacher_logits, student_lse, teacher_lse, options)
    return divergence_terms(log_p, log_q, "jsd", options.beta).sum(-1)


def shard_slopes(
    student_logits: Tensor,  # (n, V_i)
    teacher_logits: Tensor,  # (n, V_i)
    student_lse: Tensor,  # (n,) of the whole row, fp64
    teacher_lse: Tensor,  # (n,)
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(n, V_i) each: weights w and slopes g, such that the gradient of D by scaled logits is w (g - sum w g / sum w),
    the sums over the whole row. For the forward KL, whose gradient is p - q, those two."""
    student, teacher = scaled_pair(student_logits, teacher_logits, options)
    log_p, log_q = less_lse(student, student_lse), less_lse(teacher, teacher_lse)
    if options.divergence == "forward_kl":
        return log_p.exp(), log_q.exp()
    if options.divergence == "reverse_kl":
        # log p - log q with two roundings in place of five; that of the constant cancels.
        slope = student - teacher - (student_lse - teacher_lse).to(student.dtype).unsqueeze(-1)
    else:
        slope = (1 - options.beta) * (log_p - log_mixture(log_p, log_q, options.beta))
    return log_p.exp(), slope.masked_fill(log_p == -_INF, 0.0)


def slope_sums(probability: Tensor, slope: Tensor, options: Options) -> Tensor:
    """(2, n) of one shard; the shards' add up."""
    other = slope if options.divergence == "forward_kl" else probability * slope
    return torch.stack([probability.sum(-1, dtype=torch.float64), other.sum(-1, dtype=torch.float64)])


def gradient_from_sums(probability: Tensor, slope: Tensor, sums: Tensor, options: Options) -> Tensor:
    """(n, V_i) by scaled logits, `sums` (2, n) being the whole row's. Taken from the very numbers that they are sums
    of, they leave no rounding error that every entry would share: a log-sum-exp's makes sum p other than 1."""
    total, other = sums.unsqueeze(-1)
    if options.divergence == "forward_kl":
        return probability * (1 / total).to(slope.dtype) - slope * (1 / other).to(slope.dtype)
    # The difference before the product: of a token with p near 1 both are near its slope.
    return probability * (1 / total).to(slope.dtype) * (slope - (other / total).to(slope.dtype))


def through_transform(grad_scaled: Tensor, student_logits: Tensor, options: Options) -> Tensor:
    """Gradient by scaled logits -> gradient by logits as projected."""
    factor = options.logit_scale / options.temperature
    if options.softcap is None:
        return grad_scaled * factor
    capped = torch.tanh(student_logits * (options.logit_scale / options.softcap))
    return grad_scaled * factor * (1 - capped.square())


def _logprobs(student_logits, teacher_logits, student_lse, teacher_lse, options) -> tuple[Tensor, Tensor]:
    student, teacher = scaled_pair(student_logits, teacher_logits, options)
    return less_lse(student, student_lse), less_lse(teacher, teacher_lse)


def less_lse(logits: Tensor, lse: Tensor) -> Tensor:
    """logits - lse in the logits' dtype, without rounding the fp64 lse to it."""
    high, low = split_in_two(lse, logits.dtype)
    return logits - high.unsqueeze(-1) - low.unsqueeze(-1)


def split_in_two(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp64 as a sum of two numbers of `dtype`; the second is 0 where the first is not finite."""
    high = lse.to(dtype)
    return high, (lse - high).where(high.isfinite(), 0.0).to(dtype)
