"""The specification: every quantity of this package in plain torch, written as its formula reads.

Works on any device and any floating dtype. Arithmetic is fp32, or fp64 for fp64 inputs, and every function
is differentiable, so the same code serves as the `torch` backend, as the fp64 truth that kernels are held
to, and as documentation. Nothing here is tuned.

Notation: `student_logits` and `teacher_logits` are (N, V); p and q are the distributions they give after
softcap and temperature; logarithms are natural.

Source of the method: "Bringing Capabilities in Distribution via Relevance-Masked Self-Distillation"
(Applied Compute, 2026).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
TAILS = ("drop", "bucket", "renorm")  # in the order of C++'s Tail
CRITERIA = ("logprob_gap", "divergence", "entropy_gap")

_INF = math.inf


class TokenScores(NamedTuple):
    """Seven numbers a token, each of `sampled_ids`' shape, in nats."""

    student_logprob: Tensor  # log p(y)
    teacher_logprob: Tensor  # log q(y)
    divergence: Tensor  # D(p, q) over the whole vocabulary
    student_lse: Tensor  # log-sum-exp of the student's scaled logits
    teacher_lse: Tensor
    student_entropy: Tensor  # -sum p log p
    teacher_entropy: Tensor


def scaled_logits(
    logits: Tensor,  # (N, V)
    temperature: float = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """softcap * tanh(logits * logit_scale / softcap) / temperature, the first `vocab_size` columns, fp32 or fp64."""
    logits = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        # tanh would turn the -inf of a banned token into -softcap and give it mass.
        logits = torch.where(logits == -_INF, logits, softcap * torch.tanh(logits / softcap))
    return logits if temperature == 1.0 else logits / temperature


def valid_rows(logits: Tensor) -> Tensor:
    """(N,) bool: the row is a distribution, i.e. holds no NaN, no +inf and at least one finite logit."""
    return ((logits < _INF).all(-1)) & (logits > -_INF).any(-1)


def logsumexp(logits: Tensor) -> Tensor:
    """(N,) log sum e^logits; a row of -inf gives -inf with zero gradient (torch.logsumexp gives NaN gradient)."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -_INF)
    peak = logits.detach().amax(-1, keepdim=True)
    peak = torch.where(peak > -_INF, peak, 0.0)
    total = (logits - peak).exp().sum(-1)
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + peak.squeeze(-1), -_INF)


def row_peaks(logits: Tensor) -> Tensor:
    """(N, 1) each row's largest logit, a constant to autograd; 0 where none is finite. Taken off a row first, it leaves
    numbers that rounding hurts less: off by a log-sum-exp of 1e4, every log-probability would be rounded to 5e-4."""
    peaks = logits.detach().amax(-1, keepdim=True)
    return peaks.where(peaks.isfinite(), 0.0)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) entry by entry: 0 where p = 0, +inf where q = 0 and p is not. Gradients are finite everywhere."""
    in_p, in_q = log_p > -_INF, log_q > -_INF
    # Fill before the arithmetic: autograd would turn 0 * inf into NaN even behind a torch.where.
    log_p, log_q = log_p.masked_fill(~in_p, 0.0), log_q.masked_fill(~in_q, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~in_p, 0.0).masked_fill(in_p & ~in_q, _INF)


def log_mixture(student_logprobs: Tensor, teacher_logprobs: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p), -inf where both are 0."""
    student, teacher = student_logprobs + math.log1p(-beta), teacher_logprobs + math.log(beta)
    neither = (student == -_INF) & (teacher == -_INF)
    mixed = torch.logaddexp(student.masked_fill(neither, 0.0), teacher.masked_fill(neither, 0.0))
    return mixed.masked_fill(neither, -_INF)


def divergence_terms(student_logprobs: Tensor, teacher_logprobs: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """The summands of D(p, q), entry by entry; docs/method.md, "Divergence":

    reverse_kl  sum p log(p / q)
    forward_kl  sum q log(q / p)
    jsd         beta sum q log(q / m) + (1 - beta) sum p log(p / m),  m = beta q + (1 - beta) p
    """
    if divergence == "reverse_kl":
        return kl_terms(student_logprobs, teacher_logprobs)
    if divergence == "forward_kl":
        return kl_terms(teacher_logprobs, student_logprobs)
    mixture = log_mixture(student_logprobs, teacher_logprobs, beta)
    return beta * kl_terms(teacher_logprobs, mixture) + (1 - beta) * kl_terms(student_logprobs, mixture)


def topk_support(logits: Tensor, vocab_topk: int) -> Tensor:
    """(N, V) bool: each row's `vocab_topk` largest logits, ties to the lower id. Takes the logits as given,
    before softcap and temperature: both keep the order but can round two logits into a tie."""
    if vocab_topk >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    kth = logits.topk(vocab_topk, dim=-1).values[..., -1:]
    above, tied = logits > kth, logits == kth
    room = vocab_topk - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def token_scores(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    sampled_ids: Tensor,  # (N,) int64
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """All of `TokenScores`, in the arithmetic's dtype. A row that is no distribution, or an id outside the
    vocabulary, makes all seven NaN."""
    shared = dict(logit_scale=logit_scale, softcap=softcap, vocab_size=vocab_size)
    student = scaled_logits(student_logits, temperature, **shared)
    teacher = scaled_logits(teacher_logits, teacher_temperature or temperature, **shared)
    in_vocab = (sampled_ids >= 0) & (sampled_ids < student.shape[-1])
    valid = valid_rows(student) & valid_rows(teacher) & in_vocab
    sampled_ids = sampled_ids.where(in_vocab, 0).unsqueeze(-1)

    student_peaks, teacher_peaks = row_peaks(student), row_peaks(teacher)
    student, teacher = student - student_peaks, teacher - teacher_peaks
    student_lse, teacher_lse = logsumexp(student), logsumexp(teacher)
    student_logprobs, teacher_logprobs = student - student_lse.unsqueeze(-1), teacher - teacher_lse.unsqueeze(-1)
    zeros = torch.zeros_like(student)  # log 1: kl_terms(log p, log 1) is p log p
    scores = TokenScores(
        student_logprob=student_logprobs.gather(-1, sampled_ids).squeeze(-1),
        teacher_logprob=teacher_logprobs.gather(-1, sampled_ids).squeeze(-1),
        divergence=divergence_terms(student_logprobs, teacher_logprobs, divergence, beta).sum(-1),
        student_lse=student_lse + student_peaks.squeeze(-1),
        teacher_lse=teacher_lse + teacher_peaks.squeeze(-1),
        student_entropy=-kl_terms(student_logprobs, zeros).sum(-1),
        teacher_entropy=-kl_terms(teacher_logprobs, zeros).sum(-1),
    )
    return TokenScores(*(torch.where(valid, score, math.nan) for score in scores))


def token_divergence(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    vocab_topk: int | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """(N,) D(p, q), differentiable in `student_logits`, over the whole vocabulary or over the student's
    `vocab_topk` largest logits:

    bucket  the k terms of the true log-probabilities, and one entry that holds the rest of each distribution's mass: a
            KL of coarsened distributions, at least 0, and 0 only where they agree
    drop    the k terms and no others: no KL. It may be negative, and it is not stationary where p = q: its gradient
            there, p_i ([i in the support] - P), P the student's mass in the support, moves mass out of it
    renorm  both distributions renormalised over the k

    A row that is no distribution gives NaN; one whose divergence is not finite has zero gradient.
    """
    shared = dict(logit_scale=logit_scale, softcap=softcap, vocab_size=vocab_size)
    student = scaled_logits(student_logits.detach(), temperature, **shared)
    teacher = scaled_logits(teacher_logits.detach(), teacher_temperature or temperature, **shared)
    valid = valid_rows(student) & valid_rows(teacher)
    # An invalid row is replaced before the arithmetic, so that its gradient is 0 and not NaN; and before the softcap,
    # whose own derivative there is NaN.
    student = scaled_logits(student_logits.where(valid.unsqueeze(-1), 0.0), temperature, **shared)
    teacher = teacher.where(valid.unsqueeze(-1), 0.0)
    unreachable = torch.zeros_like(valid)
    if vocab_topk is not None:
        support = topk_support(student_logits.detach()[..., :vocab_size], vocab_topk)
    if vocab_topk is not None and tail == "renorm":
        student, teacher = student.masked_fill(~support, -_INF), teacher.masked_fill(~support, -_INF)
        # A teacher with no mass in the support cannot be renormalised over it; it is as far away as can be.
        unreachable = (teacher == -_INF).all(-1)
        student = student.masked_fill(unreachable.unsqueeze(-1), 0.0)
        teacher = teacher.masked_fill(unreachable.unsqueeze(-1), 0.0)
    # The largest logits of what is left: those of the whole row may lie far from a support's.
    student, teacher = student - row_peaks(student), teacher - row_peaks(teacher)  # the same distributions
    student_lse, teacher_lse = logsumexp(student).unsqueeze(-1), logsumexp(teacher).unsqueeze(-1)
    if vocab_topk is not None and tail != "renorm":
        inside_student, inside_teacher = student.masked_fill(~support, -_INF), teacher.masked_fill(~support, -_INF)
    if vocab_topk is not None and tail == "bucket":
        rest_student, rest_teacher = student.masked_fill(support, -_INF), teacher.masked_fill(support, -_INF)
        student = torch.cat([inside_student, logsumexp(rest_student).unsqueeze(-1)], -1)
        teacher = torch.cat([inside_teacher, logsumexp(rest_teacher).unsqueeze(-1)], -1)
    elif vocab_topk is not None and tail == "drop":
        student, teacher = inside_student, inside_teacher

    result = divergence_terms(student - student_lse, teacher - teacher_lse, divergence, beta).sum(-1)
    result = torch.where(unreachable, _INF, result)
    result = torch.where(valid, result, math.nan)
    return torch.where(result.isfinite(), result, result.detach())


def criterion_score(scores: TokenScores, criterion: str) -> Tensor:
    """The number by which candidates are ranked, of the scores' shape, in nats; NaN where the divergence is not finite,
    so never selected. ValueError for a criterion that there is none of."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")
    score = {
        "logprob_gap": lambda: (scores.teacher_logprob - scores.student_logprob).abs(),
        "divergence": lambda: scores.divergence,
        "entropy_gap": lambda: (scores.teacher_entropy - scores.student_entropy).abs(),
    }[criterion]()
    return torch.where(scores.divergence.isfinite(), score, math.nan)


def select_tokens(score: Tensor, mask: Tensor, *, num_tokens: int, threshold: float = 0.0) -> Tensor:
    """(B, num_tokens) int64: positions of each row's largest scores among `mask & (score > threshold)`,
    best first, ties to the earlier position, -1 where fewer qualify. NaN exceeds nothing."""
    score = score.to(torch.promote_types(score.dtype, torch.float32))  # or the threshold would be rounded to 16 bits
    qualifies = mask & (score > threshold)
    _, index = score.masked_fill(~qualifies, -_INF).sort(dim=-1, descending=True, stable=True)
    index = index.masked_fill(~qualifies.gather(-1, index), -1)[:, :num_tokens]
    return torch.nn.functional.pad(index, (0, num_tokens - index.shape[-1]), value=-1)
