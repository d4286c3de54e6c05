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
from .split import (
    MAX_PARTS,
    PART_SLOTS,
    is_last,
    launch_part_sums,
    merged_sums,
    merged_terms,
    part_of_row,
    parts_of,
    room_for_parts,
    store_sums,
    store_terms,
)
from .tiles import FLOOR, INF, LN2, ModelRow, TileShape, row_pointer, softcapped
from .visits import Normaliser, kl_from_cross, log_ratio, log_sum_exp, nats, normalised_visit, online_visit

_RUNTIME_SIZES = ["length", "size", "num_candidates", "num_parts"]  # a new L or V compiles nothing
_POINTERS = [
    "student_logits_ptr",
    "teacher_logits_ptr",
    "sampled_ids_ptr",
    "mask_ptr",
    "scores_ptr",
    "index_ptr",
    "finished_ptr",
    "parts_ptr",
    "finished_parts_ptr",
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
    parts_ptr,  # (B * L, MAX_PARTS, PART_SLOTS) fp32, with SPLIT; of a jsd with its first visit
    finished_parts_ptr,  # (B * L,) int32 zeros, with SPLIT
    student_stride_b: tl.int64,
    student_stride_l: tl.int64,
    teacher_stride_b: tl.int64,
    teacher_stride_l: tl.int64,
    length: tl.int32,
    size: tl.int32,
    num_candidates: tl.int32,
    num_parts: tl.int32,
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
    SPLIT: tl.constexpr,  # a row over num_parts programs
    APPROXIMATE_LOG2: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    TILE: tl.constexpr = TileShape(UNROLL, LANES, VEC, PAIRED, MASKED=False)
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        row, part = row // num_parts, tl.program_id(0) % num_parts
    plane = tl.num_programs(0).to(tl.int64) // num_parts
    student_ptr = row_pointer(student_logits_ptr, row, length, student_stride_b, student_stride_l, ALIGNED)
    teacher_ptr = row_pointer(teacher_logits_ptr, row, length, teacher_stride_b, teacher_stride_l, ALIGNED)
    student = ModelRow(student_ptr, student_scale, student_correction)
    teacher = ModelRow(teacher_ptr, teacher_scale, teacher_correction)
    if SPLIT:
        begin = part * (UNROLL * LANES * VEC)
        seen = tl.minimum(size - begin, UNROLL * LANES * VEC)
        seen_student, seen_teacher = part_of_row(student, begin), part_of_row(teacher, begin)
        parts_ptr += row * (MAX_PARTS * PART_SLOTS)
    else:
        seen, seen_student, seen_teacher = size, student, teacher

    # One visit gives KL(first || second); `forward` swaps the roles.
    FORWARD: tl.constexpr = DIVERGENCE == "forward_kl"
    HAS_CROSS: tl.constexpr = DIVERGENCE != "jsd"
    if SPLIT and not HAS_CROSS:
        sums = merged_sums(parts_ptr, num_parts)
    elif FORWARD:
        sums = online_visit(
            seen_teacher,
            seen_student,
            seen,
            inner_scale,
            HAS_SOFTCAP,
            TILE,
            HAS_ENTROPY=True,
            HAS_CROSS=True,
            STUDENT_FIRST=False,
        )
    else:
        sums = online_visit(
            seen_student, seen_teacher, seen, inner_scale, HAS_SOFTCAP, TILE, HAS_ENTROPY=True, HAS_CROSS=HAS_CROSS
        )
    if SPLIT and HAS_CROSS:
        store_sums(parts_ptr + part * PART_SLOTS, sums)
        if not is_last(finished_parts_ptr + row, num_parts):
            return
        sums = merged_sums(parts_ptr, num_parts)
    if FORWARD:
        teacher_m, student_m, teacher_z, student_z = sums.first_m, sums.second_m, sums.first_z, sums.second_z
        teacher_e, student_e = sums.first_e, sums.second_e
        lse_gap = log_ratio(teacher_m, teacher_z, student_m, student_z, teacher_correction, student_correction)
        scale = nats(student_scale, student_correction)
    else:
        student_m, teacher_m, student_z, teacher_z = sums.first_m, sums.second_m, sums.first_z, sums.second_z
        student_e, teacher_e = sums.first_e, sums.second_e
        lse_gap = log_ratio(student_m, student_z, teacher_m, teacher_z, student_correction, teacher_correction)
        scale = nats(teacher_scale, teacher_correction)
    if HAS_CROSS:
        divergence = kl_from_cross(sums.cross, 1.0, 0.0, scale, lse_gap)
        divergence = tl.where(sums.gap > -1.5 * FLOOR, INF, divergence.to(tl.float32))
    else:
        # The mixture needs both log-sum-exps first, so the rows are visited again, in L2.
        terms = normalised_visit(
            seen_student,
            seen_teacher,
            Normaliser(student_scale, student_m, student_z),
            Normaliser(teacher_scale, teacher_m, teacher_z),
            seen,
            inner_scale,
            beta,
            centre=0.0,
            DIVERGENCE=DIVERGENCE,
            HAS_SOFTCAP=HAS_SOFTCAP,
            APPROXIMATE_LOG2=APPROXIMATE_LOG2,
            TILE=TILE,
        )
        total = terms.total
        if SPLIT:
            store_terms(parts_ptr + part * PART_SLOTS, terms)
            if not is_last(finished_parts_ptr + row, num_parts):
                return
            total = merged_terms(parts_ptr, num_parts)[0]
        divergence = total * LN2

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
    num_rows, device = num_sequences * length, student_logits.device
    scores = torch.empty((7, num_sequences, length), dtype=torch.float32, device=device)
    if num_rows:
        tile = tile_options(student_logits, teacher_logits)
        num_parts = parts_of(num_rows, options.vocab_size, tile)
        arguments = dict(
            student_logits_ptr=student_logits,
            teacher_logits_ptr=teacher_logits,
            parts_ptr=room_for_parts(num_rows, num_parts, device),
            **row_strides(student_logits, teacher_logits),
            length=length,
            size=options.vocab_size,
            num_parts=num_parts,
            HAS_SOFTCAP=options.softcap is not None,
            **tile,
            **log2_scales(options),
        )
        if num_parts > 1 and options.divergence == "jsd":
            whole = dict(rows_ptr=None, num_rows=num_rows, HAS_ROWS=False, HAS_ENTROPY=True)
            launch_part_sums(num_rows * num_parts, student_logits, **arguments, **whole)
        launch(
            scores_kernel,
            num_rows * num_parts,
            student_logits,
            **arguments,
            sampled_ids_ptr=sampled_ids.contiguous(),
            mask_ptr=selection.mask,
            scores_ptr=scores,
            index_ptr=selection.candidates,
            finished_ptr=selection.finished,
            finished_parts_ptr=torch.zeros(num_rows, dtype=torch.int32, device=device) if num_parts > 1 else None,
            num_candidates=selection.num_candidates,
            beta=options.beta,
            threshold=selection.threshold,
            DIVERGENCE=options.divergence,
            CRITERION=selection.criterion,
            HAS_SELECTION=selection.candidates is not None,
            SPLIT=num_parts > 1,
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
