"""Hidden states @ head, a chunk of rows at a time, in fp32 whatever the inputs' dtype, and back."""

import contextlib
import functools
import itertools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

# Of both models' logits. On a CPU in a last-level cache, and each below the 32 MB from which glibc maps new pages every
# time. A GPU wants few launches and whole rows: of 4096 rows at V = 152k, H = 2560 on an H200, 48 MB took 7.2 times the
# bare products' time, 192 MB 2.2, 768 MB 1.4, all at once 1.4. 1 GB has room for 512 rows even at V = 262k.
WORKSPACE_MB = {"cpu": 48, "gpu": 1024}
_TILE_ROWS, _TILE_COLUMNS = 512, 1024  # of a tile of logits, at most and at least
_SUMMED_COLUMNS = 32768  # of a low-precision head's gradient, added to its sum at a time
_UPCAST_COLUMNS = 4096  # rows of a low-precision weight brought to fp32 at a time on a CPU
_per_thread = threading.local()


class Models(NamedTuple):
    """What both models' logits are projected from: hidden states, and heads."""

    student_hidden: Tensor  # (N, H), before `flat` maybe (B, L, H)
    student_weight: Tensor  # (V, H)
    student_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor | None = None  # (N, H'); None where the student takes both roles
    teacher_weight: Tensor | None = None  # (V, H')
    teacher_bias: Tensor | None = None  # (V,)
    shared: bool = False  # one head: one product for both

    @property
    def count(self) -> int:
        """How many projections a row takes."""
        return 1 if self.teacher_hidden is None else 2

    def flat(self) -> "Models":
        hidden = self.teacher_hidden
        return self._replace(
            student_hidden=self.student_hidden.flatten(0, -2),
            teacher_hidden=None if hidden is None else hidden.flatten(0, -2),
        )

    def columns(self, tile: slice) -> "Models":
        """The part of both heads that gives these columns of the logits."""
        return self._replace(
            student_weight=self.student_weight[tile],
            student_bias=_part(self.student_bias, tile),
            teacher_weight=_part(self.teacher_weight, tile),
            teacher_bias=_part(self.teacher_bias, tile),
        )

    def rows(self, index: Tensor) -> "Models":
        """Hidden states at `index` (R,), and a teacher that nothing is differentiated by. Detached also for
        torch.compile, which refuses one tensor twice, as a head shared by both roles would be."""
        return self._replace(
            student_hidden=self.student_hidden[index],
            teacher_hidden=self.teacher_hidden.detach()[index],
            teacher_weight=self.teacher_weight.detach(),
            teacher_bias=None if self.teacher_bias is None else self.teacher_bias.detach(),
        )

    def logits(self, part: slice, workspace: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both models' logits of a chunk, (n, V) fp32."""
        student_hidden = self.student_hidden[part]
        if self.count == 1:
            # A two-model scan with one row in both roles: it is in cache, and the projection is 20 times the scan.
            return (project(student_hidden, self.student_weight, self.student_bias, workspace),) * 2
        teacher_hidden, rows = self.teacher_hidden[part], len(student_hidden)
        if self.shared:
            both = torch.cat([student_hidden, teacher_hidden])
            logits = project(both, self.student_weight, self.student_bias, workspace)
            return logits[:rows], logits[rows:]
        below = None if workspace is None else workspace[rows:]
        return (
            project(student_hidden, self.student_weight, self.student_bias, workspace),
            project(teacher_hidden, self.teacher_weight, self.teacher_bias, below),
        )


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def default_workspace_mb(device_type: str) -> float:
    return WORKSPACE_MB["cpu" if device_type == "cpu" else "gpu"]


def column_tile(num_rows: int, models: int, width: int, workspace_mb: float) -> int:
    """Columns of the logits to project at a time: as many as leave room for `_TILE_ROWS` rows, where there are so many.
    A product of few rows reads (and a CPU's library packs) the weight for little work: from rows of the whole
    vocabulary, which at V = 152k are 41, scores took twice the time."""
    room = int(workspace_mb * 2**20 / 4 / models)
    columns = room // max(min(num_rows, _TILE_ROWS), 1) // 64 * 64  # rows that begin where a vector load may
    return min(width, max(columns, _TILE_COLUMNS))


def row_chunks(num_rows: int, logits_a_row: int, workspace_mb: float) -> list[slice]:
    """Slices of rows whose fp32 logits fit the workspace together; at least one, maybe empty. Their sizes differ by one
    at most: a last chunk of a few rows reads the whole weight for little work."""
    most = max(1, int(workspace_mb * 2**20 / (4 * logits_a_row)))
    chunks = max(1, math.ceil(num_rows / most))
    ends = [math.ceil(num_rows * chunk / chunks) for chunk in range(chunks + 1)]  # the first is the largest
    return [slice(*ends) for ends in itertools.pairwise(ends)]


def workspace_for(hidden: Tensor, parts: list[slice], models: int, width: int) -> Tensor | None:
    """Room for one chunk's logits, (models * rows of a chunk, V), which every chunk and the next call use again: on a
    CPU new pages for every chunk doubled the time, and for every call they took as long as the scan. The allocators of
    other devices keep memory by themselves, and torch.compile plans its own."""
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    rows = models * min(hidden.shape[0], parts[0].stop)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kept = getattr(_per_thread, "workspace", None)
    if kept is None or kept.dtype != dtype or kept.numel() < rows * width:
        with torch.inference_mode(False):  # or no later call outside of inference mode could write to it
            kept = _per_thread.workspace = torch.empty(rows * width, dtype=dtype, device="cpu")
    return kept[: rows * width].view(rows, width)


@functools.cache
def _has_bf16_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


@contextlib.contextmanager
def _bf16_tiles():
    """Lets a processor with AMX take fp32 operands as bf16, which those that were bf16 are exactly, and sum in fp32: on
    one such core a product fell from 54.1 to 19.7 ms, its error from 1.6e-6 to 1.3e-6."""
    if torch.compiler.is_compiling() or not _has_bf16_tiles():
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@torch.no_grad()
def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: Tensor | None = None) -> Tensor:
    """(n, H) @ (V, H).T + bias as (n, V) in fp32 (fp64 for fp64), accumulated in fp32; in rows of the workspace."""
    logits = None if workspace is None else workspace[: len(hidden)]
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype in (torch.float32, torch.float64):
            logits = torch.mm(hidden, weight.T, out=logits)
        elif _takes_low_precision(hidden):
            logits = _product(hidden, weight.T, torch.float32)
        else:
            # A CPU's low-precision product rounds its result to the inputs' dtype.
            if logits is None:
                logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
            with _bf16_tiles() if hidden.dtype == torch.bfloat16 else contextlib.nullcontext():
                hidden = hidden.float()
                for start in range(0, len(weight), _UPCAST_COLUMNS):
                    part = slice(start, start + _UPCAST_COLUMNS)
                    torch.mm(hidden, weight[part].float().T, out=logits[:, part])
        return logits if bias is None else logits.add_(bias)


