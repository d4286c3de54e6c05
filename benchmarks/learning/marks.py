"""What the marks of runs come to: numbers of one run, an interval over seeds, and which run speaks for a method."""

from statistics import mean

import torch

LEVEL = 0.6  # of target_only, where methods are compared at an equal target


def at_the_end(marks: list[dict]) -> dict:
    return marks[-1]


def at_level(marks: list[dict]) -> dict | None:
    """The first exam with the target level reached; None where none has."""
    return next((mark for mark in marks if mark["target_only"] >= LEVEL), None)


def until_drift(marks: list[dict], max_drift: float | None) -> list[dict]:
    """Up to and with the first exam whose drift exceeds it, or is no number: there DriftLimit ends training."""
    ends = (i for i, mark in enumerate(marks) if max_drift is not None and not mark["drift"] <= max_drift)
    return marks[: next(ends, len(marks)) + 1]


def steps_to_most(marks: list[dict]) -> int | None:
    """Steps to 80% of the final target (the mean of the last two exams); None where it is nothing."""
    final = mean(mark["target_only"] for mark in marks[-2:])
    return next((mark["step"] for mark in marks if mark["target_only"] >= 0.8 * final), None) if final > 0.05 else None


def largest_fall(marks: list[dict]) -> float:
    """Of the target, from any exam to any later one: 0 for a run that only rises."""
    values = [mark["target_only"] for mark in marks]
    return max(max(values[:end]) - values[end] for end in range(1, len(values)))


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and the 95% bootstrap interval over seeds."""
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(1).sort().values
    return mean(values), means[int(0.025 * draws)].item(), means[int(0.975 * draws)].item()


def chosen(results: list[dict]) -> list[dict]:
    """One run a label and seed: at the rate with the largest product of target, facts and skills at the end, in the
    mean of the label's *other* seeds, so that no seed's own marks choose its rate. What is wanted is the target and
    nothing else lost. Ties go to the lower rate."""

    def score(result: dict) -> float:
        last = result["marks"][-1]
        return last["target_only"] * last["facts"] * last["skills"]

    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["label"], []).append(result)
    picked = []
    for runs in groups.values():
        rates = sorted({run["options"]["learning_rate"] for run in runs})
        for seed in dict.fromkeys(run["seed"] for run in runs):
            others = {
                rate: mean(
                    score(run) for run in runs if run["seed"] != seed and run["options"]["learning_rate"] == rate
                )
                for rate in rates
            }
            best = max(rates, key=others.get)
            picked += [run for run in runs if run["seed"] == seed and run["options"]["learning_rate"] == best]
    return picked


def by_label(results: list[dict]) -> dict[str, list[list[dict]]]:
    runs: dict[str, list[list[dict]]] = {}
    for result in results:
        runs.setdefault(result["label"], []).append(result["marks"])
    return runs
