"""Who writes the rollouts: vLLM in this process, holding a copy of the student's weights."""

import contextlib
import gc
import importlib.util
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.merging import adapter_is_off, merged_weights, save_adapter
from ..models.parts import causal_lm, trained_as_before
from .rollout import Recorded, Rollouts
from .sampling import seeds_of
from .teacher import beside_adapter

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels


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

    On a GPU it sleeps while the student trains, its weights in the host's memory and its cache given up; and a plain
    LoRA is not merged: the base model's weights are handed over once, in a file, and then the adapter alone.

    Args:
        model: the student, a causal LM of transformers or a PEFT (LoRA) model around one.
        max_length: tokens of a prompt and its answer together, at most.
        cache_gb: GiB of its KV cache. Requests that do not fit wait for others to finish.
        num_top: likeliest tokens recorded at every position.
    """

    def __init__(self, model: nn.Module, *, max_length: int, cache_gb: float, num_top: int = 0):
        check_vllm()
        self._num_top = num_top
        # Its own process would need every weight pickled to it, and its log tells of things that are as they should be.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # A former engine takes the process group with it when it is collected: now, not while this one is built.
        gc.collect()
        base = causal_lm(model)
        parameter = next(base.parameters())
        self._device = parameter.device
        # With several processes each has an engine of its own, in the process group that they train by.
        joins = torch.distributed.is_initialized() and "RANK" in os.environ
        on_gpu = self._device.type == "cuda"
        self._sleeps, self._asleep = on_gpu, False
        self._by_adapter = sends_adapters(self._device) and _is_plain_lora(model)
        self._adapter, self._number = None, 0
        self._adapter_folder = tempfile.TemporaryDirectory()
        with tempfile.TemporaryDirectory() as folder, _process_as_it_was(self._device):
            from vllm import LLM

            config = type(base.config).from_dict(base.config.to_dict())
            config.architectures = [type(base).__name__]
            config.save_pretrained(folder)
            if self._by_adapter:
                with trained_as_before(model), model.disable_adapter():
                    weights = {name: weight.cpu().contiguous() for name, weight in merged_weights(model)}
                save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
                del weights
            self._llm = LLM(
                model=folder,
                load_format="auto" if self._by_adapter else "dummy",  # where `sync` brings the weights
                enable_sleep_mode=self._sleeps,
                **(_lora_options(model) if self._by_adapter else {}),
                skip_tokenizer_init=True,  # ids in, ids out
                generation_config="vllm",  # no sampling option but ours
                dtype=str(parameter.dtype).removeprefix("torch."),
                max_model_len=max_length,
                kv_cache_memory_bytes=int(cache_gb * 2**30),
                gpu_memory_utilization=0.01,  # not used where the cache's size is given, but checked
                enable_prefix_caching=False,  # cached keys are of the weights before
                distributed_executor_backend="external_launcher" if joins else None,
                enforce_eager=not on_gpu,  # a CPU has nothing to capture, and a compiler to wait for
            )

        if joins:  # vLLM would end that group with the engine; and let go of what it kept from the collector
            self._llm.llm_engine.engine_core._finalizer.detach()
            gc.unfreeze()

    def sync(self, model: nn.Module) -> None:
        """Copies every weight of the student, or of a teacher whose readings are wanted, and on a CPU repacks it: 0.4
        to 0.9 s for 135M fp32 parameters on one core. Of a plain LoRA on a GPU the adapter alone."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        if self._by_adapter:
            self._send_adapter(model)
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        self._llm.apply_model(_repack_head)

    def _send_adapter(self, model: nn.Module) -> None:
        from vllm.lora.request import LoRARequest

        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            self._adapter = None
        if adapter_is_off(model):  # the base model's weights are there
            return
        self._number += 1  # a name that was never used: others are never taken for it
        folder = Path(self._adapter_folder.name)
        save_adapter(model, folder)
        self._adapter = LoRARequest(f"rmsd-{self._number}", self._number, str(folder))
        self._llm.llm_engine.add_lora(self._adapter)

    def sleep(self) -> None:
        """As `Engine.sleep`, where vLLM offers it: on a GPU."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def finish(self) -> None:
        """Its files go with the process."""

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
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                max_tokens=max_new_tokens,
                stop_token_ids=eos_ids,
                ignore_eos=True,  # those of the model's config, which need not be ours
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=number,
                logprobs=self._num_top,  # and of the sampled token, before temperature and top-k
                detokenize=False,
            )
            for number in seeds_of(seed, len(prompt_ids))
        ]
        outputs = self._outputs(prompt_ids, sampling)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        entries = [_logprobs(output.outputs[0].logprobs) for output in outputs]
        return rollouts_of_lists(prompt_ids, answers, entries, self._num_top, pad_id, self._device)

    def turns(self):
        """Each turn's prompt is read anew: prefix caching is off, for its keys would outlive the weights."""
        return contextlib.nullcontext()

    def read(self, prompt_ids: list[list[int]], rollouts: Rollouts) -> Recorded:
        """What the weights it holds say of finished answers after these prompts. vLLM projects every token that it
        reads, the prompts' too, one sequence after the other, and writes one token more."""
        from vllm import SamplingParams

        answers = answers_read(rollouts)
        sequences = [prompt + answer for prompt, answer in zip(prompt_ids, answers, strict=True)]
        reading = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=self._num_top, detokenize=False)
        outputs = self._outputs(sequences, [reading] * len(sequences))
        pairs = zip(outputs, prompt_ids, strict=True)
        entries = [_logprobs(output.prompt_logprobs[len(ids) :]) for output, ids in pairs]
        return recorded_of(answers, entries, rollouts.completion_ids.shape[1], self._num_top, self._device)

    def _outputs(self, prompt_ids: list[list[int]], sampling: list):
        with _process_as_it_was(self._device):
            prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
            outputs = self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=self._adapter)
        if [output.prompt_token_ids for output in outputs] != prompt_ids:
            raise RuntimeError("vLLM read other tokens than it was given: its ids are not the trainer's")
        return outputs


