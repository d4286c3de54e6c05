"""Curves as geometry: the template turns it into SVG, page.js reads the values out at the pointer."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Series, Spread

# In SVG units, which are about CSS pixels at the width that the page gives a chart.
WIDTH, HEIGHT = 280, 172
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 28
LONE = 2.5  # half the width of a band that one step alone has
MAX_POINTS = 240  # a line; more than the eye can tell apart in 300 pixels
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    label: str
    path: str
    band: str  # from the least to the greatest, wherever two runs or more have a value; "" where none do
    dots: list[tuple[float, float]]
    steps: list[int]
    values: list[Spread]


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
    steps = [step for curve in curves for step, _ in curve]
    spreads = [spread for curve in curves for _, spread in curve]
    if not spreads:
        return None
    x_ticks = nice_ticks(min(steps), max(steps), 5, whole=True)
    x_span = (min(steps), max(max(steps), min(steps) + 1))
    if unit_interval and all(spread.low >= 0 and spread.high <= 1 for spread in spreads):
        y_ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    else:
        least, greatest = min(spread.low for spread in spreads), max(spread.high for spread in spreads)
        # Zero belongs to the picture unless the curve lives far from it.
        if 0 < least < 0.6 * greatest:
            least = 0.0
        y_ticks = nice_ticks(least, greatest, 4)
    y_span = (y_ticks[0], y_ticks[-1])
    whole = not unit_interval and all(s.low == int(s.low) and s.high == int(s.high) for s in spreads)
    peak = max(max(abs(spread.low), abs(spread.high)) for spread in spreads)
    lines = [
        _line(one.label, curve, x_span, y_span, dots=kind == "evals") if curve else None
        for one, curve in zip(series, curves, strict=True)
    ]
    return Chart(
        name,
        "; ".join(_describe(line, one, whole, peak) for line, one in zip(lines, series, strict=True) if line),
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


def range_text(spread: Spread, series: Series, whole: bool = False, peak: float = 0.0) -> str:
    """What a mean leaves out: "0.833 to 1.000", and ", 2 of 3 seeds" where some have no value. "" for a single run."""
    parts = [" to ".join(figure(v, whole, peak) for v in (spread.low, spread.high))] if spread.runs > 1 else []
    if spread.runs < len(series.runs):
        parts.append(f"{spread.runs} of {series.members}")
    return ", ".join(parts)


def _thin(curve: list[tuple]) -> list[tuple]:
    if len(curve) <= MAX_POINTS:
        return curve
    return [curve[round(i * (len(curve) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _x(step: float, span: tuple[float, float]) -> float:
    return round(LEFT + (step - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, span: tuple[float, float]) -> float:
    return round(HEIGHT - BOTTOM - (value - span[0]) / (span[1] - span[0]) * (HEIGHT - TOP - BOTTOM), 1)


def _line(label: str, curve: list[tuple[int, Spread]], x_span, y_span, *, dots: bool) -> Line:
    mean = [(_x(step, x_span), _y(spread.mean, y_span)) for step, spread in curve]
    show_dots = len(mean) == 1 or (dots and len(mean) <= 40)
    pieces = [list(piece) for many, piece in itertools.groupby(curve, lambda point: point[1].runs > 1) if many]
    return Line(
        label,
        _path(mean),
        "".join(_outline(piece, x_span, y_span) for piece in pieces),
        mean if show_dots else [],
        [step for step, _ in curve],
        [spread for _, spread in curve],
    )


def _outline(piece: list[tuple[int, Spread]], x_span, y_span) -> str:
    """Along the greatest values and back along the least. One step alone is given a width, to be seen."""
    upper = [(_x(step, x_span), _y(spread.high, y_span)) for step, spread in piece]
    lower = [(_x(step, x_span), _y(spread.low, y_span)) for step, spread in piece]
    if len(piece) == 1:
        upper, lower = ([(round(x + dx, 1), y) for x, y in edge for dx in (-LONE, LONE)] for edge in (upper, lower))
    return _path([*upper, *reversed(lower)]) + "Z"


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x},{y}" for x, y in points)


def _describe(line: Line, series: Series, whole: bool, peak: float) -> str:
    first, last = (figure(line.values[i].mean, whole, peak) for i in (0, -1))
    name = line.label if len(series.runs) == 1 else f"{line.label}, mean of {series.members}"
    span = range_text(line.values[-1], series, whole, peak)
    end = f"{last} at step {line.steps[-1]}" + (f" ({span})" if span else "")
    return f"{name}: {end}" if len(line.steps) == 1 else f"{name}: from {first} at step {line.steps[0]} to {end}"
