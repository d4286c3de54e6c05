"""The same functions from hidden states: logits exist for one chunk of rows at a time and never as a whole.

logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), then temperature. Hidden states are
(N, H) or (B, L, H), weights (V, H). A chunk's logits are fp32 whatever the inputs' dtype: rounding them to bf16
before the softmax is where other implementations lose the gradient's accuracy.
"""

import math

import torch
from torch import Tensor

from .functional import (
    _scores,
    check_floating,
    check_ids,
    check_options,
    check_rows,
    divergence_of_rows,
    gradient_of_rows,
    resolve_backend,
)
from .reference import TokenScores

WORKSPACE_MB = 32  # both chunks' logits: stays in a last-level cache and leaves GEMMs of 80 rows at V = 50k
_UPCAST_COLUMNS = 4096  # rows of a low-precision weight brought to fp32 at a time on a CPU


def linear_token_scores(
    student_hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64
    student_weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H') | (B, L, H')
    teacher_weight: Tensor,  # (V, H')
    sampled_ids: Tensor,  # (N,) | (B, L)  int64
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenScores:
    """`token_scores` of the logits that the hidden states project to, never holding (N, V).

    Args:
        logit_scale: factor on the projected logits (Cohere; 1 / logits_scaling for Granite).
        softcap: Gemma's final cap, applied after the scale; None for none.
        workspace_mb: room for one chunk's logits; None for 32.
        The rest as in `token_scores`.
    """
    _check_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    _check_transform(logit_scale, softcap)
    width = student_weight.shape[0]
    check_options(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        vocab_size=vocab_size, width=width,
    )  # fmt: skip
    check_ids(sampled_ids, student_hidden.shape[:-1], student_hidden.device, vocab_size or width)
    backend = resolve_backend(backend, student_hidden, "linear_token_scores")
    options = dict(
        divergence=divergence, beta=beta, temperature=temperature, vocab_size=vocab_size or width,
        teacher_temperature=teacher_temperature or temperature, logit_scale=logit_scale, softcap=softcap,
        backend=backend,
    )  # fmt: skip
    student_hidden, teacher_hidden = student_hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)
    flat_ids = sampled_ids.flatten()
    chunks = [
        torch.stack(
            _scores(
                _project(student_hidden[part], student_weight, student_bias),
                _project(teacher_hidden[part], teacher_weight, teacher_bias),
                flat_ids[part],
                **options,
            )
        )
        for part in _row_chunks(flat_ids.shape[0], width, workspace_mb)
    ]
    return TokenScores(*torch.cat(chunks, 1).view(7, *sampled_ids.shape).unbind())


