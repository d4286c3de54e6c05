"""`write_report`: one self-contained HTML page about a run, or about several side by side.

Prompts, answers and recipes are untrusted text. The template escapes everything; what the script needs travels as JSON
in which no "<" occurs; the script makes text nodes only; and a Content-Security-Policy admits the page's own style and
script by their hashes, so that nothing else could run or be fetched if all of that failed.
"""

import base64
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from . import charts
from .explain import TRAIN, TRAIN_FIRST, explanation, is_share, title
from .rollouts import as_data, fitting, shorten
from .runs import Run, Series, Spread, configuration, differing, group, judge_name, read_run

__all__ = ["write_report"]

MAX_BYTES = 2_900_000  # of the page
MAX_CHARTS = 24
SCRIPTS = ("page.js", "curves.js", "tokens.js")


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the page and returns its path: `output`, or else report.html in the run's directory; for several runs,
    in the directory that holds the first of them.

    Raises:
        FileNotFoundError, ValueError: a directory holds no readable run; one line that says which and why.
    """
    if isinstance(run_dirs, str | Path):
        run_dirs = [run_dirs]
    if not run_dirs:
        raise ValueError("report needs at least one run directory")
    run_dirs = {Path(path).resolve(): path for path in run_dirs}  # a run named twice is not two seeds
    runs = [read_run(path) for path in run_dirs.values()]
    home = runs[0].path if len(runs) == 1 else runs[0].path.parent
    output = Path(output) if output else home / "report.html"
    if not output.parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: the directory {output.parent} does not exist")
    output.write_text(_page(runs), encoding="utf-8", errors="backslashreplace")
    return output


def _page(runs: list[Run]) -> str:
    series = group(runs)
    evals, train = _charts(series)
    context = {
        **_headline(runs, series),
        "runs": runs,
        "series": series,
        "notes": [(run.path.name, note) for run in runs for note in run.notes],
        "banded": any(len(one.runs) > 1 for one in series),
        "looks": [_look(i) for i in range(len(series))],
        "heads": _heads(series),
        "table": _metrics_of(series),
        "eval_charts": evals,
        "train_charts": train,
        "explain": TRAIN,
        "recipes": [(str(run.path), shorten(yaml.safe_dump(run.recipe, sort_keys=False))) for run in runs],
        "differences": _differences(series),
        "rollout_total": sum(len(run.rollouts) for run in runs),
    }
    data = {
        "geometry": {name: getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")},
        "charts": [_chart_data(chart, series) for chart in (*evals, *train)],
        "looks": context["looks"],
        "runs": _run_labels(series, runs),
    }
    bare = _render(context, {**data, **as_data([])}, 0)
    shown, rollouts = fitting(runs, MAX_BYTES - _size(bare), lambda rollouts: _size(_embeddable(rollouts)))
    return _render(context, {**data, **rollouts}, shown)


def _render(context: dict, data: dict, shown: int) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": charts.figure, "named": title}
    style = _asset("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, SCRIPTS)) + "})();\n"
    return environment.get_template("page.html").render(
        **context,
        geometry=charts,
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=Markup(_embeddable(data)),
        rollout_shown=shown,
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _size(text: str) -> int:
    return len(text.encode(errors="backslashreplace"))


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embeddable(data: Any) -> str:
    """JSON that may stand in a script element: no character in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate is legal in JSON's escapes and has no UTF-8.
    return text.encode(errors="backslashreplace").decode()


# ---- what the page says --------------------------------------------------------------------------------------------


def _headline(runs: list[Run], series: list[Series]) -> dict[str, Any]:
    def all_of(values) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    def taught(run: Run) -> str:
        return str(run.recipe.get("task") or Path(str(run.recipe.get("data") or "its data")).name)

    last = [max(line["step"] for line in (*run.train, *run.evals)) for run in runs]
    return {
        "title": all_of(taught(run) for run in runs),
        "model": all_of(run.recipe.get("model") or "A model" for run in runs),
        "methods": list(dict.fromkeys(run.method for run in runs)),
        "judges": list(dict.fromkeys(judge_name(run) for run in runs if run.method != "opsd")),
        "seeds": list(dict.fromkeys(str(run.seed) for run in runs if run.seed is not None)),
        "steps": str(min(last)) if len(set(last)) == 1 else f"{min(last)} to {max(last)}",
    }


