"""The two ways to sum over a row: online, while the maxima are unknown, and again once both rows are normalised."""

import triton
import triton.language as tl

from .tiles import FLOOR, LN2, load_pair


@triton.jit
def online_tile(state, first, second, first_scale, second_scale, HAS_ENTROPY: tl.constexpr, HAS_CROSS: tl.constexpr):
    """Adds one tile to every lane's running sums. With u, v the rows' logits less their maxima so far, in log2 units:

    first_z = sum 2^u, first_e = sum 2^u u, cross = sum 2^u (u - v), gap = max (u - v), and the same for `second`.

    Each lane has a maximum of its own, so the loop holds no barrier, shuffle or shared memory, and the rescale costs
    one exponential in 32 logits. Centring u - v before it is summed keeps nearly equal rows accurate. A NaN or +inf
    reaches z by itself, as its exponential is NaN. -inf is floored, twice as low in `second`: gap exceeds -1.5 FLOOR
    exactly where the first row has mass and the second has none, even where that mass underflows.
    """
    first_m, second_m, first_z, second_z, first_e, second_e, cross, gap = state
    first_peak, second_peak = first[0], second[0]
    for block in tl.static_range(1, len(first)):
        first_peak, second_peak = tl.maximum(first_peak, first[block]), tl.maximum(second_peak, second[block])
    first_peak = tl.maximum(first_m, tl.max(first_peak, axis=1) * first_scale)
    second_peak = tl.maximum(second_m, tl.max(second_peak, axis=1) * second_scale)
    first_shift, second_shift = first_m - first_peak, second_m - second_peak
    first_rescale, second_rescale = tl.exp2(first_shift), tl.exp2(second_shift)

    for block in tl.static_range(len(first)):
        u = tl.fma(first[block], first_scale, -first_peak[:, None])
        v = tl.fma(second[block], second_scale, -second_peak[:, None])
        first_weight, second_weight = tl.exp2(u), tl.exp2(v)
        u, v = tl.maximum(u, FLOOR), tl.maximum(v, 2 * FLOOR)
        if block == 0:
            first_zs, second_zs, tile_gap = first_weight, second_weight, u - v
            first_es, second_es, crosses = first_weight * u, second_weight * v, first_weight * (u - v)
        else:
            first_zs += first_weight
            second_zs += second_weight
            tile_gap = tl.maximum(tile_gap, u - v)
            crosses = tl.fma(first_weight, u - v, crosses)
            first_es, second_es = tl.fma(first_weight, u, first_es), tl.fma(second_weight, v, second_es)

    if HAS_CROSS:
        cross = tl.fma(tl.fma(first_shift - second_shift, first_z, cross), first_rescale, tl.sum(crosses, axis=1))
        gap = tl.maximum(gap, tl.max(tile_gap, axis=1))
    if HAS_ENTROPY:
        first_e = tl.fma(tl.fma(first_shift, first_z, first_e), first_rescale, tl.sum(first_es, axis=1))
        second_e = tl.fma(tl.fma(second_shift, second_z, second_e), second_rescale, tl.sum(second_es, axis=1))
    first_z = tl.fma(first_z, first_rescale, tl.sum(first_zs, axis=1))
    second_z = tl.fma(second_z, second_rescale, tl.sum(second_zs, axis=1))
    return first_peak, second_peak, first_z, second_z, first_e, second_e, cross, gap


