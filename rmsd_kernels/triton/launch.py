"""What every launcher here shares: whether this backend can serve, a dtype's tile, and the arguments common to all."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..options import Options


class Tile(NamedTuple):
    """A row is read UNROLL x LANES x VEC logits at a time; see tiles.py."""

    unroll: int
    lanes: int  # threads of a program
    vec: int  # logits of one load


# Keyed by dtype alone: nothing is tuned or compiled anew for another V, N or L. 16 logits a lane between two rescales
# need 80 registers, which leave three programs a processor. 32 saved 1.5 instructions of 20 a pair, but need 128 (over
# a top k 255) and leave two programs (one): 8% slower in bf16 on an H200.
TILES = {
    torch.float32: Tile(unroll=4, lanes=256, vec=4),
    torch.float16: Tile(unroll=2, lanes=256, vec=8),
    torch.bfloat16: Tile(unroll=2, lanes=256, vec=8),
}
BLOCK_L = 1024  # positions of a sequence looked at together when candidates are selected


INTERPRETED = knobs.runtime.interpret  # decided with the kernels' decorators, when this package is imported


def why_not(tensor: Tensor) -> str | None:
    """Why these kernels cannot serve `tensor`; None where they can."""
    if tensor.dtype not in TILES:
        return f"its kernels compute in fp32 and the input is {str(tensor.dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None if tensor.device.type == "cpu" else "TRITON_INTERPRET=1 serves CPU tensors only"
    if tensor.device.type != "cuda":
        return f"it needs a CUDA or ROCm tensor, not {tensor.device.type} (or TRITON_INTERPRET=1)"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    return None


def current_target() -> GPUTarget | None:
    """What kernels are compiled for; None in the interpreter."""
    return None if INTERPRETED else triton.runtime.driver.active.get_current_target()


@functools.cache
def _lanes_per_warp(_device: torch.device) -> int:
    return 32 if INTERPRETED else current_target().warp_size


@triton.jit
def _histogram_kernel(digits_ptr, counts_ptr, BINS: tl.constexpr):
    place = tl.arange(0, BINS)
    tl.store(counts_ptr + place, tl.histogram(tl.load(digits_ptr + place), BINS))


@functools.cache
def histograms_are_atomic(target: GPUTarget | None) -> bool:
    """Whether this Triton compiles a histogram to one atomic addition in shared memory for each element. In older
    versions, and on ROCm, it is ballots: hundreds of instructions an element with 2048 bins. The interpreter has
    numpy's. The compiler itself is asked, once, with a small kernel that Triton then keeps on disk."""
    if target is None:
        return True
    signature = dict(digits_ptr="*i32", counts_ptr="*i32", BINS="constexpr")
    source = ASTSource(_histogram_kernel, signature, constexprs=dict(BINS=2048))
    code = triton.compile(source, target=target).asm["llir"]
    return "atomicrmw" in code and "ballot" not in code


class Scales(NamedTuple):
    """Factors that bring a stored logit to a scaled one: scale * logit, or scale * tanh(inner_scale * logit)."""

    inner_scale: float
    student_scale: float  # nats
    teacher_scale: float


def scales(options: Options) -> Scales:
    inner_scale = options.logit_scale / options.softcap if options.softcap else 1.0
    outer = options.softcap or options.logit_scale
    return Scales(inner_scale, outer / options.temperature, outer / options.teacher_temperature)


@functools.lru_cache(maxsize=256)
def log2_scales(options: Options) -> dict[str, float]:
    """The same in log2 units, in which an exponential is one instruction, and by how much fp32 rounds each scale."""
    exact = scales(options)
    student_scale = float(np.float32(exact.student_scale / math.log(2.0)))
    teacher_scale = float(np.float32(exact.teacher_scale / math.log(2.0)))
    return dict(
        inner_scale=exact.inner_scale,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        student_correction=exact.student_scale / (student_scale * math.log(2.0)) - 1.0,
        teacher_correction=exact.teacher_scale / (teacher_scale * math.log(2.0)) - 1.0,
    )


def row_strides(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, int]:
    return dict(
        student_stride_b=student_logits.stride(0),
        student_stride_l=student_logits.stride(1),
        teacher_stride_b=teacher_logits.stride(0),
        teacher_stride_l=teacher_logits.stride(1),
    )


def _is_aligned(logits: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes. The strides of an axis of one entry say nothing."""
    step = 16 // logits.element_size()
    sequences, length, _ = logits.shape
    stride_b, stride_l, _ = logits.stride()
    return (
        logits.data_ptr() % 16 == 0
        and (sequences <= 1 or stride_b % step == 0)
        and (length <= 1 or stride_l % step == 0)
    )


def tile_options(*logits: Tensor) -> dict:
    """The constexpr arguments that describe how these tensors' rows are read."""
    aligned = all(map(_is_aligned, logits))
    compiler = "" if INTERPRETED else "hip" if torch.version.hip else "cuda"
    return constexprs_of_tile(logits[0].dtype, aligned, compiler)


def constexprs_of_tile(dtype: torch.dtype, aligned: bool, compiler: str) -> dict:
    """`compiler` is "cuda" or "hip", and empty in the interpreter."""
    tile = TILES[dtype]
    if not aligned:  # neighbouring logits go to neighbouring threads, one a load, and a lane's sums stay in its thread
        tile = Tile(tile.unroll * tile.vec, tile.lanes, 1)
    paired = aligned and dtype == torch.bfloat16
    return dict(
        APPROXIMATE_LOG2=compiler,
        ALIGNED=aligned,
        PAIRED=paired,
        UNROLL=tile.unroll,
        LANES=tile.lanes,
        VEC=tile.vec,
    )


def register_limit(arguments: dict) -> dict:
    """Of a processor's 65,536 three programs of 256 threads may have 80 each. Two may have 128, over a top k and over a
    softcap, whose tanh spilled 12 bytes within 80. Left to itself the assembler took 147 in one version and 128 in the
    next, which is one program or two, or spilled for the sake of a fourth. Nothing is carried from tile to tile in a
    backward, which takes 64 at most."""
    if "CHUNK_TILES" in arguments:
        return {}
    is_small = arguments.get("TAIL", "all") == "all" and not arguments.get("HAS_SOFTCAP", False)
    return dict(maxnreg=80 if is_small else 128)


def launch(kernel, programs: int, tensor: Tensor, **arguments) -> None:
    """`programs` on axis 0, which alone may exceed 65,535. One stage: nothing is staged through shared memory."""
    # ROCm has no such option.
    options = {} if INTERPRETED or torch.version.hip else register_limit(arguments)
    # In the interpreter numpy would warn of every infinity that the kernels handle.
    with np.errstate(all="ignore") if INTERPRETED else torch.cuda.device_of(tensor):
        num_warps = max(1, arguments.get("LANES", 256) // _lanes_per_warp(tensor.device))
        # Fused multiply-adds are half of the loop; Triton 3.10 turns them off unless asked.
        kernel[(programs,)](**arguments, **options, num_warps=num_warps, num_stages=1, enable_fp_fusion=True)
