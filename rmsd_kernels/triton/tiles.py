"""Tile maths shared by every kernel here: how a row is cut and loaded, what a logit becomes, which ids a top-k holds.

A row is read in tiles of UNROLL x LANES x VEC logits: VEC neighbours are one 16-byte load of one thread, LANES is the
number of threads, UNROLL such loads are in flight at once. A tile is a tuple of (LANES, width) blocks, which `columns`
cuts further, so that a lane's sums are chains of fused multiply-adds within one thread: reducing a (LANES, width) block
instead costs 0.6 instructions more a pair of logits, as its products are summed by a tree.

Logits are held in log2 units, u = log2(e) * logit / temperature, so that each exponential is one fused multiply-add
and one MUFU instruction.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

# Stands for a logit of -inf where -inf itself would make 0 * -inf: far below any other, and twice it is finite.
FLOOR = tl.constexpr(-1e30)
# The maximum of no logit yet, in log2 units: so far above FLOOR that a floored logit weighs 0 against it. A scaled
# logit below -6.9e19 therefore counts as -inf.
EMPTY = tl.constexpr(-1e20)

# Which part of the vocabulary a sum takes: all of it, the student's top k, or the rest.
ALL = tl.constexpr(0)
INSIDE = tl.constexpr(1)
OUTSIDE = tl.constexpr(2)


class TileShape(NamedTuple):
    """How a tile is read, as one constexpr. PAIRED takes two bf16 as one 32-bit word: a shift and a mask widen them,
    where the element-wise widening compiles to three instructions a pair (19.9 -> 18.8 a pair of logits in the scores).
    """

    UNROLL: int
    LANES: int
    VEC: int
    PAIRED: bool
    MASKED: bool  # reaches behind the end of the row; never paired
    GATHERED: bool = False  # each lane has a start of its own, see `groups.group_starts`


class ModelRow(NamedTuple):
    """One model's logits of a row, and what brings them to log2 units."""

    logits_ptr: tl.tensor
    scale: tl.tensor
    correction: tl.tensor  # see `visits.nats`


# The start of a lane without a group, in gathered tiles. Its logits are -inf, and its ids negative.
NO_GROUP = tl.constexpr(-(1 << 30))
TWO_BANS = tl.constexpr(-8323200)  # bf16's -inf, twice in a word


class Support(NamedTuple):
    """Where the student's top k ends, among raw logits: see `in_support`."""

    kth_logit: tl.tensor
    last_tied_id: tl.tensor


