"""docs/learning_tables.md's tables and figures, from the runs' marks. What they show is said in docs/learning.md."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from .marks import at_level, at_the_end, by_label, chosen, interval, largest_fall, steps_to_most

PAGE, FIGURES = Path("docs/learning_tables.md"), Path("docs/learning")

NAMES = {
    "sft_templates": "SFT, templates",
    "sft_own": "SFT, own told answers",
    "rl": "RL, sparse reward",
    "opsd": "OPSD",
    "rmsd_magnitude": "RMSD, magnitude judge",
    "rmsd_context": "RMSD, context judge",
    "rmsd_topic": "RMSD, context judge on topic",
    "rmsd_contrast": "RMSD, contrast judge",
    "rmsd_contrast_topic": "RMSD, contrast judge on topic",
    "rmsd_oracle": "RMSD, oracle judge",
    "opsd_anchors": "OPSD, anchors",
    "rmsd_context_anchors": "RMSD, context judge, anchors",
    "rmsd_contrast_anchors": "RMSD, contrast judge, anchors",
    "rmsd_oracle_anchors": "RMSD, oracle judge, anchors",
}
COLUMNS = {  # heading: (metric, digits)
    "target": ("target", 2),
    "target only": ("target_only", 2),
    "specificity": ("specificity", 3),
    "facts": ("facts", 3),
    "skills": ("skills", 3),
    "told style": ("style", 2),
    "drift": ("drift", 3),
}


def cell(values: list[float | None], digits: int, sign: str = "-") -> str:
    """`sign`: "+" where that of a positive number is to be seen as well."""
    found = [value for value in values if value is not None]
    if not found:
        return "never"
    middle, low, high = (f"{round(value, digits) + 0.0:{sign}.{digits}f}" for value in interval(found))
    text = middle if low == high else f"{middle} [{low}, {high}]"
    return text if len(found) == len(values) else f"{text} ({len(found)} of {len(values)})"


MARKS = ("target_only", "facts", "style", "skills", "drift")


def compared(told: list[dict], results: list[dict], early: int) -> dict[str, str]:
    """Sections of the comparison: the told models themselves; every method at every rate; then, each at the rate that
    is chosen for it, the methods at the end, at the step `early`, and at an equal target, without continuation; those
    that were continued; RMSD less OPSD, at those rates and at one rate for all; and what was published beside it."""
    picked = chosen(results)
    once = [result for result in picked if not result["label"].endswith("+")]
    after = [result for result in picked if result["label"].endswith("+")]
    rates = sorted({result["options"]["learning_rate"] for result in results})
    at = {rate: [result for result in results if result["options"]["learning_rate"] == rate] for rate in rates}
    return {
        "told": told_table(told),
        "rates": rate_table(results, picked),
        "end": main_table(once, first=True),
        "early": main_table(once, lambda marks: next(mark for mark in marks if mark["step"] == early)),
        "level": main_table(once, at_level),
        "figure": curves(once, "methods.svg", MARKS),
        "continued": main_table(after),
        "figure continued": curves(after, "continued.svg", MARKS),
        "paired": paired_table(picked),
        "one rate": "\n\n".join(f"At {rate:g}:\n\n{paired_table(found)}" for rate, found in at.items()),
        "published": published_table(picked),
    }


def ablated(results: list[dict]) -> dict[str, str]:
    """A section a group of settings: a figure, and its numbers."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        group, setting = result["label"].split(": ", 1)
        groups.setdefault(group, []).append({**result, "label": setting})
    return {
        group: bars(settings, f"{group.replace(' ', '_')}.svg", MARKS) + "\n\n" + setting_table(settings)
        for group, settings in groups.items()
    }


def setting_table(results: list[dict]) -> str:
    """A row a setting: means over seeds at the end, and target only on each seed."""
    truncated = any(result["marks"][-1]["tail_mass"] > 0 for result in results)
    more = ["tail mass"] * truncated + ["tokens trained on", "target only by seed"]
    lines = [_row(["setting", *COLUMNS, *more]), _row(["---"] * (1 + len(COLUMNS) + len(more)))]
    for setting, runs in by_label(results).items():
        at = [marks[-1] for marks in runs]
        cells = [f"{mean(mark[name] for mark in at):.{digits}f}" for name, digits in COLUMNS.values()]
        cells += [f"{mean(mark['tail_mass'] for mark in at):.3f}"] * truncated
        tokens, each = mean(mark["tokens"] for mark in at), (f"{mark['target_only']:.2f}" for mark in at)
        lines.append(_row([name_of(setting), *cells, f"{tokens:.0f}", ", ".join(each)]))
    return "\n".join(lines)


