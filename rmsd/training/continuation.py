"""How the teacher follows the student: by a moving average, or by continuation, in which the student becomes the
teacher once training has plateaued, and training goes on."""

import difflib
import math
from collections.abc import Callable, Sequence

from transformers import TrainerCallback

from ..answers.teacher import Teacher
from ..tasks import Task

# What every step logs, Trainer's own rate and norm apart.
STEP_METRICS = (
    "loss",
    "divergence",
    "tail_mass",
    "candidates",
    "kept_tokens",
    "kept_sequences",
    "rollout_tokens",
    "empty_rollouts",
    "nonfinite_rows",
    "skipped_steps",
    "prepare_seconds",
    "judge_seconds",
    "student_entropy",
    "anchor_divergence",
    "repetition",
    "clipped_share",
)
# Of each step whose rollouts may call something; and of the evaluation of a task's environment (run.solving).
EPISODE_METRICS = ("turns", "calls", "tool_errors", "dropped_rollouts", "solved")
SOLVING_METRICS = ("solved", "turns", "tokens", "tool_errors")
# Of these and of graders, larger is better but for what training lowers, and but for what says nothing of the model.
_LOWERED = ("loss", "divergence", "drift", "tail_mass", "repetition", "clipped_share", "tool_errors")
_LOWERED += ("empty_rollouts", "dropped_rollouts", "nonfinite_rows", "skipped_steps")
_NEITHER = ("candidates", "kept_tokens", "kept_sequences", "rollout_tokens", "tokens", "turns", "calls")
_NEITHER += ("student_entropy", "prepare_seconds", "judge_seconds")


def logged(task: Task | None, samples: int, calls: bool = False) -> tuple[str, ...]:
    """The metrics of a run's log: of each step, and of the task's evaluation (run.evaluate) with so many samples.
    `calls`: rollouts are written by the student, and may call something."""
    of_a_step = (*STEP_METRICS, *(EPISODE_METRICS if calls else ()))
    if task is None:
        return of_a_step
    graders = [*(SOLVING_METRICS if task.environment else ()), *task.graders]
    graded = [f"{name}_{how}" for name in graders for how in ("greedy", "sampled")[: 2 if samples else 1]]
    return (*of_a_step, *(f"eval_{name}" for name in (*graded, "specificity", "drift", "score")))


def lower_is_better(metric: str) -> bool:
    return _of(metric).endswith(_LOWERED)


def _of(metric: str) -> str:
    return metric.removeprefix("eval_").removesuffix("_greedy").removesuffix("_sampled")


def check_metric(
    metric: str, task: Task | None, samples: int, argument: str = "continuation_metric", calls: bool = False
) -> None:
    """
    Raises:
        ValueError: the run will not log what `argument` names, and so would never continue, or choose a checkpoint; or
            it says nothing of whether the model has become better.
    """
    known = logged(task, samples, calls)
    if metric in known:
        if _of(metric) in _NEITHER:
            raise ValueError(f"{argument} {metric!r} is neither better nor worse for being larger: name another")
        return
    if task is None and metric.startswith("eval_"):
        raise ValueError(f"{argument} {metric!r} needs a task: without one nothing is evaluated")
    near = difflib.get_close_matches(metric, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(known)})"
    raise ValueError(f"{argument} {metric!r} is not logged by this run{hint}")


def has_plateaued(history: Sequence[dict], metric: str, patience: int, min_delta: float) -> bool:
    """Whether `metric`'s last `patience` entries since the last continuation brought no improvement of more than
    `min_delta`. Lower is better for losses, drift, errors and signs of bad health, higher for everything else. A step
    counts once: evaluated again where a run is resumed, it has not waited any longer. The step of the continuation
    itself was made with the teacher before, whose loss the next one's cannot be held against."""
    begun = max((entry["step"] for entry in history if "continuation" in entry), default=-1)
    sign = -1 if lower_is_better(metric) else 1
    first_of_step: dict[int, float] = {}
    for entry in history:
        if metric in entry and entry["step"] > begun:
            first_of_step.setdefault(entry["step"], sign * entry[metric])
    best, waited = -math.inf, 0  # which a first value improves on, unless it is NaN
    for value in first_of_step.values():
        best, waited = (value, 0) if value > best + min_delta else (best, waited + 1)
    return waited >= patience


class TeacherSchedule(TrainerCallback):
    """Says when. All it knows is in the log history, which travels in checkpoints, so a resumed run
    continues where the uninterrupted one would have.

    Args:
        teacher: what follows the student.
        continue_from_student: makes the student the teacher, and logs {"continuation": n}.
    """

    def __init__(self, teacher: Teacher, continue_from_student: Callable[[], None]):
        self.teacher, self.continue_from_student = teacher, continue_from_student

    def on_step_end(self, args, state, control, **kwargs):
        if args.teacher == "ema":
            self.teacher.average(args.ema_decay)
        if state.global_step in args.continuation_steps:
            self.continue_from_student()

    def on_log(self, args, state, control, logs=None, **kwargs):
        metric, history = args.continuation_metric, state.log_history
        if metric is None or metric not in (logs or {}):
            return
        by_step = set(args.continuation_steps)
        done = sum("continuation" in entry and entry["step"] not in by_step for entry in history)
        if done < args.max_continuations and has_plateaued(
            history, metric, args.continuation_patience, args.continuation_min_delta
        ):
            self.continue_from_student()
