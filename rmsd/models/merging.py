"""A model's weights for an engine: with the adapter merged into them, or the adapter alone."""

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# A module that PEFT copies holds the original beside a copy for each adapter.
_COPIED = re.compile(r"(.+)\.(?:original_module|modules_to_save\.([^.]+))\.(.+)")


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) as a checkpoint of the model names them. The active adapter, if it is not switched off, is merged
    into a copy of each layer that it changes, one at a time: merging in place and back would leave rounding in the base
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    modules, merged = dict(base.named_modules()), set()
    for name, parameter in base.named_parameters():
        places = itertools.accumulate(name.split("."), "{}.{}".format)
        place = next((place for place in places if isinstance(modules.get(place), BaseTunerLayer)), None)
        if place is not None:
            if place not in merged:
                merged.add(place)
                owner = place.removesuffix(".token_adapter")
                yield from ((f"{owner}.{rest}", weight) for rest, weight in _merged(modules[place]))
        elif copied := _COPIED.match(name):
            owner, adapter, rest = copied.groups()
            layer = modules[owner]
            if hasattr(layer, "token_adapter"):  # which holds the original, and comes next
                continue
            in_use = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.modules_to_save]
            if adapter in in_use or (adapter is None and not in_use):
                yield f"{owner}.{rest}", parameter.detach()
        else:
            yield name, parameter.detach()


def _merged(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights of what an adapter's layer stands for. A copy is merged by PEFT itself: it knows of DoRA's magnitudes and
    of biases, and refuses what is no single weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for part in layer.modules():
            if isinstance(part, BaseTunerLayer) and not part.disable_adapters:
                part.merge()
    return [(name, weight.detach()) for name, weight in layer.get_base_layer().named_parameters()]


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
