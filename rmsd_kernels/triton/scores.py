"""TokenScores of every row in one visit, and, in the same launch, each sequence's candidates."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import Options
from .candidates import select_sequence
from .launch import BLOCK_L, launch, log2_scales, row_strides, tile_options
from .layout import (
    DIVERGENCE_PLANE,
    STUDENT_ENTROPY_PLANE,
    STUDENT_LOGPROB_PLANE,
    STUDENT_LSE_PLANE,
    TEACHER_ENTROPY_PLANE,
    TEACHER_LOGPROB_PLANE,
    TEACHER_LSE_PLANE,
)
from .tiles import FLOOR, INF, LN2, ModelRow, TileShape, row_pointer, softcapped
from .visits import Normaliser, kl_from_cross, log_ratio, log_sum_exp, nats, normalised_visit, online_visit

_RUNTIME_SIZES = ["length", "size", "num_candidates"]  # a new L or V compiles nothing
_POINTERS = [
    "student_logits_ptr",
    "teacher_logits_ptr",
    "sampled_ids_ptr",
    "mask_ptr",
    "scores_ptr",
    "index_ptr",
    "finished_ptr",
]
_STRIDES = ["student_stride_b", "student_stride_l", "teacher_stride_b", "teacher_stride_l"]


@triton.jit
def sampled_logprob(row, sampled_id, in_vocab, m, z, inner_scale, HAS_SOFTCAP: tl.constexpr):
    """One scalar load, in place of a comparison for every logit of the row."""
    raw = tl.load(row.logits_ptr + sampled_id, mask=in_vocab, other=0.0).to(tl.float32)
    u = softcapped(raw, inner_scale, HAS_SOFTCAP).to(tl.float64) * tl.cast(row.scale, tl.float64) - m
    return (nats(u, row.correction) - tl.log(z)).to(tl.float32)


@triton.jit(do_not_specialize=_RUNTIME_SIZES + _STRIDES, do_not_specialize_on_alignment=_POINTERS)
def scores_kernel(
    student_logits_ptr,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits_ptr,  # (B, L, V)
    sampled_ids_ptr,  # (B, L) int64
    mask_ptr,  # (B, L) bool, with HAS_SELECTION
    scores_ptr,  # (7, B, L) fp32
    index_ptr,  # (B, num_candidates) int64, with HAS_SELECTION
    finished_ptr,  # (B,) int32 zeros, with HAS_SELECTION
    student_stride_b: tl.int64,
    student_stride_l: tl.int64,
    teacher_stride_b: tl.int64,
    teacher_stride_l: tl.int64,
    length: tl.int32,
    size: tl.int32,
    num_candidates: tl.int32,
    inner_scale: tl.float32,
    student_scale: tl.float32,
    teacher_scale: tl.float32,
    student_correction: tl.float32,
    teacher_correction: tl.float32,
    beta: tl.float32,
    threshold: tl.float32,
    DIVERGENCE: tl.constexpr,
    CRITERION: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SELECTION: tl.constexpr,
    APPROXIMATE_LOG2: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    TILE: tl.constexpr = TileShape(UNROLL, LANES, VEC, PAIRED, MASKED=False)
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64)
    student_ptr = row_pointer(student_logits_ptr, row, length, student_stride_b, student_stride_l, ALIGNED)
    teacher_ptr = row_pointer(teacher_logits_ptr, row, length, teacher_stride_b, teacher_stride_l, ALIGNED)
    student = ModelRow(student_ptr, student_scale, student_correction)
    teacher = ModelRow(teacher_ptr, teacher_scale, teacher_correction)

    # One visit gives KL(first || second).
    if DIVERGENCE == "forward_kl":
        sums = online_visit(
            teacher,
            student,
            size,
            inner_scale,
            HAS_SOFTCAP,
            TILE,
            HAS_ENTROPY=True,
            HAS_CROSS=True,
            STUDENT_FIRST=False,
        )
        teacher_m, student_m, teacher_z, student_z = sums.first_m, sums.second_m, sums.first_z, sums.second_z
        teacher_e, student_e = sums.first_e, sums.second_e
        lse_gap = log_ratio(teacher_m, teacher_z, student_m, student_z, teacher_correction, student_correction)
        divergence = kl_from_cross(sums.cross, 1.0, 0.0, nats(student_scale, student_correction), lse_gap)
    else:
        HAS_CROSS: tl.constexpr = DIVERGENCE == "reverse_kl"
        sums = online_visit(
            student, teacher, size, inner_scale, HAS_SOFTCAP, TILE, HAS_ENTROPY=True, HAS_CROSS=HAS_CROSS
        )
        student_m, teacher_m, student_z, teacher_z = sums.first_m, sums.second_m, sums.first_z, sums.second_z
        student_e, teacher_e = sums.first_e, sums.second_e
        lse_gap = log_ratio(student_m, student_z, teacher_m, teacher_z, student_correction, teacher_correction)
        divergence = kl_from_cross(sums.cross, 1.0, 0.0, nats(teacher_scale, teacher_correction), lse_gap)
    divergence = tl.where(sums.gap > -1.5 * FLOOR, INF, divergence.to(tl.float32))
    if DIVERGENCE == "jsd":
        # The mixture needs both log-sum-exps first, so the rows are visited again, in L2.
        student_normaliser = Normaliser(student_scale, student_m, student_z)
        teacher_normaliser = Normaliser(teacher_scale, teacher_m, teacher_z)
        terms = normalised_visit(
            student,
            teacher,
            student_normaliser,
            teacher_normaliser,
            size,
            inner_scale,
            beta,
            centre=0.0,
            DIVERGENCE=DIVERGENCE,
            HAS_SOFTCAP=HAS_SOFTCAP,
            APPROXIMATE_LOG2=APPROXIMATE_LOG2,
            TILE=TILE,
        )
        divergence = terms.total * LN2

    sampled_id = tl.load(sampled_ids_ptr + row)
    in_vocab = (sampled_id >= 0) & (sampled_id < size)
    student_logprob = sampled_logprob(student, sampled_id, in_vocab, student_m, student_z, inner_scale, HAS_SOFTCAP)
    teacher_logprob = sampled_logprob(teacher, sampled_id, in_vocab, teacher_m, teacher_z, inner_scale, HAS_SOFTCAP)
    student_lse = log_sum_exp(student_m, student_z, student_correction).to(tl.float32)
    teacher_lse = log_sum_exp(teacher_m, teacher_z, teacher_correction).to(tl.float32)
    student_entropy = tl.log(student_z) - tl.div_rn(student_e, student_z) * LN2
    teacher_entropy = tl.log(teacher_z) - tl.div_rn(teacher_e, teacher_z) * LN2
    # NaN and +inf made z NaN, and a row without a finite logit left it 0.
    valid = in_vocab & (student_z > 0.0) & (teacher_z > 0.0)
    nan = float("nan")
    out_ptr = scores_ptr + row
    tl.store(out_ptr + STUDENT_LOGPROB_PLANE * plane, tl.where(valid, student_logprob, nan))
    tl.store(out_ptr + TEACHER_LOGPROB_PLANE * plane, tl.where(valid, teacher_logprob, nan))
    tl.store(out_ptr + DIVERGENCE_PLANE * plane, tl.where(valid, divergence, nan))
    tl.store(out_ptr + STUDENT_LSE_PLANE * plane, tl.where(valid, student_lse, nan))
    tl.store(out_ptr + TEACHER_LSE_PLANE * plane, tl.where(valid, teacher_lse, nan))
    tl.store(out_ptr + STUDENT_ENTROPY_PLANE * plane, tl.where(valid, student_entropy, nan))
    tl.store(out_ptr + TEACHER_ENTROPY_PLANE * plane, tl.where(valid, teacher_entropy, nan))

    if HAS_SELECTION:
        # docs/gpu.md, "Why the memory ordering is right".
        sequence = row // length
        tl.debug_barrier()
        finished = tl.atomic_add(finished_ptr + sequence, 1, sem="acq_rel", scope="gpu")
        if finished == length - 1:
            select_sequence(
                scores_ptr, mask_ptr, index_ptr, sequence, length, plane, num_candidates, threshold, CRITERION, BLOCK_L
            )


class Selection(NamedTuple):
    """What the launch needs besides, to pick each sequence's candidates when its rows are done."""

    mask: Tensor | None  # (B, L) bool
    num_candidates: int
    criterion: str
    threshold: float
    candidates: Tensor | None  # (B, num_candidates) int64, written to
    finished: Tensor | None  # (B,) int32 zeros


