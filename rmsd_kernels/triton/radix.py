"""The k-th largest logit of a row by histograms, digit by digit from the left, and then the last id that ties with it.

A visit counts how many logits have each value of one digit, among those that agree with the k-th in all digits before:
two visits for 16-bit logits, three for fp32, whatever V and k are. `launch.histograms_are_atomic` says where a
histogram is cheap. Counts are whole numbers and have no order, so that the result is the same in every run.
"""

import triton
import triton.language as tl

from .groups import group_starts
from .tiles import INF, Support, TileShape, block_ids, load_tile


@triton.jit
def flat(blocks):
    """All elements of a tile's blocks as one axis, in whatever order costs nothing."""
    for _ in tl.static_range(5):  # up to 32 blocks
        if len(blocks) > 1:
            joined = ()
            for pair in tl.static_range(len(blocks) // 2):
                joined += (tl.join(blocks[2 * pair], blocks[2 * pair + 1]),)
            blocks = joined
    return tl.ravel(blocks[0])


@triton.jit
def digit_counts_of_tile(tile, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr):
    bits = flat(tile).to(tl.uint32, bitcast=True)
    if SHIFT + BITS == 32:
        return tl.histogram((bits >> SHIFT).to(tl.int32), 1 << BITS)
    else:
        # All zeros above the digit where all digits before it are the prefix's.
        digit = (bits >> SHIFT) ^ (prefix << BITS)
        return tl.histogram(digit.to(tl.int32), 1 << BITS, mask=digit < (1 << BITS))


@triton.jit
def digit_counts(row_ptr, size, groups, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """How many logits, among those whose fp32 bits start with `prefix`, go on with each value of the next BITS bits."""
    RAGGED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, PAIRED=False, MASKED=True)
    GATHERED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, TILE.PAIRED, MASKED=False, GATHERED=True)
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    counts = tl.zeros([1 << BITS], tl.int32)
    whole = size // LOGITS * LOGITS
    for first in range(0, groups.count, TILE.LANES):
        tile = load_tile(row_ptr, group_starts(groups, first, TILE), size, GATHERED)
        counts += digit_counts_of_tile(tile, prefix, SHIFT, BITS)
    if whole < size:
        counts += digit_counts_of_tile(load_tile(row_ptr, whole, size, RAGGED), prefix, SHIFT, BITS)
    return counts


@triton.jit
def next_digit(row_ptr, size, groups, k, prefix, above, SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """The k-th largest's `prefix`, longer by one digit, how many logits are `above` all that start so, and how many
    start so."""
    counts = digit_counts(row_ptr, size, groups, prefix, SHIFT, BITS, TILE)
    digits = tl.arange(0, 1 << BITS)
    upto = tl.cumsum(counts, axis=0)
    if SHIFT + BITS == 32:
        # The sign comes first: the upper half are the negatives, whose bits run from the largest down.
        positive = tl.sum(tl.where(digits < 1 << (BITS - 1), counts, 0), axis=0)
        reach = tl.where(digits < 1 << (BITS - 1), positive - upto + counts, upto)
    else:
        negative = (prefix >> (31 - SHIFT - BITS)) != 0
        reach = tl.where(negative, upto, tl.sum(counts, axis=0) - upto + counts)
    reach += above
    home = (reach >= k) & (reach - counts < k)  # one digit alone
    count = tl.sum(tl.where(home, counts, 0), axis=0)
    above = tl.sum(tl.where(home, reach, 0), axis=0) - count
    return (prefix << BITS) | tl.sum(tl.where(home, digits, 0), axis=0).to(tl.uint32), above, count


@triton.jit
def kth_largest(row_ptr, size, groups, k, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """Its fp32 bits as uint32, how many logits are above it, and how many have these very bits. -0.0 is below 0.0 here,
    and what lies behind the end of the row counts as -inf."""
    prefix, above, tied = next_digit(
        row_ptr, size, groups, k, tl.full([], 0, tl.uint32), tl.full([], 0, tl.int32), SHIFT=21, BITS=11, TILE=TILE
    )
    if LOGIT.is_bf16():
        prefix, above, tied = next_digit(row_ptr, size, groups, k, prefix, above, SHIFT=16, BITS=5, TILE=TILE)
        return prefix << 16, above, tied
    elif LOGIT.is_fp16():
        prefix, above, tied = next_digit(row_ptr, size, groups, k, prefix, above, SHIFT=13, BITS=8, TILE=TILE)
        return prefix << 13, above, tied
    else:
        prefix, above, _ = next_digit(row_ptr, size, groups, k, prefix, above, SHIFT=10, BITS=11, TILE=TILE)
        return next_digit(row_ptr, size, groups, k, prefix, above, SHIFT=0, BITS=10, TILE=TILE)


@triton.jit
def tied_counts_of_tile(tile, start, value, id_shift, TILE: tl.constexpr, BINS: tl.constexpr):
    ids, tied = (), ()
    for block in tl.static_range(len(tile)):
        tied += (tile[block],)
        ids += (block_ids(start, block, TILE) >> id_shift,)
    return tl.histogram(flat(ids), BINS, mask=flat(tied) == value)


@triton.jit
def radix_support(row_ptr, size, groups, vocab_topk, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """What `in_support` turns into the k largest, ties to the lower id; 1 <= k < size."""
    RAGGED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, PAIRED=False, MASKED=True)
    GATHERED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, TILE.PAIRED, MASKED=False, GATHERED=True)
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    BINS: tl.constexpr = 2048
    bits, above, tied = kth_largest(row_ptr, size, groups, vocab_topk, LOGIT, TILE)
    value = bits.to(tl.float32, bitcast=True)
    last_tied_id = size - 1
    room = vocab_topk - above
    if (tied != room) | (value == 0.0):
        id_shift = 8
        while (size - 1) >> id_shift >= BINS:
            id_shift += 1
        counts = tl.zeros([BINS], tl.int32)
        whole = size // LOGITS * LOGITS
        for first in range(0, groups.count, TILE.LANES):
            starts = group_starts(groups, first, TILE)
            tile = load_tile(row_ptr, starts, size, GATHERED)
            counts += tied_counts_of_tile(tile, starts, value, id_shift, GATHERED, BINS)
        if whole < size:
            tile = load_tile(row_ptr, whole, size, RAGGED)
            counts += tied_counts_of_tile(tile, whole, value, id_shift, RAGGED, BINS)
        if (bits >> 31) != 0:
            room += tl.sum(counts, axis=0) - tied  # of 0.0, which counted as above -0.0
        upto = tl.cumsum(counts, axis=0)
        home = (upto >= room) & (upto - counts < room)
        before = tl.sum(tl.where(home, upto - counts, 0), axis=0)
        first = tl.sum(tl.where(home, tl.arange(0, BINS), 0), axis=0) << id_shift
        for start in range(first, first + (1 << id_shift), TILE.LANES):
            ids = start + tl.arange(0, TILE.LANES)
            here = tl.load(row_ptr + ids, mask=ids < size, other=-INF).to(tl.float32) == value
            order = before + tl.cumsum(here.to(tl.int32), axis=0)
            last_tied_id = tl.minimum(last_tied_id, tl.min(tl.where(order >= room, ids, size - 1), axis=0))
            before = tl.max(order, axis=0)
    return Support(value, last_tied_id)
