"""The two ways to sum over a row: online, while the maxima are unknown, and again once both rows are normalised.

A quotient that is to be 1 for equal numbers is `div_rn`'s: on NVIDIA `/` is an approximate reciprocal and a product, so
that x / x need not be 1 (for one z in seven), and a row's divergence from itself not 0."""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import core
from triton.language.extra.cuda.libdevice import fast_log2f

from .groups import group_starts
from .tiles import (
    ALL,
    EMPTY,
    FLOOR,
    LN2,
    TileShape,
    columns,
    lane_pointers,
    load_lanes,
    load_pair,
    softcapped_tile,
)


class OnlineSums(NamedTuple):
    """Of a row or of each lane: with s, t the rows' logits, u, v those in log2 units less the maxima so far, and
    ratio = first scale / second scale."""

    first_m: tl.tensor  # the maximum so far, in log2 units
    second_m: tl.tensor
    first_z: tl.tensor  # sum 2^u
    second_z: tl.tensor  # sum 2^v
    first_e: tl.tensor  # sum 2^u u
    second_e: tl.tensor  # sum 2^v v
    cross: tl.tensor  # sum 2^u (s ratio - t); of a whole row the mean, divided by first_z
    gap: tl.tensor  # the largest s ratio - t


class Normaliser(NamedTuple):
    """Of one model's row: 2^(scale * logit - m) / z is a probability."""

    scale: tl.tensor
    m: tl.tensor
    z: tl.tensor


class NormalisedSums(NamedTuple):
    """Of a row or of each lane, over any part of the vocabulary."""

    total: tl.tensor  # jsd: its terms, log2 units; a KL: sum p (s ratio - t - centre)
    slope: tl.tensor  # jsd: sum p g, log2 units
    mass: tl.tensor  # a KL: sum p
    gap: tl.tensor  # as in OnlineSums; jsd has none, its terms are always finite


