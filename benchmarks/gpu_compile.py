"""Compiles the Triton kernels for GPUs that are not here, and reads the machine code.

The compiler and the disassembler come with Triton's wheel. What is compiled is what a launch would compile: no
argument but the constexpr ones, which are listed here, can make another variant.
"""

import collections
import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # with it the decorators would make interpreted functions

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmsd_kernels.triton import launch
from rmsd_kernels.triton.candidates import select_kernel
from rmsd_kernels.triton.divergence import divergence_kernel
from rmsd_kernels.triton.divergence_backward import CHUNK_TILES, divergence_backward_kernel
from rmsd_kernels.triton.scores import scores_kernel
from rmsd_kernels.triton.split import part_sums_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_POINTEE = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_FIXED_POINTEE = {
    "sampled_ids_ptr": "*i64", "mask_ptr": "*u1", "index_ptr": "*i64", "finished_ptr": "*i32", "rows_ptr": "*i64",
    "finished_parts_ptr": "*i32",
    "scores_ptr": "*fp32", "score_ptr": "*fp32", "divergence_ptr": "*fp32", "stats_ptr": "*fp32",
    "grad_divergence_ptr": "*fp32", "parts_ptr": "*fp32", "list_ptr": "*i32",
}  # fmt: skip
_SPECIAL = r"MUFU|v_exp_f32|v_log_f32|v_rcp_f32"


@dataclasses.dataclass
class Loop:
    """What one thread does for one logit, or one of each row, in an innermost loop that loads logits."""

    instructions: float
    special: float  # exponentials, logarithms, reciprocals: MUFU on NVIDIA
    narrowest_load: int  # bytes
    is_gathered: bool  # takes the groups of a list


@dataclasses.dataclass
class Compiled:
    variant: str
    target: str
    registers: int
    spilled_bytes: int  # stack, local and scratch memory: all of it would be spills here
    shared_bytes: int
    loads: dict[str, int]  # global loads of the whole kernel by instruction
    visits: list[Loop]  # of both rows: per pair of logits
    searches: list[Loop]  # of the student's row alone, for the top k: per logit
    specialised: list[str]  # arguments whose value or alignment would compile another variant
    assembly: str
    histograms: bool  # the top k is found by them
    has_groups: bool  # and in groups of the row that hold it
    approximate_divisions: int = 0  # x / x may differ from 1; NVIDIA's alone


