"""The self-check: a model of each fault answers no to its question, a sound one yes, and the run is as without it."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import trainer

from rmsd.answers.prompts import Prompts
from rmsd.run.check import check
from rmsd.run.recipe import load_recipe
from rmsd.training.self_check import self_check

NAMES = ("ids", "text", "padded as alone", "sampled is scored", "teacher is student", "head", "weights move")
RWKV = ("rwkv", dict(attention_hidden_size=32, context_length=256))
MINIMAX = (
    "minimax",
    dict(
        num_hidden_layers=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"] * 2,
        block_size=8,
    ),
)


def failed(made) -> list[str]:
    return [check.name for check in self_check(made) if check.passed is False]


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"teacher": "live"}, {"gradient_checkpointing": True}])
def test_a_sound_model_passes_every_check(tmp_path, options):
    made = trainer(tmp_path, tiny.loud(tiny.model()), **options)
    checks = self_check(made)
    assert tuple(check.name for check in checks) == NAMES and all(check.passed for check in checks)


def test_it_leaves_a_run_as_it_is(tmp_path):
    weights = []
    for on in (False, True):
        torch.manual_seed(3)
        made = trainer(tmp_path, tiny.model(attention_dropout=0.1), self_check=on)
        made.train()
        weights.append((tiny.weights(made.model), torch.rand(3)))
    assert tiny.same(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize(("kind", "expected"), [(RWKV, NAMES[2:4]), (MINIMAX, NAMES[3:4])])
def test_a_model_that_reads_padding_is_refused_and_serves_a_row_at_a_time(tmp_path, kind, expected):
    name, shape = kind
    made = trainer(tmp_path, tiny.loud(tiny.model(name, **shape)), self_check=True, max_steps=1)
    assert failed(made) == list(expected)
    with pytest.raises(ValueError, match=f"self-check, {expected[0]}: .*per_device_train_batch_size=1") as error:
        made.train()
    assert "\n" not in str(error.value)
    alone = trainer(
        tmp_path / "alone",
        tiny.loud(tiny.model(name, **shape)),
        self_check=True,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert not failed(alone)
    alone.train()


def test_a_teacher_that_is_not_the_student_is_found(tmp_path):
    made = trainer(tmp_path, tiny.loud(tiny.model()))
    with torch.no_grad():
        made.teacher.model.get_input_embeddings().weight.mul_(1.5)
    assert failed(made) == ["teacher is student"]


def test_a_head_that_does_more_is_found(tmp_path):
    """One that a probe of another sequence cannot tell from a product."""
    made = trainer(tmp_path, tiny.loud(tiny.model(tie_word_embeddings=False)))
    made.model.lm_head.register_forward_hook(
        lambda module, args, logits: logits + args[0].sum(-1, keepdim=True) * torch.arange(300) / 300
    )
    assert "head" in failed(made)


def test_weights_that_no_gradient_reaches_are_found(tmp_path):
    student = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made = trainer(tmp_path, student, self_check=True)
    for name, parameter in student.named_parameters():
        if "lora_A" in name:
            parameter.data.zero_()  # beside a B of zeros: neither has a gradient
    assert failed(made) == ["weights move"]
    assert all(parameter.grad is None for parameter in student.parameters())


def test_text_that_the_tokenizer_loses_is_found(tmp_path):
    made = trainer(tmp_path)
    made.prompts = SimpleNamespace(
        student=lambda row: Prompts(tiny.tokenizer()).student(row)[-2:],
        teacher=Prompts(tiny.tokenizer()).teacher,
        told=Prompts(tiny.tokenizer()).told,
    )
    assert failed(made) == ["text"]


@pytest.mark.parametrize(
    ("where", "check"), [("LlamaForCausalLM.generate", "sampled is scored"), ("LlamaModel.forward", "padded as alone")]
)
def test_a_model_whose_own_code_fails_is_refused_by_name(tmp_path, monkeypatch, where, check):
    def fails(*arguments, **options):
        raise IndexError("index out of range\nin self")

    rows = tiny.ROWS if "generate" in where else [{**row, "completion": [30, 31]} for row in tiny.ROWS]
    made = trainer(tmp_path, rows=rows)
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{where}", fails)
    (refused, *_) = [check for check in self_check(made) if check.passed is False]
    assert refused.name == check and "\n" not in refused.said
    assert refused.said.startswith("LlamaForCausalLM raises IndexError: index out of range: ")


def test_what_cannot_be_asked_is_said(tmp_path):
    rows = [{**row, "completion": [30, 31, 32, 33]} for row in tiny.ROWS]
    made = trainer(tmp_path, rows=rows, per_device_train_batch_size=1)
    said = {check.name: check for check in self_check(made)}
    assert [name for name, check in said.items() if check.passed is None] == ["padded as alone", "sampled is scored"]
    assert all(str(check).startswith(name) for name, check in said.items())


def test_the_command_prints_every_check_and_writes_nothing(tmp_path):
    tiny.loud(tiny.model(*RWKV[:1], **RWKV[1])).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    values = dict(model=str(tmp_path / "model"), task="house_tool", output_dir=str(tmp_path / "run"))
    path.write_text(yaml.safe_dump({**values, "train": {"use_cpu": True, "max_completion_length": 6, "max_steps": 1}}))
    text, passed = check(load_recipe(path))
    assert not passed and [line.split("  ")[0] for line in text.splitlines()] == list(NAMES)
    text, passed = check(
        load_recipe(path, ["train.per_device_train_batch_size=1", "train.gradient_checkpointing=true"])
    )
    assert passed, text
    assert not (tmp_path / "run").exists()


def test_end_tokens_that_training_adds_end_answers(tmp_path, monkeypatch):
    """transformers joins the tokenizer's with the model's when training begins."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_special_tokens({"eos_token": "<|system|>"})
    student = tiny.model("phi", tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.bias[tokenizer.eos_token_id] = 20.0  # ends at once
    monkeypatch.setattr(tiny, "tokenizer", lambda: tokenizer)
    made = trainer(tmp_path, student, max_steps=1)
    student.generation_config.eos_token_id = 7  # set by whoever, before the first step
    made.train()
    assert made.state.log_history[0]["rollout_tokens"] == len(tiny.ROWS)
    assert set(made.eos_ids) == {tokenizer.eos_token_id, 7}
