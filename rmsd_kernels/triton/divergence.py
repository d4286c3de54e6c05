"""Divergence of chosen rows, over the whole vocabulary or the student's top k, and what its backward needs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import Options
from .launch import current_target, histograms_are_atomic, launch, log2_scales, row_strides, tile_options
from .layout import (
    FINISHED_PARTS_SLOT,
    IS_FINITE_SLOT,
    KTH_LOGIT_SLOT,
    LAST_TIED_ID_SLOT,
    MEAN_SLOPE_SLOT,
    NUM_STATS,
    OFFSET_LOW_SLOT,
    OFFSET_SLOT,
    OUTSIDE_SLOPE_SLOT,
    REST_LSE_LOW_SLOT,
    REST_LSE_SLOT,
    STUDENT_LSE_LOW_SLOT,
    STUDENT_LSE_SLOT,
    TEACHER_LSE_LOW_SLOT,
    TEACHER_LSE_SLOT,
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
from .support import topk
from .tiles import ALL, FLOOR, INF, INSIDE, LN2, LOG2E, OUTSIDE, ModelRow, Support, TileShape, row_pointer
from .visits import (
    Normaliser,
    high_low,
    kl_from_cross,
    log_ratio,
    log_sum_exp,
    mixture_entry,
    nats,
    normalised_visit,
    online_visit,
)


@triton.jit
def bucket_entry(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """The term, p g and g of one more vocabulary entry of log-masses log_p and log_q, either of which may be -inf. No g
    for the forward KL: -Q / P may overflow."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == "reverse_kl":
        slope = tl.where(log_p > FLOOR, log_p - log_q, 0.0)
        term = tl.where(slope < INF, p * slope, INF)
        return term, term, slope
    elif DIVERGENCE == "forward_kl":
        distance = tl.where(log_q > FLOOR, log_q - log_p, 0.0)
        return tl.where(distance < INF, q * distance, INF), -q, 0.0
    else:
        terms, p, to_p = mixture_entry(log_p * LOG2E, log_q * LOG2E, beta, APPROXIMATE_LOG2="")
        slope = (1.0 - beta) * tl.where(p > 0.0, to_p, 0.0) * LN2
        return terms * LN2, p * slope, slope