_NO_SELECTION = Selection(None, 0, "", 0.0, None, None)


def _launch(
    student_logits: Tensor, teacher_logits: Tensor, sampled_ids: Tensor, selection: Selection, options: Options
) -> Tensor:
    num_sequences, length = sampled_ids.shape
    scores = torch.empty((7, num_sequences, length), dtype=torch.float32, device=student_logits.device)
    if scores.numel():
        launch(
            scores_kernel,
            num_sequences * length,
            student_logits,
            student_logits_ptr=student_logits,
            teacher_logits_ptr=teacher_logits,
            sampled_ids_ptr=sampled_ids.contiguous(),
            mask_ptr=selection.mask,
            scores_ptr=scores,
            index_ptr=selection.candidates,
            finished_ptr=selection.finished,
            **row_strides(student_logits, teacher_logits),
            length=length,
            size=options.vocab_size,
            num_candidates=selection.num_candidates,
            **log2_scales(options),
            beta=options.beta,
            threshold=selection.threshold,
            DIVERGENCE=options.divergence,
            CRITERION=selection.criterion,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_SELECTION=selection.candidates is not None,
            **tile_options(student_logits, teacher_logits),
            BLOCK_L=BLOCK_L,
        )
    return scores


def scores(student_logits: Tensor, teacher_logits: Tensor, sampled_ids: Tensor, options: Options) -> Tensor:
    return _launch(student_logits, teacher_logits, sampled_ids, _NO_SELECTION, options)


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
    num_sequences, length = sampled_ids.shape
    # A sequence of length 0 has no program to write its -1. Otherwise the counters' zeros are all the launch needs.
    index = (
        torch.full((num_sequences, num_candidates), -1, dtype=torch.int64, device=student_logits.device)
        if not length
        else torch.empty((num_sequences, num_candidates), dtype=torch.int64, device=student_logits.device)
    )
    finished = torch.zeros(num_sequences, dtype=torch.int32, device=student_logits.device)
    selection = Selection(mask.contiguous(), num_candidates, criterion, threshold, index, finished)
    return _launch(student_logits, teacher_logits, sampled_ids, selection, options), index
