"""The recorded answers as the page's data: cut to size, sampled evenly where there are too many."""

from collections.abc import Callable, Sequence
from typing import Any

from .runs import Run, number

MAX_TEXT = 20_000  # characters of a prompt or context
MAX_TOKENS = 2_000  # of an answer
MAX_TOKEN_TEXT = 100  # characters


def fitting(runs: Sequence[Run], room: int, size: Callable[[dict], int]) -> tuple[int, dict[str, Any]]:
    """As many rollouts as have room, evenly spaced over all; how many, and their data."""
    everything = [(r, rollout) for r, run in enumerate(runs) for rollout in run.rollouts]
    count = len(everything)
    while True:
        last = max(count - 1, 1)
        data = as_data([everything[round(i * (len(everything) - 1) / last)] for i in range(count)])
        if not count or (taken := size(data)) <= room:
            return count, data
        count = int(count * min(0.95, 0.98 * max(room, 0) / taken))


def as_data(chosen: list[tuple[int, dict]]) -> dict[str, Any]:
    texts: dict[str, int] = {}  # prompts and contexts recur: each is stored once

    def text(value: str) -> int:
        return texts.setdefault(shorten(value), len(texts))

    rollouts = []
    for run, rollout in chosen:
        shown = range(min(len(rollout["tokens"]), MAX_TOKENS))
        rollouts.append(
            {
                "run": run,
                "step": rollout["step"],
                "prompt": text(rollout["prompt"]),
                "context": text(rollout["privileged_context"]),
                "teacher_prompt": text(rollout.get("teacher_prompt", "")),
                "length": len(rollout["tokens"]),
                "tokens": [shorten(rollout["tokens"][i], MAX_TOKEN_TEXT) for i in shown],
                "student": [_round(rollout["student_logprob"][i]) for i in shown],
                "teacher": [_round(rollout["teacher_logprob"][i]) for i in shown],
                "divergence": [_round(rollout["divergence"][i]) for i in shown] if "divergence" in rollout else None,
                "candidates": rollout["candidates"],
                "kept": rollout["kept"],
                "unwritten": rollout.get("unwritten", []),
                "guided": rollout.get("guided") is True,
                # Of candidates, by position; none where nothing was read under a contrast context.
                "contrast": {at: _round(nats) for at, nats in rollout["contrast"].items()}
                if "contrast" in rollout
                else None,
                "episode": {
                    shorten(name, MAX_TOKEN_TEXT): count
                    for name, count in rollout.get("episode", {}).items()
                    if number(count) is not None
                },
                "preferred": {
                    position: shorten(token, MAX_TOKEN_TEXT)
                    for position, token in rollout.get("preferred", {}).items()
                    if isinstance(token, str)
                },
            }
        )
    return {"texts": list(texts), "rollouts": rollouts, "scale": _scale(rollouts)}


def _scale(rollouts: list[dict]) -> float:
    """The gap, in nats, at which colour saturates: near the 98th percentile, so that one outlier does not pale all."""
    gaps = sorted(
        abs(teacher - student)
        for rollout in rollouts
        for student, teacher in zip(rollout["student"], rollout["teacher"], strict=True)
        if student is not None and teacher is not None
    )
    wide = gaps[int(0.98 * (len(gaps) - 1))] if gaps else 1.0
    return next((s for s in (1.0, 2.0, 4.0, 6.0, 8.0) if wide <= s), 10.0)


def _round(value: Any) -> float | None:
    value = number(value)
    return None if value is None else float(f"{value:.4g}")


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"
