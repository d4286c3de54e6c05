"""The best positions of a sequence, in order, ties to the earlier one: alone, or at the end of the scores' launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import BLOCK_L, launch
from .tiles import INF

# Below every key: a float's order-preserving key lies above -2139095042 * 2^32.
_NONE = tl.constexpr(-9223372036854775807)


@triton.jit
def load_keys(
    score_ptr, mask_ptr, first, positions, length, plane, threshold, CRITERION: tl.constexpr
):  # int64, distinct  # fmt: skip
    """The score as an integer of the same order, above, and the position reversed, below: larger is better, earlier
    wins a tie, and no two positions are equal. `_NONE` where the position does not qualify."""
    wanted = positions < length
    wanted = wanted & (tl.load(mask_ptr + first + positions, mask=wanted, other=0) != 0)
    # L2 level: another program, on another processor, may have written the scores in this very launch.
    rows_ptr = score_ptr + first + positions
    if CRITERION == "score":
        score = tl.load(rows_ptr, mask=wanted, other=-INF, cache_modifier=".cg")
    else:
        # Planes in the order of TokenScores: 0, 1 log-probabilities, 2 divergence, 5, 6 entropies.
        divergence = tl.load(rows_ptr + 2 * plane, mask=wanted, other=INF, cache_modifier=".cg")
        wanted = wanted & (tl.abs(divergence) < INF)
        if CRITERION == "divergence":
            score = divergence
        else:
            student_plane: tl.constexpr = 0 if CRITERION == "logprob_gap" else 5
            student = tl.load(rows_ptr + student_plane * plane, mask=wanted, other=0.0, cache_modifier=".cg")
            teacher = tl.load(rows_ptr + (student_plane + 1) * plane, mask=wanted, other=0.0, cache_modifier=".cg")
            score = tl.abs(teacher - student)
    wanted = wanted & (score > threshold)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(wanted, (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - positions).to(tl.int64), _NONE)


@triton.jit
def select_sequence(
    score_ptr, mask_ptr, index_ptr, sequence, length, plane, num_tokens, threshold,
    CRITERION: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Writes index[sequence]. Lane i keeps the best key left among positions i, i + BLOCK_L, ...; the best of all lanes
    is written out, and only its lane looks again. So a rank costs two reductions whatever the length."""
    first = sequence * length
    lanes = tl.arange(0, BLOCK_L)
    best = tl.full([BLOCK_L], _NONE, tl.int64)
    for start in range(0, length, BLOCK_L):
        keys = load_keys(score_ptr, mask_ptr, first, start + lanes, length, plane, threshold, CRITERION)
        best = tl.maximum(best, keys)
    for rank in range(0, num_tokens):
        key = tl.max(best, axis=0)
        position = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        tl.store(index_ptr + sequence * num_tokens + rank, tl.where(key == _NONE, -1, position))
        lane = (position % BLOCK_L).to(tl.int32)
        if key != _NONE:
            left = tl.full([BLOCK_L], _NONE, tl.int64)
            for start in range(0, length, BLOCK_L * BLOCK_L):
                positions = start + lanes * BLOCK_L + lane
                keys = load_keys(score_ptr, mask_ptr, first, positions, length, plane, threshold, CRITERION)
                left = tl.maximum(left, tl.where(keys < key, keys, _NONE))
            best = tl.where(lanes == lane, tl.max(left, axis=0), best)


@triton.jit(
    do_not_specialize=["length", "num_tokens"],
    do_not_specialize_on_alignment=["score_ptr", "mask_ptr", "index_ptr"],
)
def select_kernel(
    score_ptr,  # (B, L) fp32
    mask_ptr,  # (B, L) bool
    index_ptr,  # (B, num_tokens) int64
    length: tl.int32,
    num_tokens: tl.int32,
    threshold: tl.float32,
    BLOCK_L: tl.constexpr,
):
    select_sequence(
        score_ptr, mask_ptr, index_ptr, tl.program_id(0).to(tl.int64), length, 0, num_tokens, threshold,
        "score", BLOCK_L,
    )  # fmt: skip


def select(score: Tensor, mask: Tensor, num_tokens: int, threshold: float) -> Tensor:
    num_sequences, length = score.shape
    index = torch.empty((num_sequences, num_tokens), dtype=torch.int64, device=score.device)
    if index.numel():
        launch(
            select_kernel, num_sequences, score,
            score_ptr=score.contiguous(), mask_ptr=mask.contiguous(), index_ptr=index,
            length=length, num_tokens=num_tokens, threshold=threshold, BLOCK_L=BLOCK_L,
        )  # fmt: skip
    return index
