"""Where a row's numbers lie in memory: the planes of its scores, and the slots of what its backward needs."""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import ops
from ..reference import TokenScores

_planes = {name: tl.constexpr(plane) for plane, name in enumerate(TokenScores._fields)}  # of (7, B, L)
STUDENT_LOGPROB_PLANE = _planes["student_logprob"]
TEACHER_LOGPROB_PLANE = _planes["teacher_logprob"]
DIVERGENCE_PLANE = _planes["divergence"]
STUDENT_LSE_PLANE = _planes["student_lse"]
TEACHER_LSE_PLANE = _planes["teacher_lse"]
STUDENT_ENTROPY_PLANE = _planes["student_entropy"]
TEACHER_ENTROPY_PLANE = _planes["teacher_entropy"]


class RowStats(NamedTuple):
    """A row's part of ops.NUM_STATS, slot by slot; the names are those of `Stats` in cpu/divergence.cpp. Log-sum-exps
    and the offset have twice fp32's digits, as two numbers whose sum they are."""

    student_lse: tl.tensor  # of the scaled logits, over the support for "renorm"; nats
    student_lse_low: tl.tensor
    teacher_lse: tl.tensor
    teacher_lse_low: tl.tensor
    mean_slope: tl.tensor  # c; not for the reverse KL
    offset: tl.tensor  # reverse KL only: g - c is the scaled logits' difference less this
    offset_low: tl.tensor
    outside_slope: tl.tensor  # g - c outside the support, but for the forward KL's bucket
    kth_logit: tl.tensor  # where the support ends, among raw logits
    last_tied_id: tl.tensor
    rest_lse: tl.tensor  # forward KL's bucket: p_j Q / P is e^(scaled logit - this)
    rest_lse_low: tl.tensor
    finished_parts: tl.tensor  # int32, and 0 afterwards: of a row split over programs, how many have stored their sums
    is_finite: tl.tensor  # 1, or 0 where the divergence is not and the gradient is 0


assert len(RowStats._fields) <= ops.NUM_STATS
NUM_STATS = tl.constexpr(ops.NUM_STATS)
_slots = {name: tl.constexpr(slot) for slot, name in enumerate(RowStats._fields)}
STUDENT_LSE_SLOT = _slots["student_lse"]
STUDENT_LSE_LOW_SLOT = _slots["student_lse_low"]
TEACHER_LSE_SLOT = _slots["teacher_lse"]
TEACHER_LSE_LOW_SLOT = _slots["teacher_lse_low"]
MEAN_SLOPE_SLOT = _slots["mean_slope"]
OFFSET_SLOT = _slots["offset"]
OFFSET_LOW_SLOT = _slots["offset_low"]
OUTSIDE_SLOPE_SLOT = _slots["outside_slope"]
KTH_LOGIT_SLOT = _slots["kth_logit"]
LAST_TIED_ID_SLOT = _slots["last_tied_id"]
REST_LSE_SLOT = _slots["rest_lse"]
REST_LSE_LOW_SLOT = _slots["rest_lse_low"]
FINISHED_PARTS_SLOT = _slots["finished_parts"]
IS_FINITE_SLOT = _slots["is_finite"]


@triton.jit
def load_stats(stats_ptr):
    return RowStats(
        student_lse=tl.load(stats_ptr + STUDENT_LSE_SLOT),
        student_lse_low=tl.load(stats_ptr + STUDENT_LSE_LOW_SLOT),
        teacher_lse=tl.load(stats_ptr + TEACHER_LSE_SLOT),
        teacher_lse_low=tl.load(stats_ptr + TEACHER_LSE_LOW_SLOT),
        mean_slope=tl.load(stats_ptr + MEAN_SLOPE_SLOT),
        offset=tl.load(stats_ptr + OFFSET_SLOT),
        offset_low=tl.load(stats_ptr + OFFSET_LOW_SLOT),
        outside_slope=tl.load(stats_ptr + OUTSIDE_SLOPE_SLOT),
        kth_logit=tl.load(stats_ptr + KTH_LOGIT_SLOT),
        last_tied_id=tl.load(stats_ptr + LAST_TIED_ID_SLOT).to(tl.int32),
        rest_lse=tl.load(stats_ptr + REST_LSE_SLOT),
        rest_lse_low=tl.load(stats_ptr + REST_LSE_LOW_SLOT),
        finished_parts=0,
        is_finite=tl.load(stats_ptr + IS_FINITE_SLOT),
    )
