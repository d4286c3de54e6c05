"""Hidden states of answers: one forward over prompts and answers, or several over sequences of like length."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .parts import captured_hidden, decoder_feeds_head, no_head
from .past import CACHE_ARGUMENT, Past, by_beginning, pass_tokens
from .transfer import to_device, to_host


def left_padded(prompt_ids: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, P) int64, of prompts that end together, where the answers begin."""
    width = max(map(len, prompt_ids))
    ids = [[pad_id] * (width - len(ids)) + ids for ids in prompt_ids]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    return to_device(ids, device), to_device(mask, device)


def by_length(prompt_lengths: list[int], lengths: list[int], device: torch.device) -> list[list[int]]:
    """Sequences in groups of like length, a forward each, so that little of what is computed is padding: of all ways to
    cut the sequences in order of length, the one with the fewest tokens, `pass_tokens` a group among them."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], prompt_lengths[i]))
    each = pass_tokens(device)
    fewest, cut = [0.0], [0]  # of the first n sequences; where their last group begins
    for end in range(1, len(order) + 1):
        prompt = length = 0
        fewest.append(float("inf"))
        cut.append(0)
        for begin in range(end - 1, -1, -1):
            prompt = max(prompt, prompt_lengths[order[begin]])
            length = max(length, lengths[order[begin]])
            tokens = fewest[begin] + (end - begin) * (prompt + length) + each
            if tokens < fewest[end]:
                fewest[end], cut[end] = tokens, begin
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups


def row_lengths(mask: Tensor) -> list[int]:
    """(B, L) bool on the host -> each row's length up to its last true entry."""
    if not mask.shape[1]:
        return [0] * len(mask)
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(1).tolist()


def completion_hidden(
    model: nn.Module,
    prompt_ids: list[list[int]],
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool: what belongs to the answer, as opposed to padding on its right
    pad_id: int,
    one_forward: bool = False,
    lengths: list[int] | None = None,
) -> Tensor:
    """(B, L, H): the hidden states whose logits are the distributions that the completion's tokens are drawn from;
    finite numbers without meaning where a sequence has ended. The forwards are `by_length`'s groups, or one. What
    prompts begin with in common is read once where no gradient is asked for and the model can keep it. `lengths` are
    `row_lengths` of the mask, where the host knows them."""
    if one_forward:
        return _one_forward(model, prompt_ids, completion_ids, completion_mask, pad_id)
    if lengths is None:
        lengths = row_lengths(*to_host(completion_mask))
    device, hidden = completion_ids.device, None
    for alike, shared in _beginnings(model, prompt_ids, device):
        past = None
        if shared:
            past = Past.empty(model, device)
            past.read(model, prompt_ids[alike[0]][:shared])
        for group in by_length([len(prompt_ids[i]) - shared for i in alike], [lengths[i] for i in alike], device):
            group = [alike[i] for i in group]
            length = max(lengths[i] for i in group)
            rows, prompts = to_device(group, device), [prompt_ids[i] for i in group]
            answers = completion_ids[rows, :length], completion_mask[rows, :length]
            part = _one_forward(model, prompts, *answers, pad_id, past and past.repeated(len(group)))
            if hidden is None:
                hidden = part.new_zeros(*completion_ids.shape, part.shape[-1])
            hidden[rows, :length] = part
    return hidden


def _beginnings(model, prompt_ids: list[list[int]], device: torch.device) -> list[tuple[list[int], int]]:
    """`by_beginning`, where the model can keep what it has read. In training mode transformers may drop a cache: with
    gradient checkpointing its versions differ."""
    can_keep = not torch.is_grad_enabled() and not model.training and Past.empty(model, device) is not None
    return by_beginning(prompt_ids, device) if can_keep else [(list(range(len(prompt_ids))), 0)]


def _one_forward(model, prompt_ids, completion_ids, completion_mask, pad_id, past: Past | None = None) -> Tensor:
    read = past.lengths[0] if past else 0
    prompts, prompt_mask = left_padded([ids[read:] for ids in prompt_ids], pad_id, completion_ids.device)
    width = prompts.shape[1]
    attention_mask = torch.cat([*([past.mask] if past else []), prompt_mask, completion_mask.long()], 1)
    with captured_hidden(model) as captured, no_head(model):
        output = model(
            input_ids=torch.cat([prompts, completion_ids], 1),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp_min(0)[:, read:],
            use_cache=past is not None,
            # No head runs, but logits cost what a model makes of them; at the head all positions are read.
            logits_to_keep=1 if decoder_feeds_head(model) else 0,
            **({CACHE_ARGUMENT: past.cache} if past else {}),
        )
    hidden = captured[-1]
    if isinstance(model, FSDPModule):
        hidden = _Joined.apply(hidden, output.logits)
    return hidden[:, width - 1 : -1]


class _Joined(torch.autograd.Function):
    """The hidden states, with the model's output in their graph at gradient 0. FSDP2 begins and ends its backward by
    hooks on the output: without it there, gradients of the root's own parameters would stay this rank's, unsharded."""

    @staticmethod
    def forward(ctx, hidden, logits):
        ctx.logits = logits.shape, logits.dtype, logits.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad_hidden):
        shape, dtype, device = ctx.logits
        return grad_hidden, torch.zeros((), dtype=dtype, device=device).expand(shape)
