"""Who writes the rollouts: the student itself, or vLLM holding a copy of its weights."""

import contextlib
import gc
import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .rollout import Rollouts, generate

ENGINES = ("transformers", "vllm")
MAX_GAP = 0.5  # nats a token; bf16 engines are seen at some hundredths


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
        seed: int,
    ) -> Rollouts:
        """One answer a prompt, a function of the weights and these arguments alone."""


class TransformersEngine:
    """The model's own `generate`: nothing to copy, and hidden states are recorded as it samples."""

    def sync(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, prompt_ids: list[list[int]], **options) -> Rollouts:
        return generate(self._model, prompt_ids, **options)


def check_vllm() -> None:
    """Raises ImportError, in one line, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "engine=vllm needs vLLM: pip install 'rmsd-kernels[vllm]', or on a CPU `make vllm`; "
            "engine=transformers needs nothing"
        )


class VLLMEngine:
    """vLLM in this process, beside the model that is trained.

    It is built from the model's config alone and gets its weights by `sync`: one copy from tensor to tensor, so that
    nothing is written to disk and a LoRA is merged on the way. Its answers carry the log-probabilities that it sampled
    by, but no hidden states; those take a forward of the student over the finished answers.

    Args:
        model: the student, a causal LM of transformers or a PEFT (LoRA) model around one.
        max_length: tokens of a prompt and its answer together, at most.
        cache_gb: GiB of its KV cache. Requests that do not fit wait for others to finish.
    """

    def __init__(self, model: nn.Module, *, max_length: int, cache_gb: float):
        check_vllm()
        # Its own process would need every weight pickled to it, and its log tells of things that are as they should be.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # A former engine takes the process group with it when it is collected: now, not while this one is built.
        gc.collect()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameter = next(base.parameters())
        self._device = parameter.device
        with tempfile.TemporaryDirectory() as folder, _process_as_it_was(self._device):
            from vllm import LLM

            config = type(base.config).from_dict(base.config.to_dict())
            config.architectures = [type(base).__name__]
            config.save_pretrained(folder)
            self._llm = LLM(
                model=folder,
                load_format="dummy",  # `sync` brings the weights
                skip_tokenizer_init=True,  # ids in, ids out
                generation_config="vllm",  # no sampling option but ours
                dtype=str(parameter.dtype).removeprefix("torch."),
                max_model_len=max_length,
                kv_cache_memory_bytes=int(cache_gb * 2**30),
                gpu_memory_utilization=0.01,  # not used where the cache's size is given, but checked
                enable_prefix_caching=False,  # cached keys are of the weights before
                enforce_eager=parameter.device.type == "cpu",  # nothing to capture there, and a compiler to wait for
            )

    def sync(self, model: nn.Module) -> None:
        """Copies every weight, and on a CPU repacks it: 0.4 to 0.9 s for 135M fp32 parameters on one core."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        self._llm.apply_model(_repack_head)

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
        seed: int = 0,
    ) -> Rollouts:
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                max_tokens=max_new_tokens,
                stop_token_ids=eos_ids,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=(seed + i) % 2**63,
                logprobs=0,  # of the sampled token alone, before temperature and top-k
                detokenize=False,
            )
            for i in range(len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        with _process_as_it_was(self._device):
            outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        if [output.prompt_token_ids for output in outputs] != prompt_ids:
            raise RuntimeError("vLLM read other prompts than it was given: its ids are not the trainer's")
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, answer, strict=True)]
            for output, answer in zip(outputs, answers, strict=True)
        ]
        width = max(map(len, answers))
        return Rollouts(
            prompt_ids=prompt_ids,
            completion_ids=_right_padded(answers, width, pad_id).to(self._device),
            completion_mask=_right_padded([[True] * len(answer) for answer in answers], width, False).to(self._device),
            student_logprob=_right_padded(logprobs, width, 0.0).to(self._device),
        )


def engine_for(name: str, model: nn.Module, *, max_length: int, cache_gb: float, num_processes: int = 1) -> Engine:
    """The engine of a recipe.

    Raises:
        ValueError: vLLM was asked for by several processes; it would have to share the trainer's process group.
    """
    if name == "transformers":
        return TransformersEngine()
    if num_processes > 1:
        raise ValueError(f"engine=vllm serves one training process, not {num_processes}: set engine=transformers")
    return VLLMEngine(model, max_length=max_length, cache_gb=cache_gb)


def engine_gap(rollouts: Rollouts, student_logprob: Tensor) -> float:
    """Nats a token, in the mean, between the log-probabilities that an engine sampled by and the trainer's of the same
    tokens, (B, L): rounding, 1e-5 in fp32.

    Raises:
        RuntimeError: it is so large that the engine must hold other weights than the student.
    """
    gap = (rollouts.student_logprob - student_logprob).abs()[rollouts.completion_mask].mean().item()
    if gap > MAX_GAP:
        raise RuntimeError(
            f"the engine's log-probabilities differ from the student's by {gap:.2f} nats a token: "
            "it does not hold the student's weights; set engine=transformers"
        )
    return gap


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) as a checkpoint of the model names them. The active LoRA is added to a copy of each weight that it
    changes, one at a time: merging in place and back would leave rounding in the base weights."""
    if not hasattr(model, "get_base_model"):
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
        return
    base = model.get_base_model()
    layers = dict(base.named_modules())
    for name, parameter in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            layer, weight = layers[owner], parameter.detach()
            if leaf == "weight":
                weight = sum((layer.get_delta_weight(name).detach() for name in layer.active_adapters), weight)
            yield f"{owner}.{leaf}", weight
        elif ".lora_" not in name:
            yield name, parameter.detach()


def _repack_head(model: nn.Module) -> None:
    """On a CPU vLLM multiplies by repacked copies of its weights. A reload renews them all but that of a head tied to
    the embedding, which no checkpoint holds: it would go on sampling from the head it was built with."""
    head = getattr(model, "lm_head", None)
    if method := getattr(head, "quant_method", None):
        method.process_weights_after_loading(head)


def _right_padded(rows: list[list], width: int, pad) -> Tensor:
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@contextlib.contextmanager
def _process_as_it_was(device: torch.device):
    """vLLM assumes a process of its own: it seeds every generator and draws from them, though each request has one, and
    on a CPU it makes torch.set_num_threads a no-op."""
    python, numpy, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python)
        np.random.set_state(numpy)