def main_table(results: list[dict], marks_at: Callable = at_the_end, first: bool = False) -> str:
    """A row a method; mean [95% bootstrap interval over seeds]. `first`: and a row of the base models."""
    more = ["steps to 80%", "largest fall", "loss spread", "tokens trained on", "seconds"]
    lines = [_row(["method", *COLUMNS, *more]), _row(["---"] * (1 + len(COLUMNS) + len(more)))]
    if first:
        starts = [run[0] for run in next(iter(by_label(results).values()))]
        cells = [cell([mark[metric] for mark in starts], digits) for metric, digits in COLUMNS.values()]
        lines.append(_row(["before training", *cells, *([""] * len(more))]))
    for label, marks in by_label(results).items():
        at = [marks_at(run) for run in marks]
        cells = [cell([mark and mark[metric] for mark in at], digits) for metric, digits in COLUMNS.values()]
        cells += [
            cell([steps_to_most(run) for run in marks], 0),
            cell([largest_fall(run) for run in marks], 2),
            _spread([mark["loss"] for mark in at if mark]),
            cell([mark and mark["tokens"] for mark in at], 0),
            cell([mark and mark["seconds"] for mark in at], 1),
        ]
        lines.append(_row([name_of(label), *cells]))
    return "\n".join(lines)


PAIRS = {  # row: RMSD and OPSD under the same conditions
    "context judge": ("rmsd_context", "opsd"),
    "context judge on topic": ("rmsd_topic", "opsd"),
    "contrast judge": ("rmsd_contrast", "opsd"),
    "contrast judge on topic": ("rmsd_contrast_topic", "opsd"),
    "magnitude judge": ("rmsd_magnitude", "opsd"),
    "oracle judge": ("rmsd_oracle", "opsd"),
    "context judge, continued": ("rmsd_context+", "opsd+"),
    "context judge on topic, continued": ("rmsd_topic+", "opsd+"),
    "contrast judge, continued": ("rmsd_contrast+", "opsd+"),
    "contrast judge on topic, continued": ("rmsd_contrast_topic+", "opsd+"),
    "magnitude judge, continued": ("rmsd_magnitude+", "opsd+"),
    "oracle judge, continued": ("rmsd_oracle+", "opsd+"),
    "context judge, anchors": ("rmsd_context_anchors", "opsd_anchors"),
    "contrast judge, anchors": ("rmsd_contrast_anchors", "opsd_anchors"),
    "contrast judge, anchors, continued": ("rmsd_contrast_anchors+", "opsd_anchors+"),
    "context judge, anchors, continued": ("rmsd_context_anchors+", "opsd_anchors+"),
}


def paired_table(results: list[dict]) -> str:
    """A row a pair that was run: RMSD less OPSD on the same base and lesson at the end, mean [95% bootstrap interval
    over seeds]. Seeds differ more than methods, which this is free of."""
    runs = by_label(results)
    lines = [_row(["RMSD less OPSD", *COLUMNS, "steps to 80%"]), _row(["---"] * (2 + len(COLUMNS)))]
    for name, labels in PAIRS.items():
        if not all(label in runs for label in labels):
            continue
        pairs = list(zip(*(runs[label] for label in labels), strict=True))
        cells = [
            cell([a[-1][metric] - b[-1][metric] for a, b in pairs], digits, sign="+")
            for metric, digits in COLUMNS.values()
        ]
        steps = [(steps_to_most(a), steps_to_most(b)) for a, b in pairs]
        cells.append(cell([a - b if a and b else None for a, b in steps], 0, sign="+"))
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


# Qwen3-4B on "pinapple": target, target only, specificity, GSM8K. Second-hand, from a public research note on
# "Bringing Capabilities in Distribution via Relevance-Masked Self-Distillation" (Applied Compute, 2026).
PUBLISHED = {
    "base": ("0", "0", "1", "0.933"),
    "SFT": ("0.700", "0.670", "1.000", "0.895"),
    "OPSD": ("0.980", "0.430", "0.930", "0.930"),
    "RMSD": ("0.970", "0.470", "1.000", "0.940"),
    "OPSD, continued": ("1.000", "0.480", "0.650", "0.925"),
    "RMSD, continued": ("1.000", "0.740", "0.935", "0.940"),
}
BESIDE_PUBLISHED = ("sft_own", "opsd", "rmsd_oracle", "rmsd_contrast_topic", "rmsd_topic", "rmsd_context")


