"""What the benchmarks share: alternating medians, counted memory, parity, the machine, one command line.

Contestants take turns within one process, so that a slow second of the machine falls on all of them, and a ratio is
the median of the rounds' ratios, each of neighbours in time.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rmsd_kernels import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Result:
    work: str
    contestant: str
    milliseconds: float  # median
    gigabytes_a_second: float  # the bytes that must be read and written, over the median
    times_ours: float  # median over the rounds of (its time / ours)
    extra_megabytes: float  # peak of the tensors allocated meanwhile, less `must_exist`
    extra_percent: float  # of the two logits tensors


def command_line(description: str, sizes: list[tuple[int, int]]) -> argparse.Namespace:
    """`sizes` of (rows, vocab) unless both are given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args()
    if (arguments.rows is None) != (arguments.vocab is None):
        parser.error("--rows and --vocab go together")
    arguments.sizes = sizes if arguments.rows is None else [(arguments.rows, arguments.vocab)]
    return arguments


def logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, vocab) twice: a student, and a teacher that mostly agrees, as a model under another prompt does."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, vocab, generator=generator) * 3
    teacher = student + torch.randn(rows, vocab, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def compare(
    work: str,
    contestants: dict[str, Callable[[], object]],  # ours first
    num_bytes: int,
    logits_bytes: int,
    repeats: int,
    must_exist: int = 0,  # bytes of the result that the caller asked for, a gradient say
) -> list[Result]:
    for run in contestants.values():
        run()
    seconds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ours = next(iter(seconds.values()))
    results = []
    for name, run in contestants.items():
        median = statistics.median(seconds[name])
        extra = max(0, peak_bytes(run) - must_exist)
        results.append(
            Result(
                work=work, contestant=name, milliseconds=median * 1e3, gigabytes_a_second=num_bytes / median / 1e9,
                times_ours=statistics.median(its / our for its, our in zip(seconds[name], ours, strict=True)),
                extra_megabytes=extra / 2**20, extra_percent=100 * extra / logits_bytes,
            )
        )  # fmt: skip
    return results


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at once: tensors by torch's profiler, numpy's memory by tracemalloc; the peaks add up.

    Not counted is the kernels' own scratch: two tiles a thread (16 KiB), and for a vocabulary top-k some 2 V / 128 + k
    numbers."""
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        kept = run()
        peak_of_numpy = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    alive = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    del kept
    return peak + peak_of_numpy


def assert_parity(what: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    """Before anything is timed: the largest error against fp64 may be `tolerance`."""
    error = (got.detach().double() - truth.double()).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: off by {error:.3g} from fp64, more than {tolerance:.3g}")


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(
        processor=names[0] if names else platform.processor(),
        cores=os.cpu_count(), threads=torch.get_num_threads(), build=cpu.capability(), torch=torch.__version__,
        load_average=round(os.getloadavg()[0], 1),
    )  # fmt: skip


def report(results: list[Result], as_json: bool) -> None:
    if as_json:
        print(json.dumps(dict(machine=machine(), results=[dataclasses.asdict(result) for result in results]), indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()), "\n")
    print("| work | contestant | ms | GB/s | times ours | extra MB | % of the logits |\n|---|---|---|---|---|---|---|")
    for result in results:
        print(
            f"| {result.work} | {result.contestant} | {result.milliseconds:.1f} | {result.gigabytes_a_second:.1f} "
            f"| {result.times_ours:.2f} | {result.extra_megabytes:.2f} | {result.extra_percent:.2f} |"
        )
