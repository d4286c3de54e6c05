"""What a model has read already, so that it is not read again: the beginning that prompts share, and earlier turns.

Prompts that show tools begin alike, with schemas and instructions of hundreds of tokens; and an episode's next turn is
asked for after everything that the turn before was. The cache of keys and values holds both.
"""

import copy
import inspect
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from .parts import causal_lm, no_head
from .transfer import to_device

# What a forward of its own costs, in tokens: it reads every weight once more and, where it trains, adds up a
# gradient of every weight. From the ratio of arithmetic to memory bandwidth: tens on a CPU, hundreds on a GPU.
_PASS_TOKENS = {"cpu": 48}
_PASS_TOKENS_ELSEWHERE = 512

# transformers renamed it.
_renamed = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if _renamed else "past_key_values"


@dataclass
class Past:
    """B sequences as a model has read them. Columns that are padding may stand anywhere: no mask lets them be read."""

    cache: DynamicCache
    ids: Tensor  # (B, W) int64
    mask: Tensor  # (B, W) int64: 0 on padding
    lengths: list[int]  # tokens of each sequence

    @classmethod
    def empty(cls, model, device) -> "Past | None":
        """Of no sequence yet; None for a model that takes no cache, or one that cannot hold padding anywhere (sliding
        windows, states)."""
        lm = causal_lm(model)
        if CACHE_ARGUMENT not in inspect.signature(lm.forward).parameters:
            return None
        cache = DynamicCache(config=lm.config)
        if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        none = torch.zeros(0, 0, dtype=torch.int64, device=device)
        return cls(cache, none, none, [])

    @torch.no_grad()
    def read(self, model, ids: list[int]) -> None:
        """Reads the beginning of one sequence, where nothing has been read yet."""
        self.ids = to_device(torch.tensor([ids], dtype=torch.int64), self.ids.device)
        self.mask, self.lengths = torch.ones_like(self.ids), [len(ids)]
        if ids:
            with no_head(model):
                model(input_ids=self.ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: self.cache})

    def read_shared(self, model, prompt_ids: list[list[int]]) -> None:
        """Reads what all prompts begin with, once, where that saves more than a forward costs; at least a token of
        each is left to read."""
        count, shared = len(prompt_ids), _shared(prompt_ids)
        if shared * (count - 1) < pass_tokens(self.ids.device):
            shared = 0
        self.read(model, prompt_ids[0][:shared])
        if shared:
            self.cache.batch_repeat_interleave(count)
        self.ids, self.mask = self.ids.repeat(count, 1), self.mask.repeat(count, 1)
        self.lengths = self.lengths * count

    def repeated(self, count: int) -> "Past":
        """One sequence as the beginning of `count`."""
        cache = copy.deepcopy(self.cache)
        if self.lengths[0]:
            cache.batch_repeat_interleave(count)
        return Past(cache, self.ids.expand(count, -1), self.mask.expand(count, -1), self.lengths * count)

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences alone, in this order."""
        index = torch.tensor(rows, device=self.ids.device)
        self.cache.batch_select_indices(index)
        self.ids, self.mask, self.lengths = self.ids[index], self.mask[index], [self.lengths[row] for row in rows]

    def sequences(self) -> list[list[int]]:
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.ids.cpu(), self.mask.cpu(), strict=True)]


def continued(past: Past, prompt_ids: list[list[int]]) -> bool:
    """Whether each prompt goes on from one of the sequences; those are kept, in the prompts' order."""
    known = past.sequences()
    rows: list[int] = []
    for prompt in prompt_ids:
        free = (i for i, ids in enumerate(known) if i not in rows and prompt[: len(ids)] == ids and prompt != ids)
        row = next(free, None)
        if row is None:
            return False
        rows.append(row)
    past.select(rows)
    return True


def _shared(prompt_ids: list[list[int]]) -> int:
    """Tokens that all prompts begin with; at least one of each is not among them."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompt_ids, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompt_ids)) - 1)


def pass_tokens(device: torch.device) -> int:
    """What a forward costs beside the tokens that it reads, in tokens."""
    return _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)


def by_beginning(prompt_ids: list[list[int]], device: torch.device) -> list[tuple[list[int], int]]:
    """(prompts, tokens that they share): which prompts are read together, and how much of their beginning is read once
    for all of them, so that the fewest tokens are read, what a forward costs among them. At least one token of each
    prompt is not shared. Of all ways to cut the prompts in the order of their tokens, where those that begin alike are
    neighbours."""
    order = sorted(range(len(prompt_ids)), key=prompt_ids.__getitem__)
    each = pass_tokens(device)
    of_neighbours = [_shared([prompt_ids[i], prompt_ids[j]]) for i, j in pairwise(order)]
    fewest, cut = [0.0], [(0, 0)]  # of the first n prompts; where their last group begins, and what it shares
    for end in range(1, len(order) + 1):
        total, best, where = 0, float("inf"), (0, 0)
        for begin in range(end - 1, -1, -1):
            total += len(prompt_ids[order[begin]])
            shared = min(of_neighbours[begin : end - 1], default=0)
            saved = shared * (end - begin - 1) - each  # a pass more, in which the beginning is read
            cost = fewest[begin] + total + each - max(saved, 0)
            if cost < best:
                best, where = cost, (begin, shared if saved > 0 else 0)
        fewest.append(best)
        cut.append(where)
    groups, end = [], len(order)
    while end:
        begin, shared = cut[end]
        groups.append((sorted(order[begin:end]), shared))
        end = begin
    return groups
