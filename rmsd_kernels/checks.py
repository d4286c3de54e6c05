"""What the public functions refuse: each check names the argument, what it was and what it must be."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from .reference import CRITERIA, DIVERGENCES, TAILS

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_options(
    *, divergence, beta, temperature, teacher_temperature, vocab_size, width, vocab_topk=None, tail="bucket"
) -> None:
    """Raises ValueError for an option that no divergence can be computed with, TypeError for one of another kind."""
    for name, value in (("beta", beta), ("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        check_number(name, value, optional=name == "teacher_temperature")
    for name, value in (("vocab_size", vocab_size), ("vocab_topk", vocab_topk)):
        check_number(name, value, Integral, optional=True)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie strictly between 0 and 1, not {beta} (at either end the jsd is always 0)")
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, not {tail!r}")
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, not {value}")
    if vocab_size is not None and not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must lie between 1 and the logits' width {width}, not {vocab_size}")
    if vocab_topk is not None and vocab_topk < 1:
        raise ValueError(f"vocab_topk must be at least 1 or None, not {vocab_topk}")


def check_selection(*, criterion="logprob_gap", num_tokens, threshold, name="num_tokens") -> None:
    """Raises ValueError for an option that no token can be selected with."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")
    check_number(name, num_tokens, Integral)
    check_number("threshold", threshold)
    if num_tokens < 1:
        raise ValueError(f"{name} must be at least 1, not {num_tokens}")
    if threshold != threshold:
        raise ValueError("threshold must be a number, not NaN")


def check_number(name: str, value: object, kind: type = Real, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        wanted = "an integer" if kind is Integral else "a number"
        raise TypeError(f"{name} must be {wanted}{' or None' if optional else ''}, not {value!r}")


def check_floating(**tensors: Tensor) -> None:
    """Raises TypeError unless all are floating tensors of one supported dtype, ValueError unless of one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, not {tensor.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, not {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first_name}'s device {first.device}, not {tensor.device}")


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.ndim not in (2, 3) or student_logits.shape[-1] < 1:
        raise ValueError(f"student_logits must be (N, V) or (B, L, V), V >= 1, not {tuple(student_logits.shape)}")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have student_logits' shape {tuple(student_logits.shape)}, "
            f"not {tuple(teacher_logits.shape)}"
        )


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless `weight` (V, H) and `bias` (V,) project `hidden` (N, H) or (B, L, H). `prefix`: of their names."""
    tensors = {f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias}
    check_floating(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    if hidden.ndim not in (2, 3):
        raise ValueError(f"{prefix}hidden must be (N, H) or (B, L, H), not {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"{prefix}weight must be (V, {hidden.shape[-1]}) to match {prefix}hidden, not {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")


def check_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> None:
    """Raises unless both heads project their hidden states to logits of one shape, dtype and device."""
    tensors = dict(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
    )
    check_floating(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    check_head("student_", student_hidden, student_weight, student_bias)
    if teacher_weight.ndim == 2 and teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight must have student_weight's vocabulary {student_weight.shape[0]}, "
            f"not {teacher_weight.shape[0]}"
        )
    check_head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must have student_hidden's leading shape {tuple(student_hidden.shape[:-1])}, "
            f"not {tuple(teacher_hidden.shape[:-1])}"
        )


def check_transform(logit_scale: float, softcap: float | None) -> None:
    check_number("logit_scale", logit_scale)
    check_number("softcap", softcap, optional=True)
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number above 0, not {logit_scale}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number above 0 or None, not {softcap}")


def check_workspace(workspace_mb: float | None) -> None:
    check_number("workspace_mb", workspace_mb, optional=True)
    if workspace_mb is not None and not 0.0 < workspace_mb < math.inf:
        raise ValueError(f"workspace_mb must be a finite number above 0 or None, not {workspace_mb}")


def check_ids(sampled_ids: Tensor, shape: torch.Size, device: torch.device, limit: int, mask: Tensor | None = None):
    """Raises unless `sampled_ids` is an integer tensor of `shape` whose (unmasked) values lie in [0, limit).
    The values are looked at on the CPU only; elsewhere that would cost a sync, and a bad id gives NaN scores."""
    if not isinstance(sampled_ids, Tensor) or sampled_ids.dtype not in (torch.int64, torch.int32):
        kind = sampled_ids.dtype if isinstance(sampled_ids, Tensor) else type(sampled_ids).__name__
        raise TypeError(f"sampled_ids must be an int64 tensor, not {kind}")
    if sampled_ids.shape != shape:
        raise ValueError(f"sampled_ids must be {tuple(shape)}, one id a row, not {tuple(sampled_ids.shape)}")
    if sampled_ids.device != device:
        raise ValueError(f"sampled_ids must be on the logits' device {device}, not {sampled_ids.device}")
    if sampled_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (sampled_ids < 0) | (sampled_ids >= limit)
        if mask is not None:
            outside &= mask
        if outside.any():
            raise ValueError(f"sampled_ids must lie in [0, {limit}), not {sampled_ids[outside][0].item()}")


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device, name: str = "mask") -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, not {kind}")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on {device} like the scores, not {mask.device}")


def check_rows(rows: Tensor, num_rows: int, device: torch.device) -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"rows must be an int64 tensor, not {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.ndim != 1:
        raise ValueError(f"rows must be (R,), not {tuple(rows.shape)}")
    if rows.device != device:
        raise ValueError(f"rows must be on {device}, not {rows.device}")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (rows < -1) | (rows >= num_rows)
        if outside.any():
            raise ValueError(f"rows must lie in [0, {num_rows}), or be -1, not {rows[outside][0].item()}")
