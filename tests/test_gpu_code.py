"""The machine code of the GPU kernels, compiled and read here, where no GPU is: see benchmarks/gpu_compile.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.long
ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict]:
    """(variant, target) -> what gpu_compile.Compiled holds."""
    # In a process of its own: with TRITON_INTERPRET=1, as the other tests set it, nothing would be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--json", "--skip-slow"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return {(entry["variant"], entry["target"]): entry for entry in json.loads(result.stdout)}


def test_every_kernel_compiles_for_every_target(compiled):
    kernels = {"scores", "scores+candidates", "select", "divergence", "part_sums", "backward"}
    for target in TARGETS:
        assert {variant.split()[0] for variant, of in compiled if of == target} == kernels


def test_nothing_spills(compiled):
    """Local memory of one thread is global memory of 256: a spill in the loop costs more than the logits."""
    assert {key: entry["spilled_bytes"] for key, entry in compiled.items() if entry["spilled_bytes"]} == {}


def test_registers_leave_room_for_three_programs_a_processor_or_two(compiled):
    """Three of 256 threads have 80 each of its 65,536; two, over a top k or a softcap, have 128."""
    for (variant, target), entry in compiled.items():
        if target != "gfx942":
            assert entry["registers"] <= (128 if "top-k" in variant or "softcap" in variant else 80), (variant, target)


def test_no_quotient_is_an_approximation(compiled):
    """Of equal temperatures and of equal rows' sums it must be 1, or a row differs from itself. A softcap's tanh has
    one for each logit, by numbers that are never equal."""
    approximate = {key for key, entry in compiled.items() if entry["approximate_divisions"]}
    assert approximate and all("softcap" in variant for variant, _ in approximate)


def test_aligned_rows_are_loaded_sixteen_bytes_at_a_time(compiled):
    for (variant, target), entry in compiled.items():
        if variant == "select" or "unaligned" in variant:
            continue
        if "split" in variant or "part_sums" in variant:  # one tile, so no loop, and beside it the ragged one
            assert any(re.search(r"128|dwordx4", load) for load in entry["loads"]), (variant, target)
            continue
        loops = entry["visits"] + entry["searches"]
        assert loops, (variant, target)
        assert {loop["narrowest_load"] for loop in loops} == {16}, (variant, target)


@pytest.mark.parametrize("variant", ["scores bf16", "scores bf16 forward_kl", "scores+candidates bf16"])
def test_scores_cost_at_most_18_6_instructions_a_pair(compiled, variant):
    """14 are the arithmetic: widen 2, maxima 2, exponents 4, sums 6; two floors and a gap handle -inf, and a rescale
    comes every 16 pairs. H100's memory leaves room for 37 at full bandwidth."""
    (visit,) = compiled[variant, "sm_90"]["visits"]
    assert visit["instructions"] <= 18.6
    assert visit["special"] <= 2.2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("variant", "instructions", "special"),
    [
        ("scores bf16", 22.0, 2.2),
        ("scores fp16", 22.0, 2.2),
        ("scores fp32", 21.0, 2.2),
        ("divergence bf16", 20.0, 2.2),
        ("backward bf16", 20.0, 1.0),
        ("backward bf16 top-k bucket", 26.0, 1.0),
    ],
)
def test_one_visit_stays_within_its_budget(compiled, variant, target, instructions, special):
    (visit,) = compiled[variant, target]["visits"]
    assert visit["instructions"] <= instructions
    assert visit["special"] <= special


@pytest.mark.parametrize(
    ("variant", "digits"), [("divergence bf16 top-k drop", 2), ("divergence fp32 top-k drop", 3)], ids=str
)
def test_the_top_k_is_found_by_histograms_where_they_are_atomic(compiled, variant, digits):
    """A visit for each digit of the groups' maxima and one that lists groups; then, within the groups, one for each
    digit and one for ties. A histogram is one atomic addition an element on NVIDIA. On ROCm it would be ballots, so
    there logits are counted against three values at a time."""
    for target in TARGETS:
        entry = compiled[variant, target]
        within = [search["instructions"] for search in entry["searches"] if search["is_gathered"]]
        assert entry["has_groups"]
        if target == "gfx942":
            assert not entry["histograms"] and max(within) <= 32.0  # its masked loads are branches
        else:
            assert entry["histograms"] and "ATOMS.POPC.INC" in entry["assembly"]
            assert len(within) == digits + 1 and len(entry["searches"]) == 2 * (digits + 1)
            assert within[0] <= 8.0 and max(within[:-1]) <= 14.0 and within[-1] <= 24.0


