"""A mixture of experts' own loss: added as the user says, or left out as the user says, and never without a word."""

import json

import pytest
import tiny
import torch
from tiny import trainer


def mixture(asked_for):
    return tiny.model(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        router_aux_loss_coef=10.0,
        output_router_logits=asked_for,
    )


def first_step(tmp_path, asked_for, choice, **options):
    made = trainer(tmp_path, mixture(asked_for), router_loss=choice, max_steps=1, **options)
    made.train()
    return made, made.state.log_history[0]["loss"]


def test_a_router_loss_is_added_or_dropped_as_chosen(tmp_path):
    plain, without = first_step(tmp_path, False, None)
    dropped, drop = first_step(tmp_path, True, "drop")
    assert drop == without and tiny.same(tiny.weights(plain.model), tiny.weights(dropped.model))
    added, add = first_step(tmp_path, True, "add")
    with torch.no_grad():
        # Of random routers nearly balanced: the experts that a token takes.
        assert add - without == pytest.approx(10.0 * 2.0, rel=0.05)
    assert not tiny.same(tiny.weights(plain.model), tiny.weights(added.model))
    _, of_parts = first_step(tmp_path, True, "add", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert of_parts == pytest.approx(add, rel=0.02), "the mean over sequences, however they are parted"


def test_it_is_asked_which(tmp_path):
    with pytest.raises(ValueError, match=r"adds a loss of its router .* set router_loss=add or router_loss=drop"):
        trainer(tmp_path, mixture(True))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router loss"):
        trainer(tmp_path, router_loss="add")
    with pytest.raises(ValueError, match="router_loss must be add or drop, not 'yes'"):
        trainer(tmp_path, router_loss="yes")


def test_the_saved_config_is_the_models_own(tmp_path):
    made, _ = first_step(tmp_path, True, "drop")
    made.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["output_router_logits"] is True
    assert made.model.config.output_router_logits is False
