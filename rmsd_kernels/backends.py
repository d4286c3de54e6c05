"""Which backend serves a tensor, and why another cannot."""

import functools
import importlib
import logging

import torch
from torch import Tensor

log = logging.getLogger("rmsd_kernels")

BACKENDS = {"triton": "rmsd_kernels.triton", "cpu": "rmsd_kernels.cpu"}  # modules; see ops.py
PREFERRED_BACKENDS = {"cuda": "triton", "cpu": "cpu"}  # by device type; ROCm tensors are "cuda" to torch


@functools.cache
def implementation(backend: str):
    """The backend's module; see ops.py. Raises ImportError where it cannot be imported."""
    return importlib.import_module(BACKENDS[backend])


def why_not(backend: str, tensor: Tensor) -> str | None:
    """Why `backend` cannot serve `tensor`; None where it can."""
    if backend == "torch":
        return None
    if tensor.dtype == torch.float64:
        return "its kernels compute in fp32 and the input is float64"
    if torch.compiler.is_compiling():
        return _why_not_while_tracing(backend, tensor.dtype, tensor.device)
    return _why_not(backend, tensor)


@torch.compiler.assume_constant_result  # imports, libraries and environments cannot be traced
def _why_not_while_tracing(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    return _why_not(backend, torch.empty(0, dtype=dtype, device=device))


def _why_not(backend: str, tensor: Tensor) -> str | None:
    try:
        return implementation(backend).why_not(tensor)
    except ImportError as error:
        return str(error)


@torch.compiler.assume_constant_result
@functools.cache
def _log_fallback(name: str, reason: str) -> None:
    log.warning("%s is computed by backend 'torch': %s", name, reason)


def resolve_backend(backend: str, tensor: Tensor, name: str) -> str:
    """`auto` takes triton for CUDA and ROCm tensors and cpu for CPU tensors, and torch where those cannot (logged
    once). A backend asked for by name that cannot serve raises ValueError."""
    if backend not in ("auto", "torch", *BACKENDS):
        raise ValueError(f"backend must be auto, torch, {' or '.join(BACKENDS)}, not {backend!r}")
    if backend != "auto":
        if reason := why_not(backend, tensor):
            raise ValueError(f"backend={backend!r} cannot serve {name}: {reason}")
        return backend
    preferred = PREFERRED_BACKENDS.get(tensor.device.type, "torch")
    if reason := why_not(preferred, tensor):
        _log_fallback(name, reason)
        return "torch"
    return preferred
