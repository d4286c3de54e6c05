"""Between host and device, without waiting where nobody has to.

A copy from pageable memory to a GPU, `tolist()`, `item()` and `cpu()` each make the host wait for everything that the
device has been asked to do, and the device then for the host. A step waits where the host has to decide something.
Sampling does for every token, and a log entry for what it prints; tests/test_syncs.py lists the waits between those
that a spy on a CPU can see.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence, device: torch.device | str) -> Tensor:
    """Numbers on the host, or a tensor of them, onto the device: queued behind its work, not waited for."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device, on the host: it waits once for all of them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return tuple(tensor.cpu() for tensor in tensors)
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return tuple(copies)
