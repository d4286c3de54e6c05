"""QLoRA: an adapter in fp32 on a model whose layers bitsandbytes stores in 4 bits, on its CPU backend."""

import json

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_heads import IDS, MASK, VocabularyWide
from test_same_gradients import ROWS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rmsd.models.heads import OutputHead
from rmsd.models.hidden import completion_hidden
from rmsd.models.loading import load_model
from rmsd.run.costs import Sizes
from rmsd.run.recipe import load_recipe
from rmsd.run.skeleton import skeleton
from rmsd.run.train import train

pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
FOUR_BITS = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture
def folder(tmp_path):
    """Layers of a whole number of blocks, 64 weights each."""
    made = tiny.model(hidden_size=64, head_dim=32, intermediate_size=128, initializer_range=0.2)
    made.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def recipe(tmp_path, folder):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS))
    values = {
        "model": str(folder),
        "data": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "judge": {"kind": "magnitude"},
        "lora": {"r": 4},
        "quantization": {"load_in_4bit": True},
        "train": {"max_steps": 1, "max_completion_length": 6, "use_cpu": True, "save_strategy": "no"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def packed(model) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.dtype == torch.uint8]


def adapted(model):
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_it_trains_as_on_the_weights_that_the_bits_stand_for(tmp_path, folder):
    """Rows that bring their answers: what is compared are losses and gradients, not what sampling makes of rounding."""
    ended = []
    for stored in (True, False):
        base, _ = load_model(str(folder), quantization=FOUR_BITS)
        assert len(packed(base)) == 14
        model = adapted(base if stored else base.dequantize())
        assert bool(packed(model)) == stored
        before = tiny.weights(model)
        once = dict(optim="sgd", max_grad_norm=0.0, learning_rate=0.1, max_steps=3, method="opsd", self_check=True)
        made = tiny.trainer(tmp_path / str(stored), model, rows=ROWS, **once)
        made.train()
        after = tiny.weights(model)
        changes = {name: after[name] - before[name] for name in before if ".lora_" in name}
        assert all(torch.equal(after[name], before[name]) for name in before if name not in changes)
        assert all(change.dtype == torch.float32 for change in changes.values())
        ended.append(([entry["loss"] for entry in made.state.log_history if "loss" in entry], changes))
    (losses, changes), (plain_losses, plain_changes) = ended
    assert len(losses) == 3 and losses == pytest.approx(plain_losses, rel=1e-4)
    assert max(change.abs().max() for change in plain_changes.values()) > 1e-2
    for name, change in plain_changes.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-3, atol=2e-6)
    whole, _ = load_model(str(folder))
    weight = base.get_parameter("model.layers.0.mlp.up_proj.base_layer.weight")
    assert (weight - whole.get_parameter("model.layers.0.mlp.up_proj.weight")).abs().max() > 1e-2, "4 bits are coarse"


def test_forwards_for_hidden_states_run_no_head_beside_layers_of_4_bits(folder):
    model = adapted(load_model(str(folder), quantization=FOUR_BITS)[0])
    with VocabularyWide() as spied, torch.no_grad():
        model(input_ids=IDS)
    assert spied.count == 1, "the spy sees a head"
    with VocabularyWide() as spied:
        completion_hidden(model, [[7, 8], [9]], IDS, MASK, pad_id=0, one_forward=True).sum().backward()
        with model.disable_adapter(), torch.no_grad():  # as the teacher reads
            completion_hidden(model, [[7, 8], [9]], IDS, MASK, pad_id=0)
    assert spied.count == 0


def test_a_recipe_trains_an_adapter_on_4_bits(tmp_path, recipe, monkeypatch):
    seen = []
    from rmsd.run import train as module

    with_lora = module.with_lora
    monkeypatch.setattr(module, "with_lora", lambda model, lora: seen.append(packed(model)) or with_lora(model, lora))
    train(load_recipe(recipe))
    assert len(seen[0]) == 14 and not any("lm_head" in name or "embed" in name for name in seen[0])
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert max(value.abs().max() for name, value in saved.items() if "lora_B" in name) > 0
    assert all(value.dtype == torch.float32 for value in saved.values())


@pytest.mark.parametrize("double", [False, True])
def test_a_plan_counts_the_bytes_that_are_held(folder, recipe, double):
    asked = load_recipe(recipe, [f"quantization.bnb_4bit_use_double_quant={str(double).lower()}"])
    planned = Sizes.of(skeleton(asked)[0], asked.quantization.bytes_a_weight)
    base, _ = load_model(str(folder), quantization=asked.quantization.model_dump())
    held = 0
    for weight in adapted(base).parameters():
        held += weight.nbytes
        if state := getattr(weight, "quant_state", None):
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    # Scales of scales are by the 256, which these layers are too small for.
    assert planned.weight_bytes == pytest.approx(held, rel=0.01 if double else 0)
    assert planned.weight_bytes < 0.7 * Sizes.of(skeleton(asked)[0]).weight_bytes


def test_a_quantised_head_is_refused_by_name(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(ValueError, match=r"output head is quantised \(Linear4bit\): .*llm_int8_skip_modules"):
        OutputHead.of(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=null"], "quantization leaves the model's own weights as they are: set lora too"),
        (["engine=vllm"], "engine=vllm takes no quantised weights: .* engine=vllm_server"),
        (["train.fsdp=true"], "train.fsdp does not shard quantised weights"),
        (["quantization.load_in_4bits=true"], "did you mean 'quantization.load_in_4bit'"),
        (["quantization.load_in_4bit=false"], "quantization.load_in_4bit: .* not False"),
    ],
)
def test_what_does_not_go_with_quantised_weights_is_refused_before_they_are_loaded(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, overrides)


def test_without_bitsandbytes_one_line_says_what_to_install(folder, monkeypatch):
    from rmsd.models import loading

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"quantization needs bitsandbytes: pip install 'rmsd-kernels\[quantization\]'"
    ):
        load_model(str(folder), quantization=FOUR_BITS)
