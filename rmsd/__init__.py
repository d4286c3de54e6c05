"""Relevance-Masked Self-Distillation: the method, on top of rmsd_kernels."""

import importlib

_HOME = {
    "RMSDLoss": "loss",
    "LinearRMSDLoss": "loss",
    "RMSDConfig": "training.config",
    "RMSDTrainer": "training.trainer",
    "Judge": "judge",
    "LLMJudge": "judge",
    "ContextJudge": "judge",
    "MagnitudeJudge": "judge",
    "CachedJudge": "judge",
}
__all__ = list(_HOME)


def __getattr__(name):
    # On first use: a loss alone should not cost the import of transformers.
    if name not in _HOME:
        raise AttributeError(f"module 'rmsd' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
