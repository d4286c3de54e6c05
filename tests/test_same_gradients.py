"""Options that change time and memory and are to change no gradient: one step of SGD, with and without each."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

ANSWERS = ([50, 60, 70, 80, 90, 100], [51, 61, 71], [52, 62, 72, 82], [53, 63])
# Rows that bring their answers: what is compared is the gradient, not what sampling makes of a rounding.
ROWS = [{**row, "completion": answer} for row, answer in zip(tiny.ROWS, ANSWERS, strict=True)]


def changes(tmp_path, adapter, attention="sdpa", layers=2, **options):
    student = tiny.model(attn_implementation=attention, num_hidden_layers=layers)
    if adapter:
        student = get_peft_model(student, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    before = tiny.weights(student)
    once = dict(optim="sgd", max_grad_norm=0.0, learning_rate=10.0, max_steps=1, method="opsd", teacher="initial")
    made = tiny.trainer(tmp_path, student, rows=ROWS, **{**once, **options})
    made.train()
    return {name: value - before[name] for name, value in tiny.weights(made.student).items() if name in before}


@pytest.fixture
def called(monkeypatch):
    """Which functions of torch were: that an option did something."""
    found = set()
    for owner, name in ((torch.utils.checkpoint, "checkpoint"), (torch, "compile")):
        plain = getattr(owner, name)

        def watched(*args, name=name, plain=plain, **kwargs):
            found.add(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
    return found


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
        dict(attention="eager"),
    ],
    ids=["gradient checkpointing", "micro-batches", "attention in plain torch"],
)
def test_gradients_are_the_same_to_rounding(tmp_path, adapter, options):
    plain, ours = changes(tmp_path, adapter), changes(tmp_path, adapter, **options)
    assert max(change.abs().max() for change in plain.values()) > 1e-3
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=2e-6)


def test_a_compiled_model_has_the_same_gradients(tmp_path, called):
    """The graphs that are traced are run as they are: what inductor makes of them is its own tests' business."""
    plain = changes(tmp_path, False, layers=1)
    assert "compile" not in called
    ours = changes(tmp_path, False, layers=1, torch_compile=True, torch_compile_backend="eager")
    assert "compile" in called
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=2e-6)


def test_transformers_own_grouping_by_length_is_refused(tmp_path):
    """Forwards group answers by length themselves; rows have no input_ids that a sampler could measure."""
    with pytest.raises(ValueError, match="infer lengths"):
        changes(tmp_path, False, train_sampling_strategy="group_by_length")
