"""What the GPU kernels compile to, and how fast that could run: `python -m benchmarks.gpu_static`. No GPU is needed.

Nothing here is timed. Registers, spills, loads and instructions are read from the machine code; the roofline divides
them by an H100's published rates. `--json` prints the same for tests/test_gpu_code.py.
"""

import argparse
import dataclasses
import json

from benchmarks.gpu_compile import TARGETS, Compiled, compile_variant, variants

# H100 SXM: 3.35 TB/s; 132 processors at 1.83 GHz (the clock of its 989 TFLOPS), 4 warps of 32 issued and 16 special
# functions a clock each.
BANDWIDTH = 3.35e12
SLOTS = 132 * 128 * 1.83e9
SPECIALS = 132 * 16 * 1.83e9
TOKENS, VOCABULARY = 8192, 151_936
# A tile is 4096 logits, and one of its lanes' 16 a group; V = 151,936 are 37 whole tiles and a ragged one. At k = 500 a
# row of normal logits in bf16 has 516 groups whose maximum reaches the 500th largest: three tiles, gathered.
TILE, GROUP, LISTED = 4096, 16, 516


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--variants", nargs="*", default=list(variants()), choices=list(variants()), metavar="NAME")
    parser.add_argument("--skip-slow", action="store_true", help="unaligned rows, which take longest, for sm_90 only")
    arguments = parser.parse_args()
    compiled = [
        compile_variant(name, target)
        for name in arguments.variants
        for target in arguments.targets
        if not (arguments.skip_slow and "unaligned" in name and target != "sm_90")
    ]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) | totals(entry) for entry in compiled]))
        return
    print("Read from machine code compiled here; nothing was run.\n")
    for line in table(compiled):
        print(line)
    print(f"\nRoofline on an H100 (sm_90): computed from the counts above, not timed. {TOKENS} rows of {VOCABULARY}.\n")
    for line in roofline([entry for entry in compiled if entry.target == "sm_90"]):
        print(line)


def table(compiled: list[Compiled]) -> list[str]:
    lines = [
        "| kernel | target | registers | spilled bytes | bytes a load in the loops | instructions a pair, by visit "
        "| special functions a pair | instructions a logit, search |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in compiled:
        cells = (
            entry.variant,
            entry.target,
            entry.registers,
            entry.spilled_bytes,
            min((loop.narrowest_load for loop in entry.visits + entry.searches), default="-"),
            ", ".join(f"{visit.instructions:.1f}" for visit in entry.visits) or "-",
            ", ".join(f"{visit.special:.2f}" for visit in entry.visits) or "-",
            ", ".join(f"{search.instructions:.1f}" for search in entry.searches) or "-",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def totals(entry: Compiled) -> dict[str, float]:
    """Instructions, special functions and bytes a pair in all visits, over a row of VOCABULARY logits.

    A loop over gathered groups takes their tiles and the ragged one, and a search that is not gathered the maxima.
    Without groups every loop takes the whole row. That is for a top k by histograms: where logits are counted, a search
    is made many times. Bytes are the logits', the maxima's and the list's, wherever they come from, and a backward's
    gradient."""
    itemsize = 4 if "fp32" in entry.variant else 2
    tiles = -(-LISTED // (TILE // GROUP)) + 1
    instructions = special = moved = 0.0
    for loop in entry.visits + entry.searches:
        rows = 2 if loop in entry.visits else 1
        if loop.is_gathered and entry.has_groups:
            share, logits = tiles * TILE / VOCABULARY, LISTED * GROUP + VOCABULARY % TILE
            moved += 4 * LISTED / VOCABULARY
        elif rows == 1 and entry.has_groups:
            share, logits = 1 / GROUP, VOCABULARY / GROUP
        else:
            share, logits = 1.0, VOCABULARY
        instructions += share * loop.instructions
        special += share * loop.special
        moved += rows * itemsize * logits / VOCABULARY
    if entry.has_groups:
        moved += itemsize / GROUP + 4 * LISTED / VOCABULARY  # the maxima and the list are written
    if entry.variant.startswith("backward"):
        moved += itemsize
    return dict(instructions_a_pair=instructions, special_a_pair=special, bytes_a_pair=moved)


def roofline(compiled: list[Compiled]) -> list[str]:
    """One pair of logits takes bytes / BANDWIDTH, instructions / SLOTS, special / SPECIALS; the longest bounds it."""
    lines = [
        "| kernel | bytes a pair from memory | in all visits | instructions a pair | memory, ms | issue, ms "
        "| special functions, ms | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in compiled:
        if not entry.visits or "split" in entry.variant or "part_sums" in entry.variant:  # for a few rows, not for 8192
            continue
        itemsize = 4 if entry.variant.split()[1] == "fp32" else 2
        # Both rows once, from memory: later visits find them in L2. A backward writes a gradient as well.
        moved = (3 if entry.variant.startswith("backward") else 2) * itemsize
        total = totals(entry)
        pairs = TOKENS * VOCABULARY * 1e3
        times = {
            "memory": pairs * moved / BANDWIDTH,
            "issue": pairs * total["instructions_a_pair"] / SLOTS,
            "special functions": pairs * total["special_a_pair"] / SPECIALS,
        }
        cells = (
            entry.variant,
            moved,
            f"{total['bytes_a_pair']:.1f}",
            f"{total['instructions_a_pair']:.1f}",
            *(f"{time:.2f}" for time in times.values()),
            max(times, key=times.get),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
