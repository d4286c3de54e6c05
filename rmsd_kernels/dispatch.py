"""Rows of logits to the backend that serves them: after the checks of the public functions, before the operators.

The functions from logits and those from hidden states meet here. Logits are (N, V) or (B, L, V).

A call passes through torch.library's dispatcher only where somebody may want to see it there: a compiler, fake tensors,
a function transform. Plain eager code calls the backend itself, which takes the host about half of the time
(benchmarks/bench_host.py).
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops, reference
from .backends import implementation
from .options import Options
from .reference import TokenScores


def _as_blv(logits: Tensor) -> Tensor:
    """(N, V) | (B, L, V) -> (B, L, V) with unit stride along V; copies only where a row is not contiguous."""
    logits = logits.unsqueeze(0) if logits.ndim == 2 else logits
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _as_bl(tensor: Tensor) -> Tensor:
    return (tensor.unsqueeze(0) if tensor.ndim == 1 else tensor).contiguous()


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nobody is tracing, transforming or standing in for tensors, and their memory holds what they are: a view
    that is to be negated is so by the dispatcher."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, vjp, functionalize
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(x is None or (type(x) in plain and not x.is_meta and not x.is_neg()) for x in tensors)


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
    rows = _as_blv(student_logits), _as_blv(teacher_logits), _as_bl(sampled_ids)
    if is_plain_eager(*rows):
        scores = implementation(options.backend).scores(*rows, options)
    else:
        scores = ops.scores(*rows, *options)
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
    selection = num_candidates, criterion, threshold
    if is_plain_eager(*rows):
        scores, index = implementation(options.backend).scores_and_candidates(*rows, *selection, options)
    else:
        scores, index = ops.scores_and_candidates(*rows, *selection, *options)
    return TokenScores(*scores.unbind()), index


def divergence_of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Tensor | None,  # (R,) int64 of the flattened leading axis, -1 for none; None for all
    options: Options,
) -> Tensor:
    """(R,), differentiable in `student_logits`."""
    if options.backend != "torch":
        logits = _as_blv(student_logits), _as_blv(teacher_logits.detach())
        if is_plain_eager(*logits, rows):
            return _Divergence.apply(*logits, rows, options)
        _refuse_functional_derivatives(student_logits)
        return ops.divergence(*logits, rows, *options)[0]
    student_logits, teacher_logits = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    if rows is not None:
        if student_logits.shape[0] == 0:
            dtype = torch.promote_types(student_logits.dtype, torch.float32)
            return student_logits.sum() + student_logits.new_zeros(rows.shape, dtype=dtype)
        student_logits, teacher_logits = student_logits[rows.clamp_min(0)], teacher_logits[rows.clamp_min(0)]
    result = reference.token_divergence(student_logits, teacher_logits, **options.of_divergence())
    return result if rows is None else torch.where(rows >= 0, result, 0.0)


def _refuse_functional_derivatives(student_logits: Tensor) -> None:
    """An operator's derivative is unknown to torch.func's transforms: a jvp through it was 0, without a word."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(student_logits):
        if torch._C._functorch.is_gradtrackingtensor(student_logits):
            raise RuntimeError(
                "token_divergence's kernels have no derivative by torch.func: use torch.autograd, or backend='torch'"
            )
        student_logits = torch._C._functorch.get_unwrapped(student_logits)


class _Divergence(torch.autograd.Function):
    """ops.divergence and its backward, called without the dispatcher."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, rows, options):
        result, stats = implementation(options.backend).divergence(student_logits, teacher_logits, rows, options)
        ctx.options = options
        # What was made in inference mode, as a teacher's logits may be, autograd refuses to save.
        ctx.teacher_logits = teacher_logits if teacher_logits.is_inference() else None
        ctx.save_for_backward(student_logits, None if teacher_logits.is_inference() else teacher_logits, rows, stats)
        return result

    @staticmethod
    def backward(ctx, grad_divergence):
        student_logits, teacher_logits, rows, stats = ctx.saved_tensors
        logits = student_logits, ctx.teacher_logits if teacher_logits is None else teacher_logits
        # With a graph wanted of the backward, the operator is who says that there is no second derivative.
        if is_plain_eager(grad_divergence) and not torch.is_grad_enabled():
            if rows is not None:
                grad_divergence = ops.summed_over_repeats(grad_divergence, rows, student_logits.shape[:2].numel())
            kernels = implementation(ctx.options.backend)
            grad = kernels.divergence_backward(grad_divergence, *logits, rows, stats, ctx.options)
        else:
            grad = ops.divergence_backward(grad_divergence, *logits, rows, stats, *ctx.options)
        return grad, None, None, None


def divergence_and_stats(
    student_logits: Tensor,  # (n, V)
    teacher_logits: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """(n,) divergence of every row, and what a backend's kernels hand to their backward, (n, 16)."""
    if options.backend == "torch":
        return divergence_of_rows(student_logits, teacher_logits, None, options), None
    logits = _as_blv(student_logits), _as_blv(teacher_logits)
    if is_plain_eager(*logits):
        return implementation(options.backend).divergence(*logits, None, options)
    return ops.divergence(*logits, None, *options)


def gradient_of_rows(
    grad_divergence: Tensor,  # (n,)
    student_logits: Tensor,  # (n, V)
    teacher_logits: Tensor,
    stats: Tensor | None,  # of `divergence_and_stats`
    options: Options,
) -> Tensor:
    """Gradient of the divergence by all of (n, V) student logits. Written out, without autograd, where there are
    kernels: torch.compile cannot trace autograd.grad inside a backward."""
    if options.backend == "torch":

        def divergence(logits):
            return divergence_of_rows(logits, teacher_logits, None, options)

        return torch.func.vjp(divergence, student_logits)[1](grad_divergence)[0]
    logits = _as_blv(student_logits), _as_blv(teacher_logits)
    if is_plain_eager(*logits, grad_divergence):
        kernels = implementation(options.backend)
        return kernels.divergence_backward(grad_divergence, *logits, None, stats, options)[0]
    return ops.divergence_backward(grad_divergence, *logits, None, stats, *options)[0]
