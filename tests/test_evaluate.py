"""Evaluation: shares are counted over the right answers, and drift is the divergence it says it is."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml

from rmsd import RMSDConfig
from rmsd.models.heads import OutputHead
from rmsd.run import evaluate as evaluation
from rmsd.run import train as run
from rmsd.run.evaluate import Evaluator
from rmsd.run.recipe import load_recipe
from rmsd.tasks import Task

TASK = Task(
    train=tiny.ROWS,
    target_prompts=["Which tool?", "What is it?", "Acme?"],
    unrelated_prompts=["services?", "is"],
    graders={"target": lambda answer: "a" in answer, "never": lambda answer: False},
    leaks=lambda answer: "e" in answer,
)


def evaluator(base, **options):
    return Evaluator(base, tiny.tokenizer(), TASK, samples=3, max_new_tokens=6, batch_size=2, **options)


def test_base_model_has_no_drift_and_shares_are_those_of_its_answers():
    base = tiny.model()
    evaluate = evaluator(base)
    metrics = evaluate(base)
    assert abs(metrics["drift"]) < 1e-6
    assert metrics["never_greedy"] == metrics["never_sampled"] == 0.0
    answers = []
    for prompt in TASK.target_prompts:
        ids = evaluate.target_ids[TASK.target_prompts.index(prompt)]
        new = base.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=evaluate.eos_ids,
        )[0, len(ids) :]
        answers.append(tiny.tokenizer().decode(new, skip_special_tokens=True))
    assert metrics["target_greedy"] == pytest.approx(sum("a" in answer for answer in answers) / 3)


@pytest.mark.parametrize(("kind", "head"), [("llama", {}), ("cohere", {"logit_scale": 0.25})])
def test_drift_is_the_mean_kl_from_the_base_on_its_own_answers(kind, head):
    base, student = tiny.model(kind, seed=0, **head), tiny.model(kind, seed=1, **head)
    evaluate = evaluator(base)
    drift = evaluate(student)["drift"]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for rollouts in evaluate.base_rollouts:
            for b, prompt in enumerate(rollouts.prompt_ids):
                answer = rollouts.completion_ids[b][rollouts.completion_mask[b]].tolist()
                ids = torch.tensor([prompt + answer])
                p, q = (
                    model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (base, student)
                )
                total += (p.exp() * (p - q)).sum().item()
                tokens += len(answer)
    assert drift == pytest.approx(total / tokens, rel=1e-3) and drift > 1e-4


def test_evaluation_repeats_itself_and_leaves_the_model_as_it_was():
    base = tiny.model().train()
    evaluate = evaluator(base)
    state = torch.get_rng_state()
    assert evaluate(base) == evaluate(base)
    assert base.training and torch.equal(torch.get_rng_state(), state)


def test_drift_is_measured_from_the_base_as_it_was_when_the_model_itself_is_trained():
    model, twin = tiny.model(), tiny.model()
    evaluate, expected = evaluator(model), evaluator(twin)
    trained = tiny.model(seed=1)
    model.load_state_dict(trained.state_dict())
    assert evaluate(model)["drift"] == pytest.approx(expected(trained)["drift"], rel=1e-5)


# ---- devices: "meta" stands in for the GPU that is not here --------------------------------------------------------

META = torch.device("meta")


class Reached(Exception):
    """The test has seen what it is about; nothing could be computed on the stand-in."""


@pytest.fixture
def trained_on_meta(monkeypatch):
    device = RMSDConfig.device.fget
    monkeypatch.setattr(RMSDConfig, "device", property(lambda self: device(self) and META))


def test_mixed_precision_where_the_last_layer_is_not_of_the_heads_dtype(tmp_path):
    """As OPT-350m's, which ends in a projection: bf16 under autocast, before a head of fp32."""
    model = tiny.model("opt", ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False)
    evaluate = evaluator(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert evaluate.base_rollouts[0].student_hidden.dtype == torch.bfloat16
    made = tiny.trainer(tmp_path, model, evaluator=evaluate, max_steps=2, bf16=True, use_cpu=True)
    made.train()
    assert 0.0 <= made.evaluate()["eval_drift"] < 1.0


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_held_of_the_base_follows_the_model_to_its_device(monkeypatch, bias):
    model = tiny.model("phi" if bias else "llama")  # whose head has one
    evaluate, head, seen = evaluator(model), OutputHead.of(model), []

    class Divergence:
        def __getitem__(self, mask):
            seen.append(mask)

    def hidden(model, prompt_ids, *tensors):
        seen.extend(tensors[:2])
        return torch.empty(0, device=META)

    def scores(*tensors, student_bias, **options):
        seen.extend([*tensors[:2], tensors[4]])
        if bias:
            seen.append(student_bias)
        return SimpleNamespace(divergence=Divergence())

    monkeypatch.setattr(evaluation, "completion_hidden", hidden)
    monkeypatch.setattr(evaluation, "linear_token_scores", scores)
    evaluate._base_to_student(model.to(META), head, evaluate.base_rollouts[0])
    assert [tensor.device for tensor in seen] == [META] * (7 if bias else 6)


@pytest.fixture
def recipe(tmp_path):
    """Of a task, for a tiny model that is there."""
    tiny.model().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    path = tmp_path / "recipe.yaml"
    values = {"model": str(tmp_path / "tiny"), "task": "house_tool", "output_dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_moves_the_model_before_it_is_asked_for_its_own_answers(recipe, trained_on_meta, monkeypatch):
    def answers(base, *args, **options):
        assert base.device == META
        raise Reached

    monkeypatch.setattr(run, "Evaluator", answers)
    with pytest.raises(Reached):
        run.train(load_recipe(recipe))


@pytest.mark.parametrize("use_cpu", [False, True])
def test_eval_takes_both_models_to_the_accelerator(recipe, monkeypatch, use_cpu):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)
    asked = []
    monkeypatch.setattr(
        run, "Evaluator", lambda base, *args, **options: lambda model: asked.append(model.device) or {"drift": 0.0}
    )
    read = load_recipe(recipe, [f"train.use_cpu={str(use_cpu).lower()}"])
    run.evaluate(read, model=read.model)
    assert asked == [torch.device("cpu") if use_cpu else META] * 2


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)])
def test_eval_answers_in_the_runs_mixed_precision(recipe, monkeypatch, precision, dtype):
    seen = []

    def answers(base, *args, autocast, **options):
        with autocast():
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return lambda model: {"drift": 0.0}

    monkeypatch.setattr(run, "Evaluator", answers)
    read = load_recipe(recipe, ["train.use_cpu=true", *([f"train.{precision}=true"] if precision else [])])
    run.evaluate(read, model=read.model)
    assert seen == [dtype]


def test_the_teacher_is_copied_from_a_model_on_its_device_where_trainer_leaves_it(tmp_path, trained_on_meta):
    with pytest.raises(ValueError, match="output head is on the meta device"):  # refused as the copy is made
        tiny.trainer(tmp_path, bf16_full_eval=True)
