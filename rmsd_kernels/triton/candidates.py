"""The best positions of a sequence, in order, ties to the earlier one: alone, or at the end of the scores' launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import BLOCK_L, launch
from .layout import (
    DIVERGENCE_PLANE,
    STUDENT_ENTROPY_PLANE,
    STUDENT_LOGPROB_PLANE,
    TEACHER_ENTROPY_PLANE,
    TEACHER_LOGPROB_PLANE,
)
from .tiles import INF

# Below every key: a float's order-preserving key lies above -2139095042 * 2^32.
_NONE = tl.constexpr(-9223372036854775807)


@triton.jit
def load_keys(score_ptr, mask_ptr, first, positions, length, plane, threshold, CRITERION: tl.constexpr):
    """Distinct int64, the score as an integer of the same order above and the position reversed below: larger is
    better and earlier wins a tie. `_NONE` where the position does not qualify."""
    wanted = positions < length
    wanted = wanted & (tl.load(mask_ptr + first + positions, mask=wanted, other=0) != 0)
    # L2 level: another program, on another processor, may have written the scores in this very launch.
    rows_ptr = score_ptr + first + positions
    if CRITERION == "score":
        score = tl.load(rows_ptr, mask=wanted, other=-INF, cache_modifier=".cg")
    else:
        divergence = tl.load(rows_ptr + DIVERGENCE_PLANE * plane, mask=wanted, other=INF, cache_modifier=".cg")
        wanted = wanted & (tl.abs(divergence) < INF)
        if CRITERION == "divergence":
            score = divergence
        else:
            BY_LOGPROB: tl.constexpr = CRITERION == "logprob_gap"
            student_ptr = rows_ptr + (STUDENT_LOGPROB_PLANE if BY_LOGPROB else STUDENT_ENTROPY_PLANE) * plane
            teacher_ptr = rows_ptr + (TEACHER_LOGPROB_PLANE if BY_LOGPROB else TEACHER_ENTROPY_PLANE) * plane
            student = tl.load(student_ptr, mask=wanted, other=0.0, cache_modifier=".cg")
            teacher = tl.load(teacher_ptr, mask=wanted, other=0.0, cache_modifier=".cg")
            score = tl.abs(teacher - student)
    wanted = wanted & (score > threshold)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(wanted, (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - positions).to(tl.int64), _NONE)


@triton.jit
def select_sequence(
    score_ptr,
    mask_ptr,
    index_ptr,
    sequence,
    length,
    plane,
    num_tokens,
    threshold,
    CRITERION: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
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
        score_ptr,
        mask_ptr,
        index_ptr,
        sequence=tl.program_id(0).to(tl.int64),
        length=length,
        plane=0,  # the score alone
        num_tokens=num_tokens,
        threshold=threshold,
        CRITERION="score",
        BLOCK_L=BLOCK_L,
    )


def select(score: Tensor, mask: Tensor, num_tokens: int, threshold: float) -> Tensor:
    num_sequences, length = score.shape
    index = torch.empty((num_sequences, num_tokens), dtype=torch.int64, device=score.device)
    if index.numel():
        launch(
            select_kernel,
            num_sequences,
            score,
            score_ptr=score.contiguous(),
            mask_ptr=mask.contiguous(),
            index_ptr=index,
            length=length,
            num_tokens=num_tokens,
            threshold=threshold,
            BLOCK_L=BLOCK_L,
        )
    return index
