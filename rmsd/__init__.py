"""Relevance-Masked Self-Distillation: the method, on top of rmsd_kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .judge import CachedJudge, Candidate, ContextJudge, ContrastJudge, Judge, LLMJudge, MagnitudeJudge, Question
    from .loss import LinearRMSDLoss, RMSDLoss
    from .tasks import Task, load_task
    from .training.config import RMSDConfig
    from .training.trainer import RMSDTrainer

_HOME = {
    "RMSDLoss": "loss",
    "LinearRMSDLoss": "loss",
    "RMSDConfig": "training.config",
    "RMSDTrainer": "training.trainer",
    "Judge": "judge",
    "LLMJudge": "judge",
    "ContextJudge": "judge",
    "ContrastJudge": "judge",
    "MagnitudeJudge": "judge",
    "CachedJudge": "judge",
    "Candidate": "judge",
    "Question": "judge",
    "Task": "tasks",
    "load_task": "tasks",
}
__all__ = [
    "CachedJudge",
    "Candidate",
    "ContextJudge",
    "ContrastJudge",
    "Judge",
    "LLMJudge",
    "LinearRMSDLoss",
    "MagnitudeJudge",
    "Question",
    "RMSDConfig",
    "RMSDLoss",
    "RMSDTrainer",
    "Task",
    "load_task",
]


def __getattr__(name: str) -> Any:
    # On first use: a loss alone should not cost the import of transformers.
    if name not in _HOME:
        raise AttributeError(f"module 'rmsd' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
