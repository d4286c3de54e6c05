"""The student's top k of a row: where it ends, and which groups of the row hold it."""

import triton
import triton.language as tl

from .groups import all_groups, list_groups
from .radix import kth_largest, radix_support
from .tiles import INF, Support
from .topk import kth_or_part, topk_support


@triton.jit
def topk_groups(
    maxima_ptr, list_ptr, size, vocab_topk, capacity, LOGIT: tl.constexpr, HISTOGRAMS: tl.constexpr, TILE: tl.constexpr
):
    """The groups that hold the student's top k, or all of them; and a value that at least k logits reach, and none
    outside of these groups and the ragged tile."""
    LOGITS: tl.constexpr = TILE.UNROLL * TILE.LANES * TILE.VEC
    num_groups = size // LOGITS * TILE.LANES
    least = tl.full([], -INF, tl.float32)
    if vocab_topk <= num_groups:
        every = all_groups(list_ptr, num_groups, TILE)
        if HISTOGRAMS:
            bits, _, _ = kth_largest(maxima_ptr, num_groups, every, vocab_topk, LOGIT, TILE)
            least = bits.to(tl.float32, bitcast=True)
        else:
            least = kth_or_part(maxima_ptr, num_groups, every, vocab_topk, LOGIT, TILE)[0]
    groups = list_groups(maxima_ptr, list_ptr, least, size, capacity, TILE)
    # All groups need no bound, and that of bans would leave them out: a maximum is floored and lies above its -inf.
    return groups, tl.where(groups.num_listed > 0, least, -INF)


@triton.jit
def topk(
    row_ptr,
    maxima_ptr,  # with HAS_GROUPS, as `online_visit` keeps them
    list_ptr,  # room for `capacity` groups; read only where they are listed
    size,
    vocab_topk,
    capacity,
    LOGIT: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HISTOGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """(Support, Groups) of the k largest logits, ties to the lower id; 1 <= k < size."""
    groups, least = all_groups(list_ptr, size, TILE), tl.full([], -INF, tl.float32)
    if HAS_GROUPS:
        groups, least = topk_groups(maxima_ptr, list_ptr, size, vocab_topk, capacity, LOGIT, HISTOGRAMS, TILE)
    if HISTOGRAMS:
        return radix_support(row_ptr, size, groups, vocab_topk, LOGIT, TILE), groups
    else:
        support = topk_support(row_ptr, size, groups, vocab_topk, LOGIT, TILE)
        # What parts these groups at k may lie below `least`, and logits of others above it.
        return Support(tl.maximum(support.kth_logit, least), support.last_tied_id), groups