@triton.jit
def block_ids(start, block: tl.constexpr, TILE: tl.constexpr):
    """(LANES, width) int32: vocabulary ids of a tile's block."""
    lane = tl.arange(0, TILE.LANES)[:, None] * TILE.VEC
    if TILE.PAIRED:  # even ids and odd ids of a load are two blocks
        element = tl.arange(0, TILE.VEC // 2)[None, :]
        return start + (block // 2 * TILE.LANES * TILE.VEC + block % 2) + lane + 2 * element
    else:
        element = tl.arange(0, TILE.VEC)[None, :]
        return start + block * TILE.LANES * TILE.VEC + lane + element


@triton.jit
def widened(words):
    """The even and the odd logit of each word."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def lane_pointers(row_ptr, TILE: tl.constexpr):
    """Where each lane's first load of the row begins: (LANES, width), of words where two logits are paired."""
    lane, element = tl.arange(0, TILE.LANES)[:, None], tl.arange(0, TILE.VEC // (2 if TILE.PAIRED else 1))[None, :]
    if TILE.PAIRED:
        return tl.multiple_of(row_ptr.to(tl.pointer_type(tl.int32)), 16) + (lane * (TILE.VEC // 2) + element)
    else:
        return row_ptr + (lane * TILE.VEC + element)


@triton.jit
def load_lanes(lane_ptr, TILE: tl.constexpr):
    """A whole tile in fp32, from `lane_pointers` that were moved to it."""
    tile = ()
    for load in tl.static_range(TILE.UNROLL):
        if TILE.PAIRED:
            tile += widened(tl.load(lane_ptr + load * (TILE.LANES * TILE.VEC // 2)))
        else:
            tile += (tl.load(lane_ptr + load * (TILE.LANES * TILE.VEC)).to(tl.float32),)
    return tile


@triton.jit
def load_tile(row_ptr, start, size, TILE: tl.constexpr):
    """The tile's logits as stored, in fp32; past the end of the row, and where a gathered tile's lane has no group,
    -inf, which adds nothing anywhere."""
    lane_ptr = lane_pointers(row_ptr, TILE)
    if not TILE.GATHERED and not TILE.MASKED:
        return load_lanes(lane_ptr + (start // 2 if TILE.PAIRED else start), TILE)
    else:
        tile = ()
        for load in tl.static_range(TILE.UNROLL):
            ids = block_ids(start, 2 * load if TILE.PAIRED else load, TILE)
            if TILE.PAIRED:
                first = tl.multiple_of(start // 2, [TILE.VEC // 2, TILE.VEC // 2])
                has_group = tl.broadcast_to(start > NO_GROUP // 2, ids.shape)
                words = tl.load(
                    lane_ptr + (first + load * (TILE.LANES * TILE.VEC // 2)), mask=has_group, other=TWO_BANS
                )
                tile += widened(words)
            else:
                wanted = tl.broadcast_to(start > NO_GROUP // 2, ids.shape) if TILE.GATHERED else ids < size
                tile += (tl.load(row_ptr + ids, mask=wanted, other=-INF).to(tl.float32),)
        return tile


@triton.jit
def halved(block):
    """The even columns of a block and its odd ones."""
    return tl.split(tl.reshape(block, (block.shape[0], block.shape[1] // 2, 2)))


@triton.jit
def columns(tile):
    """A tile's blocks cut into (LANES,) ones, so that a lane adds up all of them in one chain."""
    for _ in tl.static_range(3):  # a load has 8 logits at most
        if tile[0].shape[1] > 1:
            halves = ()
            for block in tl.static_range(len(tile)):
                halves += halved(tile[block])
            tile = halves
    flat = ()
    for block in tl.static_range(len(tile)):
        flat += (tl.reshape(tile[block], (tile[block].shape[0],)),)
    return flat


@triton.jit
def row_pointer(logits_ptr, row, length, stride_b, stride_l, ALIGNED: tl.constexpr):
    """Where row `row` of the flattened (B, L) starts; 64-bit, as B * L * V may exceed 2^31."""
    row_ptr = logits_ptr + (row // length) * stride_b + (row % length) * stride_l
    # A stated alignment instead of Triton's own guess from the arguments: two variants a kernel, whatever the shapes.
    return tl.multiple_of(row_ptr, 16) if ALIGNED else row_ptr


@triton.jit
def tanh(y):
    """To 1.3e-7 of its value everywhere; the hardware's approximation is good to 5e-4 only."""
    w = y * y
    near = tl.fma(w, -0.005691985599696636, 0.020626291632652283)
    near = tl.fma(tl.fma(near, w, -0.05373531952500343), w, 0.13331381976604462)
    near = tl.fma(tl.fma(near, w, -0.3333328068256378) * w, y, y)  # |y| < 0.625, where 1 - z below would cancel
    z = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    far = 1.0 - 2.0 * z / (1.0 + z)  # the exponential's error counts at most 0.45 times
    return tl.where(tl.abs(y) < 0.625, near, tl.where(y < 0, -far, far))


@triton.jit
def softcapped(raw, inner_scale, HAS_SOFTCAP: tl.constexpr):
    """tanh(logit_scale * raw / softcap), whose factor softcap the caller's scale holds; a banned token stays banned."""
    if HAS_SOFTCAP:
        return tl.where(raw == -INF, raw, tanh(raw * inner_scale))
    else:
        return raw


@triton.jit
def softcapped_tile(tile, inner_scale, HAS_SOFTCAP: tl.constexpr):
    capped = ()
    for block in tl.static_range(len(tile)):
        capped += (softcapped(tile[block], inner_scale, HAS_SOFTCAP),)
    return capped


@triton.jit
def in_support(raw_student, ids, support):
    """The student's top k: above the k-th largest raw logit, or tied with it and not past the last id that fits."""
    above, tied = raw_student > support.kth_logit, raw_student == support.kth_logit
    return above | (tied & (ids <= support.last_tied_id))


@triton.jit
def load_pair(
    first,  # ModelRow
    second,
    start,
    size,
    inner_scale,
    support,  # of the student; not looked at where PART is ALL
    HAS_SOFTCAP: tl.constexpr,
    STUDENT_FIRST: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """Both rows' tiles after softcap, -inf in both outside the wanted part of the vocabulary."""
    first_tile = load_tile(first.logits_ptr, start, size, TILE)
    second_tile = load_tile(second.logits_ptr, start, size, TILE)
    if PART != ALL:
        first_kept, second_kept = (), ()
        for block in tl.static_range(len(first_tile)):
            a, b = first_tile[block], second_tile[block]
            wanted = in_support(a if STUDENT_FIRST else b, block_ids(start, block, TILE), support)
            if PART == OUTSIDE:
                wanted = wanted == 0
            first_kept += (tl.where(wanted, a, -INF),)
            second_kept += (tl.where(wanted, b, -INF),)
        first_tile, second_tile = first_kept, second_kept
    first_tile = softcapped_tile(first_tile, inner_scale, HAS_SOFTCAP)
    return first_tile, softcapped_tile(second_tile, inner_scale, HAS_SOFTCAP)
