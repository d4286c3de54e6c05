"""Engines: who writes the rollouts. What needs vLLM itself runs from here in a process of its own."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import adapters
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from rmsd import RMSDConfig
from rmsd.answers.data import check_lengths, context_of
from rmsd.answers.engines import TransformersEngine, engine_gap
from rmsd.answers.prompts import Prompts, encode
from rmsd.answers.rollout import generate, hidden_states
from rmsd.answers.vllm_engine import _is_plain_lora, check_vllm
from rmsd.models.merging import merged_weights
from rmsd.run.recipe import load_recipe, trainer_config

OPTIONS = dict(max_new_tokens=6, pad_id=0, eos_ids=[0], temperature=1.0, top_p=1.0, top_k=0, seed=3)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.fixture
def without_vllm(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))


def test_hidden_states_recorded_or_from_a_forward_are_the_same():
    model = tiny.model().train()
    rollouts = TransformersEngine()
    rollouts.sync(model)
    rollouts = rollouts(PROMPTS, **OPTIONS)
    plain = generate(model, PROMPTS, **OPTIONS)
    assert torch.equal(rollouts.completion_ids, plain.completion_ids)
    recorded = hidden_states(model, rollouts, 0)
    assert recorded is rollouts.student_hidden
    forward = hidden_states(model, dataclasses.replace(rollouts, student_hidden=None), 0)
    mask = rollouts.completion_mask
    torch.testing.assert_close(forward[mask], recorded[mask], rtol=1e-4, atol=1e-5)
    assert model.training, "left as it was found"


def test_training_does_not_depend_on_who_recorded_the_hidden_states(tmp_path):
    class Forgetful(TransformersEngine):
        def __call__(self, prompt_ids, **options):
            return dataclasses.replace(super().__call__(prompt_ids, **options), student_hidden=None)

    finals = []
    for engine in (TransformersEngine(), Forgetful()):
        made = tiny.trainer(tmp_path, optim="sgd", max_grad_norm=0.0)
        made.engine = engine
        before = tiny.weights(made.model)
        made.train()
        finals.append({name: value - before[name] for name, value in tiny.weights(made.model).items()})
    assert any(change.abs().max() > 1e-6 for change in finals[0].values())
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_merged_weights_are_peft_s_own_and_leave_the_model_alone(saved):
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model(), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = tiny.weights(model)
    merged = dict(merged_weights(model))
    assert tiny.same(tiny.weights(model), before)
    original = tiny.model().state_dict()
    for name in ("model.layers.0.mlp.up_proj.weight", *(f"{module}.weight" for module in saved or ())):
        assert not torch.equal(merged[name], original[name])
    with model.disable_adapter():
        untouched = dict(merged_weights(model))
    assert untouched.keys() == merged.keys() and all(torch.equal(untouched[name], original[name]) for name in merged)
    expected = dict(model.merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["LORA, DoRA", "LORA, a bias of its own", "LORA, tokens", "OFT"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_more_than_a_lora_is_merged_as_it_is_multiplied(name, tied):
    model = get_peft_model(tiny.model("qwen2", tie_word_embeddings=tied), adapters.config(name))
    assert not _is_plain_lora(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    before, plain = tiny.weights(model), tiny.model("qwen2", tie_word_embeddings=tied)
    plain.load_state_dict(dict(merged_weights(model)) | ({"lm_head.weight": plain.lm_head.weight} if tied else {}))
    torch.testing.assert_close(adapters.logits(plain), adapters.logits(model), rtol=0, atol=1e-5)
    with model.disable_adapter():
        untouched = dict(merged_weights(model))
    assert tiny.same(tiny.weights(model), before)
    fresh = tiny.weights(tiny.model("qwen2", tie_word_embeddings=tied))
    assert untouched.keys() == fresh.keys() and tiny.same(untouched, fresh)


def test_an_adapter_that_no_weight_stands_for_is_not_merged():
    model = get_peft_model(tiny.model("qwen2"), adapters.config("LORA, invoked by tokens"))
    with pytest.raises(NotImplementedError, match="does not support merging"):
        dict(merged_weights(model))


def test_quantised_weights_are_not_handed_to_an_engine_as_they_are_stored():
    model = tiny.model()
    packed = torch.zeros(64 * 32 // 2, 1, dtype=torch.uint8)  # two 4-bit numbers a byte, as bitsandbytes keeps them
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is quantised, .* engine=transformers"):
        next(merged_weights(model))


def test_the_gap_is_a_mean_over_tokens_and_too_large_a_one_is_refused():
    recorded = torch.full((3,), -1.0)
    assert engine_gap(recorded, torch.tensor([-1.3, -1.0, -0.7])) == pytest.approx(0.2)
    with pytest.raises(RuntimeError, match=r"differ from the teacher's by 2.00 nats .* hold the teacher's weights"):
        engine_gap(recorded, torch.full((3,), -3.0), "teacher")


def test_without_vllm_one_line_says_what_to_install_before_anything_is_loaded(without_vllm, tmp_path):
    recipe = load_recipe("recipes/house_tool.yaml", ["engine=vllm", "model=/nowhere"])
    with pytest.raises(ImportError, match=r"engine=vllm needs vLLM: pip install 'rmsd-kernels\[vllm\]'") as error:
        trainer_config(recipe, tmp_path)
    assert "\n" not in str(error.value)


def test_an_engine_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="engine"):
        load_recipe("recipes/house_tool.yaml", ["engine=sglang"])
    with pytest.raises(ValueError, match=r"did you mean 'engine'"):
        load_recipe("recipes/house_tool.yaml", ["train.engine=vllm"])
    with pytest.raises(ValueError, match="engine must be one of transformers, vllm, vllm_server, not 'sglang'"):
        RMSDConfig(output_dir=str(tmp_path), engine="sglang")
    with pytest.raises(ValueError, match="engine_cache_gb must be above 0"):
        RMSDConfig(output_dir=str(tmp_path), engine_cache_gb=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "transformers"}, "engine_scores needs engine=vllm or vllm_server, not transformers"),
        ({"method": "opsd"}, "engine_scores needs method=rmsd, not opsd"),
        ({"criterion": "divergence"}, "engine_scores needs criterion=logprob_gap, not divergence"),
        ({"temperature": 0.5}, "engine_scores needs temperature=1.0, not 0.5"),
        ({"continuation_metric": "divergence"}, "engine_scores leaves divergence unknown"),
        ({"continuation_metric": "anchor_divergence"}, "engine_scores leaves anchor_divergence unknown"),
        ({"continuation_metric": "student_entropy"}, "engine_scores leaves student_entropy unknown"),
    ],
)
def test_scores_of_an_engine_are_refused_where_it_cannot_tell_them(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RMSDConfig(**{"output_dir": str(tmp_path), "engine": "vllm", "engine_scores": True, **options})


def test_an_engine_that_reads_answers_needs_room_for_a_token_more():
    config, plain = SimpleNamespace(max_position_embeddings=8), SimpleNamespace(engine_scores=False)
    rows = [{"prompt": "x", "privileged_context": "", "teacher_prompt": "xy", "completion": [5, 6, 7]}]
    student, teacher = (len(encode(tiny.tokenizer(), prompt)) + 3 for prompt in ("x", "xy"))
    prompts = Prompts(tiny.tokenizer())
    assert check_lengths(rows, prompts, 0, context_of(config, plain), 300) == (student, teacher) == (7, 8)
    with pytest.raises(ValueError, match=r"row 0: the teacher's prompt and its completion take 8 tokens"):
        check_lengths(rows, prompts, 0, context_of(config, SimpleNamespace(engine_scores=True)), 300)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vllm_cases.py", "vllm_route_cases.py"])
def test_with_vllm(name):
    """Cases in a process of their own: vLLM starts a process group and patches torch in the one it has."""
    try:
        check_vllm()
    except ImportError:
        pytest.skip("needs vLLM: make vllm, or pip install 'rmsd-kernels[vllm]' on a GPU")
    cases = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-rs", str(cases)], capture_output=True, text=True, env=dict(os.environ)
    )
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]  # of finalizers, which change no exit code