def test_a_top_k_is_one_visit_of_the_row_and_little_more(compiled):
    """What `totals` says of k = 500: at most 40 instructions and 6 bytes a pair, where both rows are 4."""
    entry = compiled["divergence bf16 top-k drop", "sm_90"]
    assert [visit["is_gathered"] for visit in entry["visits"]] == [False, True]
    assert entry["instructions_a_pair"] <= 40
    assert entry["bytes_a_pair"] <= 6


@pytest.mark.parametrize(
    ("rows", "instructions"),
    [("without groups", 80), ("unaligned", 90), ("softcap", 160)],  # a load for each logit; a tanh in each visit
)
def test_a_top_k_without_groups_takes_eighty_instructions_a_pair(compiled, rows, instructions):
    """By `totals`: two visits of both rows, and one of the student's for each digit and for the ties."""
    entry = compiled[f"divergence bf16 {rows} top-k drop", "sm_90"]
    assert entry["histograms"] and not entry["has_groups"]
    assert len(entry["visits"]) == 2 and len(entry["searches"]) == 3
    assert entry["instructions_a_pair"] <= instructions
    assert entry["bytes_a_pair"] == 14  # the bar; each loop takes the whole row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("variant", "instructions"), [("scores bf16 jsd", 22.0), ("divergence bf16 jsd", 26.0)])
def test_the_jsd_takes_one_logarithm_and_no_library_function(compiled, target, variant, instructions):
    """CUDA's own log2 is 12 instructions, of which a pair had two: 46 in the second visit. LLVM's for gfx942 is six;
    with one, and two numbers an instruction, a gradient's terms take 20 there."""
    first, second = compiled[variant, target]["visits"]
    assert first["instructions"] <= 18.0
    assert second["instructions"] <= (min(instructions, 20.5) if target == "gfx942" else instructions)
    assert second["special"] == 3.0


def test_unaligned_rows_cost_no_second_layout(compiled):
    """Their loads are of 2 bytes; but a lane's sums still stay in its thread, or this would be 36."""
    (visit,) = compiled["scores bf16 unaligned", "sm_90"]["visits"]
    assert visit["instructions"] <= 22.0
    assert visit["special"] <= 2.2


def test_no_size_stride_or_alignment_compiles_another_variant(compiled):
    """A new V, N or L, or a view that starts elsewhere, must not cost a recompile in the middle of training."""
    assert {key: entry["specialised"] for key, entry in compiled.items() if entry["specialised"]} == {}


@pytest.mark.parametrize(
    "variant",
    [
        "scores+candidates bf16",
        "scores bf16 split",
        "scores bf16 jsd split",
        "divergence bf16 split",
        "divergence bf16 jsd split",
        "divergence bf16 top-k drop split",
    ],
)
@pytest.mark.parametrize(
    ("target", "release", "counter", "acquire"),
    [
        ("sm_80", "MEMBAR", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL"),
        ("sm_90", "MEMBAR", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL"),
        ("sm_100", "MEMBAR", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL"),
        ("gfx942", "buffer_wbl2 sc1", "global_atomic_add", "buffer_inv sc1"),
    ],
)
def test_the_counter_releases_and_acquires(compiled, variant, target, release, counter, acquire):
    """docs/gpu.md, "Why the memory ordering is right"; of a sequence's scores, and of a split row's parts."""
    code = compiled[variant, target]["assembly"]
    stores = [found.start() for found in re.finditer(r"\bSTG|global_store", code)]
    barriers = [found.start() for found in re.finditer(r"BAR\.SYNC|s_barrier", code)]
    count = code.index(counter)
    scores_stored = max(place for place in stores if place < count)
    released = code.rindex(release, 0, count)
    acquired = code.index(acquire, count)
    assert scores_stored < max(place for place in barriers if place < count)
    assert scores_stored < released < count < acquired
    # Every processor's threads wait for the counter, and what they then read is not their own cache's.
    assert any(acquired < place for place in barriers)
    if target != "gfx942":
        assert "LDG.E.STRONG.GPU" in code[acquired:]
    assert counter not in compiled["scores bf16", target]["assembly"]
