"""A model's weights for an engine: with the adapter merged into them, or the adapter alone."""

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

# A module that PEFT copies holds the original beside a copy for each adapter.
_COPIED = re.compile(r"(.+)\.(?:original_module|modules_to_save\.([^.]+))\.(.+)")


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) as a checkpoint of the model names them. The active LoRA, if it is not switched off, is added to a
    copy of each weight that it changes, one at a time: merging in place and back would leave rounding in the base
    weights. Of a module that PEFT's `modules_to_save` copies, the copy in use.

    Raises:
        ValueError: a weight is quantised (bitsandbytes keeps packed integers), so that it is no checkpoint's.
    """
    packed = next((name for name, weight in model.named_parameters() if not weight.is_floating_point()), None)
    if packed:
        raise ValueError(
            f"{packed} is quantised, and a copy of it cannot be handed to an engine: use engine=transformers, or for a "
            "LoRA engine=vllm_server with a server that holds the base model quantised alike"
        )
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
                adapters = [] if layer.disable_adapters else layer.active_adapters
                weight = sum((layer.get_delta_weight(name).detach() for name in adapters), weight)
            yield f"{owner}.{leaf}", weight
        elif copied := _COPIED.match(name):
            owner, adapter, rest = copied.groups()
            layer = layers[owner]
            in_use = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.modules_to_save]
            if adapter in in_use or (adapter is None and not in_use):
                yield f"{owner}.{rest}", parameter.detach()
        elif ".lora_" not in name:
            yield name, parameter.detach()


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes a PEFT model's active adapter as PEFT itself would, from the weights as they are now."""
    from peft import get_peft_model_state_dict

    adapter = model.active_adapters[0]
    state = get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters()), adapter_name=adapter, save_embedding_layers=False
    )
    weights = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    model.peft_config[adapter].save_pretrained(folder)


def adapter_is_off(model: nn.Module) -> bool:
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())
