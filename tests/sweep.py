"""Tiny models of every causal architecture that the installed transformers can build from a config: each trains two
steps right, or is refused in one line. Writes a page with the table.

    python tests/sweep.py [--only NAME ...] [--write FILE]
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import tiny
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import PrinterCallback

# What the common names of `tiny.model` leave large, or must fit each other; other architectures take those alone.
SMALL = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    experts_per_token=2,
    moe_k=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    n_group=1,
    topk_group=1,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    decoder_layers=2,
    n_head=2,
    n_heads=2,
    num_heads=2,
    decoder_attention_heads=2,
    n_embd=32,
    d_model=32,
    n_positions=256,
    ffn_dim=64,
    decoder_ffn_dim=64,
    n_inner=64,
    word_embed_proj_dim=32,
    state_size=8,
    expand=2,
    time_step_rank=4,
    conv_kernel=4,
    ssm_state_size=8,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=1,
    attention_hidden_size=32,
    context_length=256,
    block_size=8,
    chunk_size=8,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    rotary_dim=8,
    sliding_window=64,
    attention_window=64,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=300,
    altup_num_inputs=2,
    laurel_rank=4,
    lru_width=32,
    num_kv_shared_layers=0,
    d_kv=16,
    d_ff=64,
    is_decoder=True,
    tie_word_embeddings=True,
)


def config_of(kind: str):
    """The architecture's config, with those of the small dimensions that it knows; text part first."""
    made = CONFIG_MAPPING[kind]
    known = made().to_dict()
    text = known.get("text_config")
    inside = {**tiny.shape(), **SMALL}
    if isinstance(text, dict):
        return made(text_config={k: v for k, v in inside.items() if k in text})
    return made(**{key: value for key, value in inside.items() if key in known or key in tiny.shape()})


def tried(kind: str) -> tuple[str, str]:
    """(result, what was said) of one architecture: trained, refused, or broken."""
    try:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind)).eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > 30_000_000:
            return "not tried", f"its smallest config here has {size / 1e6:.0f}M parameters"
    except Exception as error:
        return "not tried", f"no tiny config: {_line(error)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = tiny.trainer(folder, model, self_check=True, log_level="error")
            made.remove_callback(PrinterCallback)
            before = tiny.weights(made.model)
            made.train()
        except (ValueError, TypeError) as error:
            return "refused", _line(error)
        except Exception as error:
            return "broken", f"{type(error).__name__}: {_line(error)}"
    if tiny.same(before, tiny.weights(made.model)):
        return "broken", "no weight moved"
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    if len(losses) != 2 or not all(torch.isfinite(torch.tensor(losses))):
        return "broken", f"losses {losses}"
    return "trains", ""


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).replace("|", "/")[:200]


def page(results: dict[str, tuple[str, str]]) -> str:
    counts = {word: sum(result == word for result, _ in results.values()) for word in ("trains", "refused", "broken")}
    rows = "\n".join(f"| {kind} | {result} | {said} |" for kind, (result, said) in results.items())
    return f"""# Models

What `make sweep` found with transformers {transformers.__version__}: a tiny model of random weights of every causal
architecture, built from its config, trains two steps after the self-check. Trained: {counts["trains"]}; refused in one
line: {counts["refused"]}; ended otherwise: {counts["broken"]}. "Not tried": no tiny model could be built by the sweep's
common dimensions, which says nothing of the architecture. Random weights say whether the parts are found and heeded,
not how well a real model learns.

| architecture | result | said |
| --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    results = {}
    for kind in arguments.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        started = time.monotonic()
        results[kind] = tried(kind)
        print(f"{kind:32} {results[kind][0]:10} {time.monotonic() - started:5.1f} s  {results[kind][1]}", flush=True)
        if arguments.write and not arguments.only:
            arguments.write.write_text(page(results), encoding="utf-8")
