"""What several processes must do together. With one process everything here does nothing."""

import contextlib

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule

from . import zero
from .parts import head_module


@contextlib.contextmanager
def whole(model: nn.Module):
    """Every weight of a model sharded by FSDP2 or DeepSpeed ZeRO-3, gathered once for as long as this is open: an
    answer is hundreds of forwards, each of which would gather them again, and ranks whose answers end early would have
    to wait for the rest. All ranks enter together. A model that is not sharded is left as it is."""
    if any(map(zero.is_partitioned, model.parameters())):
        with zero.gathered(model):
            yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        head = head_module(model).weight if units else None
        owners = [unit for unit in units if any(parameter is head for parameter in unit.parameters())]
        # The loss reads the head's weight after the forward, so what owns it stays whole until the backward. A unit of
        # several modules counts as one of the head's owners if any of them is: the last setting stands.
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
        for unit in owners:
            unit.set_reshard_after_forward(False, recurse=False)
        for unit in units:
            unit.reshard()


def check_sharding(accelerator, args) -> bool:
    """Whether the model is to be sharded: by args.fsdp, or by `accelerate launch --use_fsdp`. Only FSDP2 is, among CPU
    processes too: it works over gloo, but accelerate's state knows FSDP for accelerators only and would train whole
    copies (DDP) without a word.

    Raises:
        ValueError: FSDP1 is asked for, there is one process, or DeepSpeed is asked for on CPUs, where accelerate would
            train without it as quietly.
    """
    if args.deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError("deepspeed needs GPUs, and torchrun or accelerate launch: on CPUs use DDP or fsdp")
    if not args.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    plugin = plugin or FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if plugin.fsdp_version != 2:
        raise ValueError("fsdp_config.version (--fsdp_version) must be 2: FSDP1's flat weights are no head")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_config.cpu_ram_efficient_loading (--fsdp_cpu_ram_efficient_loading) must be false: with it only the "
            "first process has the weights that the teacher is copied from"
        )
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    elif accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("fsdp needs several processes: start with torchrun or accelerate launch")
    return True


def check_sharded_teacher(has_adapter: bool, args, trained_before: bool = False) -> None:
    """Raises ValueError where the teacher would be an adapter beside the student's: one added after the sharding has
    no shards, and neither is saved whole."""
    moves = args.teacher == "ema" or args.continuation_steps or args.continuation_metric
    if has_adapter and (moves or trained_before):
        raise ValueError(
            "fsdp and ZeRO-3 cannot keep a second adapter for the teacher: use DDP, or no ema, no continuation and "
            "a new adapter"
        )


def as_rank_zero(values: dict) -> dict:
    """Rank 0's `values` on every rank, so that what follows from them is decided alike."""
    return broadcast_object_list([values])[0]


def most_of_ranks(counts: list[int], accelerator) -> list[int]:
    """Each count's largest value on any rank."""
    if accelerator.num_processes == 1:
        return counts
    return accelerator.gather(torch.tensor([counts], device=accelerator.device)).amax(0).tolist()
