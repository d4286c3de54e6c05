"""What the answers of a recipe's run may call."""

from typing import Any

from ..answers.environments import Environments, load_environment
from ..tasks import Task, load_task
from ..training.config import RMSDConfig
from .recipe import Recipe


def callable_of(recipe: Recipe, task: Task | None) -> dict[str, Any]:
    """What answers may call, as `Environments` and the trainer take it: of the recipe's environment, or else of the
    task; empty where answers are one turn."""
    if recipe.environment and recipe.environment.endswith(".py"):
        return load_environment(recipe.environment)
    task = load_task(recipe.environment) if recipe.environment else task
    if task is None or task.environment is None:
        if recipe.environment:
            raise ValueError(f"environment {recipe.environment!r}: this task has none")
        if task is not None and not task.graders:
            raise ValueError(
                f"task {recipe.task!r} has requests and no environment to answer them: name one in its Task"
            )
        return {}
    return dict(environment_factory=task.environment)


def environments_of(called: dict[str, Any], args: RMSDConfig) -> Environments | None:
    """None where answers are one turn."""
    return Environments(**called, limits=args.tool_limits) if called else None
