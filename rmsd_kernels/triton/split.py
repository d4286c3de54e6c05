"""A row split over programs, one for each tile of it, where so few rows are launched that processors would stand idle.

Each program sums up its part of the row and stores the sums; then it adds 1 to the row's counter. The one that finds
all others there merges the parts, in their order, so that the result is the same in every run. Why it sees what the
others stored is docs/gpu.md's "Why the memory ordering is right". A row that is not split is summed in another order:
the last bits of the two may differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tiles import EMPTY, FLOOR, ModelRow, TileShape, row_pointer
from .visits import OnlineSums, merge_lanes, online_visit

# Above it rows fill the processors well enough, with no parts to merge. The same on every GPU, and so are a row's bits.
FEW_ROWS = 64
MAX_PARTS = tl.constexpr(128)  # a row of more tiles, so of more than half a million logits, is not split
PART_SLOTS = tl.constexpr(16)  # numbers that a part stores
_TERMS = tl.constexpr(8)  # where those of the second visit begin


def parts_of(num_rows: int, size: int, tile: dict) -> int:
    """How many programs a row gets; 1 where it is not split."""
    parts = -(-size // (tile["UNROLL"] * tile["LANES"] * tile["VEC"]))
    return parts if num_rows <= FEW_ROWS and parts <= MAX_PARTS.value else 1


def room_for_parts(num_rows: int, num_parts: int, device: torch.device) -> Tensor | None:
    """What `parts_ptr` points to; None where rows are not split."""
    if num_parts == 1:
        return None
    return torch.empty((num_rows, MAX_PARTS.value, PART_SLOTS.value), dtype=torch.float32, device=device)


@triton.jit
def part_of_row(row, begin):
    return ModelRow(row.logits_ptr + begin, row.scale, row.correction)


@triton.jit
def store_sums(part_ptr, sums):
    """A part without mass has no mean of the logits' differences: 0 stands for its sum."""
    cross = tl.where(sums.first_z > 0.0, sums.cross * sums.first_z, 0.0)
    tl.store(part_ptr, sums.first_m)
    tl.store(part_ptr + 1, sums.second_m)
    tl.store(part_ptr + 2, sums.first_z)
    tl.store(part_ptr + 3, sums.second_z)
    tl.store(part_ptr + 4, cross)
    tl.store(part_ptr + 5, sums.gap)
    tl.store(part_ptr + 6, sums.first_e)
    tl.store(part_ptr + 7, sums.second_e)


@triton.jit
def load_slot(parts_ptr, slot: tl.constexpr, num_parts, other):
    """One number of every part; `other` in lanes without one. From L2, as other processors wrote it in this launch."""
    part = tl.arange(0, MAX_PARTS)
    return tl.load(parts_ptr + part * PART_SLOTS + slot, mask=part < num_parts, other=other, cache_modifier=".cg")


@triton.jit
def merged_sums(parts_ptr, num_parts):
    """OnlineSums of the row."""
    parts = OnlineSums(
        first_m=load_slot(parts_ptr, 0, num_parts, EMPTY),
        second_m=load_slot(parts_ptr, 1, num_parts, EMPTY),
        first_z=load_slot(parts_ptr, 2, num_parts, 0.0),
        second_z=load_slot(parts_ptr, 3, num_parts, 0.0),
        first_e=load_slot(parts_ptr, 6, num_parts, 0.0),
        second_e=load_slot(parts_ptr, 7, num_parts, 0.0),
        cross=load_slot(parts_ptr, 4, num_parts, 0.0),
        gap=load_slot(parts_ptr, 5, num_parts, 2 * FLOOR),
    )
    return merge_lanes(parts)


@triton.jit
def store_terms(part_ptr, terms):
    tl.store(part_ptr + _TERMS, terms.total)
    tl.store(part_ptr + _TERMS + 1, terms.slope)


@triton.jit
def merged_terms(parts_ptr, num_parts):
    """(total, slope) of a jsd."""
    total = load_slot(parts_ptr, _TERMS, num_parts, 0.0)
    slope = load_slot(parts_ptr, _TERMS + 1, num_parts, 0.0)
    return tl.sum(total, axis=0), tl.sum(slope, axis=0)


@triton.jit
def is_last(finished_ptr, num_parts):
    """Whether all other parts of the row are stored, and visible to this program."""
    tl.debug_barrier()
    return tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1


@triton.jit(
    do_not_specialize=[
        "student_stride_b",
        "student_stride_l",
        "teacher_stride_b",
        "teacher_stride_l",
        "num_rows",
        "length",
        "size",
        "num_parts",
    ],
    do_not_specialize_on_alignment=["student_logits_ptr", "teacher_logits_ptr", "rows_ptr", "parts_ptr"],
)
def part_sums_kernel(
    student_logits_ptr,  # (B, L, V) fp32 | fp16 | bf16
    teacher_logits_ptr,  # (B, L, V)
    rows_ptr,  # (R,) int64, with HAS_ROWS
    parts_ptr,  # (R, MAX_PARTS, PART_SLOTS) fp32
    student_stride_b: tl.int64,
    student_stride_l: tl.int64,
    teacher_stride_b: tl.int64,
    teacher_stride_l: tl.int64,
    num_rows: tl.int64,
    length: tl.int32,
    size: tl.int32,
    num_parts: tl.int32,
    inner_scale: tl.float32,
    student_scale: tl.float32,
    teacher_scale: tl.float32,
    HAS_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAIRED: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """The first visit of a jsd's split rows. Its second needs every part of the first, so it is another launch."""
    TILE: tl.constexpr = TileShape(UNROLL, LANES, VEC, PAIRED, MASKED=False)
    item, part = tl.program_id(0).to(tl.int64) // num_parts, tl.program_id(0) % num_parts
    row = item
    if HAS_ROWS:
        row = tl.load(rows_ptr + item)
        if (row < 0) | (row >= num_rows):
            return  # the second launch gives it its number
    begin = part * (UNROLL * LANES * VEC)
    student_ptr = row_pointer(student_logits_ptr, row, length, student_stride_b, student_stride_l, ALIGNED) + begin
    teacher_ptr = row_pointer(teacher_logits_ptr, row, length, teacher_stride_b, teacher_stride_l, ALIGNED) + begin
    student, teacher = ModelRow(student_ptr, student_scale, 0.0), ModelRow(teacher_ptr, teacher_scale, 0.0)
    size = tl.minimum(size - begin, UNROLL * LANES * VEC)
    sums = online_visit(student, teacher, size, inner_scale, HAS_SOFTCAP, TILE, HAS_ENTROPY)
    store_sums(parts_ptr + (item * MAX_PARTS + part) * PART_SLOTS, sums)


def launch_part_sums(programs: int, student_logits: Tensor, **arguments) -> None:
    """With what `part_sums_kernel` takes of the arguments for the second launch."""
    taken = {name: value for name, value in arguments.items() if name in part_sums_kernel.arg_names}
    launch(part_sums_kernel, programs, student_logits, **taken)
