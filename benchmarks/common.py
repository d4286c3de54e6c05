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
    rate: float  # the bytes that must be read and written, or the FLOPs of the products, over the median
    unit: str  # of the rate
    times_ours: float  # median over the rounds of (its time / ours)
    extra_megabytes: float  # peak of the tensors allocated meanwhile, less `must_exist`
    extra_percent: float  # of the two logits tensors, which from hidden states never exist
    spread: float  # (third quartile - first) / median


def command_line(
    description: str,
    sizes: list[tuple[int, int]],
    hidden: int | None = None,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
) -> argparse.Namespace:
    """`sizes` of (rows, vocab) unless both are given; `hidden` adds --hidden, `dtypes` adds --dtype."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocab", type=int)
    if hidden is not None:
        parser.add_argument("--hidden", type=int, default=hidden, help="width of the hidden states")
    if dtypes:
        parser.add_argument("--dtype", nargs="+", default=list(dtypes), choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--write", type=Path, help="folder that also gets the JSON, and the plots where there are any")
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
    amount: int,  # bytes, or FLOPs
    logits_bytes: int,
    repeats: int,
    must_exist: int = 0,  # bytes of the result that the caller asked for, a gradient say
    unit: str = "GB/s",
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
                work=work, contestant=name, milliseconds=median * 1e3, rate=amount / median / 1e9, unit=unit,
                times_ours=statistics.median(its / our for its, our in zip(seconds[name], ours, strict=True)),
                extra_megabytes=extra / 2**20, extra_percent=100 * extra / logits_bytes, spread=spread(seconds[name]),
            )
        )  # fmt: skip
    return results


def spread(seconds: list[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    first, median, third = statistics.quantiles(seconds, n=4)
    return (third - first) / median


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


def report(results: list[Result], arguments: argparse.Namespace, stem: str) -> None:
    """Prints the table or the JSON; writes the JSON where asked to."""
    text = json.dumps(dict(machine=machine(), results=[dataclasses.asdict(result) for result in results]), indent=1)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / f"{stem}.json").write_text(text + "\n")
    if arguments.json:
        print(text)
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()), "\n")
    print("| work | contestant | ms | spread | rate | times ours | extra MB | % of the logits |")
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        print(
            f"| {result.work} | {result.contestant} | {result.milliseconds:.1f} | {result.spread:.0%} "
            f"| {result.rate:.1f} {result.unit} | {result.times_ours:.2f} | {result.extra_megabytes:.2f} "
            f"| {result.extra_percent:.2f} |"
        )
