"""What the benchmarks share: alternating medians, counted memory, parity, the machine, one command line.

Contestants take turns within one process, so that a slow second of the machine falls on all of them, and a ratio is
the median of the rounds' ratios, each of neighbours in time. On a GPU the time is that between two events on the
stream, after the last-level cache was overwritten, and the rounds take several sets of inputs in turn.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rmsd_kernels import cpu
from rmsd_kernels.backends import PREFERRED_BACKENDS
from rmsd_kernels.heads import projection

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLUSH_BYTES = 2**29  # twice the largest last-level cache there is (256 MiB, MI300)


@dataclasses.dataclass
class Result:
    work: str
    contestant: str
    milliseconds: float  # median
    rate: float  # the bytes that must be read and written, or the FLOPs of the products, over the median
    unit: str  # of the rate
    times_ours: float  # median over the rounds of (its time / ours)
    extra_megabytes: float  # peak of the tensors allocated meanwhile, less `must_exist`
    extra_percent: float  # of two logits tensors in the inputs' dtype, which from hidden states never exist
    spread: float  # (third quartile - first) / median
    rows: int = 0  # of the logits; 0 where the work is no such matrix
    vocab: int = 0


def command_line(
    description: str,
    sizes: list[tuple[int, int]],
    hidden: int | None = None,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    quick: str | None = None,
    model: str | None = None,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """`sizes` of (rows, vocab) unless both are given; `hidden` adds --hidden, `dtypes` --dtype, `quick` (its help)
    --quick, `model` --model, `more` what it adds. `backend` is the device's own by name, never "auto": what cannot
    serve raises, so that no fallback is timed in its place."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default=default_device(), choices=list(PREFERRED_BACKENDS))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocab", type=int)
    if hidden is not None:
        parser.add_argument("--hidden", type=int, default=hidden, help="width of the hidden states")
    if dtypes:
        parser.add_argument("--dtype", nargs="+", default=list(dtypes), choices=list(DTYPES))
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    if model:
        parser.add_argument("--model", default=model, help=f"a folder or a name, in place of {model}")
    if more:
        more(parser)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--write", type=Path, help="folder that also gets the JSON, for benchmarks.plot")
    arguments = parser.parse_args()
    if (arguments.rows is None) != (arguments.vocab is None):
        parser.error("--rows and --vocab go together")
    arguments.sizes = sizes if arguments.rows is None else [(arguments.rows, arguments.vocab)]
    arguments.backend = PREFERRED_BACKENDS[arguments.device]
    return arguments


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def logits(rows: int, vocab: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, vocab) twice, a student and a teacher that mostly agrees, as a model under another prompt does; and
    sampled ids (rows,)."""
    made = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
    student = torch.randn(rows, vocab, **made) * 3
    teacher = student + torch.randn(rows, vocab, **made)
    return student.to(dtype), teacher.to(dtype), torch.randint(vocab, (rows,), **made)


def input_sets(make: Callable[[int], tuple[Tensor, ...]], device: str) -> list[tuple[Tensor, ...]]:
    """Inputs by seed: three sets for a GPU, whose caches and clocks take to one, and one for a CPU."""
    return [make(seed) for seed in range(3 if device == "cuda" else 1)]


def compare(
    work: str,
    size: tuple[int, int],  # rows, vocab
    contestants: dict[str, Callable[..., object]],  # of one set of inputs; ours first
    inputs: list[tuple[Tensor, ...]],
    amount: int,  # bytes, or FLOPs
    repeats: int,
    check: Callable[[str, object], None],  # of a contestant's name and its first result, before anything is timed
    must_exist: int = 0,  # bytes of the result that the caller asked for, a gradient say
    unit: str = "GB/s",
) -> list[Result]:
    for name, run in contestants.items():
        check(name, run(*inputs[0]))
    seconds = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name, run in contestants.items():
            seconds[name].append(elapsed(functools.partial(run, *inputs[repeat % len(inputs)]), inputs[0][0].device))
    ours = next(iter(seconds.values()))
    logits_bytes = 2 * size[0] * size[1] * inputs[0][0].element_size()
    results = []
    for name, run in contestants.items():
        median = statistics.median(seconds[name])
        extra = max(0, peak_bytes(functools.partial(run, *inputs[0]), inputs[0][0].device) - must_exist)
        results.append(
            Result(
                work=work,
                rows=size[0],
                vocab=size[1],
                contestant=name,
                milliseconds=median * 1e3,
                rate=amount / median / 1e9,
                unit=unit,
                times_ours=statistics.median(its / our for its, our in zip(seconds[name], ours, strict=True)),
                extra_megabytes=extra / 2**20,
                extra_percent=100 * extra / logits_bytes,
                spread=spread(seconds[name]),
            )
        )
    return results


def elapsed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # The host launches `run` while the flush is under way (0.2 ms on an H100), so few gaps are timed.
    _flush_buffer(device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def spread(seconds: list[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    first, median, third = statistics.quantiles(seconds, n=4)
    return (third - first) / median


def peak_bytes(run: Callable[[], object], device: torch.device = CPU) -> int:
    """Most bytes that `run` held at once. On a CPU: tensors by torch's profiler, numpy's memory by tracemalloc; the
    peaks add up. On a GPU: what its allocator says.

    The room for a chunk's logits, which linear.py keeps from call to call on a CPU, counts as if this were its first
    call: it is given up before, so that `run` allocates it again. Not counted is the C++ kernels' own scratch: two
    tiles a thread (16 KiB), and for a vocabulary top-k some 2 V / 128 + k numbers."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    projection._per_thread.workspace = None
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


def machine(device: str) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = dict(gpu=torch.cuda.get_device_name()) if device == "cuda" else {}
    return dict(
        **gpu,
        processor=names[0] if names else platform.processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        build=cpu.capability(),
        torch=torch.__version__,
        load_average=round(os.getloadavg()[0], 1),
    )


def written_by_part(parts: Iterable[list[Result]], arguments: argparse.Namespace, stem: str) -> list[Result]:
    """The results of all parts. Where asked to, the JSON is written as each part ends: what a benchmark measured
    before it was stopped is kept."""
    results = []
    for part in parts:
        results += part
        write(results, arguments, stem)
    return results


def write(results: list[Result], arguments: argparse.Namespace, stem: str, **more: object) -> str:
    """The JSON, which also holds `more`; in a file where asked to, whole or as it was before."""
    computer = machine(arguments.device)
    text = json.dumps(dict(machine=computer, **more, results=[dataclasses.asdict(r) for r in results]), indent=1)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        unfinished = arguments.write / f"{stem}.json.part"
        unfinished.write_text(text + "\n")
        unfinished.replace(arguments.write / f"{stem}.json")
    return text


def report(results: list[Result], arguments: argparse.Namespace, stem: str, **more: object) -> None:
    """Prints the table or the JSON, which also holds `more`; writes the JSON where asked to."""
    text = write(results, arguments, stem, **more)
    if arguments.json:
        print(text)
        return
    print(", ".join(f"{name} {value}" for name, value in machine(arguments.device).items()), "\n")
    print("| work | contestant | ms | spread | rate | times ours | extra MB | % of the logits |")
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        print(
            f"| {result.work} | {result.contestant} | {result.milliseconds:.3g} | {result.spread:.0%} "
            f"| {result.rate:.1f} {result.unit} | {result.times_ours:.2f} | {result.extra_megabytes:.2f} "
            f"| {result.extra_percent:.2f} |"
        )
