"""Who writes the rollouts: a vLLM server elsewhere, on other GPUs or another machine.

Its completions endpoint takes token ids and gives them back. Of a LoRA student it is sent the adapter alone, beside the
base model that it was started with; of any other student all weights, in files on a folder that both machines see.
"""

import contextlib
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import nn

from ..models.merging import adapter_is_off, merged_weights, save_adapter
from ..models.parts import causal_lm
from .rollout import Recorded, Rollouts
from .sampling import seeds_of
from .server import REQUESTS, VLLMServer, reason
from .teacher import beside_adapter
from .vllm_engine import answers_read, recorded_of, rollouts_of_lists

log = logging.getLogger("rmsd")

_LEAST = -9999.0  # what the server writes for the logarithm of 0
_VERSION = re.compile(r"rmsd-[0-9a-f]{32}")  # what is sent once, by its folder's name
_RELOADS = 3  # of the same weights, for one batch
_Answer = TypeVar("_Answer")


class _WeightsLost(Exception):
    """The server no longer holds what it was sent."""


class VLLMServerEngine:
    """A `vllm serve` that holds the student's base model, or takes its weights.

    Args:
        model: the student, a causal LM of transformers or a PEFT (LoRA) model around one.
        url: of its OpenAI-compatible endpoint, up to /v1.
        folder: that this machine writes to and the server's reads from, under the same path.
        max_length: tokens of a prompt and its answer together, at most.
        seconds: that the server may take for an answer, or to come back after it was away.
        num_top: likeliest tokens recorded at every position.
        own_folder: it is this run's alone, so what is left there of one that was killed is removed.

    An answer follows from the weights and its own seed, so what was asked of a server that died is asked again once it
    is back, and comes out the same. A server that has restarted is sent the weights again: an adapter has a name that
    was never used before, and all weights a version, so that others are never taken for them.

    Raises:
        ConnectionError: in one line, where no such server answers, or it stays away for `seconds`.
        ValueError: for a student that it cannot be sent.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        url: str,
        folder: str | Path,
        max_length: int,
        seconds: float,
        num_top: int = 0,
        own_folder: bool = False,
    ):
        self._server, self._folder, self._num_top = VLLMServer(url, seconds), Path(folder), num_top
        self._device = next(model.parameters()).device
        self._base = self._server.base_model(max_length)
        self._by_adapter = hasattr(model, "peft_config")
        if self._by_adapter:
            self._check_adapter(model)
        else:
            self._check_full(model)
        self._name, self._held, self._stale = self._base, None, None
        self._own_folder = own_folder

    # ---- weights ---------------------------------------------------------------------------------------------------

    def sync(self, model: nn.Module) -> None:
        """Sends the weights of the student, or of a teacher whose readings are wanted: the active adapter, nothing
        where it is switched off, or all weights where there is none. One process does so for all, once none of them
        waits for answers by the weights before."""
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            if self._own_folder:
                self._remove_left()
            self._name, self._held = self._written(model)
            self._load()
            if self._stale and self._stale != self._held:
                self._forget(self._stale)
        self._name, self._held = broadcast_object_list([(self._name, self._held)])[0]
        self._stale = self._held

    def finish(self) -> None:
        """The run has ended: what it sent last is removed. The next sync, if there is one, sends all anew."""
        if self._held and PartialState().is_main_process:
            self._remove(self._held)
        self._name, self._held, self._stale = self._base, None, None

    def _remove_left(self) -> None:
        """Once, before anything of this run is there."""
        self._own_folder = False
        for folder in self._folder.glob("rmsd-*"):
            if _VERSION.fullmatch(folder.name) and folder.is_dir():
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        if self._by_adapter:
            self._server.tell("/v1/unload_lora_adapter", {"lora_name": folder.name})
        shutil.rmtree(folder, ignore_errors=True)

    def _written(self, model: nn.Module) -> tuple[str, Path | None]:
        """What the server will call the model's weights, and the folder that they were written to."""
        if self._by_adapter and adapter_is_off(model):
            return self._base, None
        version = f"rmsd-{uuid.uuid4().hex}"
        folder = (self._folder / version).resolve()
        folder.mkdir(parents=True)
        if not self._by_adapter:
            weights = {name: weight.cpu().contiguous() for name, weight in merged_weights(model)}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            causal_lm(model).config.save_pretrained(folder)
            return self._base, folder
        save_adapter(model, folder)
        return version, folder

    def _load(self) -> None:
        """Has the server read what was last written; to do so again changes nothing."""
        if self._held is None:
            return
        if self._by_adapter:
            body = {"lora_name": self._name, "lora_path": str(self._held)}
            answer = self._server("/v1/load_lora_adapter", body)
            if answer.is_error and "already been loaded" not in answer.text:
                raise ConnectionError(f"{self._server} refuses the adapter: {reason(answer)}")
            return
        for path, body in (
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._held)}}),
            ("/update_weight_version", {"new_version": self._held.name}),
        ):
            answer = self._server(path, body)
            if answer.is_error:
                raise ConnectionError(f"{self._server} does not take the weights in {self._held}: {reason(answer)}")

    def _forget(self, folder: Path) -> None:
        if self._by_adapter:
            self._server("/v1/unload_lora_adapter", {"lora_name": folder.name})  # a server that restarted has it not
        shutil.rmtree(folder, ignore_errors=True)

    def _with_weights(self, ask: Callable[[], _Answer]) -> _Answer:
        """What `ask` gives by the weights that were sent, which it raises _WeightsLost for the want of."""
        for _ in range(_RELOADS):
            try:
                found = ask()
                if not self._by_adapter and self._held is not None:
                    version = self._server("/weight_info").json().get("weight_version")
                    if version != self._held.name:
                        raise _WeightsLost(f"it holds the weights {version!r}")
                return found
            except _WeightsLost as lost:
                log.warning("%s no longer holds what it was sent (%s): it is sent again", self._server, lost)
                self._load()
        raise ConnectionError(
            f"{self._server} has lost the weights {_RELOADS} times while it answered: is it shared, or short of memory?"
        )

    # ---- answers ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt_ids: list[list[int]],
        *,
        max_new_tokens: int,
        pad_id: int,
        eos_ids: list[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] = 0,
    ) -> Rollouts:
        sampling = dict(
            max_tokens=max_new_tokens,
            stop_token_ids=eos_ids,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            logprobs=self._num_top,  # and of the sampled token, before temperature and top-k
        )
        choices = self._choices(prompt_ids, [{**sampling, "seed": each} for each in seeds_of(seed, len(prompt_ids))])
        answers = [choice["token_ids"] for choice in choices]
        entries = [[_by_id(entry) for entry in choice["logprobs"]["top_logprobs"]] for choice in choices]
        return rollouts_of_lists(prompt_ids, answers, entries, self._num_top, pad_id, self._device)

    def sleep(self) -> None:
        """It has devices of its own."""

    def turns(self):
        """The server's own prefix cache serves: its keys are known by the weights that they are of."""
        return contextlib.nullcontext()

    def read(self, prompt_ids: list[list[int]], rollouts: Rollouts) -> Recorded:
        """What the weights it holds say of finished answers after these prompts."""
        answers = answers_read(rollouts)
        sequences = [prompt + answer for prompt, answer in zip(prompt_ids, answers, strict=True)]
        reading = dict(max_tokens=1, temperature=0.0, prompt_logprobs=self._num_top)
        choices = self._choices(sequences, [reading] * len(sequences))
        pairs = zip(choices, prompt_ids, strict=True)
        entries = [
            [
                {int(i): _finite(of["logprob"]) for i, of in entry.items()}
                for entry in choice["prompt_logprobs"][len(ids) :]
            ]
            for choice, ids in pairs
        ]
        return recorded_of(answers, entries, rollouts.completion_ids.shape[1], self._num_top, self._device)

    def _choices(self, prompt_ids: list[list[int]], sampling: list[dict]) -> list[dict]:
        """One completion a prompt. Options that a model's generation_config would set are set here."""

        def ask() -> list[dict]:
            fixed = dict(
                model=self._name,
                ignore_eos=True,  # its own idea of which ids end an answer; ours are in stop_token_ids
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                return_token_ids=True,
                return_tokens_as_token_ids=True,
                cache_salt=self._held.name if self._held else "base",
            )
            bodies = [{**fixed, **each, "prompt": ids} for ids, each in zip(prompt_ids, sampling, strict=True)]
            pool = ThreadPoolExecutor(min(len(bodies), REQUESTS), thread_name_prefix="engine")
            try:
                return list(pool.map(self._completed, bodies))
            finally:  # where it unwinds by an error or Ctrl-C, what is under way is not waited for
                pool.shutdown(wait=False, cancel_futures=True)

        return self._with_weights(ask)

    def _completed(self, body: dict) -> dict:
        answer = self._server("/v1/completions", body)
        if answer.status_code == 404:
            raise _WeightsLost(reason(answer))
        if answer.is_error:
            raise ConnectionError(f"{self._server} refuses a request: {reason(answer)}")
        try:
            (choice,) = answer.json()["choices"]
            prompt, _ = choice["prompt_token_ids"], choice["token_ids"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConnectionError(
                f"{self._server} answers, but not with token ids: it needs vLLM 0.32 or later"
            ) from error
        if prompt != body["prompt"]:
            raise RuntimeError(f"{self._server} read other tokens than it was given: its ids are not the trainer's")
        return choice

    # ---- what it can be sent -----------------------------------------------------------------------------------------

    def _check_adapter(self, model) -> None:
        adapter = model.peft_config[model.active_adapters[0]]
        kind = getattr(adapter.peft_type, "value", None)
        if getattr(adapter, "alora_invocation_tokens", None):
            raise ValueError(
                "engine=vllm_server is sent a LoRA adapter that is on at every token, and alora_invocation_tokens "
                "switch this one on within a prompt: use engine=transformers"
            )
        if kind != "LORA" or beside_adapter(model):
            what = f"{beside_adapter(model)} is trained beside it" if kind == "LORA" else f"it is {kind}"
            raise ValueError(f"engine=vllm_server is sent a LoRA adapter alone, and {what}: use engine=vllm")
        if self._server("/v1/load_lora_adapter").status_code == 404:  # 405 where it is there, to be posted to
            raise ValueError(
                f"{self._server} takes no adapters: start it with --enable-lora and the environment variable "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        config = self._server_config() or {}
        if self._num_top and _runs_on_cpu(config) and not (config.get("lora_config") or {}).get("target_modules"):
            # Its CPU kernel takes the rows of a prompt for those of samples, and its engine dies of it.
            raise ValueError(
                f"{self._server} runs on a CPU, where it reads no answers through a head that could take an adapter: "
                "start it with --lora-target-modules and the layers' own (q_proj k_proj v_proj ...)"
            )

    def _check_full(self, model) -> None:
        config = self._server_config()
        if config is None:
            raise ValueError(
                f"{self._server} takes no weights: start it with the environment variable VLLM_SERVER_DEV_MODE=1, "
                "or train a LoRA adapter"
            )
        if _runs_on_cpu(config) and causal_lm(model).config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"{self._server} runs on a CPU, where a reload leaves a head that is tied to the embedding as it was: "
                "train a LoRA adapter, or use engine=vllm"
            )

    def _server_config(self) -> dict | None:
        """What it was started with, where it tells (VLLM_SERVER_DEV_MODE=1)."""
        answer = self._server("/server_info?config_format=json")
        return None if answer.is_error else answer.json()["vllm_config"]


def _runs_on_cpu(config: dict) -> bool:
    return (config.get("device_config") or {}).get("device") == "cpu"


def _by_id(entry: dict[str, float]) -> dict[int, float]:
    return {int(token.removeprefix("token_id:")): _finite(logprob) for token, logprob in entry.items()}


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else -float("inf")
