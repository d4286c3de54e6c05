"""Each answer drawn by random numbers of its own, whatever else is in its batch and whichever process holds it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def seed_at(*place: int) -> int:
    """A seed for a place in a run, such as its own seed, a step and a row, unlike those of all other places."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8]) >> 1


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` answers: those given, `seed` and the numbers after it, or, for None, the global
    generator's.

    Raises:
        ValueError: another number of seeds is given.
    """
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed must be one for each of {count} answers, not {len(seeds)}")
    return [number % 2**63 for number in seeds]


class Draw(LogitsProcessor):
    """Draws the next token of each answer, and leaves it alone in the scores: transformers' `generate`, told to be
    greedy, takes it. Its own sampling draws a whole batch from one generator, so that an answer would depend on the
    batch's other rows.

    By inversion: an answer's generator gives one number in [0, 1) a token, which falls into one token's share of the
    cumulated probabilities. Those are summed in fp64, in which 150,000 terms leave no share out.

    Args:
        seeds: one for each answer.
        length: tokens of an answer, at most.
        temperature, top_p, top_k: applied in transformers' order; 1.0, 1.0 and 0 leave the distribution as it is.
    """

    def __init__(
        self, seeds: Sequence[int], length: int, device, *, temperature: float, top_p: float = 1.0, top_k: int = 0
    ):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        numbers = [torch.rand(length, generator=generator, dtype=torch.float64) for generator in generators]
        self.numbers = iter(torch.stack(numbers, 1).unsqueeze(-1).to(device))  # (length, B, 1)
        self.warpers: list[LogitsProcessor] = []
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, V) logits -> (B, V)
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        shares = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        total = shares[:, -1:]
        # Rounding may bring the product to the total, which lies in no token's share.
        place = torch.minimum(next(self.numbers) * total, total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(shares, place, right=True).clamp_max(scores.shape[-1] - 1)  # NaN lies nowhere
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)
