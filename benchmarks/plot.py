"""Draws what the benchmarks wrote: `python -m benchmarks.plot docs/benchmarks`.

scale.json becomes scale.svg, time and memory against rows and against vocabulary; scores.json becomes scores.svg, both
against the bytes of the logits, which alone decide the time of a scan. The dashed line is the least that the work can
take: the unavoidable products at the rate of a bare one, or reading both tensors once, as measured in the same run.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "rmsd", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False,
})  # fmt: skip
READING = "sum of both"


def lines(axes: Axes, results: list[dict], x: str, y: str) -> None:
    """A line a contestant, ours first and heaviest."""
    for place, name in enumerate(dict.fromkeys(result["contestant"] for result in results)):
        points = sorted((result[x], result[y]) for result in results if result["contestant"] == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name, linewidth=1 if place else 2, markersize=4)


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    sizes = sorted({size for line in axes.lines[:-1] for size in line.get_xdata()})
    axes.set_xticks(sizes, [f"{size / 1024:.4g}k" if size >= 1024 else f"{size:.3g}" for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.legend(fontsize=8)


def scale(wrote: dict) -> Figure:
    results, ours = wrote["results"], wrote["results"][0]["contestant"]
    for result in results:  # the FLOPs that must be, at the bare product's rate
        result["roofline"] = result["milliseconds"] * result["rate"] / wrote["gemm_rate"]
    fewest, vocab = min(r["rows"] for r in results), max(results, key=lambda r: r["rows"])["vocab"]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    sweeps = (
        ("rows", f"rows, V = {vocab:,}", [r for r in results if r["vocab"] == vocab]),
        ("vocab", f"vocabulary, {fewest:,} rows", [r for r in results if r["rows"] == fewest]),
    )
    for (x, label, sweep), (time, memory) in zip(sweeps, panels.T, strict=True):
        lines(time, sweep, x, "milliseconds")
        bound = sorted({(result[x], result["roofline"]) for result in sweep if result["contestant"] == ours})
        time.plot(*zip(*bound, strict=True), "k--", linewidth=1, label="the products alone")
        finish(time, label, "ms")
        lines(memory, sweep, x, "extra_megabytes")
        aim = wrote["aims"]["megabytes"]
        memory.axhline(aim, color="k", linestyle=":", linewidth=1, label=f"aim: {aim:.0f} MB")
        finish(memory, label, "extra MB")
    figure.suptitle(f"Hidden states to gradients, H = {wrote['hidden']}, {wrote['machine']['threads']} threads")
    return figure


def scores(wrote: dict) -> Figure:
    for result in wrote["results"]:
        result["megabytes"] = round(result["milliseconds"] * result["rate"], 3)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    contestants = [result for result in wrote["results"] if result["contestant"] != READING]
    reading = sorted((r["megabytes"], r["milliseconds"]) for r in wrote["results"] if r["contestant"] == READING)
    lines(time, contestants, "megabytes", "milliseconds")
    time.plot(*zip(*reading, strict=True), "k--", linewidth=1, label="reading both once")
    lines(memory, contestants, "megabytes", "extra_megabytes")
    for axes, label in ((time, "ms"), (memory, "extra MB")):
        finish(axes, "MB of logits, fp32 and bf16", label)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for draw in (scale, scores):
        source = folder / f"{draw.__name__}.json"
        if source.exists():
            draw(json.loads(source.read_text())).savefig(source.with_suffix(".svg"), metadata=dict(Date=None))
            print(source.with_suffix(".svg"))


if __name__ == "__main__":
    main()