def linear_token_divergence(
    student_hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64
    student_weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H') | (B, L, H')
    teacher_weight: Tensor,  # (V, H')
    *,
    rows: Tensor | None = None,  # (R,) int64
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    vocab_topk: int | None = None,
    tail: str = "drop",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`token_divergence` of the projected logits at `rows`; only those rows reach the head, forward and backward.

    Args:
        rows: int64 into the flattened leading axis, None for all; -1 gives 0. Rows not named get exactly zero gradient.
        The rest as in `token_divergence` and `linear_token_scores`.

    Returns:
        (R,) fp32 (fp64 for fp64 inputs), differentiable in `student_hidden`, `student_weight` and `student_bias`.
    """
    _check_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    _check_transform(logit_scale, softcap)
    width = student_weight.shape[0]
    check_options(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        vocab_size=vocab_size, width=width, vocab_topk=vocab_topk, tail=tail,
    )  # fmt: skip
    student_hidden, teacher_hidden = student_hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)
    if rows is None:
        rows = torch.arange(student_hidden.shape[0], device=student_hidden.device)
    check_rows(rows, student_hidden.shape[0], student_hidden.device)
    options = dict(
        divergence=divergence, beta=beta, vocab_topk=vocab_topk, tail=tail, temperature=temperature,
        teacher_temperature=teacher_temperature or temperature, vocab_size=vocab_size or width,
        logit_scale=logit_scale, softcap=softcap,
        backend=resolve_backend(backend, student_hidden, "linear_token_divergence"),
    )  # fmt: skip
    if not rows.numel() or not student_hidden.shape[0]:
        # No row at all: zeros that still belong to the graph, so that a caller's backward() runs.
        return rows.new_zeros(rows.shape, dtype=torch.float32) + 0.0 * student_hidden.sum()
    # Detached also for torch.compile, which refuses one tensor twice, as a head shared by both roles would be.
    return _LinearDivergence.apply(
        student_hidden[rows.clamp_min(0)], student_weight, student_bias,
        teacher_hidden.detach()[rows.clamp_min(0)], teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), rows >= 0, workspace_mb, options,
    )  # fmt: skip


class _LinearDivergence(torch.autograd.Function):
    """Divergence of R gathered rows in chunks; the backward projects each chunk again instead of keeping (R, V)."""

    @staticmethod
    def forward(
        ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        live, workspace_mb, options,
    ):  # fmt: skip
        ctx.save_for_backward(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, live
        )
        ctx.chunks = _row_chunks(student_hidden.shape[0], student_weight.shape[0], workspace_mb)
        ctx.options = options
        result = [
            divergence_of_rows(
                _project(student_hidden[part], student_weight, student_bias),
                _project(teacher_hidden[part], teacher_weight, teacher_bias),
                None,
                **options,
            )
            for part in ctx.chunks
        ]
        return torch.cat(result).masked_fill(~live, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_divergence):
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, live = (
            ctx.saved_tensors
        )
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_dtype = torch.promote_types(student_weight.dtype, torch.float32)
        grad_hidden = torch.zeros_like(student_hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(student_weight, dtype=sum_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(student_bias, dtype=sum_dtype) if needs_bias else None
        grad_divergence = grad_divergence.masked_fill(~live, 0.0)
        for part in ctx.chunks:
            grad_logits = gradient_of_rows(
                grad_divergence[part],
                _project(student_hidden[part], student_weight, student_bias),
                _project(teacher_hidden[part], teacher_weight, teacher_bias),
                **ctx.options,
            )
            if needs_hidden:
                grad_hidden[part] = _backproject(grad_logits, student_weight)
            if needs_weight:
                grad_weight.addmm_(grad_logits.T, student_hidden[part].to(sum_dtype))
            if needs_bias:
                grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            grad_weight.to(student_weight.dtype) if needs_weight else None,
            grad_bias.to(student_bias.dtype) if needs_bias else None,
            *(None,) * 6,
        )


def _row_chunks(num_rows: int, width: int, workspace_mb: float | None) -> list[slice]:
    """Slices of rows whose student and teacher logits, fp32, fit the workspace together; at least one, maybe empty."""
    rows = max(1, int((workspace_mb or WORKSPACE_MB) * 2**20 / (2 * 4 * width)))
    return [slice(start, start + rows) for start in range(0, max(num_rows, 1), rows)]


@torch.no_grad()
def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, H) @ (V, H).T + bias as (n, V) in fp32 (fp64 for fp64), accumulated in fp32."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype in (torch.float32, torch.float64):
            logits = hidden @ weight.T
        elif hidden.is_cuda:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            # A CPU's low-precision product rounds its result to the inputs' dtype.
            hidden, logits = hidden.float(), hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
            for start in range(0, len(weight), _UPCAST_COLUMNS):
                part = slice(start, start + _UPCAST_COLUMNS)
                torch.mm(hidden, weight[part].float().T, out=logits[:, part])
        return logits if bias is None else logits.add_(bias)


def _backproject(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """(n, V) @ (V, H) accumulated in fp32, in the weight's dtype."""
    if weight.dtype == grad_logits.dtype:
        return grad_logits @ weight
    if weight.is_cuda:
        return grad_logits.to(weight.dtype) @ weight
    grad_hidden = grad_logits.new_zeros(len(grad_logits), weight.shape[1])
    for start in range(0, len(weight), _UPCAST_COLUMNS):
        part = slice(start, start + _UPCAST_COLUMNS)
        grad_hidden.addmm_(grad_logits[:, part], weight[part].float())
    return grad_hidden.to(weight.dtype)


def _check_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias) -> None:
    tensors = dict(
        student_hidden=student_hidden, student_weight=student_weight, teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight, student_bias=student_bias, teacher_bias=teacher_bias,
    )  # fmt: skip
    check_floating(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    if student_hidden.ndim not in (2, 3):
        raise ValueError(f"student_hidden must be (N, H) or (B, L, H), not {tuple(student_hidden.shape)}")
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must have student_hidden's leading shape {tuple(student_hidden.shape[:-1])}, "
            f"not {tuple(teacher_hidden.shape[:-1])}"
        )
    for role, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
            raise ValueError(
                f"{role}_weight must be (V, {hidden.shape[-1]}) to match {role}_hidden, not {tuple(weight.shape)}"
            )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight must have student_weight's vocabulary {student_weight.shape[0]}, "
            f"not {teacher_weight.shape[0]}"
        )
    for name, bias in (("student_bias", student_bias), ("teacher_bias", teacher_bias)):
        if bias is not None and bias.shape != student_weight.shape[:1]:
            raise ValueError(f"{name} must be ({student_weight.shape[0]},), not {tuple(bias.shape)}")


def _check_transform(logit_scale: float, softcap: float | None) -> None:
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number above 0, not {logit_scale}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number above 0 or None, not {softcap}")
