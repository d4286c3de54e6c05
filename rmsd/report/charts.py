"""Curves as geometry: the template turns it into SVG, page.js reads the values out at the pointer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Series

# In SVG units, which are about CSS pixels at the width that the page gives a chart.
WIDTH, HEIGHT = 280, 172
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 28
MAX_POINTS = 240  # a line; more than the eye can tell apart in 300 pixels
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    label: str
    path: str
    band: str  # "" for one run
    dots: list[tuple[float, float]]
    steps: list[int]
    values: list[tuple[float, float, float]]  # mean, least, greatest


@dataclass(frozen=True)
class Chart:
    name: str
    description: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_span: tuple[float, float]
    y_span: tuple[float, float]
    whole: bool  # every value is a whole number: a count
    peak: float  # the greatest size of a value
    lines: list[Line | None]  # one for each series of the page; None for one without this metric


def chart(series: Sequence[Series], kind: str, name: str, unit_interval: bool) -> Chart | None:
    """A metric of all series in one plot; None where no run has a finite value of it."""
    curves = [_thin(one.curve(kind, name)) for one in series]
    points = [point for curve in curves for point in curve]
    if not points:
        return None
    steps = [point[0] for point in points]
    x_ticks = nice_ticks(min(steps), max(steps), 5, whole=True)
    x_span = (min(steps), max(max(steps), min(steps) + 1))
    if unit_interval and all(low >= 0 and high <= 1 for _, _, low, high in points):
        y_ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    else:
        least, greatest = min(point[2] for point in points), max(point[3] for point in points)
        # Zero belongs to the picture unless the curve lives far from it.
        if 0 < least < 0.6 * greatest:
            least = 0.0
        y_ticks = nice_ticks(least, greatest, 4)
    y_span = (y_ticks[0], y_ticks[-1])
    whole = not unit_interval and all(low == int(low) and high == int(high) for _, _, low, high in points)
    peak = max(max(abs(low), abs(high)) for _, _, low, high in points)
    lines = [
        _line(one.label, curve, x_span, y_span, dots=kind == "evals", band=len(one.runs) > 1) if curve else None
        for one, curve in zip(series, curves, strict=True)
    ]
    return Chart(
        name,
        "; ".join(_describe(line, whole, peak) for line in lines if line),
        [(_x(t, x_span), str(int(t))) for t in x_ticks if x_span[0] <= t <= x_span[1]],
        [(_y(t, y_span), tick_text(t)) for t in y_ticks],
        x_span,
        y_span,
        whole,
        peak,
        lines,
    )


def nice_ticks(least: float, greatest: float, count: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [least, greatest]."""
    if greatest - least <= 1e-9 * max(abs(least), abs(greatest)):
        pad = abs(least) * 0.5 or 1.0
        least, greatest = (least, least + 1) if whole else (least - pad if least < 0 else 0.0, least + pad)
    raw = (greatest - least) / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        size = max(size, 1)
    first = math.floor(least / size + 1e-9)
    last = math.ceil(greatest / size - 1e-9)
    return [i * size for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return scientific(value, 1)
    return f"{value:g}".replace("-", MINUS)


def scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if digits == 1 else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def figure(value: float | None, whole: bool = False, peak: float = 0.0) -> str:
    """A metric's value for the reader. `whole`: it counts something, or is a mean of counts. `peak`: the metric's
    greatest size anywhere; beside 0.1, 5e-8 is 0.000."""
    if value is None:
        return "\N{EN DASH}"
    if value != 0 and (max(abs(value), peak) < 5e-4 or abs(value) >= 1e6):
        return scientific(value, 2)
    if whole and value == int(value):
        return f"{value:.0f}".replace("-", MINUS)
    value = value if abs(value) >= 5e-4 else 0.0
    digits = 1 if whole or abs(value) >= 100 else 3
    return f"{value:.{digits}f}".replace("-", MINUS)


def _thin(curve: list[tuple]) -> list[tuple]:
    if len(curve) <= MAX_POINTS:
        return curve
    return [curve[round(i * (len(curve) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _x(step: float, span: tuple[float, float]) -> float:
    return round(LEFT + (step - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, span: tuple[float, float]) -> float:
    return round(HEIGHT - BOTTOM - (value - span[0]) / (span[1] - span[0]) * (HEIGHT - TOP - BOTTOM), 1)


def _line(label, curve, x_span, y_span, *, dots: bool, band: bool) -> Line:
    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{_x(step, x_span)},{_y(value, y_span)}" for step, value in points)

    mean = [(step, mean) for step, mean, _, _ in curve]
    show_dots = len(mean) == 1 or (dots and len(mean) <= 40)
    outline = [(step, high) for step, _, _, high in curve] + [(step, low) for step, _, low, _ in reversed(curve)]
    return Line(
        label,
        path(mean),
        path(outline) + "Z" if band else "",
        [(_x(step, x_span), _y(value, y_span)) for step, value in mean] if show_dots else [],
        [step for step, *_ in curve],
        [(mean, low, high) for _, mean, low, high in curve],
    )


def _describe(line: Line, whole: bool, peak: float) -> str:
    first, last = (figure(line.values[i][0], whole, peak) for i in (0, -1))
    if len(line.steps) == 1:
        return f"{line.label}: {first} at step {line.steps[0]}"
    return f"{line.label}: from {first} at step {line.steps[0]} to {last} at step {line.steps[-1]}"
