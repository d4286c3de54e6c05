"""The kernels as PyTorch operators: schemas, fakes, and the one autograd definition.

Every operator takes logits as (B, L, V) with unit stride along V and any strides along B and L, so that the
usual `logits[:, :-1]` costs no copy, and ends in the fields of `Options`, one by one, as a schema has no records.

A backend is a module with the five functions `scores`, `select`, `scores_and_candidates`, `divergence` and
`divergence_backward`, which take the tensors below and an `Options`, and `why_not(tensor) -> str | None`, which says
why it cannot serve a tensor.

`divergence` hands its backward sixteen fp32 numbers a row (`NUM_STATS`), in place of anything of size V.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from .backends import implementation
from .checks import check_rows
from .options import SCHEMA, Options

# divergence() hands this many fp32 numbers a row to its backward; what they are is each backend's affair. With f the
# divergence's summand and g = df/dp, the gradient by scaled logit j is p_j (g_j - c) inside the support and
# p_j (g_rest - c) outside it (drop: g_rest = 0; renorm: 0 altogether), where c is the sum of p g over the support and
# the bucket. Of these, the log-sum-exps, c, the bucket's slope and where the support ends are worth saving.
NUM_STATS = 16


@custom_op(
    "rmsd_kernels::scores",
    mutates_args=(),
    schema=f"(Tensor student_logits, Tensor teacher_logits, Tensor sampled_ids, {SCHEMA}) -> Tensor",
)
def scores(
    student_logits: Tensor,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits: Tensor,  # (B, L, V), same dtype
    sampled_ids: Tensor,  # (B, L) int64
    *fields,
) -> Tensor:  # (7, B, L) fp32, in the order of TokenScores
    options = Options(*fields)
    return implementation(options.backend).scores(student_logits, teacher_logits, sampled_ids, options)


@scores.register_fake
def _(student_logits, teacher_logits, sampled_ids, *fields):
    return student_logits.new_empty((7, *sampled_ids.shape), dtype=torch.float32)


@custom_op("rmsd_kernels::select", mutates_args=())
def select(
    score: Tensor,  # (B, L) fp32
    mask: Tensor,  # (B, L) bool
    num_tokens: int,
    threshold: float,
    backend: str,
) -> Tensor:  # (B, num_tokens) int64
    return implementation(backend).select(score, mask, num_tokens, threshold)


@select.register_fake
def _(score, mask, num_tokens, threshold, backend):
    return score.new_empty((score.shape[0], num_tokens), dtype=torch.int64)


@custom_op(
    "rmsd_kernels::scores_and_candidates",
    mutates_args=(),
    schema="(Tensor student_logits, Tensor teacher_logits, Tensor sampled_ids, Tensor mask, SymInt num_candidates, "
    f"str criterion, float threshold, {SCHEMA}) -> (Tensor, Tensor)",
)
def scores_and_candidates(
    student_logits: Tensor,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits: Tensor,  # (B, L, V), same dtype
    sampled_ids: Tensor,  # (B, L) int64
    mask: Tensor,  # (B, L) bool
    num_candidates: int,
    criterion: str,
    threshold: float,
    *fields,
) -> tuple[Tensor, Tensor]:  # (7, B, L) fp32, (B, num_candidates) int64
    options = Options(*fields)
    return implementation(options.backend).scores_and_candidates(
        student_logits, teacher_logits, sampled_ids, mask, num_candidates, criterion, threshold, options
    )


@scores_and_candidates.register_fake
def _(student_logits, teacher_logits, sampled_ids, mask, num_candidates, *rest):
    return (
        student_logits.new_empty((7, *sampled_ids.shape), dtype=torch.float32),
        student_logits.new_empty((sampled_ids.shape[0], num_candidates), dtype=torch.int64),
    )


@custom_op(
    "rmsd_kernels::divergence",
    mutates_args=(),
    schema=f"(Tensor student_logits, Tensor teacher_logits, Tensor? rows, {SCHEMA}) -> (Tensor, Tensor)",
)
def divergence(
    student_logits: Tensor,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits: Tensor,  # (B, L, V), same dtype
    rows: Tensor | None,  # (R,) int64 into B*L, -1 for none; None for every row in order
    *fields,
) -> tuple[Tensor, Tensor]:  # (R,) fp32, 0 at rows of -1; (R, 16) fp32, see NUM_STATS
    options = Options(*fields)
    if rows is not None:  # a compiled call could not look at their values, and C++ would read wherever they point
        check_rows(rows, student_logits.shape[:2].numel(), student_logits.device)
    return implementation(options.backend).divergence(student_logits, teacher_logits, rows, options)


@divergence.register_fake
def _(student_logits, teacher_logits, rows, *fields):
    num_rows = student_logits.shape[0] * student_logits.shape[1] if rows is None else rows.shape[0]
    return (
        student_logits.new_empty((num_rows,), dtype=torch.float32),
        student_logits.new_empty((num_rows, NUM_STATS), dtype=torch.float32),
    )


def summed_over_repeats(grad_divergence: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """(R,): the sum of a row's gradients wherever it is named. Whether rows repeat cannot be asked of a device without
    waiting for it; so those that do write the same numbers to the same place, in whatever order."""
    slots = rows.clamp(-1, num_rows) + 1  # the first and the last stand for none
    sums = grad_divergence.new_zeros(num_rows + 2)
    # Each in a fixed order. The other way around they are atomic additions, whose last bits change from run to run.
    if sums.is_cpu:
        sums.index_add_(0, slots, grad_divergence)
    else:
        sums.index_put_((slots,), grad_divergence, accumulate=True)
    return sums[slots]


@custom_op(
    "rmsd_kernels::divergence_backward",
    mutates_args=(),
    schema="(Tensor grad_divergence, Tensor student_logits, Tensor teacher_logits, Tensor? rows, Tensor stats, "
    f"{SCHEMA}) -> Tensor",
)
def divergence_backward(
    grad_divergence: Tensor,  # (R,) fp32
    student_logits: Tensor,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits: Tensor,  # (B, L, V), same dtype
    rows: Tensor | None,  # (R,) int64, -1 for none; one that is named twice gets the sum of both gradients
    stats: Tensor,  # (R, 16) fp32
    *fields,
) -> Tensor:  # (B, L, V) in the logits' dtype, contiguous; 0 in rows not named
    options = Options(*fields)
    if rows is not None:
        num_rows = student_logits.shape[0] * student_logits.shape[1]
        grad_divergence = summed_over_repeats(grad_divergence, rows, num_rows)
    return implementation(options.backend).divergence_backward(
        grad_divergence, student_logits, teacher_logits, rows, stats, options
    )


@divergence_backward.register_fake
def _(grad_divergence, student_logits, *rest):
    return student_logits.new_empty(student_logits.shape)


def _setup_context(ctx, inputs, output):
    student_logits, teacher_logits, rows, *ctx.options = inputs
    ctx.save_for_backward(student_logits, teacher_logits, rows, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_divergence, _grad_stats):
    grad = divergence_backward(grad_divergence, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, *(None for _ in ctx.options)


divergence.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, grad):
    raise RuntimeError(
        "token_divergence has no second derivative in its kernels: differentiate once, or pass backend='torch'"
    )


divergence_backward.register_autograd(_no_double_backward)
