"""The student's answers, and the hidden states that their tokens were drawn from."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ..models.hidden import completion_hidden, left_padded, row_lengths
from ..models.parts import captured_hidden, causal_lm, last_position_head
from ..models.past import CACHE_ARGUMENT, Past
from ..models.transfer import to_device, to_host
from .sampling import Draw, seeds_of


class Recorded(NamedTuple):
    """What an engine records of B answers as it writes or reads them, before temperature and top-k."""

    logprob: Tensor  # (B, L) fp32, of the answers' own tokens; 0 on padding
    top_ids: Tensor  # (B, L, k) int64, the likeliest tokens of each position, the likeliest first
    top_logprob: Tensor  # (B, L, k) fp32


class OnHost(NamedTuple):
    """Of `Rollouts`, on the host."""

    completion_ids: Tensor
    completion_mask: Tensor
    attention_mask: Tensor


@dataclass
class Rollouts:
    """B answers. `completion_mask` is true on tokens the student wrote, its end-of-sequence token included;
    `attention_mask` on those of tools and environments too, which both models read. By default it is the same."""

    prompt_ids: list[list[int]]  # B prompts as the student reads them
    completion_ids: Tensor  # (B, L) int64
    completion_mask: Tensor  # (B, L) bool
    student_hidden: Tensor | None = None  # (B, L, H): row i gave the distribution of completion_ids[i]
    recorded: Recorded | None = None  # by the engine that wrote them
    attention_mask: Tensor | None = None  # (B, L) bool: false on padding alone

    def __post_init__(self):
        if self.attention_mask is None:
            self.attention_mask = self.completion_mask

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @functools.cached_property
    def on_host(self) -> "OnHost":
        """What of the answers a host needs, brought there once."""
        return OnHost(*to_host(self.completion_ids, self.completion_mask, self.attention_mask))

    def of(self, sequences: Tensor, length: int | None = None) -> "Rollouts":
        """The answers at `sequences`, (B',) int64 on the host, cut after `length` tokens: what is needed to read them.
        A sequence may stand there more than once."""
        at = to_device(sequences, self.completion_ids.device)
        chosen = Rollouts(
            [self.prompt_ids[i] for i in sequences.tolist()],
            self.completion_ids[at, :length],
            self.completion_mask[at, :length],
            attention_mask=self.attention_mask[at, :length],
        )
        chosen.on_host = OnHost(*(tensor[sequences, :length] for tensor in self.on_host))
        return chosen


@torch.no_grad()
def generate(
    model,
    prompt_ids: list[list[int]],
    *,
    max_new_tokens: int,
    pad_id: int,
    eos_ids: list[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] | None = None,
    past: Past | None = None,
) -> Rollouts:
    """One answer a prompt, drawn from the model's own distribution under these options and no others: what its
    generation_config would change (repetition_penalty, suppress_tokens, ...) is left out, for what is scored and
    trained on knows none of it. `temperature=0` is greedy. With `seed`, one for each answer or one from which those
    follow (sampling.seeds_of), each answer follows from its own: not from the global random state, which is neither
    read nor moved, nor from what else is in the batch. So a resumed run writes what the interrupted one would have, and
    several processes what one would.

    What `past` holds of the prompts is not read again; without one that is the beginning that they share. A given one
    holds the answers afterwards too."""
    was_training = model.training
    model.eval()
    started = past or Past.empty(model, model.device)
    if started is not None and not started.lengths:
        started.read_shared(model, prompt_ids)
    read = started.lengths if started else [0] * len(prompt_ids)
    rest = [ids[length:] for ids, length in zip(prompt_ids, read, strict=True)]
    input_ids, attention_mask = left_padded(rest, pad_id, model.device)
    if started is not None:
        input_ids = torch.cat([started.ids, input_ids], 1)
        attention_mask = torch.cat([started.mask, attention_mask], 1)
    width = input_ids.shape[1]
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=eos_ids, do_sample=False)
    drawn = LogitsProcessorList()
    if temperature:
        seeds = seeds_of(seed, len(prompt_ids))
        drawn.append(Draw(seeds, max_new_tokens, model.device, temperature=temperature, top_p=top_p, top_k=top_k))
    with captured_hidden(model) as captured, last_position_head(model), _generation_config(model, config):
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=drawn,
            **({CACHE_ARGUMENT: started.cache} if started is not None else {}),
            synced_gpus=False,  # sharded weights are whole here (sharding.whole): no rank waits for another
        )
    model.train(was_training)
    completion_ids = sequences[:, width:]
    ends = torch.isin(completion_ids, to_device(torch.tensor(eos_ids, dtype=torch.int64), completion_ids.device))
    ended = ends.cumsum(1)
    just_ended = ends & (ended == 1)
    completion_mask = (ended == 0) | just_ended
    if past is not None:
        past.ids, past.mask = sequences, torch.cat([attention_mask, completion_mask.long()], 1)
        past.lengths = past.mask.sum(1).tolist()
    return Rollouts(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        student_hidden=torch.stack([hidden[:, -1] for hidden in captured], 1),
    )


@contextlib.contextmanager
def _generation_config(model, config: GenerationConfig):
    """`config` in the place of the model's own, from which transformers fills all that a config passed to its generate
    leaves open. A PEFT model may hold one beside its base model's."""
    owners = {id(owner): owner for owner in (model, causal_lm(model)) if "generation_config" in vars(owner)}.values()
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, its in zip(owners, own, strict=True):
            owner.generation_config = its


@torch.no_grad()
def hidden_states(model, rollouts: Rollouts, pad_id: int) -> Tensor:
    """(B, L, H): recorded while sampling, or else from a forward over the finished answers."""
    if rollouts.student_hidden is not None:
        return rollouts.student_hidden
    was_training = model.training
    model.eval()
    hidden = completion_hidden(
        model,
        rollouts.prompt_ids,
        rollouts.completion_ids,
        rollouts.attention_mask,
        pad_id,
        lengths=row_lengths(rollouts.on_host.attention_mask),
    )
    model.train(was_training)
    return hidden


def eos_ids_of(model, tokenizer) -> list[int]:
    """Every id that ends an answer: the generation config's and the tokenizer's, as transformers joins them when
    training begins; none where neither knows one."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [own, *ids]


def pad_id_of(tokenizer, eos_ids: list[int]) -> int:
    """The id that fills up prompts and answers, which no mask lets a model read: the tokenizer's, or else one that ends
    answers.

    Raises:
        ValueError: there is neither.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if not eos_ids:
        raise ValueError("the tokenizer has no pad token and no end-of-sequence token: set tokenizer.pad_token")
    return eos_ids[0]
