"""Which of a row's raw logits are its k largest, exactly: a search over the values a logit can have, not a sort.

Floats keep their order as integers once the negatives' bits are flipped, so the k-th largest is found by counting, four
intervals a visit: 8 visits for 16-bit logits whatever V and k, at most 16 for fp32, where it usually stops near 10
as soon as some value parts the row at exactly k. The row is in L2 by then (600 kB at V = 152k in fp32). Logits are
compared as floats, so -0.0 ties with 0.0.
"""

import triton
import triton.language as tl

from .groups import group_starts
from .tiles import Support, TileShape, block_ids, load_tile


@triton.jit
def key_to_logit(key, LOGIT: tl.constexpr):
    """The fp32 value of the `key`-th float of dtype LOGIT, counted from -1 for -0.0 and 0 for 0.0."""
    if LOGIT.is_fp32():
        bits = key.to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        bits = key.to(tl.int16)
        return (bits ^ ((bits >> 15) & 0x7FFF).to(tl.int16)).to(LOGIT, bitcast=True).to(tl.float32)


@triton.jit
def count_tile(counts, tile, low, middle, high):
    low_counts = tl.zeros(tile[0].shape, tl.int32)
    middle_counts, high_counts = low_counts, low_counts
    for block in tl.static_range(len(tile)):
        low_counts += (tile[block] >= low).to(tl.int32)
        middle_counts += (tile[block] >= middle).to(tl.int32)
        high_counts += (tile[block] >= high).to(tl.int32)
    low_count, middle_count, high_count = counts
    return (
        low_count + tl.sum(low_counts, axis=1),
        middle_count + tl.sum(middle_counts, axis=1),
        high_count + tl.sum(high_counts, axis=1),
    )


@triton.jit
def count_row(row_ptr, size, groups, low, middle, high, TILE: tl.constexpr):
    """How many logits reach each of three values."""
    RAGGED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, PAIRED=False, MASKED=True)
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    GATHERED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, TILE.PAIRED, MASKED=False, GATHERED=True)
    zeros = tl.zeros([TILE.LANES], tl.int32)
    counts = (zeros, zeros, zeros)
    whole = size // LOGITS * LOGITS
    for first in range(0, groups.count, TILE.LANES):
        tile = load_tile(row_ptr, group_starts(groups, first, TILE), size, GATHERED)
        counts = count_tile(counts, tile, low, middle, high)
    if whole < size:
        tile = load_tile(row_ptr, whole, size, RAGGED)
        counts = count_tile(counts, tile, low, middle, high)
    low_count, middle_count, high_count = counts
    return tl.sum(low_count, axis=0), tl.sum(middle_count, axis=0), tl.sum(high_count, axis=0)


@triton.jit
def count_tied(tile, value, start, last_id, TILE: tl.constexpr):
    count = tl.zeros([TILE.LANES], tl.int32)
    for block in tl.static_range(len(tile)):
        ids = block_ids(start, block, TILE)
        count += tl.sum(((tile[block] == value) & (ids <= last_id)).to(tl.int32), axis=1)
    return tl.sum(count, axis=0)


@triton.jit
def nth_tied_id(row_ptr, size, value, nth, TILE: tl.constexpr):
    """The id of the nth (from 1) logit equal to `value`: one visit finds its tile, a bisection its place there."""
    RAGGED: tl.constexpr = TileShape(TILE.UNROLL, TILE.LANES, TILE.VEC, PAIRED=False, MASKED=True)
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    whole = size // LOGITS * LOGITS
    before, left, home = nth * 0, nth, whole  # in the last, ragged tile unless found earlier
    for start in range(0, whole, LOGITS):
        tile = load_tile(row_ptr, start, size, TILE)
        tied = count_tied(tile, value, start, size, TILE)
        if before < nth:
            if before + tied >= nth:
                home = start
            else:
                left = nth - before - tied
        before += tied
    tile = load_tile(row_ptr, home, size, RAGGED)
    low, high = home - 1, home + LOGITS - 1
    while high - low > 1:
        middle = (low + high) // 2
        if count_tied(tile, value, home, middle, RAGGED) >= left:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def kth_or_part(row_ptr, size, groups, vocab_topk, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """The k-th largest logit, how many are above it, and whether they were counted to the end: where exactly k logits
    reach some value, that value parts the row as the k-th largest itself would, and is given instead."""
    if LOGIT.is_fp32():
        high = tl.full([], 0x7F800000, tl.int64)  # the key of +inf
    elif LOGIT.is_bf16():
        high = tl.full([], 0x7F80, tl.int64)
    else:
        high = tl.full([], 0x7C00, tl.int64)
    low = -high - 1  # of -inf
    above = tl.full([], 0, tl.int32)  # how many reach `high`: fewer than k; at least k reach `low`
    searching = low < high
    while searching:
        step = high - low
        first, second, third = low + step // 4, low + step // 2, low + step * 3 // 4
        first_count, second_count, third_count = count_row(
            row_ptr,
            size,
            groups,
            key_to_logit(first, LOGIT),
            key_to_logit(second, LOGIT),
            key_to_logit(third, LOGIT),
            TILE,
        )
        if third_count >= vocab_topk:
            low, reached = third, third_count
        elif second_count >= vocab_topk:
            low, high, above, reached = second, third, third_count, second_count
        elif first_count >= vocab_topk:
            low, high, above, reached = first, second, second_count, first_count
        else:
            high, above, reached = first, first_count, vocab_topk + 1
        searching = (high - low > 1) & (reached != vocab_topk)
    return key_to_logit(low, LOGIT), above, high - low == 1


@triton.jit
def topk_support(row_ptr, size, groups, vocab_topk, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """What `in_support` turns into the k largest, ties to the lower id; 1 <= k < size."""
    kth_logit, above, is_kth = kth_or_part(row_ptr, size, groups, vocab_topk, LOGIT, TILE)
    last_tied_id = size - 1
    if is_kth:
        last_tied_id = nth_tied_id(row_ptr, size, kth_logit, vocab_topk - above, TILE)
    return Support(kth_logit, last_tied_id)
