"""Who writes the rollouts: the student itself, or vLLM holding its weights, in this process or in a server's."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..models.past import Past, continued
from .rollout import Rollouts, generate
from .vllm_engine import VLLMEngine
from .vllm_server import VLLMServerEngine

ENGINES = ("transformers", "vllm", "vllm_server")
MAX_GAP = 0.5  # nats a token; bf16 engines are seen at some hundredths
TOP = 20  # likeliest tokens recorded where candidates come from the engine: as many as vLLM gives by default


class Engine(Protocol):
    """Writes the student's answers."""

    def sync(self, model: nn.Module) -> None:
        """Takes the student's weights as they are now; called before the rollouts of every step."""

    def __call__(
        self,
        prompt_ids: list[list[int]],
        *,
        max_new_tokens: int,
        pad_id: int,
        eos_ids: list[int],
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int | Sequence[int],
    ) -> Rollouts:
        """One answer a prompt, a function of the weights and these arguments alone. `seed` is one for each answer, or
        one from which they follow (sampling.seeds_of): an answer depends on its own."""

    def sleep(self) -> None:
        """Lets go of memory that training can use: nothing is asked of it until the next sync."""

    def finish(self) -> None:
        """Training has ended: what the engine keeps outside this process is removed. It may begin again by a sync."""

    def turns(self) -> contextlib.AbstractContextManager:
        """Calls inside are turns of the same rollouts: an engine may keep what it has read of them."""


class TransformersEngine:
    """The model's own `generate`: nothing to copy, and hidden states are recorded as it samples, in the `autocast` that
    the training forward runs in. accelerate puts it around the model's own forward, which a PEFT model's `generate`
    goes past."""

    def __init__(self, autocast: Callable = contextlib.nullcontext):
        self._autocast = autocast
        self._in_turns, self._past = False, None

    def sync(self, model: nn.Module) -> None:
        self._model = model

    def sleep(self) -> None:
        """It holds nothing."""

    def finish(self) -> None:
        """Nor does it leave anything."""

    @contextlib.contextmanager
    def turns(self):
        """Keys and values are kept from turn to turn, where the model's cache can be; and dropped at the end."""
        self._in_turns = True
        try:
            yield
        finally:
            self._in_turns, self._past = False, None

    def __call__(self, prompt_ids: list[list[int]], **options) -> Rollouts:
        if self._in_turns and not (self._past and continued(self._past, prompt_ids)):
            self._past = Past.empty(self._model, self._model.device)
        with self._autocast():
            return generate(self._model, prompt_ids, past=self._past, **options)


def engine_for(args, model: nn.Module, *, max_length: int, autocast: Callable = contextlib.nullcontext) -> Engine:
    """The engine that RMSDConfig names, for sequences of `max_length` tokens at most."""
    if args.engine == "transformers":
        return TransformersEngine(autocast)
    num_top = TOP if args.engine_scores else 0
    if args.engine == "vllm":
        return VLLMEngine(model, max_length=max_length, cache_gb=args.engine_cache_gb, num_top=num_top)
    return VLLMServerEngine(
        model,
        url=args.engine_url,
        folder=args.engine_folder or Path(args.output_dir) / "engine",
        max_length=max_length,
        seconds=args.engine_seconds,
        num_top=num_top,
        own_folder=not args.engine_folder,
    )


def engine_gap(recorded: Tensor, logprob: Tensor, whose: str = "student") -> float:
    """Nats a token, in the mean, between the log-probabilities that an engine recorded, (R,), and the trainer's of the
    same tokens: rounding, 1e-5 in fp32.

    Raises:
        RuntimeError: it is so large that the engine must have held other weights than `whose`.
    """
    gap = (recorded - logprob).abs().mean().item()
    if gap > MAX_GAP:
        raise RuntimeError(
            f"the engine's log-probabilities differ from the {whose}'s by {gap:.2f} nats a token: "
            f"it does not hold the {whose}'s weights; set engine=transformers, or look whether a server serves the "
            "base model in the trainer's precision"
        )
    return gap
