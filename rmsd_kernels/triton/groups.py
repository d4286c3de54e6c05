"""Which parts of a row can hold its top k, from the maxima that the first visit keeps.

A group is what one lane reads of one tile: 16 logits, 9,472 groups a row at V = 152k. Let T be the k-th largest of
their maxima. Then k logits reach T, so the k-th largest logit does, and all that reach it lie in groups whose maximum
does: about k groups, 5% of a row at k = 500. What follows the first visit looks at these and at the ragged tile alone.
Where the maxima tell too little, all groups are taken, in order: k is more than there are groups, T is not a number
above all bans, or so many groups tie that the list has no room for them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import EMPTY, INF, NO_GROUP


class Groups(NamedTuple):
    """The groups that a visit takes, by number: tile * LANES + lane."""

    list_ptr: tl.tensor  # ascending
    num_listed: tl.tensor  # 0 where they are all groups, in order
    count: tl.tensor


@triton.jit
def all_groups(list_ptr, size, TILE: tl.constexpr):
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    return Groups(list_ptr, size * 0, size // LOGITS * TILE.LANES)


@triton.jit
def group_starts(groups, first, TILE: tl.constexpr):
    """(LANES, 1): what `block_ids` and `load_tile` take for a tile's start, so that lane i reads group `first` + i."""
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    lane = tl.arange(0, TILE.LANES)
    place = first + lane
    is_listed = place < groups.num_listed
    group = tl.where(is_listed, tl.load(groups.list_ptr + place, mask=is_listed, other=0), place)
    start = group // TILE.LANES * LOGITS + (group % TILE.LANES - lane) * TILE.VEC
    start = tl.where(place < groups.count, start, NO_GROUP)[:, None]
    return tl.multiple_of(start, [TILE.VEC, TILE.VEC])


@triton.jit
def list_groups(maxima_ptr, list_ptr, least, size, capacity, TILE: tl.constexpr):
    """The groups whose maximum is at least `least`; all of them where that is no number above all bans, or where they
    are more than `capacity`."""
    BLOCK: tl.constexpr = TILE.LANES * 8
    every = all_groups(list_ptr, size, TILE)
    listed = every.count * 0
    for first in range(0, every.count, BLOCK):
        group = first + tl.arange(0, BLOCK)
        maxima = tl.load(maxima_ptr + group, mask=group < every.count, other=-INF).to(tl.float32)
        order = listed + tl.cumsum((maxima >= least).to(tl.int32), axis=0)
        tl.store(list_ptr + order - 1, group, mask=(maxima >= least) & (order <= capacity))
        listed = tl.max(order, axis=0)
    tl.debug_barrier()  # other threads of this program will read them
    # Not FLOOR: the student's bans are floored to FLOOR over the ratio of the models' scales.
    listed = tl.where((least > EMPTY) & (listed <= capacity), listed, 0)
    return Groups(list_ptr, listed, tl.where(listed > 0, listed, every.count))
