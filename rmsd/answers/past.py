"""What a model has read already, so that it is not read again: the beginning that prompts share, and earlier turns.

Prompts that show tools begin alike, with schemas and instructions of hundreds of tokens; and an episode's next turn is
asked for after everything that the turn before was. The cache of keys and values holds both.
"""

import inspect
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from ..models.parts import causal_lm, no_head

LEAST_SHARED = 64  # tokens that sharing saves of a batch, or a pass over the weights is not worth it
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
    def read_shared(self, model, prompt_ids: list[list[int]]) -> None:
        """Reads what all prompts begin with, once; at least a token of each is left to read."""
        shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompt_ids, strict=False)))
        shared = min(shared, min(map(len, prompt_ids)) - 1)
        count = len(prompt_ids)
        if shared * (count - 1) < LEAST_SHARED:
            shared = 0
        else:
            ids = torch.tensor([prompt_ids[0][:shared]], device=self.ids.device)
            with no_head(model):
                model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: self.cache})
            self.cache.batch_repeat_interleave(count)
        start = [prompt_ids[0][:shared]] * count
        self.ids = torch.tensor(start, dtype=torch.int64, device=self.ids.device).view(count, shared)
        self.mask = torch.ones_like(self.ids)
        self.lengths = [shared] * count

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