def variants() -> dict[str, tuple]:
    """Every kernel, in variants that differ in code: name -> (kernel, dtype, constexprs, absent)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    row = dict(HAS_SOFTCAP=False, ALIGNED=True)
    all_scores = dict(row, DIVERGENCE="reverse_kl", CRITERION="", HAS_SELECTION=False, BLOCK_L=launch.BLOCK_L)
    all_scores |= dict(SPLIT=False)
    split_scores = dict(all_scores, SPLIT=True)
    unsplit_scores = ("parts_ptr", "finished_parts_ptr")
    unselected = ("mask_ptr", "index_ptr", "finished_ptr")
    no_selection = (*unselected, *unsplit_scores)
    selected = dict(all_scores, HAS_SELECTION=True, CRITERION="logprob_gap")
    rows = dict(row, DIVERGENCE="reverse_kl", TAIL="all", HAS_ROWS=True, SPLIT=False)
    # No launch compiles this one, for aligned rows have groups: the search of a whole row, and no tanh beside it.
    without_groups = dict(rows, TAIL="drop", HAS_GROUPS=False)
    split = dict(rows, SPLIT=True)
    unsplit = ("parts_ptr",)
    forward, backward = divergence_kernel, divergence_backward_kernel
    return {
        "scores bf16": (scores_kernel, bf16, all_scores, no_selection),
        "scores fp16": (scores_kernel, fp16, all_scores, no_selection),
        "scores fp32": (scores_kernel, fp32, all_scores, no_selection),
        "scores bf16 unaligned": (scores_kernel, bf16, dict(all_scores, ALIGNED=False), no_selection),
        "scores bf16 forward_kl": (scores_kernel, bf16, dict(all_scores, DIVERGENCE="forward_kl"), no_selection),
        "scores bf16 jsd": (scores_kernel, bf16, dict(all_scores, DIVERGENCE="jsd"), no_selection),
        "scores fp32 softcap": (scores_kernel, fp32, dict(all_scores, HAS_SOFTCAP=True), no_selection),
        "scores+candidates bf16": (scores_kernel, bf16, selected, unsplit_scores),
        "scores bf16 split": (scores_kernel, bf16, split_scores, unselected),
        "scores bf16 jsd split": (scores_kernel, bf16, dict(split_scores, DIVERGENCE="jsd"), unselected),
        "select": (select_kernel, fp32, dict(BLOCK_L=launch.BLOCK_L), ()),
        "divergence bf16": (forward, bf16, rows, unsplit),
        "divergence bf16 jsd": (forward, bf16, dict(rows, DIVERGENCE="jsd"), unsplit),
        "divergence bf16 top-k drop": (forward, bf16, dict(rows, TAIL="drop"), unsplit),
        "divergence fp32 top-k drop": (forward, fp32, dict(rows, TAIL="drop"), unsplit),
        "divergence bf16 top-k bucket": (forward, bf16, dict(rows, TAIL="bucket"), unsplit),
        "divergence bf16 top-k renorm": (forward, bf16, dict(rows, TAIL="renorm"), unsplit),
        "divergence bf16 without groups top-k drop": (forward, bf16, without_groups, unsplit),
        "divergence bf16 unaligned top-k drop": (forward, bf16, dict(rows, TAIL="drop", ALIGNED=False), unsplit),
        "divergence bf16 softcap top-k drop": (forward, bf16, dict(rows, TAIL="drop", HAS_SOFTCAP=True), unsplit),
        "divergence bf16 split": (forward, bf16, split, ()),
        "divergence bf16 jsd split": (forward, bf16, dict(split, DIVERGENCE="jsd"), ()),
        "divergence bf16 top-k drop split": (forward, bf16, dict(split, TAIL="drop"), ()),
        "part_sums bf16": (part_sums_kernel, bf16, dict(row, HAS_ROWS=True, HAS_ENTROPY=False), ()),
        "backward bf16": (backward, bf16, rows, ()),
        "backward fp32": (backward, fp32, rows, ()),
        "backward bf16 jsd": (backward, bf16, dict(rows, DIVERGENCE="jsd"), ()),
        "backward bf16 top-k bucket": (backward, bf16, dict(rows, TAIL="bucket"), ()),
        "backward fp32 softcap": (backward, fp32, dict(rows, HAS_SOFTCAP=True), ()),
    }


def compile_variant(variant: str, target: str) -> Compiled:
    kernel, dtype, constexprs, absent = variants()[variant]
    constexprs = dict(constexprs)
    if "ALIGNED" in constexprs:
        constexprs |= launch.constexprs_of_tile(dtype, constexprs["ALIGNED"], TARGETS[target].backend)
    if kernel is divergence_kernel:
        constexprs["HISTOGRAMS"] = constexprs["TAIL"] != "all" and launch.histograms_are_atomic(TARGETS[target])
        has_groups = constexprs["TAIL"] != "all" and constexprs["ALIGNED"] and not constexprs["HAS_SOFTCAP"]
        constexprs.setdefault("HAS_GROUPS", has_groups)
        if not constexprs["HAS_GROUPS"]:
            absent += ("maxima_ptr",) if constexprs["TAIL"] != "all" else ("maxima_ptr", "list_ptr")
    if kernel is divergence_backward_kernel:
        constexprs["CHUNK_TILES"] = CHUNK_TILES
    constexprs |= dict.fromkeys(absent)
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = {}
    for parameter in kernel.params:
        if parameter.name in constexprs:
            signature[parameter.name] = "constexpr"
        elif parameter.name.endswith("_ptr"):
            signature[parameter.name] = _FIXED_POINTEE.get(parameter.name, _POINTEE[dtype])
        else:
            signature[parameter.name] = parameter.annotation_type
    gpu = TARGETS[target]
    options = dict(num_warps=launch.TILES[dtype].lanes // gpu.warp_size, num_stages=1, enable_fp_fusion=True)
    if gpu.backend == "cuda":
        options |= launch.register_limit(constexprs)
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constexprs), target=gpu, options=options)
    read = _read_cuda if gpu.backend == "cuda" else _read_hip
    specialised = [
        parameter.name
        for parameter in kernel.params
        if not parameter.is_constexpr
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        and parameter.annotation_type != "fp32"
    ]
    ways = dict(histograms=constexprs.get("HISTOGRAMS", False), has_groups=constexprs.get("HAS_GROUPS", False))
    return Compiled(variant, target, specialised=specialised, **ways, **read(compiled, dtype.itemsize))


def _read_cuda(compiled, itemsize: int) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    code = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            code.append((label[1] + ":", ""))
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            code.append((found[1], found[2]))
    local = sum(opcode.split(".")[0] in ("LDL", "STL") for opcode, _ in code)
    return dict(
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"] + local,
        shared_bytes=usage["SHARED"],
        **_loops(code, r"LDG", r"^BRA", itemsize),
        assembly=sass,
        approximate_divisions=len(re.findall(r"\bdiv\.(?:full|approx)", compiled.asm["ptx"])),
    )


def _read_hip(compiled, itemsize: int) -> dict:
    text = compiled.asm["amdgcn"]
    meta = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    code = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            code.append((label[1] + ":", ""))
        elif found := re.match(r"\t([a-z]\w+)(.*)", line):
            code.append((found[1], found[2]))
    # Scalar registers spill into lanes of vector registers, not to memory.
    spilled = meta["private_segment_fixed_size"] + meta["vgpr_spill_count"]
    return dict(
        registers=meta["vgpr_count"],
        spilled_bytes=spilled,
        shared_bytes=meta["group_segment_fixed_size"],
        **_loops(code, r"(global|buffer)_load", r"^s_c?branch", itemsize),
        assembly=text,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _loops(code: list[tuple[str, str]], load: str, branch: str, itemsize: int) -> dict:
    labels = {opcode[:-1]: place for place, (opcode, _) in enumerate(code) if opcode.endswith(":")}
    bodies = []
    for place, (opcode, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+|\.LBB\d+_\d+", operands) if re.match(branch, opcode) else None
        if target and labels.get(target[0], place) < place:
            bodies.append((labels[target[0]], place + 1))
    inner = [a for a in bodies if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in bodies)]
    found = []
    for start, end in inner:
        opcodes = [opcode for opcode, _ in code[start:end] if not opcode.endswith(":")]
        widths = [_load_bytes(opcode) for opcode in opcodes if re.match(load, opcode)]
        is_tile = 16 in widths or widths.count(itemsize) >= 16  # a tile of logits, not a few scores
        is_gathered = is_tile and widths.count(4) == 1
        if is_gathered:
            widths.remove(4)  # the group's number
        loaded = sum(widths)
        if is_tile or loaded >= 64:
            special = sum(bool(re.match(_SPECIAL, opcode)) for opcode in opcodes)
            count = len(opcodes) * itemsize / loaded
            found.append(Loop(count, special * itemsize / loaded, min(widths), is_gathered))
    visits = [
        dataclasses.replace(loop, instructions=2 * loop.instructions, special=2 * loop.special)
        for loop in found
        if loop.special
    ]
    searches = [loop for loop in found if not loop.special]
    return dict(
        loads=dict(collections.Counter(opcode for opcode, _ in code if re.match(load, opcode))),
        visits=visits,
        searches=searches,
    )


def _load_bytes(opcode: str) -> int:
    """Of one global load: LDG.E.128 and global_load_dwordx4 are 16."""
    if opcode.startswith("LDG"):
        width = re.search(r"\.(U?S?8|U?S?16|64|128)\b", opcode)
        return int(re.sub(r"\D", "", width[1])) // 8 if width else 4
    words = re.search(r"dword(?:x(\d))?$", opcode)
    return 4 * int(words[1] or 1) if words else 2
