"""Behaviours to teach, one file each, which defines `TASK`: a module of this package, or a file of your own."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import defined_in


@dataclass(frozen=True)
class Task:
    """What to train on and how to tell whether it was learned: by graders of an answer's text or, of a task with an
    environment, by what the environment's `get_reward` says of a whole rollout, which is solved at 1."""

    train: Sequence[dict]  # rows (answers.data), as `told` makes them; an empty context makes an anchor row
    target_prompts: Sequence[str]  # held out: the behaviour is wanted here
    unrelated_prompts: Sequence[str]  # held out: it is not wanted here
    graders: Mapping[str, Callable[[str], bool]]  # of an answer to a target prompt; the first is the target itself
    leaks: Callable[[str], bool]  # of an answer to an unrelated prompt: does it show the behaviour all the same?
    environment: Callable[[], Any] | None = None  # answers.environments: makes one for each rollout
    requests: Sequence[dict] = ()  # with an environment, in place of target_prompts: rows like those of `train`

    def __post_init__(self):
        """Raises ValueError: an evaluation would have nothing to say whether the behaviour was learned."""
        if not (self.graders or self.requests):
            raise ValueError("a Task needs graders, or requests to its environment: by neither is anything evaluated")
        if self.graders and not self.target_prompts:
            raise ValueError("a Task with graders needs target_prompts: it is their answers that are graded")


def told(prompt: str, context: str, contrast: str) -> dict:
    """A row whose teacher is told something, and what it is told instead, in the same form, where a contrast judge asks
    whether its wish would be another."""
    return {"prompt": prompt, "privileged_context": context, "contrast_context": contrast}


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_task(name: str) -> Task:
    """The TASK of a module of this package, or of the Python file that a name ending in .py is the path of.

    Raises:
        FileNotFoundError, ValueError: there is no such module or file, or it fails, or it defines no TASK.
    """
    if name.endswith(".py"):
        task = defined_in(name, "task").get("TASK")
        if not isinstance(task, Task):
            raise ValueError(f"task file {name} must define TASK, a rmsd.tasks.Task, not {type(task).__name__}")
        return task
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task {name!r} does not exist (there are: {', '.join(names())}){hint}")
    return importlib.import_module(f"{__name__}.{name}").TASK