def published_table(results: list[dict]) -> str:
    """What was published of Qwen3-4B, and a row for each of these models' methods, at the end; then both continued."""
    runs, digits = by_label(results), dict(COLUMNS.values())
    lines = [_row(["", "target", "target only", "specificity", "GSM8K; skills", "drift"]), _row(["---"] * 6)]
    for continued in (False, True):
        named = {name: cells for name, cells in PUBLISHED.items() if name.endswith("continued") is continued}
        lines += [_row([f"published: {name}", *cells, ""]) for name, cells in named.items()]
        for label in (name + "+" * continued for name in BESIDE_PUBLISHED):
            metrics = ("target", "target_only", "specificity", "skills", "drift")
            cells = (cell([marks[-1][metric] for marks in runs[label]], digits[metric]) for metric in metrics)
            lines.append(_row([f"here: {name_of(label)}", *cells]))
    return "\n".join(lines)


def told_table(told: list[dict]) -> str:
    """A row a seed: the base model's own marks when it reads the hint, which is the teacher before continuation."""
    names = [name for name in COLUMNS if name not in ("skills", "drift")]  # neither is asked under a hint
    lines = [_row(["seed", *names]), _row(["---"] * (1 + len(names)))]
    for marks in told:
        lines.append(_row([str(marks["seed"]), *(f"{marks[COLUMNS[n][0]]:.{COLUMNS[n][1]}f}" for n in names)]))
    means = (f"{mean(marks[COLUMNS[n][0]] for marks in told):.{COLUMNS[n][1]}f}" for n in names)
    return "\n".join([*lines, _row(["mean", *means])])


def rate_table(results: list[dict], picked: list[dict]) -> str:
    """A row a method and rate: means over seeds at the end, and for how many seeds the rate is chosen."""
    names = ("target_only", "specificity", "facts", "skills", "drift")
    digits = dict(COLUMNS.values())
    lines = [_row(["method", "learning rate", *(name.replace("_", " ") for name in names), "chosen for"])]
    lines.append(_row(["---"] * (3 + len(names))))
    runs: dict[tuple[str, float], list[dict]] = {}
    for result in results:
        runs.setdefault((result["label"], result["options"]["learning_rate"]), []).append(result)
    for (label, rate), found in runs.items():
        means = (mean(run["marks"][-1][name] for run in found) for name in names)
        values = (
            f"{round(value, digits[name]) + 0.0:.{digits[name]}f}" for name, value in zip(names, means, strict=True)
        )
        lines.append(_row([name_of(label), f"{rate:g}", *values, str(sum(run in picked for run in found))]))
    return "\n".join(lines)


def name_of(label: str) -> str:
    name = NAMES.get(label.rstrip("+"), label.rstrip("+"))
    return f"{name}, continued" if label.endswith("+") else name


def curves(results: list[dict], file: str, metrics: tuple[str, ...]) -> str:
    """A panel a metric, a line a label: the seeds' mean with their range. A method with anchors has the colour of the
    same without, and dashes."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.2), squeeze=False)
    colours = list(dict.fromkeys(label.replace("_anchors", "") for label in by_label(results)))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for label, runs in by_label(results).items():
            steps = [mark["step"] for mark in runs[0]]
            values = [[run[i][metric] for run in runs] for i in range(len(steps))]
            color = f"C{colours.index(label.replace('_anchors', ''))}"
            dashes = "--" if "_anchors" in label else "-"
            axis.plot(steps, [mean(v) for v in values], dashes, label=name_of(label), lw=1.5, color=color)
            ends = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, *ends, alpha=0.05, lw=0, color=color)
        axis.set(title=metric.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, file)


def bars(results: list[dict], file: str, metrics: tuple[str, ...]) -> str:
    """A panel a metric, a bar a label, at the end: mean and 95% interval over seeds."""
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(3.0 * len(metrics) + 1.5, 0.32 * len(by_label(results)) + 1), sharey=True
    )
    for axis, metric in zip(axes, metrics, strict=True):
        for number, runs in enumerate(by_label(results).values()):
            middle, low, high = interval([run[-1][metric] for run in runs], 1000)
            axis.barh(number, middle, color="C0", xerr=[[middle - low], [high - middle]])
        axis.set(title=metric.replace("_", " "))
        axis.set_yticks(range(len(by_label(results))), [name_of(label) for label in by_label(results)], fontsize=7)
    axes[0].invert_yaxis()
    return _save(figure, file)


def _spread(losses: list[float | None]) -> str:
    """Standard deviation between seeds, as a share of the mean: losses of different methods have different scales."""
    losses = [loss for loss in losses if loss is not None]
    return f"{stdev(losses) / mean(losses):.2f}" if len(losses) > 1 and mean(losses) else ""


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _save(figure, file: str) -> str:
    FIGURES.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "rmsd"  # the same figure gives the same file
    figure.tight_layout()
    figure.savefig(FIGURES / file, metadata={"Date": None})
    plt.close(figure)
    return f"![{file}](learning/{file})"