@triton.jit
def floor_pair(first, second, ratio):
    """-inf made finite, so that its weight of 0 can multiply it; twice as low in `second`. NaN stays NaN."""
    first = tl.maximum(first, tl.div_rn(FLOOR, ratio), propagate_nan=tl.PropagateNan.ALL)
    return first, tl.maximum(second, 2 * FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def online_tile(
    sums, first, second, first_scale, second_scale, ratio, HAS_ENTROPY: tl.constexpr, HAS_CROSS: tl.constexpr
):
    """Adds one tile to every lane's running sums, which it gives with each lane's largest logit of either row's tile.

    Each lane has a maximum of its own, so the loop holds no barrier, shuffle or shared memory, and the rescale costs
    one exponential in 16 logits. The logits' difference is taken before anything rounds it, which keeps nearly equal
    rows, and any rows whose logits differ by a representable number, accurate. A NaN or +inf reaches z by itself, as
    its exponential is NaN. -inf is floored, twice as low in `second`: gap exceeds -1.5 FLOOR exactly where the first
    row has mass and the second has none, even where that mass underflows.
    """
    first_m, second_m, first_z, second_z, first_e, second_e, cross, gap = sums
    first, second = columns(first), columns(second)
    floored = ()
    for column in tl.static_range(len(first)):
        s, t = floor_pair(first[column], second[column], ratio)
        if column == 0:
            first_max, second_max = s, t
        else:
            first_max, second_max = tl.maximum(first_max, s), tl.maximum(second_max, t)
        floored += ((s, t),)
    first_peak = tl.maximum(first_m, first_max * first_scale)
    second_peak = tl.maximum(second_m, second_max * second_scale)
    first_shift, second_shift = first_m - first_peak, second_m - second_peak
    first_rescale, second_rescale = tl.exp2(first_shift), tl.exp2(second_shift)

    # The tile's own sums first: weights too small for a row's sum, one by one, are not lost together.
    for column in tl.static_range(len(first)):
        s, t = floored[column]
        u, v = tl.fma(s, first_scale, -first_peak), tl.fma(t, second_scale, -second_peak)
        first_weight, second_weight = tl.exp2(u), tl.exp2(v)
        difference = tl.fma(s, ratio, -t)
        gap = tl.maximum(gap, difference)
        if column == 0:
            first_zs, second_zs = first_weight, second_weight
            first_es, second_es, crosses = first_weight * u, second_weight * v, first_weight * difference
        else:
            first_zs += first_weight
            second_zs += second_weight
            crosses = tl.fma(first_weight, difference, crosses)
            first_es, second_es = tl.fma(first_weight, u, first_es), tl.fma(second_weight, v, second_es)

    if HAS_CROSS:
        cross = tl.fma(cross, first_rescale, crosses)
    else:
        gap = sums.gap
    if HAS_ENTROPY:
        first_e = tl.fma(tl.fma(first_shift, first_z, first_e), first_rescale, first_es)
        second_e = tl.fma(tl.fma(second_shift, second_z, second_e), second_rescale, second_es)
    first_z = tl.fma(first_z, first_rescale, first_zs)
    second_z = tl.fma(second_z, second_rescale, second_zs)
    return OnlineSums(first_peak, second_peak, first_z, second_z, first_e, second_e, cross, gap), first_max, second_max


@triton.jit
def merge_lanes(lanes):
    """OnlineSums of a row from those of its lanes, or of its parts."""
    first_lanes, second_lanes, first_z, second_z, first_e, second_e, cross, gap = lanes
    first_m, second_m = tl.max(first_lanes, axis=0), tl.max(second_lanes, axis=0)
    first_shift, second_shift = first_lanes - first_m, second_lanes - second_m
    first_rescale, second_rescale = tl.exp2(first_shift), tl.exp2(second_shift)
    first_e = tl.sum(tl.fma(first_shift, first_z, first_e) * first_rescale, axis=0)
    second_e = tl.sum(tl.fma(second_shift, second_z, second_e) * second_rescale, axis=0)
    second_z = tl.sum(second_z * second_rescale, axis=0)
    # fp64 for the lanes' sums: fp32 cost four units in the last place of a divergence of 40.
    first_z = tl.sum((first_z * first_rescale).to(tl.float64), axis=0)
    mean_cross = (tl.sum((cross * first_rescale).to(tl.float64), axis=0) / first_z).to(tl.float32)
    gap = tl.max(gap, axis=0)
    return OnlineSums(first_m, second_m, first_z.to(tl.float32), second_z, first_e, second_e, mean_cross, gap)


@triton.jit
def online_visit(
    first,  # ModelRow
    second,
    size,
    inner_scale,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr = False,
    HAS_CROSS: tl.constexpr = False,
    STUDENT_FIRST: tl.constexpr = True,
    PART: tl.constexpr = ALL,
    support=None,
    groups=None,  # with GATHERED: what to visit besides the ragged tile
    GATHERED: tl.constexpr = False,
    maxima_ptr=None,  # with KEEPS_MAXIMA: of the student's groups, floored
    KEEPS_MAXIMA: tl.constexpr = False,
):
    """Reads both rows once; the OnlineSums of the whole row, or of a part of the vocabulary."""
    SHAPE: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, TILE.PAIRED, MASKED=False, GATHERED=GATHERED)
    RAGGED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, PAIRED=False, MASKED=True)
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    ratio = tl.div_rn(first.scale, second.scale)
    zeros = tl.zeros([TILE.LANES], tl.float32)
    sums = OnlineSums(zeros + EMPTY, zeros + EMPTY, zeros, zeros, zeros, zeros, zeros, zeros + 2 * FLOOR)
    whole = size // LOGITS * LOGITS
    count = tl.cdiv(groups.count, TILE.LANES) if GATHERED else whole // LOGITS
    first_ptr, second_ptr = lane_pointers(first.logits_ptr, TILE), lane_pointers(second.logits_ptr, TILE)
    for tile in range(0, count):
        if PART == ALL and not GATHERED:
            # Pointers that move on, in place of a start: 0.8 instructions a pair less.
            first_tile, second_tile = load_lanes(first_ptr, TILE), load_lanes(second_ptr, TILE)
            first_tile = softcapped_tile(first_tile, inner_scale, HAS_SOFTCAP)
            second_tile = softcapped_tile(second_tile, inner_scale, HAS_SOFTCAP)
            first_ptr += LOGITS // 2 if TILE.PAIRED else LOGITS
            second_ptr += LOGITS // 2 if TILE.PAIRED else LOGITS
        else:
            start = group_starts(groups, tile * TILE.LANES, TILE) if GATHERED else tile * LOGITS
            first_tile, second_tile = load_pair(
                first, second, start, size, inner_scale, support, HAS_SOFTCAP, STUDENT_FIRST, PART, SHAPE
            )
        sums, first_max, second_max = online_tile(
            sums, first_tile, second_tile, first.scale, second.scale, ratio, HAS_ENTROPY, HAS_CROSS
        )
        if KEEPS_MAXIMA:
            lane_ptr = maxima_ptr + tile * TILE.LANES + tl.arange(0, TILE.LANES)
            tl.store(lane_ptr, (first_max if STUDENT_FIRST else second_max).to(maxima_ptr.dtype.element_ty))
    if whole < size:  # apart, so that the loop's loads need no mask
        first_tile, second_tile = load_pair(
            first, second, whole, size, inner_scale, support, HAS_SOFTCAP, STUDENT_FIRST, PART, RAGGED
        )
        sums, first_max, second_max = online_tile(
            sums, first_tile, second_tile, first.scale, second.scale, ratio, HAS_ENTROPY, HAS_CROSS
        )
    if KEEPS_MAXIMA:
        tl.debug_barrier()  # other threads of this program will read them

    return merge_lanes(sums)