@triton.jit
def online_visit(
    first_ptr, second_ptr, size, inner_scale, first_scale, second_scale, kth_logit, last_tied_id,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_CROSS: tl.constexpr, STUDENT_FIRST: tl.constexpr,
    PART: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Reads both rows once; the sums of `online_tile` for the whole row, as eight scalars."""
    TILE: tl.constexpr = UNROLL * LANES * VEC
    zeros = tl.zeros([LANES], tl.float32)
    state = (zeros + FLOOR, zeros + FLOOR, zeros, zeros, zeros, zeros, zeros, zeros + 2 * FLOOR)
    whole = size // TILE * TILE
    for start in range(0, whole, TILE):
        first, second = load_pair(
            first_ptr, second_ptr, start, size, inner_scale, kth_logit, last_tied_id,
            HAS_SOFTCAP, STUDENT_FIRST, PART, UNROLL, LANES, VEC, PAIRED, False,
        )  # fmt: skip
        state = online_tile(state, first, second, first_scale, second_scale, HAS_ENTROPY, HAS_CROSS)
    if whole < size:  # apart, so that the loop's loads need no mask
        first, second = load_pair(
            first_ptr, second_ptr, whole, size, inner_scale, kth_logit, last_tied_id,
            HAS_SOFTCAP, STUDENT_FIRST, PART, UNROLL, LANES, VEC, False, True,
        )  # fmt: skip
        state = online_tile(state, first, second, first_scale, second_scale, HAS_ENTROPY, HAS_CROSS)

    first_lanes, second_lanes, first_z, second_z, first_e, second_e, cross, gap = state
    first_m, second_m = tl.max(first_lanes, axis=0), tl.max(second_lanes, axis=0)
    first_shift, second_shift = first_lanes - first_m, second_lanes - second_m
    first_rescale, second_rescale = tl.exp2(first_shift), tl.exp2(second_shift)
    cross = tl.sum(tl.fma(first_shift - second_shift, first_z, cross) * first_rescale, axis=0)
    first_e = tl.sum(tl.fma(first_shift, first_z, first_e) * first_rescale, axis=0)
    second_e = tl.sum(tl.fma(second_shift, second_z, second_e) * second_rescale, axis=0)
    first_z, second_z = tl.sum(first_z * first_rescale, axis=0), tl.sum(second_z * second_rescale, axis=0)
    return first_m, second_m, first_z, second_z, first_e, second_e, cross, tl.max(gap, axis=0)


@triton.jit
def log_sum_exp(m, z):
    """In nats. fp64 for this one product: rounding m log 2 to fp32 would cost 5e-4 at logits of 1e4."""
    return (m.to(tl.float64) * LN2 + tl.log(z)).to(tl.float32)


@triton.jit
def log_to_mixture(log_p, log_q, p, q, beta):
    """log2(p / m) and log2(q / m), m = beta q + (1 - beta) p; where both are 0, finite numbers that 0 can multiply."""
    log_m = tl.maximum(tl.log2(tl.fma(q, beta, p * (1.0 - beta))), FLOOR)
    return tl.maximum(log_p, FLOOR) - log_m, tl.maximum(log_q, FLOOR) - log_m


@triton.jit
def normalised_tile(
    state, student, teacher, student_scale, teacher_scale, student_m, teacher_m, student_log_z, teacher_log_z, beta,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Adds one tile to every lane's sums; see `normalised_visit`. jsd has no gap: its terms are always finite."""
    total, slope, mass, gap = state
    totals = tl.zeros(student[0].shape, tl.float32)
    slopes, masses, gaps = totals, totals, totals + 2 * FLOOR
    for block in tl.static_range(len(student)):
        # Less the maximum first and log z after: their sum would be rounded, by 5e-4 at logits of 1e4.
        log_p = tl.fma(student[block], student_scale, -student_m) - student_log_z
        log_q = tl.fma(teacher[block], teacher_scale, -teacher_m) - teacher_log_z
        if DIVERGENCE == "jsd":
            p, q = tl.exp2(log_p), tl.exp2(log_q)
            to_p, to_q = log_to_mixture(log_p, log_q, p, q, beta)
            slopes = tl.fma(p, to_p, slopes)
            totals = tl.fma(q, to_q, totals)
        else:
            if DIVERGENCE == "reverse_kl":
                log_a, log_b = log_p, log_q
            else:
                log_a, log_b = log_q, log_p
            weight = tl.exp2(log_a)
            distance = tl.maximum(log_a, FLOOR) - tl.maximum(log_b, 2 * FLOOR)
            totals = tl.fma(weight, distance, totals)
            masses += weight
            gaps = tl.maximum(gaps, distance)
    total += tl.sum(totals, axis=1)
    if DIVERGENCE == "jsd":
        slope += tl.sum(slopes, axis=1)
    else:
        mass += tl.sum(masses, axis=1)
        gap = tl.maximum(gap, tl.max(gaps, axis=1))
    return total, slope, mass, gap


@triton.jit
def normalised_visit(
    student_ptr, teacher_ptr, size, inner_scale, student_scale, teacher_scale,
    student_m, teacher_m, student_log_z, teacher_log_z, beta, kth_logit, last_tied_id,
    DIVERGENCE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PART: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """The divergence over a part of the vocabulary, from L2 as the rows were just read. Four scalars, in log2 units:
    the sum of its terms; for jsd the sum of p g; for a KL the mass that weighs it and `online_tile`'s gap."""
    TILE: tl.constexpr = UNROLL * LANES * VEC
    zeros = tl.zeros([LANES], tl.float32)
    state = (zeros, zeros, zeros, zeros + 2 * FLOOR)
    whole = size // TILE * TILE
    for start in range(0, whole, TILE):
        student, teacher = load_pair(
            student_ptr, teacher_ptr, start, size, inner_scale, kth_logit, last_tied_id,
            HAS_SOFTCAP, True, PART, UNROLL, LANES, VEC, PAIRED, False,
        )  # fmt: skip
        state = normalised_tile(
            state, student, teacher, student_scale, teacher_scale, student_m, teacher_m,
            student_log_z, teacher_log_z, beta, DIVERGENCE,
        )  # fmt: skip
    if whole < size:
        student, teacher = load_pair(
            student_ptr, teacher_ptr, whole, size, inner_scale, kth_logit, last_tied_id,
            HAS_SOFTCAP, True, PART, UNROLL, LANES, VEC, False, True,
        )  # fmt: skip
        state = normalised_tile(
            state, student, teacher, student_scale, teacher_scale, student_m, teacher_m,
            student_log_z, teacher_log_z, beta, DIVERGENCE,
        )  # fmt: skip
    total, slope, mass, gap = state
    total, slope = tl.sum(total, axis=0), tl.sum(slope, axis=0)
    if DIVERGENCE == "jsd":
        slope *= 1.0 - beta
        total = tl.fma(total, beta, slope)
    return total, slope, tl.sum(mass, axis=0), tl.max(gap, axis=0)