@triton.jit(
    do_not_specialize=[
        "student_stride_b",
        "student_stride_l",
        "teacher_stride_b",
        "teacher_stride_l",
        "num_rows",
        "length",
        "size",
        "vocab_topk",
        "num_parts",
        "num_groups",
        "capacity",
    ],
    do_not_specialize_on_alignment=[
        "student_logits_ptr",
        "teacher_logits_ptr",
        "rows_ptr",
        "divergence_ptr",
        "stats_ptr",
        "parts_ptr",
        "maxima_ptr",
        "list_ptr",
    ],
)
def divergence_kernel(
    student_logits_ptr,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits_ptr,  # (B, L, V)
    rows_ptr,  # (R,) int64, with HAS_ROWS
    divergence_ptr,  # (R,) fp32
    stats_ptr,  # (R, 16) fp32 zeros, ops.NUM_STATS
    parts_ptr,  # (R, MAX_PARTS, PART_SLOTS) fp32, with SPLIT; of a jsd without a top k with its first visit
    maxima_ptr,  # (R, num_groups) of the logits' dtype, with HAS_GROUPS
    list_ptr,  # (R, capacity) int32, with a top k
    student_stride_b: tl.int64,
    student_stride_l: tl.int64,
    teacher_stride_b: tl.int64,
    teacher_stride_l: tl.int64,
    num_rows: tl.int64,
    length: tl.int32,
    size: tl.int32,
    vocab_topk: tl.int32,
    num_parts: tl.int32,
    num_groups: tl.int32,
    capacity: tl.int32,
    inner_scale: tl.float32,
    student_scale: tl.float32,
    teacher_scale: tl.float32,
    student_correction: tl.float32,
    teacher_correction: tl.float32,
    beta: tl.float32,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,  # "all" without vocab_topk
    HAS_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,  # a row over num_parts programs; of a top k its first visit alone
    HAS_SOFTCAP: tl.constexpr,
    HISTOGRAMS: tl.constexpr,  # False without vocab_topk
    APPROXIMATE_LOG2: tl.constexpr,
    HAS_GROUPS: tl.constexpr,  # False without vocab_topk
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    TILE: tl.constexpr = TileShape(UNROLL, LANES, VEC, PAIRED, MASKED=False)
    item, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        item, part = item // num_parts, tl.program_id(0) % num_parts
    row = item
    if HAS_ROWS:
        row = tl.load(rows_ptr + item)
    if (row < 0) | (row >= num_rows):
        # -1 is no row and gives 0; any other index that is not a row gives NaN, and no read either.
        tl.store(divergence_ptr + item, tl.where(row == -1, 0.0, float("nan")))
        tl.store(stats_ptr + item * NUM_STATS + tl.arange(0, NUM_STATS), tl.zeros([NUM_STATS], tl.float32))
        return
    student_ptr = row_pointer(student_logits_ptr, row, length, student_stride_b, student_stride_l, ALIGNED)
    teacher_ptr = row_pointer(teacher_logits_ptr, row, length, teacher_stride_b, teacher_stride_l, ALIGNED)

    student = ModelRow(student_ptr, student_scale, student_correction)
    teacher = ModelRow(teacher_ptr, teacher_scale, teacher_correction)

    # Over the whole vocabulary a KL is done in this one visit. `forward` swaps the roles: KL(first || second).
    FORWARD: tl.constexpr = DIVERGENCE == "forward_kl"
    HAS_CROSS: tl.constexpr = DIVERGENCE != "jsd" and TAIL == "all"
    SPLITS_SECOND: tl.constexpr = SPLIT and DIVERGENCE == "jsd" and TAIL == "all"
    part_maxima_ptr = maxima_ptr
    if HAS_GROUPS:
        maxima_ptr = tl.multiple_of(maxima_ptr + item * num_groups, 16)
        part_maxima_ptr = maxima_ptr + part * LANES  # a part is one tile
        list_ptr += item * capacity
    if SPLIT:
        begin = part * (UNROLL * LANES * VEC)
        seen = tl.minimum(size - begin, UNROLL * LANES * VEC)
        seen_student, seen_teacher = part_of_row(student, begin), part_of_row(teacher, begin)
        parts_ptr += item * (MAX_PARTS * PART_SLOTS)
        finished_ptr = (stats_ptr + item * NUM_STATS + FINISHED_PARTS_SLOT).to(tl.pointer_type(tl.int32))
    else:
        seen, seen_student, seen_teacher = size, student, teacher
    if SPLITS_SECOND:
        sums = merged_sums(parts_ptr, num_parts)
    elif FORWARD:
        sums = online_visit(
            seen_teacher,
            seen_student,
            seen,
            inner_scale,
            HAS_SOFTCAP,
            TILE,
            HAS_CROSS=HAS_CROSS,
            STUDENT_FIRST=False,
            maxima_ptr=part_maxima_ptr,
            KEEPS_MAXIMA=HAS_GROUPS,
        )
    else:
        sums = online_visit(
            seen_student,
            seen_teacher,
            seen,
            inner_scale,
            HAS_SOFTCAP,
            TILE,
            HAS_CROSS=HAS_CROSS,
            maxima_ptr=part_maxima_ptr,
            KEEPS_MAXIMA=HAS_GROUPS,
        )
    if SPLIT and not SPLITS_SECOND:
        store_sums(parts_ptr + part * PART_SLOTS, sums)
        if not is_last(finished_ptr, num_parts):
            return
        sums = merged_sums(parts_ptr, num_parts)
        seen, seen_student, seen_teacher = size, student, teacher
    if FORWARD:
        teacher_m, student_m, teacher_z, student_z = sums.first_m, sums.second_m, sums.first_z, sums.second_z
    else:
        student_m, teacher_m, student_z, teacher_z = sums.first_m, sums.second_m, sums.first_z, sums.second_z
    valid = (student_z > 0.0) & (teacher_z > 0.0)

    support = Support(-INF, size - 1)
    groups = None
    if TAIL != "all":
        support, groups = topk(
            student_ptr,
            maxima_ptr,
            list_ptr,
            size,
            vocab_topk,
            capacity,
            student_logits_ptr.dtype.element_ty,
            HAS_GROUPS,
            HISTOGRAMS,
            TILE,
        )
    if TAIL == "renorm":
        inside = online_visit(
            student,
            teacher,
            size,
            inner_scale,
            HAS_SOFTCAP,
            TILE,
            PART=INSIDE,
            support=support,
            groups=groups,
            GATHERED=True,
        )
        student_m, teacher_m, student_z, teacher_z = inside.first_m, inside.second_m, inside.first_z, inside.second_z
    # KL(first || second) in nats: the logits' differences times `scale`, less the log-sum-exps' difference.
    centre, scale, exact_gap = 0.0, 1.0, 0.0
    if FORWARD:
        scale = nats(student_scale, student_correction)
        exact_gap = log_ratio(teacher_m, teacher_z, student_m, student_z, teacher_correction, student_correction)
    elif DIVERGENCE == "reverse_kl":
        scale = nats(teacher_scale, teacher_correction)
        exact_gap = log_ratio(student_m, student_z, teacher_m, teacher_z, student_correction, teacher_correction)

    if HAS_CROSS:
        cross, mass, slope, gap = sums.cross, 1.0, 0.0, sums.gap
    else:
        if DIVERGENCE != "jsd":
            centre = (exact_gap / scale).to(tl.float32)
        terms = normalised_visit(
            seen_student,
            seen_teacher,
            Normaliser(student_scale, student_m, student_z),
            Normaliser(teacher_scale, teacher_m, teacher_z),
            seen,
            inner_scale,
            beta,
            centre,
            DIVERGENCE,
            HAS_SOFTCAP,
            APPROXIMATE_LOG2,
            TILE,
            PART=ALL if TAIL == "all" else INSIDE,
            support=support,
            groups=groups,
            GATHERED=TAIL != "all",
        )
        cross, mass, slope, gap = terms.total, terms.mass, terms.slope, terms.gap
        if SPLITS_SECOND:
            store_terms(parts_ptr + part * PART_SLOTS, terms)
            if not is_last(finished_ptr, num_parts):
                return
            cross, slope = merged_terms(parts_ptr, num_parts)

    if DIVERGENCE != "jsd":
        divergence = kl_from_cross(cross, mass, centre, scale, exact_gap)
        mean_slope = -mass if FORWARD else divergence  # sum p g, where forward p g = -q
        if DIVERGENCE == "reverse_kl" and TAIL == "drop":
            # g = log(p / q) + 1. The 1 drops out of g - mean_slope only where the masses summed are all of them.
            mean_slope += mass
    else:
        divergence, mean_slope, gap = cross * LN2, slope * LN2, 0.0
    divergence = tl.where(gap > -1.5 * FLOOR, INF, divergence)
    if TAIL == "renorm":  # a teacher without mass in the support
        divergence = tl.where(teacher_z == 0.0, INF, divergence)

    rest_slope = 0.0
    stats_ptr += item * NUM_STATS
    if TAIL == "bucket":
        rest = online_visit(student, teacher, size, inner_scale, HAS_SOFTCAP, TILE, PART=OUTSIDE, support=support)
        rest_log_p = log_ratio(
            rest.first_m, rest.first_z, student_m, student_z, student_correction, student_correction
        ).to(tl.float32)
        rest_log_q = log_ratio(
            rest.second_m, rest.second_z, teacher_m, teacher_z, teacher_correction, teacher_correction
        ).to(tl.float32)
        rest_term, rest_weighted, rest_slope = bucket_entry(rest_log_p, rest_log_q, beta, DIVERGENCE)
        divergence += rest_term
        mean_slope += rest_weighted
        rest_lse = log_sum_exp(rest.first_m, rest.first_z, student_correction)
        # Where the student has no mass there, every p_j is 0; the log-sum-exp of -inf would make p_j Q / P infinite.
        rest_lse = tl.where(rest_log_p > FLOOR, rest_lse - tl.maximum(rest_log_q, FLOOR), -FLOOR)
        rest_lse, rest_lse_low = high_low(rest_lse)
        tl.store(stats_ptr + REST_LSE_SLOT, rest_lse)
        tl.store(stats_ptr + REST_LSE_LOW_SLOT, rest_lse_low)

    divergence = tl.where(valid, divergence, float("nan")).to(tl.float32)
    is_finite = tl.abs(divergence) < INF
    tl.store(divergence_ptr + item, divergence)
    student_lse, student_lse_low = high_low(log_sum_exp(student_m, student_z, student_correction))
    teacher_lse, teacher_lse_low = high_low(log_sum_exp(teacher_m, teacher_z, teacher_correction))
    tl.store(stats_ptr + STUDENT_LSE_SLOT, student_lse)
    tl.store(stats_ptr + STUDENT_LSE_LOW_SLOT, student_lse_low)
    tl.store(stats_ptr + TEACHER_LSE_SLOT, teacher_lse)
    tl.store(stats_ptr + TEACHER_LSE_LOW_SLOT, teacher_lse_low)
    if DIVERGENCE == "reverse_kl":
        # What the backward subtracts from the logits' difference to have g - mean_slope.
        offset, offset_low = high_low(exact_gap + mean_slope - (1.0 if TAIL == "drop" else 0.0))
        tl.store(stats_ptr + OFFSET_SLOT, offset)
        tl.store(stats_ptr + OFFSET_LOW_SLOT, offset_low)
    else:
        tl.store(stats_ptr + MEAN_SLOPE_SLOT, mean_slope.to(tl.float32))
    tl.store(stats_ptr + OUTSIDE_SLOPE_SLOT, (rest_slope - mean_slope).to(tl.float32))
    tl.store(stats_ptr + KTH_LOGIT_SLOT, support.kth_logit)
    tl.store(stats_ptr + LAST_TIED_ID_SLOT, support.last_tied_id.to(tl.float32))
    tl.store(stats_ptr + IS_FINITE_SLOT, is_finite.to(tl.float32))
    if SPLIT:
        tl.store(stats_ptr + FINISHED_PARTS_SLOT, 0.0)  # so that a row's numbers are its own, however they were made


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, rows: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    num_rows = student_logits.shape[0] * student_logits.shape[1]
    result = torch.empty(num_rows if rows is None else len(rows), dtype=torch.float32, device=student_logits.device)
    stats = torch.zeros((len(result), NUM_STATS.value), dtype=torch.float32, device=student_logits.device)
    tile = tile_options(student_logits, teacher_logits)
    num_groups = options.vocab_size // (tile["UNROLL"] * tile["LANES"] * tile["VEC"]) * tile["LANES"]
    # A softcap may round two logits into a tie, and a group of a row that is not aligned is 16 loads far apart.
    has_groups = options.vocab_topk is not None and options.softcap is None and tile["ALIGNED"]
    capacity = has_groups * min(num_groups, 2 * -(-(options.vocab_topk or 0) // tile["LANES"]) * tile["LANES"])
    if len(result):
        num_parts = parts_of(len(result), options.vocab_size, tile)
        arguments = dict(
            student_logits_ptr=student_logits,
            teacher_logits_ptr=teacher_logits,
            rows_ptr=None if rows is None else rows.contiguous(),
            parts_ptr=room_for_parts(len(result), num_parts, student_logits.device),
            **row_strides(student_logits, teacher_logits),
            num_rows=num_rows,
            length=max(student_logits.shape[1], 1),
            size=options.vocab_size,
            num_parts=num_parts,
            HAS_ROWS=rows is not None,
            HAS_SOFTCAP=options.softcap is not None,
            **tile,
        )
        scales = log2_scales(options)
        if num_parts > 1 and options.divergence == "jsd" and not options.vocab_topk:
            launch_part_sums(len(result) * num_parts, student_logits, HAS_ENTROPY=False, **arguments, **scales)
        launch(
            divergence_kernel,
            len(result) * num_parts,
            student_logits,
            **arguments,
            **scales,
            divergence_ptr=result,
            stats_ptr=stats,
            vocab_topk=options.vocab_topk or 0,
            num_groups=num_groups,
            capacity=capacity,
            maxima_ptr=student_logits.new_empty(len(result), num_groups) if has_groups else None,
            list_ptr=result.new_empty((len(result), capacity), dtype=torch.int32) if options.vocab_topk else None,
            beta=options.beta,
            DIVERGENCE=options.divergence,
            TAIL=options.tail if options.vocab_topk else "all",
            HISTOGRAMS=options.vocab_topk is not None and histograms_are_atomic(current_target()),
            SPLIT=num_parts > 1,
            HAS_GROUPS=has_groups,
        )
    return result, stats
