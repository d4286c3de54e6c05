"""Behaviours to teach, one file each: a module of this package that defines `TASK`."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What to train on and how to tell whether it was learned."""

    train: Sequence[dict]  # rows of prompt and privileged_context; an empty context makes an anchor row
    target_prompts: Sequence[str]  # held out: the behaviour is wanted here
    unrelated_prompts: Sequence[str]  # held out: it is not wanted here
    graders: Mapping[str, Callable[[str], bool]]  # of an answer to a target prompt; the first is the target itself
    leaks: Callable[[str], bool]  # of an answer to an unrelated prompt: does it show the behaviour all the same?


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_task(name: str) -> Task:
    """Raises ValueError for a name that is no module of this package."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task {name!r} does not exist (there are: {', '.join(names())}){hint}")
    return importlib.import_module(f"{__name__}.{name}").TASK
