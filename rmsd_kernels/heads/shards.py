"""A head's vocabulary over the ranks of a process group: who holds which columns, and whether all ranks agree."""

import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import resolve_backend
from ..checks import check_heads, check_ids, check_rows, check_transform, check_workspace
from ..options import Options, complete_options
from .projection import Models, default_workspace_mb, row_chunks


class Shard(NamedTuple):
    group: object  # dist.ProcessGroup | None
    rank: int
    ranges: list[tuple[int, int]]  # each rank's real columns, [start, stop)

    @property
    def start(self) -> int:
        return self.ranges[self.rank][0]

    @property
    def width(self) -> int:
        return self.ranges[self.rank][1] - self.start

    def cut(self, models: Models) -> Models:
        """Without the padding's rows."""
        return models if self.width == len(models.student_weight) else models.columns(slice(self.width))

    def chunks(self, models: Models, workspace_mb: float | None) -> list[slice]:
        """The same on every rank: for the widest shard."""
        widest = max(stop - start for start, stop in self.ranges)
        workspace_mb = workspace_mb or default_workspace_mb(models.student_hidden.device.type)
        return row_chunks(len(models.student_hidden), 2 * widest, workspace_mb)

    def gather(self, partial: Tensor) -> Tensor:
        """Every rank's partial, in rank order: (...) -> (P, ...) in fp64."""
        return _all_gather(partial, self.group).double()


def agree(
    function: str,  # the public function's name
    models: Models,
    group: object,  # dist.ProcessGroup | None
    workspace_mb: float | None,
    *,
    sampled_ids: Tensor | None = None,
    rows: Tensor | None = None,
    **wanted,  # options as the caller gave them
) -> tuple[Shard, Options]:
    """Checks this rank's arguments and that they fit the others'. Raises on every rank or on none."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group: torch.distributed is not initialised: call init_process_group first, or linear_token_scores and "
            "linear_token_divergence where one process holds the whole head"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must be one that this process belongs to")
    error, last_id, shared = None, -1, {}
    try:
        heads = models._asdict()
        del heads["shared"]
        check_heads(**heads)
        check_workspace(workspace_mb)
        check_transform(wanted["logit_scale"], wanted["softcap"])
        hidden, leading, device = models.student_hidden, models.student_hidden.shape[:-1], models.student_hidden.device
        if sampled_ids is not None:
            check_ids(sampled_ids, leading, device, torch.iinfo(torch.int64).max)
            if device.type == "cpu" and sampled_ids.numel():
                last_id = int(sampled_ids.max())
        if rows is not None:
            check_rows(rows, leading.numel(), device)
        resolve_backend(wanted["backend"], hidden, function)
        shared = dict(
            {name: value for name, value in wanted.items() if name != "backend"},
            workspace_mb=workspace_mb,
            rows=getattr(rows, "shape", None),
            student_hidden=(hidden.shape, hidden.dtype, hidden.requires_grad),
            teacher_hidden=models.teacher_hidden.shape,
        )
    except (TypeError, ValueError) as raised:
        error = raised
    shared = {name: str(value) for name, value in shared.items()}
    size = 0 if error else len(models.student_weight)
    facts = _exchange([error is None, size, last_id, zlib.crc32(repr(shared).encode())], group)
    if not all(good for good, *_ in facts):
        _raise_everywhere(error, rank, group)
    if len({digest for *_, digest in facts}) > 1:
        _raise_difference(shared, group)
    sizes = [size for _, size, *_ in facts]
    options = complete_options(function, models.student_hidden, sum(sizes), **wanted)
    last_id = max(last for _, _, last, _ in facts)
    if last_id >= options.vocab_size:
        raise ValueError(f"sampled_ids must lie in [0, {options.vocab_size}), not {last_id}")
    stops = [min(sum(sizes[: i + 1]), options.vocab_size) for i in range(len(sizes))]
    return Shard(group, rank, list(zip([0, *stops], stops, strict=False))), options


def _exchange(facts: list[int], group) -> list[list[int]]:
    """Every rank's four integers. On the host where the group has a backend for it, so that no GPU need wait."""
    device = "cpu" if "gloo" in dist.get_backend(group) else "cuda"
    return _all_gather(torch.tensor(facts, dtype=torch.int64, device=device), group).tolist()


def _all_gather(mine: Tensor, group) -> Tensor:
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(every), mine.contiguous(), group=group)
    return every


def _raise_everywhere(error: Exception | None, rank: int, group) -> None:
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, error and str(error), group=group)
    if error:
        raise error
    other, message = next((i, message) for i, message in enumerate(messages) if message)
    raise ValueError(f"{message} (on rank {other} of the group; rank {rank} was given good arguments)")


def _raise_difference(shared: dict, group) -> None:
    every: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(every, shared, group=group)
    for name, first in every[0].items():
        for rank, theirs in enumerate(every):
            if theirs[name] != first:
                raise ValueError(
                    f"{name} must be the same on every rank, not {first} on 0 and {theirs[name]} on {rank}"
                )