@triton.jit
def nats(log2_units, correction):
    """fp64, for a handful of scalars a row: fp32 would round a maximum of 1e4 by 5e-4, and `correction` undoes the
    rounding of the log2 scale itself, 1e-4 there."""
    return tl.cast(log2_units, tl.float64) * ((tl.cast(correction, tl.float64) + 1.0) * LN2)


@triton.jit
def log_sum_exp(m, z, correction):
    return nats(m, correction) + tl.log(z)


@triton.jit
def high_low(x):
    """An fp64 number as the sum of two fp32 ones; infinities are cut to the largest finite ones first."""
    x = tl.minimum(tl.maximum(x, -3e38), 3e38)
    high = x.to(tl.float32)
    return high, (x - high).to(tl.float32)


@triton.jit
def log_ratio(first_m, first_z, second_m, second_z, first_correction, second_correction):
    """log-sum-exp of the first less the second's, fp64. One logarithm: two would be off by 5e-7 each."""
    quotient = tl.div_rn(first_z, second_z)
    return nats(first_m, first_correction) - nats(second_m, second_correction) + tl.log(quotient)


@triton.jit
def kl_from_cross(cross, mass, centre, second_scale, lse_gap):
    """sum p log(p / q), fp64, over any part of the vocabulary, from cross = sum p (s ratio - t - centre), mass = sum p,
    the second scale in nats and the first log-sum-exp less the second."""
    return second_scale * cross + (second_scale * centre - lse_gap) * mass


@core.extern
def amdgcn_log2(x, _semantic=None):
    """v_log_f32 alone. LLVM's log2 scales denormal arguments before it and the result after: five instructions more."""
    symbol = {(core.dtype("fp32"),): ("llvm.amdgcn.log.f32", core.dtype("fp32"))}
    return core.extern_elementwise("", "", [x], symbol, is_pure=True, _semantic=_semantic)


@triton.jit
def log2(x, APPROXIMATE_LOG2: tl.constexpr):
    """Of no denormal number; to 2^-22 where there is one instruction for it, which in CUDA's library takes some twelve.
    The interpreter's is exact."""
    if APPROXIMATE_LOG2 == "cuda":
        return fast_log2f(x)
    elif APPROXIMATE_LOG2 == "hip":
        return amdgcn_log2(x)
    else:
        return tl.log2(x)


@triton.jit
def mixture_entry(log_p, log_q, beta, APPROXIMATE_LOG2: tl.constexpr):
    """An entry of m = beta q + (1 - beta) p, from log2-probabilities of which either or both may be -inf: its terms'
    sum beta q log2(q / m) + (1 - beta) p log2(p / m), then p and log2(p / m).

    The larger of p and q is taken out: m / larger = w + (1 - w) 2^-d lies between w and 1, where an approximate
    logarithm is off by 2^-22 at most, and is exactly 1 where p = q.
    """
    difference = log_p - log_q
    d = tl.minimum(tl.abs(difference), -FLOOR)  # also where both are -inf and their difference is NaN
    student_leads = difference > 0.0
    larger = tl.exp2(tl.maximum(log_p, log_q))
    ratio = tl.exp2(-d)
    smaller_share = tl.where(student_leads, beta, 1.0 - beta) * ratio
    m = tl.where(student_leads, 1.0 - beta, beta) + smaller_share
    log_m = log2(m, APPROXIMATE_LOG2)
    # Not m less the larger's weight for the smaller's share: its rounding error would be multiplied by d.
    terms = -larger * tl.fma(d, smaller_share, m * log_m)
    p = larger * tl.where(student_leads, 1.0, ratio)
    return terms, p, -log_m - tl.where(student_leads, 0.0, d)