def _takes_low_precision(tensor: Tensor) -> bool:
    """Whether the device multiplies 16-bit operands and sums in fp32. A CPU's product rounds its sums to 16 bits, so
    there the operands are brought to fp32."""
    return tensor.is_cuda


def backproject(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """(n, V) @ (V, H) in fp32 (fp64 for fp64). To be called outside of autocast."""
    if weight.dtype == grad_logits.dtype:
        return grad_logits @ weight
    if _takes_low_precision(weight):
        return _product(grad_logits.to(weight.dtype), weight, torch.float32)
    grad_hidden = grad_logits.new_zeros(len(grad_logits), weight.shape[1])
    for start in range(0, len(weight), _UPCAST_COLUMNS):
        part = slice(start, start + _UPCAST_COLUMNS)
        grad_hidden.addmm_(grad_logits[:, part], weight[part].float())
    return grad_hidden


def _product(first: Tensor, second: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Of two 16-bit matrices, summed in fp32."""
    if first.is_cuda:
        return torch.mm(first, second, out_dtype=out_dtype)
    return (first.float() @ second.float()).to(out_dtype)


def add_weight_gradient(
    grad_weight: Tensor | None,  # (V, H), the sum so far; None before the first chunk
    grad_logits: Tensor,  # (n, V)
    hidden: Tensor,  # (n, H)
    live: Tensor,  # (n,) bool
    dtype: torch.dtype,
) -> Tensor:
    """grad_weight + (V, n) @ (n, H), in place, or that product in `dtype`; to be called outside of autocast. Where a
    row is not `live` its gradient by logits is 0, and so is its hidden state here: it may hold NaN, and 0 * NaN would
    be everywhere in the product."""
    hidden = torch.where(live.unsqueeze(-1), hidden, 0.0)
    if hidden.dtype == grad_logits.dtype or not _takes_low_precision(hidden):
        hidden = hidden.to(grad_logits.dtype)
        # The first product is written, not added to zeros: those 113 MB at V = 50k are a third of the backward.
        return grad_logits.T @ hidden if grad_weight is None else grad_weight.addmm_(grad_logits.T, hidden)
    grad_logits = grad_logits.to(hidden.dtype)
    if grad_weight is None:
        return _product(grad_logits.T, hidden, dtype)
    for start in range(0, len(grad_weight), _SUMMED_COLUMNS):  # or a product as large as the sum would stand beside it
        part = slice(start, start + _SUMMED_COLUMNS)
        grad_weight[part] += _product(grad_logits[:, part].T, hidden, torch.float32)
    return grad_weight


def differentiable_once(backward):
    """`once_differentiable` for a backward of saved tensors. Torch's own refuses a second derivative only where the
    upstream gradient needs one: of a loss with a penalty on its gradient, the penalty was left out in silence."""
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, grad_divergence):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad_divergence = grad_divergence.detach().requires_grad_()
        return once(ctx, grad_divergence)

    return checked


def no_rows(rows: Tensor, *parameters: Tensor | None) -> Tensor:
    """Zeros, (R,), that still belong to the graph of all parameters, so that a caller's backward() runs and gives each
    a gradient of zeros, for which other processes may wait."""
    parameters = [parameter for parameter in parameters if parameter is not None]
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    return rows.new_zeros(rows.shape, dtype=dtype) + sum(parameter[:0].sum() for parameter in parameters)
