"""C++ kernels for CPU tensors: the launcher. The sources beside this file are built three times by setup.py, and the
build that this processor can run is loaded on first use."""

import ctypes
import functools
import importlib.util
import os

import numpy as np
import torch
from torch import Tensor

from ..ops import NUM_STATS
from ..options import Options
from ..reference import CRITERIA, DIVERGENCES, TAILS

# Best first. at::vec is specialised at compile time, so each is a library of its own.
CAPABILITIES = ("avx512", "avx2", "default")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Problem(ctypes.Structure):
    """Mirrors Problem in common.h, field by field."""

    _fields_ = (
        ("student_logits", ctypes.c_void_p),
        ("teacher_logits", ctypes.c_void_p),
        ("student_stride", ctypes.c_int64 * 2),
        ("teacher_stride", ctypes.c_int64 * 2),
        ("num_sequences", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("divergence", ctypes.c_int32),
        ("beta", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("teacher_temperature", ctypes.c_float),
        ("logit_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def capability() -> str:
    """The best build that is here and that this processor can run; RMSD_CPU_CAPABILITY asks for a lesser one.

    Raises:
        ImportError: RMSD_CPU_CAPABILITY asks for one that this processor cannot run.
    """
    have = torch.backends.cpu.get_cpu_capability().lower()
    runnable = CAPABILITIES[CAPABILITIES.index(have) if have in CAPABILITIES else -1 :]
    wanted = os.environ.get("RMSD_CPU_CAPABILITY", "").lower()
    if wanted and wanted not in runnable:
        raise ImportError(f"RMSD_CPU_CAPABILITY={wanted}: this processor runs {', '.join(runnable)}")
    return wanted or next(filter(_library_file, runnable), runnable[0])


def _library_file(name: str) -> str | None:
    spec = importlib.util.find_spec(f"{__name__}._{name}")
    return spec.origin if spec else None


@functools.cache
def library() -> ctypes.CDLL:
    """Raises ImportError, saying what to do, where there is no library for this processor or torch cannot serve it.

    Of torch a library asks, by name, for seven functions that say how many threads there are and for two of SLEEF:
    torch 2.9.0 and 2.13.0 have the same. A torch that lacks one is told here, before anything is computed."""
    name = capability()
    path = _library_file(name)
    again = "`pip install --force-reinstall --no-deps --no-cache-dir`"
    if path is None:
        raise ImportError(f"the C++ kernels ({name}) are not built: install a C++20 compiler, then this, by {again}")
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"the C++ kernels ({name}) do not load beside torch {torch.__version__} ({error}): install this from "
            f"source, by {again}"
        ) from error


def why_not(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"its kernels take CPU tensors, not {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    try:
        library()
    except ImportError as error:
        return str(error)
    return None


def _problem(student_logits: Tensor, teacher_logits: Tensor, options: Options) -> _Problem:
    num_sequences, length, width = student_logits.shape
    return _Problem(
        student_logits=student_logits.data_ptr(),
        teacher_logits=teacher_logits.data_ptr(),
        student_stride=student_logits.stride()[:2],
        teacher_stride=teacher_logits.stride()[:2],
        num_sequences=num_sequences,
        length=length,
        width=width,
        vocab_size=options.vocab_size,
        dtype=_DTYPES[student_logits.dtype],
        divergence=DIVERGENCES.index(options.divergence),
        beta=options.beta,
        temperature=options.temperature,
        teacher_temperature=options.teacher_temperature,
        logit_scale=options.logit_scale,
        softcap=options.softcap or 0.0,
    )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """torch.zeros from memory that the system zeroes when it is first touched, in huge pages where Linux grants them.
    A gradient with 5 rows of 512 x 49,152 set then costs 0.2 ms in place of 69, and together with the product that
    reads it 56 ms in place of 138 (2 cores, busy)."""
    num_bytes = shape.numel() * dtype.itemsize
    memory = np.zeros(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64  # torch's own alignment
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the kernels write into: of their type wherever the user's default dtype and device point."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]


def scores(student_logits: Tensor, teacher_logits: Tensor, sampled_ids: Tensor, options: Options) -> Tensor:
    out = _empty(7, *sampled_ids.shape)
    problem = _problem(student_logits, teacher_logits, options)
    library().rmsd_scores(ctypes.byref(problem), _pointer(sampled_ids), _pointer(out))
    return out


def select(score: Tensor, mask: Tensor, num_tokens: int, threshold: float) -> Tensor:
    index = _empty(score.shape[0], num_tokens, dtype=torch.int64)
    sizes = _sizes(*score.shape, num_tokens)
    library().rmsd_select(_pointer(score), _pointer(mask), *sizes, ctypes.c_float(threshold), _pointer(index))
    return index


def scores_and_candidates(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sampled_ids: Tensor,
    mask: Tensor,
    num_candidates: int,
    criterion: str,
    threshold: float,
    options: Options,
) -> tuple[Tensor, Tensor]:
    out = scores(student_logits, teacher_logits, sampled_ids, options)
    index = _empty(mask.shape[0], num_candidates, dtype=torch.int64)
    library().rmsd_candidates(
        _pointer(out),
        _pointer(mask),
        *_sizes(*mask.shape, num_candidates),
        CRITERIA.index(criterion),
        ctypes.c_float(threshold),
        _pointer(index),
    )
    return out, index


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, rows: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    num_rows = student_logits.shape[0] * student_logits.shape[1] if rows is None else rows.shape[0]
    rows = None if rows is None else rows.contiguous()
    out, stats = _empty(num_rows), _empty(num_rows, NUM_STATS)
    problem = _problem(student_logits, teacher_logits, options)
    library().rmsd_divergence(
        ctypes.byref(problem),
        _pointer(rows),
        *_sizes(num_rows, options.vocab_topk or 0),
        TAILS.index(options.tail),
        _pointer(out),
        _pointer(stats),
    )
    return out, stats


def divergence_backward(
    grad_divergence: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    options: Options,
) -> Tensor:
    rows = None if rows is None else rows.contiguous()
    grad_divergence = grad_divergence.float().contiguous()
    grad = _zeros(student_logits.shape, student_logits.dtype)
    problem = _problem(student_logits, teacher_logits, options)
    library().rmsd_divergence_backward(
        ctypes.byref(problem),
        _pointer(rows),
        *_sizes(len(grad_divergence), options.vocab_topk or 0),
        TAILS.index(options.tail),
        _pointer(grad_divergence),
        _pointer(stats),
        _pointer(grad),
    )
    return grad
