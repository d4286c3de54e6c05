"""Evaluation: shares are counted over the right answers, and drift is the divergence it says it is."""

import pytest
import tiny
import torch

from rmsd.evaluate import Evaluator
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
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=6,
            do_sample=False, pad_token_id=0, eos_token_id=evaluate.eos_ids,
        )[0, len(ids) :]  # fmt: skip
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
