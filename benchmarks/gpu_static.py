"""What the GPU kernels compile to, and how fast that could run: `python -m benchmarks.gpu_static`. No GPU is needed.

Nothing here is timed. Registers, spills, loads and instructions are read from the machine code; the roofline divides
them by an H100's published rates. `--json` prints the same for tests/test_gpu_code.py.
"""

import argparse
import dataclasses
import json

from benchmarks.gpu_compile import TARGETS, Compiled, Loop, compile_variant, variants

# H100 SXM: 3.35 TB/s; 132 processors at 1.83 GHz (the clock of its 989 TFLOPS), 4 warps of 32 issued and 16 special
# functions a clock each.
BANDWIDTH = 3.35e12
SLOTS = 132 * 128 * 1.83e9
SPECIALS = 132 * 16 * 1.83e9
TOKENS, VOCABULARY = 8192, 151_936
# Visits that find the k-th largest logit by counting, where the compiler has no cheap histograms. fp32 may need 16, and
# stops where a value parts the row at exactly k.
SEARCHES = {"bf16": 8, "fp16": 8, "fp32": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--variants", nargs="*", default=list(variants()), choices=list(variants()), metavar="NAME")
    parser.add_argument("--skip-slow", action="store_true", help="unaligned rows, 6 s each, for sm_90 only")
    arguments = parser.parse_args()
    compiled = [
        compile_variant(name, target)
        for name in arguments.variants
        for target in arguments.targets
        if not (arguments.skip_slow and "unaligned" in name and target != "sm_90")
    ]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in compiled]))
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


def search_visits(entry: Compiled) -> list[Loop]:
    """The visits of the student's row alone, each as often as it is made: a digit each and then the ties, or a counting
    visit many times and then the ties."""
    if entry.histograms or not entry.searches:
        return entry.searches
    counting, ties = entry.searches
    return SEARCHES[entry.variant.split()[1]] * [counting] + [ties]


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
        backward = entry.variant.startswith("backward")
        itemsize = 4 if entry.variant.split()[1] == "fp32" else 2
        # Both rows once, from memory: later visits find them in L2. A backward writes a gradient as well.
        moved = (3 if backward else 2) * itemsize
        instructions = sum(visit.instructions for visit in entry.visits)
        searches = search_visits(entry)
        instructions += sum(search.instructions for search in searches)
        visited = (2 * len(entry.visits) + len(searches) + backward) * itemsize
        pairs = TOKENS * VOCABULARY * 1e3
        times = {
            "memory": pairs * moved / BANDWIDTH,
            "issue": pairs * instructions / SLOTS,
            "special functions": pairs * sum(visit.special for visit in entry.visits) / SPECIALS,
        }
        cells = (
            entry.variant,
            moved,
            visited,
            f"{instructions:.1f}",
            *(f"{time:.2f}" for time in times.values()),
            max(times, key=times.get),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
