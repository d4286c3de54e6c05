"""A head's vocabulary over the ranks of a process group: who holds which columns, and whether all ranks agree."""

import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import resolve_backend
from ..checks import check_heads, check_ids, check_options, check_rows, check_transform
from .projection import default_workspace_mb, project, row_chunks


class Heads(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None

    def flat(self) -> "Heads":
        return self._replace(
            student_hidden=self.student_hidden.flatten(0, -2), teacher_hidden=self.teacher_hidden.flatten(0, -2)
        )

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        return (
            project(self.student_hidden[part], self.student_weight, self.student_bias),
            project(self.teacher_hidden[part], self.teacher_weight, self.teacher_bias),
        )


class Shard(NamedTuple):
    group: object  # dist.ProcessGroup | None
    rank: int
    ranges: list[tuple[int, int]]  # each rank's real columns, [start, stop)
    backend: str

    @property
    def start(self) -> int:
        return self.ranges[self.rank][0]

    @property
    def width(self) -> int:
        return self.ranges[self.rank][1] - self.start

    @property
    def vocab_size(self) -> int:
        return self.ranges[-1][1]

    def cut(self, heads: Heads) -> Heads:
        """Without the padding's rows."""
        if self.width == len(heads.student_weight):
            return heads
        cut = {
            name: None if (tensor := getattr(heads, name)) is None else tensor[: self.width]
            for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
        }
        return heads._replace(**cut)

    def chunks(self, heads: Heads, workspace_mb: float | None) -> list[slice]:
        """The same on every rank: for the widest shard."""
        widest = max(stop - start for start, stop in self.ranges)
        workspace_mb = workspace_mb or default_workspace_mb(heads.student_hidden.device.type)
        return row_chunks(len(heads.student_hidden), 2 * widest, workspace_mb)

    def gather(self, partial: Tensor) -> Tensor:
        """Every rank's partial, in rank order: (...) -> (P, ...) in fp64."""
        return _all_gather(partial, self.group).double()


def agree(
    name, heads, options, group, vocab_size, workspace_mb, backend, *, sampled_ids=None, rows=None, **topk
) -> Shard:
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
        check_heads(**heads._asdict())
        check_transform(options["logit_scale"], options["softcap"], workspace_mb)
        leading, device = heads.student_hidden.shape[:-1], heads.student_hidden.device
        if sampled_ids is not None:
            check_ids(sampled_ids, leading, device, torch.iinfo(torch.int64).max)
            if device.type == "cpu" and sampled_ids.numel():
                last_id = int(sampled_ids.max())
        if rows is not None:
            check_rows(rows, leading.numel(), device)
        backend = resolve_backend(backend, heads.student_hidden, name)
        shared = dict(
            options, **topk, vocab_size=vocab_size, workspace_mb=workspace_mb, rows=getattr(rows, "shape", None),
            student_hidden=(heads.student_hidden.shape, heads.student_hidden.dtype, heads.student_hidden.requires_grad),
            teacher_hidden=heads.teacher_hidden.shape,
        )  # fmt: skip
    except (TypeError, ValueError) as raised:
        error = raised
    shared = {name: str(value) for name, value in shared.items()}
    size = 0 if error else len(heads.student_weight)
    facts = _exchange([error is None, size, last_id, zlib.crc32(repr(shared).encode())], group)
    if not all(good for good, *_ in facts):
        _raise_everywhere(error, rank, group)
    if len({digest for *_, digest in facts}) > 1:
        _raise_difference(shared, group)
    sizes = [size for _, size, *_ in facts]
    checked = {name: value for name, value in options.items() if name not in ("logit_scale", "softcap")}
    check_options(**checked, **topk, vocab_size=vocab_size, width=sum(sizes))
    vocab_size = vocab_size or sum(sizes)
    last_id = max(last for _, _, last, _ in facts)
    if last_id >= vocab_size:
        raise ValueError(f"sampled_ids must lie in [0, {vocab_size}), not {last_id}")
    stops = [min(sum(sizes[: i + 1]), vocab_size) for i in range(len(sizes))]
    return Shard(group, rank, list(zip([0, *stops], stops, strict=False)), backend)


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
