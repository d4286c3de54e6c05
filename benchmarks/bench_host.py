"""What a call of the kernels costs the host before the device has anything to do: every launch is a stub.

    python -m benchmarks.bench_host
    python -m benchmarks.bench_host --write docs/benchmarks

The Triton launchers run as they do for a GPU, on CPU tensors, and the kernels are not called. What Triton itself takes
for a launch is left out, and so is what only CPU tensors pay: the check of every id. `operators` goes through
torch.library's dispatcher, as torch.compile and fake tensors do; `direct` is what eager code takes.
"""

import argparse
import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: their launchers then take CPU tensors

import torch

from rmsd_kernels import dispatch, functional

from . import common

AIMS = {"token_scores": 50, "token_divergence, forward": 75, "token_divergence, with backward": 150}  # microseconds
ROWS, VOCAB = 64, 512


@contextlib.contextmanager
def stubbed():
    """No kernel is launched, and no id is looked at."""
    with contextlib.ExitStack() as stack:
        for module in ("scores", "divergence", "divergence_backward"):
            module = importlib.import_module(f"rmsd_kernels.triton.{module}")
            stack.enter_context(mock.patch.object(module, "launch", lambda *_, **__: None))
        for check in ("check_ids", "check_rows"):
            stack.enter_context(mock.patch.object(functional, check, lambda *_: None))
        yield


def calls() -> dict:
    student, teacher = torch.randn(2, 1, ROWS, VOCAB)
    leaf, ids = student.clone().requires_grad_(), torch.zeros(1, ROWS, dtype=torch.int64)
    rows = torch.arange(5)
    grad = torch.ones(5)

    def backward():
        leaf.grad = None
        functional.token_divergence(leaf, teacher, rows=rows, backend="triton").backward(grad)

    return {
        "token_scores": lambda: functional.token_scores(student, teacher, ids, backend="triton"),
        "token_divergence, forward": lambda: functional.token_divergence(leaf, teacher, rows=rows, backend="triton"),
        "token_divergence, with backward": backward,
    }


class _Allocates(torch.autograd.Function):
    """What no implementation can save: the engine's own time, and the memory of the results."""

    @staticmethod
    def forward(ctx, student_logits):
        ctx.save_for_backward(student_logits)
        return student_logits.new_empty(5)

    @staticmethod
    def backward(ctx, grad_divergence):
        (student_logits,) = ctx.saved_tensors
        return torch.zeros_like(student_logits)


def floor() -> Callable:
    leaf, grad = torch.randn(1, ROWS, VOCAB).requires_grad_(), torch.ones(5)

    def backward():
        leaf.grad = None
        _Allocates.apply(leaf).backward(grad)

    return backward


def microseconds(call, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count * 1e6


def measure(repeats: int, count: int = 200) -> list[dict]:
    """Both ways in turn, medians over rounds."""
    found = {name: {"operators": [], "direct": []} for name in AIMS}
    allocating, floors = floor(), []
    with stubbed():
        for _ in range(repeats):
            for name, call in calls().items():
                found[name]["direct"].append(microseconds(call, count))
                with mock.patch.object(dispatch, "is_plain_eager", lambda *_: False):
                    found[name]["operators"].append(microseconds(call, count))
            floors.append(microseconds(allocating, count))
    rows = [
        dict(call=name, aim_us=AIMS[name], **{way: round(median(times), 1) for way, times in ways.items()})
        for name, ways in found.items()
    ]
    rows[-1]["floor"] = round(median(floors), 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.repeats)
    for row in found:
        floor_us = f"; an autograd.Function that only allocates {row['floor']:.0f}" if "floor" in row else ""
        ways = f"{row['direct']:.0f} us, aim {row['aim_us']}; through the operators {row['operators']:.0f}"
        print(f"{row['call']}: {ways}{floor_us}")
    if options.write:
        text = json.dumps(dict(machine=common.machine("cpu"), results=found), indent=1)
        (options.write / "host.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
