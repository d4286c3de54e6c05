"""Weights that DeepSpeed ZeRO-3 keeps in parts, a part a process: made whole for what reads them past its engine.

The engine gathers a module's weights in hooks around its forward and its backward, and leaves empty tensors with a
`ds_id` between. What does not go through the engine has to gather by itself: rollouts and scores, which are hundreds of
forwards that need not be as many on every process, and the loss, which reads the head's weight after the forward.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps it in parts, and so may leave it empty."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(model: nn.Module):
    """All weights whole, once, and the engine's hooks set aside: they would let go of each after its first use, and
    wait for the other processes in every layer. All processes enter together."""
    with _gathered(model.parameters()), _without_hooks(model):
        yield


def whole_copy(parameter: Tensor) -> Tensor:
    """A copy of the whole weight, whose gradient is the weight's. All processes call together."""
    with _gathered([parameter]):
        return _Copy.apply(parameter)


@contextlib.contextmanager
def _gathered(parameters: Iterable[Tensor]):
    """Those that are whole already stay so: the engine holds them, or who has gathered them."""
    away = [p for p in parameters if is_partitioned(p) and p.ds_status.name != "AVAILABLE"]
    if not away:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(away):
        yield


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter):
        ctx.parameter = parameter
        return parameter.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        # It is added to the weight, which has to have its shape; a hook of the engine's then adds up the processes'
        # and keeps this one's part. The engine lets go of the weight before its optimizer's step.
        if ctx.parameter.ds_status.name != "AVAILABLE":
            ctx.parameter.all_gather()
        return grad


@contextlib.contextmanager
def _without_hooks(model: nn.Module):
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    hooks = [getattr(module, kind) for module in model.modules() for kind in kinds]
    own = [dict(each) for each in hooks]
    for each in hooks:
        for key, hook in list(each.items()):
            if (getattr(hook, "__module__", None) or "").startswith("deepspeed."):
                del each[key]
    try:
        yield
    finally:
        for each, its in zip(hooks, own, strict=True):
            each.clear()
            each.update(its)