def _metrics_of(series: list[Series]) -> list[dict[str, Any]]:
    """A row for each metric of the evaluations: before (all runs together), and after for each series."""
    names = dict.fromkeys(name for one in series for run in one.runs for line in run.evals for name in line)
    rows = []
    for name in names:
        before = [value for one in series for value in one.ends(name, last=False)]
        if name in _NOT_DRAWN or not before:
            continue
        own_before = [Spread.of(one.ends(name, last=False)) for one in series]
        after = [Spread.of(one.ends(name, last=True)) for one in series]
        values = [*before, *(value for spread in after if spread for value in (spread.low, spread.high))]
        peak = max(map(abs, values))
        ends = zip(after, series, strict=True)
        ranges = [charts.range_text(end, one, peak=peak) if end else "" for end, one in ends]
        rows.append(
            {
                "name": name,
                "title": title(name),
                "peak": peak,
                "explanation": explanation(name),
                "before": Spread.of(before),
                "after": list(zip(own_before, after, ranges, strict=True)),
                "is_share": is_share(name) and all(0 <= value <= 1 for value in values),
            }
        )
    return rows


def _heads(series: list[Series]) -> list[str]:
    """What the table says below each series' name: over how many runs, and after how many steps where that differs."""
    last = [sorted({run.evals[-1]["step"] for run in one.runs if len(run.evals) > 1}) for one in series]
    same = len(set(itertools.chain(*last))) < 2
    heads = []
    for one, steps in zip(series, last, strict=True):
        parts = [f"mean of {one.members}, range"] if len(one.runs) > 1 else []
        if steps and not same:
            parts.append(f"after {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") + " steps")
        heads.append("; ".join(parts))
    return heads


def _differences(series: list[Series]) -> list[tuple[str, list[str]]]:
    """What else than method and judge tells the series apart: a key of the recipe, and each one's value."""
    recipes = [configuration(one.runs[0].recipe) for one in series]
    keys = [key for key in differing(recipes) if key not in ("method", "judge.kind")]
    return [(key, [shorten(recipe.get(key, "not set"), 200) for recipe in recipes]) for key in keys]


def _look(index: int) -> str:
    """A series' colour and dashes: six of each, paired anew after every six series."""
    return f"s{index % 6} d{(index + index // 6) % 6}"


def _charts(series: list[Series]) -> tuple[list[charts.Chart], list[charts.Chart]]:
    made: dict[str, list[charts.Chart]] = {}
    for kind in ("evals", "train"):
        names = dict.fromkeys(
            name for one in series for run in one.runs for line in getattr(run, kind) for name in line
        )
        names = sorted(names, key=lambda name: TRAIN_FIRST.index(name) if name in TRAIN_FIRST else len(TRAIN_FIRST))
        drawn = [charts.chart(series, kind, name, is_share(name)) for name in names if name not in _NOT_DRAWN]
        made[kind] = [chart for chart in drawn if chart][:MAX_CHARTS]
    return made["evals"], made["train"]


_NOT_DRAWN = ("kind", "step", "epoch")


def _chart_data(chart: charts.Chart, series: list[Series]) -> dict[str, Any]:
    style = {"whole": chart.whole, "peak": chart.peak}
    values = [
        {
            "steps": line.steps,
            "text": [
                [charts.figure(spread.mean, **style), charts.range_text(spread, one, **style)] for spread in line.values
            ],
            "means": [float(f"{spread.mean:.6g}") for spread in line.values],
        }
        if line
        else None
        for line, one in zip(chart.lines, series, strict=True)
    ]
    return {"name": title(chart.name), "x": chart.x_span, "y": chart.y_span, "lines": values}


def _run_labels(series: list[Series], runs: list[Run]) -> list[str]:
    """Series and seed; the directory too where that would name two runs alike."""
    of = {run.path: one.label for one in series for run in one.runs}
    labels = [of[run.path] + (f", seed {run.seed}" if run.seed is not None else "") for run in runs]
    return [
        label if labels.count(label) == 1 else f"{label}, {run.path}" for label, run in zip(labels, runs, strict=True)
    ]