@triton.jit
def normalised_tile(
    sums,
    student_tile,
    teacher_tile,
    student,  # Normaliser
    teacher,
    beta,
    centre,
    DIVERGENCE: tl.constexpr,
    APPROXIMATE_LOG2: tl.constexpr,
):
    """Adds one tile to every lane's sums; see `normalised_visit`. All probabilities here are multiplied by one z: the
    student's in the reverse KL, else the teacher's. Dividing the sums in the end costs nothing for each logit."""
    total, slope, mass, gap = sums
    if DIVERGENCE == "reverse_kl":
        ratio = tl.div_rn(student.scale, teacher.scale)
    elif DIVERGENCE == "forward_kl":
        ratio = tl.div_rn(teacher.scale, student.scale)
    else:
        log_z_gap = tl.log2(tl.div_rn(student.z, teacher.z))
    totals = tl.zeros(student_tile[0].shape, tl.float32)
    slopes, masses, gaps = totals, totals, totals + 2 * FLOOR
    for block in tl.static_range(len(student_tile)):
        if DIVERGENCE == "jsd":
            # The maximum first and the rest after: their sum would be rounded, by 5e-4 at logits of 1e4.
            log_p = tl.fma(student_tile[block], student.scale, -student.m) - log_z_gap
            log_q = tl.fma(teacher_tile[block], teacher.scale, -teacher.m)
            terms, p, to_p = mixture_entry(log_p, log_q, beta, APPROXIMATE_LOG2)
            totals += terms
            slopes = tl.fma(p, to_p, slopes)
        else:
            if DIVERGENCE == "reverse_kl":
                s, t = floor_pair(student_tile[block], teacher_tile[block], ratio)
                weight = tl.exp2(tl.fma(s, student.scale, -student.m))
                difference = tl.fma(s, ratio, -t)
            else:
                t, s = floor_pair(teacher_tile[block], student_tile[block], ratio)
                weight = tl.exp2(tl.fma(t, teacher.scale, -teacher.m))
                difference = tl.fma(t, ratio, -s)
            totals = tl.fma(weight, difference - centre, totals)
            masses += weight
            gaps = tl.maximum(gaps, difference)
    total += tl.sum(totals, axis=1)
    if DIVERGENCE == "jsd":
        slope += tl.sum(slopes, axis=1)
    else:
        mass += tl.sum(masses, axis=1)
        gap = tl.maximum(gap, tl.max(gaps, axis=1))
    return NormalisedSums(total, slope, mass, gap)


@triton.jit
def normalised_visit(
    student,  # ModelRow
    teacher,
    student_normaliser,  # Normaliser
    teacher_normaliser,
    size,
    inner_scale,
    beta,
    centre,
    DIVERGENCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    APPROXIMATE_LOG2: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr = ALL,
    support=None,
    groups=None,
    GATHERED: tl.constexpr = False,
):
    """NormalisedSums of a part of the vocabulary. The rows were just read from their start to their end, so this goes
    from the end to the start, to meet what L2 still holds. `centre` is of the differences' own size, so that small
    numbers are summed: without it a divergence was off by 3e-6."""
    RAGGED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, PAIRED=False, MASKED=True)
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    SHAPE: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, TILE.PAIRED, MASKED=False, GATHERED=GATHERED)
    zeros = tl.zeros([TILE.LANES], tl.float32)
    sums = NormalisedSums(zeros, zeros, zeros, zeros + 2 * FLOOR)
    whole = size // LOGITS * LOGITS
    end = tl.cdiv(groups.count, TILE.LANES) * LOGITS if GATHERED else whole
    if whole < size:
        tiles = load_pair(
            student, teacher, whole, size, inner_scale, support, HAS_SOFTCAP, STUDENT_FIRST=True, PART=PART, TILE=RAGGED
        )
        sums = normalised_tile(
            sums,
            tiles[0],
            tiles[1],
            student_normaliser,
            teacher_normaliser,
            beta,
            centre,
            DIVERGENCE,
            APPROXIMATE_LOG2,
        )
    for done in range(0, end, LOGITS):
        place = end - LOGITS - done
        start = group_starts(groups, place // LOGITS * TILE.LANES, TILE) if GATHERED else place
        tiles = load_pair(
            student, teacher, start, size, inner_scale, support, HAS_SOFTCAP, STUDENT_FIRST=True, PART=PART, TILE=SHAPE
        )
        sums = normalised_tile(
            sums,
            tiles[0],
            tiles[1],
            student_normaliser,
            teacher_normaliser,
            beta,
            centre,
            DIVERGENCE,
            APPROXIMATE_LOG2,
        )
    z = student_normaliser.z if DIVERGENCE == "reverse_kl" else teacher_normaliser.z
    total, slope, mass = tl.sum(sums.total, axis=0), tl.sum(sums.slope, axis=0), tl.sum(sums.mass, axis=0)
    if DIVERGENCE == "jsd":
        slope *= 1.0 - beta
    return NormalisedSums(tl.div_rn(total, z), tl.div_rn(slope, z), tl.div_rn(mass, z), tl.max(sums.gap, axis=0))
