"""A model without its weights: on the meta device, made from its config, or from the recipe where there is none."""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..answers.prompts import fix_template_variables
from ..models.loading import adapted, with_attention, with_lora
from ..models.wheels import is_gguf, readable
from ..words import first_line
from .recipe import Recipe


def skeleton(recipe: Recipe):
    """(model on the meta device, tokenizer or None, where the dimensions are from).

    Raises:
        FileNotFoundError: the model's config or tokenizer cannot be read, and it is not for want of a network, or the
            recipe has no `architecture`.
        ValueError: the recipe's `architecture` is not the model's.
    """
    place, options, offline = (
        adapted(recipe.model) or os.path.expanduser(recipe.model),
        {"trust_remote_code": recipe.trust_remote_code},
        False,
    )
    if is_gguf(place):
        place, gguf = readable(place)
        options |= gguf
    elif not Path(place).is_dir() and not _hub_answers():
        options["local_files_only"] = offline = True  # what was fetched before; asking would mean 20 s of retries
    try:
        config = AutoConfig.from_pretrained(place, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        if not offline or recipe.architecture is None:
            reason = first_line(error)
            hint = " Give the recipe an `architecture` to plan by." if offline else ""
            raise FileNotFoundError(f"model {recipe.model!r} cannot be planned: {reason}{hint}") from error
        config, tokenizer = _own_config(recipe.architecture), None
        source = "by the recipe's `architecture`: the hub does not answer"
    else:
        _check_same(recipe.architecture or {}, config, recipe.model)
        fix_template_variables(tokenizer, recipe.chat_template_kwargs)
        source = "by the model's own config"
    with torch.device("meta"):
        model = with_attention(
            lambda **attention: AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, recipe.dtype), trust_remote_code=recipe.trust_remote_code, **attention
            ),
            recipe.attn_implementation,
            recipe.dtype,
        )
        if adapted(recipe.model):
            from peft import PeftConfig, get_peft_model

            adapter = PeftConfig.from_pretrained(os.path.expanduser(recipe.model))
            adapter.inference_mode = False
            model = get_peft_model(model, adapter)
        return with_lora(model, recipe.lora) if recipe.lora else model, tokenizer, source


def _check_same(architecture: dict, config, name: str) -> None:
    for key, value in architecture.items():
        if (own := getattr(config, key, None)) != value:
            raise ValueError(f"architecture.{key} is {value!r}; the config of {name!r} has {own!r}")


def _own_config(architecture: dict):
    kind = architecture["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"architecture.model_type: transformers knows no {kind!r}")
    unknown = architecture.keys() - CONFIG_MAPPING[kind]().to_dict().keys()
    if unknown:
        raise ValueError(f"architecture.{min(unknown)}: a {kind} config has no such key")
    return AutoConfig.for_model(**architecture)


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no name server, no route, a proxy's refusal: whatever the client of this version raises
        return False
    return True
