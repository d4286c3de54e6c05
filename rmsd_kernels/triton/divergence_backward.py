"""Gradient of chosen rows' divergence by the student's logits, written in their dtype; other rows stay zero.

By the scaled logit of entry j, with g and c = mean_slope as in ops.NUM_STATS:

    in the support   p_j (g_j - c)
    outside it       p_j (rest_slope - c), where rest_slope is 0 for "drop"; 0 for "renorm"

    g_j:  reverse_kl  log(p_j / q_j), + 1 for "drop"      forward_kl  -q_j / p_j      jsd  (1 - beta) log(p_j / m_j)

The row's own numbers come in twice fp32's digits, high and low: with logits of 1e4 one log-sum-exp rounded to fp32 is
off by 5e-4, and so is every p.

Everything a row needs is in its stats, so a row is cut into as many programs as it has chunks. Where every row is
differentiated, whole, each program writes its zeros itself, and nothing is zeroed before.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import Options
from .launch import INTERPRETED, launch, row_strides, scales, tile_options
from .layout import NUM_STATS, load_stats
from .tiles import FLOOR, LN2, LOG2E, Support, TileShape, block_ids, in_support, load_tile, row_pointer, softcapped
from .visits import mixture_entry

CHUNK_TILES = 4  # 16,384 logits a program: 10 programs a row at V = 152k, so that a few kept rows fill the processors


class Factors(NamedTuple):
    """What is the same for every entry of a row, besides its RowStats."""

    upstream: tl.tensor  # gradient by the row's divergence
    inner_scale: tl.tensor
    student_scale: tl.tensor  # nats
    teacher_scale: tl.tensor
    raw_scale: tl.tensor  # d(scaled logit) / d(raw logit), but for the softcap
    beta: tl.tensor


@triton.jit
def gradient(
    raw_student,
    raw_teacher,
    ids,
    stats,  # RowStats
    factors,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    APPROXIMATE_LOG2: tl.constexpr,
):
    student_scale, teacher_scale, beta = factors.student_scale, factors.teacher_scale, factors.beta
    student = tl.maximum(softcapped(raw_student, factors.inner_scale, HAS_SOFTCAP), FLOOR)
    teacher = tl.maximum(softcapped(raw_teacher, factors.inner_scale, HAS_SOFTCAP), FLOOR)
    # Nats here: a product with log2(e) would round the log-sum-exps again.
    log_p = tl.fma(student, student_scale, -stats.student_lse) - stats.student_lse_low
    log_q = tl.fma(teacher, teacher_scale, -stats.teacher_lse) - stats.teacher_lse_low
    p = tl.exp2(log_p * LOG2E)
    if DIVERGENCE == "reverse_kl":
        # The logits' difference first, as in the forward: nearly equal rows, and gradients that vanish, stay accurate.
        # Of two scaled products one would be rounded and the other, fused, not: equal rows differed by half a bit.
        difference = tl.fma(student, tl.div_rn(student_scale, teacher_scale), -teacher) * teacher_scale
        grad = p * ((difference - stats.offset) - stats.offset_low)
    elif DIVERGENCE == "forward_kl":
        grad = -tl.exp2(log_q * LOG2E) - p * stats.mean_slope
    else:
        _, p, to_p = mixture_entry(log_p * LOG2E, log_q * LOG2E, beta, APPROXIMATE_LOG2)
        grad = p * ((1.0 - beta) * to_p * LN2 - stats.mean_slope)
    if TAIL != "all":
        if TAIL == "renorm":
            # Not p * 0: of a teacher's logit far above its support's log-sum-exp, p is NaN here.
            outside = tl.zeros(p.shape, tl.float32)
        elif TAIL == "bucket" and DIVERGENCE == "forward_kl":
            # p rest_slope = -p Q / P of the rest, whose ratio alone may overflow.
            outside = p * stats.outside_slope
            outside -= tl.exp2((tl.fma(student, student_scale, -stats.rest_lse) - stats.rest_lse_low) * LOG2E)
        else:
            outside = p * stats.outside_slope
        support = Support(stats.kth_logit, stats.last_tied_id)
        grad = tl.where(in_support(raw_student, ids, support), grad, outside)
    grad *= factors.upstream * factors.raw_scale
    if HAS_SOFTCAP:
        grad *= tl.where(student > -1.0, 1.0 - student * student, 0.0)
    return grad


@triton.jit
def gradient_tile(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    start,
    size,
    stats,  # RowStats
    factors,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    APPROXIMATE_LOG2: tl.constexpr,
    TILE: tl.constexpr,
):
    student = load_tile(student_ptr, start, size, TILE)
    teacher = load_tile(teacher_ptr, start, size, TILE)
    for block in tl.static_range(TILE.UNROLL):
        ids = block_ids(start, block, TILE)
        grad = gradient(
            student[block], teacher[block], ids, stats, factors, DIVERGENCE, TAIL, HAS_SOFTCAP, APPROXIMATE_LOG2
        )
        if not HAS_ROWS:
            grad = tl.where(stats.is_finite != 0.0, grad, 0.0)
        grad = grad.to(grad_ptr.dtype.element_ty)
        if TILE.MASKED:
            tl.store(grad_ptr + ids, grad, mask=ids < size)
        else:
            tl.store(grad_ptr + ids, grad)


@triton.jit(
    do_not_specialize=[
        "student_stride_b",
        "student_stride_l",
        "teacher_stride_b",
        "teacher_stride_l",
        "grad_stride",
        "num_rows",
        "length",
        "size",
        "num_chunks",
    ],
    do_not_specialize_on_alignment=[
        "grad_divergence_ptr",
        "student_logits_ptr",
        "teacher_logits_ptr",
        "rows_ptr",
        "stats_ptr",
        "grad_logits_ptr",
    ],
)
def divergence_backward_kernel(
    grad_divergence_ptr,  # (R,) fp32
    student_logits_ptr,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits_ptr,  # (B, L, V)
    rows_ptr,  # (R,) int64, with HAS_ROWS
    stats_ptr,  # (R, 16) fp32
    grad_logits_ptr,  # (B * L, V), contiguous
    student_stride_b: tl.int64,
    student_stride_l: tl.int64,
    teacher_stride_b: tl.int64,
    teacher_stride_l: tl.int64,
    grad_stride: tl.int64,
    num_rows: tl.int64,
    length: tl.int32,
    size: tl.int32,
    num_chunks: tl.int32,
    inner_scale: tl.float32,
    student_scale: tl.float32,
    teacher_scale: tl.float32,
    raw_scale: tl.float32,
    beta: tl.float32,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    APPROXIMATE_LOG2: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    # Not as pairs of bf16: the gradients' 16-byte stores need neighbours in one block.
    TILE: tl.constexpr = TileShape(UNROLL, LANES, VEC, PAIRED=False, MASKED=False)
    RAGGED: tl.constexpr = TileShape(UNROLL, LANES, VEC, PAIRED=False, MASKED=True)
    LOGITS: tl.constexpr = UNROLL * LANES * VEC
    item = tl.program_id(0).to(tl.int64) // num_chunks
    chunk = (tl.program_id(0) % num_chunks) * CHUNK_TILES * LOGITS
    stats = load_stats(stats_ptr + item * NUM_STATS)
    row = item
    if HAS_ROWS:
        row = tl.load(rows_ptr + item)
        if (row < 0) | (row >= num_rows) | (stats.is_finite == 0.0):
            return  # its gradient is zero already
    student_ptr = row_pointer(student_logits_ptr, row, length, student_stride_b, student_stride_l, ALIGNED)
    teacher_ptr = row_pointer(teacher_logits_ptr, row, length, teacher_stride_b, teacher_stride_l, ALIGNED)
    grad_ptr = grad_logits_ptr + row * grad_stride
    grad_ptr = tl.multiple_of(grad_ptr, 16) if ALIGNED else grad_ptr

    upstream = tl.load(grad_divergence_ptr + item)
    factors = Factors(upstream, inner_scale, student_scale, teacher_scale, raw_scale, beta)
    end, whole = tl.minimum(chunk + CHUNK_TILES * LOGITS, size), size // LOGITS * LOGITS
    for start in range(chunk, tl.minimum(end, whole), LOGITS):
        gradient_tile(
            student_ptr,
            teacher_ptr,
            grad_ptr,
            start,
            size,
            stats,
            factors,
            DIVERGENCE,
            TAIL,
            HAS_SOFTCAP,
            HAS_ROWS,
            APPROXIMATE_LOG2,
            TILE,
        )
    if end > whole:
        gradient_tile(
            student_ptr,
            teacher_ptr,
            grad_ptr,
            whole,
            size,
            stats,
            factors,
            DIVERGENCE,
            TAIL,
            HAS_SOFTCAP,
            HAS_ROWS,
            APPROXIMATE_LOG2,
            RAGGED,
        )


def divergence_backward(
    grad_divergence: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Tensor | None,
    stats: Tensor,
    options: Options,
) -> Tensor:
    # The interpreter would cut fp32 off to bf16 where every GPU rounds: there, torch rounds.
    dtype = torch.float32 if INTERPRETED else student_logits.dtype
    num_sequences, length, width = student_logits.shape
    allocate = torch.empty if rows is None and options.vocab_size == width else torch.zeros
    grad_logits = allocate(student_logits.shape, dtype=dtype, device=student_logits.device)
    if stats.shape[0] and grad_logits.numel():
        tile = dict(tile_options(student_logits, teacher_logits, grad_logits), CHUNK_TILES=CHUNK_TILES)
        logits_a_program = tile["CHUNK_TILES"] * tile["UNROLL"] * tile["LANES"] * tile["VEC"]
        num_chunks = -(-options.vocab_size // logits_a_program)
        launch(
            divergence_backward_kernel,
            stats.shape[0] * num_chunks,
            student_logits,
            grad_divergence_ptr=grad_divergence.contiguous(),
            student_logits_ptr=student_logits,
            teacher_logits_ptr=teacher_logits,
            rows_ptr=None if rows is None else rows.contiguous(),
            stats_ptr=stats,
            grad_logits_ptr=grad_logits,
            **row_strides(student_logits, teacher_logits),
            grad_stride=width,
            num_rows=num_sequences * length,
            length=length,
            size=options.vocab_size,
            num_chunks=num_chunks,
            **scales(options)._asdict(),
            raw_scale=options.logit_scale / options.temperature,
            beta=options.beta,
            DIVERGENCE=options.divergence,
            TAIL=options.tail if options.vocab_topk else "all",
            HAS_ROWS=rows is not None,
            HAS_SOFTCAP=options.softcap is not None,
            **tile,
        )
    return grad_logits.to(student_logits.dtype)