def sends_adapters(device: torch.device) -> bool:
    """On a CPU merging costs less than products of a low rank at every token, and takes every adapter."""
    return device.type == "cuda"


def _is_plain_lora(model: nn.Module) -> bool:
    """Whether vLLM can be given its adapter as it is: low-rank products on layers, and nothing trained beside them."""
    if not hasattr(model, "peft_config") or beside_adapter(model):
        return False
    config = model.peft_config[model.active_adapters[0]]
    if config.peft_type != "LORA":
        return False
    names = ("modules_to_save", "use_dora", "trainable_token_indices", "target_parameters", "lora_bias")
    more = (getattr(config, name, None) for name in (*names, "alora_invocation_tokens"))  # not in every version
    return not any(more) and config.bias == "none" and _rank(config) <= max(_RANKS)


def _rank(config) -> int:
    return max([config.r, *config.rank_pattern.values()])


def _lora_options(model: nn.Module) -> dict:
    config = model.peft_config[model.active_adapters[0]]
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return dict(
        enable_lora=True,
        max_loras=1,
        max_lora_rank=min(rank for rank in _RANKS if rank >= _rank(config)),
        lora_target_modules=sorted(layers),
    )


def _logprobs(positions: list[dict]) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in position.items()} for position in positions]


def rollouts_of_lists(
    prompt_ids: list[list[int]],
    answers: list[list[int]],  # token ids as vLLM writes them, an end-of-sequence token included
    entries: list[list[dict[int, float]]],  # as for recorded_of
    num_top: int,
    pad_id: int,
    device: torch.device,
) -> Rollouts:
    """The answers with what vLLM recorded of them, as tensors."""
    width = max(map(len, answers))
    return Rollouts(
        prompt_ids=prompt_ids,
        completion_ids=_right_padded(answers, width, pad_id).to(device),
        completion_mask=_right_padded([[True] * len(answer) for answer in answers], width, False).to(device),
        recorded=recorded_of(answers, entries, width, num_top, device),
    )


def answers_read(rollouts: Rollouts) -> list[list[int]]:
    """Each answer's token ids, those of tools included."""
    present = zip(rollouts.on_host.completion_ids, rollouts.on_host.attention_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in present]


def recorded_of(
    answers: list[list[int]], entries: list[list[dict[int, float]]], width: int, num_top: int, device: torch.device
) -> Recorded:
    """`entries` are vLLM's: {token id: log-probability} of each position's likeliest tokens and its own."""
    places = [list(zip(*pair, strict=True)) for pair in zip(answers, entries, strict=True)]
    own = [[entry[token] for token, entry in row] for row in places]
    top = [[sorted(entry, key=lambda i: -entry[i])[:num_top] for _, entry in row] for row in places]
    logprobs = [
        [[entry[i] for i in ids] for ids, (_, entry) in zip(*pair, strict=True)]
        for pair in zip(top, places, strict=True)
    ]
    none = [0] * num_top
    return Recorded(
        _right_padded(own, width, 0.0).float().to(device),
        _right_padded(top, width, none).long().to(device),
        _right_padded(logprobs, width, none).float().to(device),
    )


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
