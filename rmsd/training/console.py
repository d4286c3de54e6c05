"""What a person at a terminal sees of a run: one line a log entry, in place of a dict between two progress bars."""

import sys
import time
from collections import deque

from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

RECENT = 10  # log entries that the time left is told from: a step's length changes as answers do


class TerminalLog(TrainerCallback):
    """Prints a line a log entry: step, loss, kept tokens of candidates, the target as last evaluated, tokens written a
    second, the time left, and what a model that judges was asked; and a line an evaluation.

    Args:
        console: where to; by default stdout.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.target: float | None = None
        self._times: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)  # (step, when it was logged)

    def on_train_begin(self, args, state, control, **kwargs):
        self._began(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._began(state)  # the minutes that it took are no step's

    def _began(self, state) -> None:
        """From here on steps are timed anew, at the pace of those before."""
        now = time.monotonic()
        if self._times:
            away = now - self._times[-1][1]
            self._times = deque(((step, at + away) for step, at in self._times), RECENT + 1)
        else:
            self._times.append((state.global_step, now))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            self.console.print(f"trained to step {state.global_step} in {_clock(logs['train_runtime'])}", style="bold")
        elif "continuation" in logs:
            self.console.print(f"the student becomes the teacher (continuation {logs['continuation']})", style="bold")
        elif "rolled_back_from" in logs:
            back = f"rolled back from step {logs['rolled_back_from']} to step {state.global_step}, at half the rate"
            self.console.print(back, style="bold")
        elif "loss" in logs:
            self.console.print(self._step(state, logs))
        else:
            self.console.print(self._evaluation(state, logs))

    def _step(self, state, logs: dict) -> Text:
        now = time.monotonic()
        before = self._times[-1] if self._times else (state.global_step, now)
        self._times.append((state.global_step, now))
        (first, began), seconds = self._times[0], now - before[1]
        per_step = (now - began) / max(state.global_step - first, 1)
        parts = [
            ("", f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"),
            ("loss", f"{logs['loss']:<9.4g}"),
            ("kept", f"{logs.get('kept_tokens', 0):.0f} of {logs.get('candidates', 0):.0f}"),
            ("target", "-" if self.target is None else f"{self.target:.2f}"),
            ("", f"{logs.get('rollout_tokens', 0) / max(seconds, 1e-9):.0f} tokens/s"),
            ("", f"{_clock(per_step * (state.max_steps - state.global_step))} left"),
        ]
        if "judge_requests" in logs:
            parts.append(("judge", f"{logs['judge_requests']:.0f} requests, {logs.get('judge_tokens', 0):.0f} tokens"))
        line = _line("step", parts)
        for name in ("skipped_steps", "nonfinite_rows"):
            if logs.get(name):
                line.append(f"  {name.replace('_', ' ')} {logs[name]:.0f}", style="red")
        return line

    def _evaluation(self, state, logs: dict) -> Text:
        metrics = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        self.target = next((value for name, value in metrics.items() if name.endswith("_greedy")), self.target)
        parts = [(name.replace("_", " "), f"{value:.3g}") for name, value in metrics.items()]
        line = _line(f"evaluated at step {state.global_step}", parts)
        line.stylize("cyan")
        return line


def _line(head: str, parts: list[tuple[str, str]]) -> Text:
    """Names dim, values plain."""
    line = Text(head + " ", style="")
    for i, (name, value) in enumerate(parts):
        line.append("  " if i else "")
        if name:
            line.append(f"{name} ", style="dim")
        line.append(value)
    return line


def _clock(seconds: float) -> str:
    """83 is 1:23, 4000 is 1:06:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show_lines(trainer) -> None:
    """On a terminal `trainer` logs by lines. In a pipe, in a notebook, and with `disable_tqdm` all stays with Trainer:
    the plain records."""
    plain = next((c for c in trainer.callback_handler.callbacks if type(c) is ProgressCallback), None)
    if plain is not None and sys.stdout.isatty():
        trainer.remove_callback(plain)
        trainer.add_callback(TerminalLog())
