"""Candidates from what vLLM records, really run; tests/test_engine.py starts this file in a process of its own."""

import dataclasses

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from vllm_cases import PROMPTS, built, options, student, trainer

from rmsd.answers.engines import TOP
from rmsd.answers.vllm_engine import VLLMEngine
from rmsd.models.heads import OutputHead
from rmsd.models.hidden import completion_hidden
from rmsd.step.micro_batch import MicroBatch
from rmsd.step.scoring import scored_by_engine, scored_by_forwards


def test_what_it_records_of_two_models_is_what_they_say():
    """The answers' own tokens and the likeliest, of the student as it writes and of a teacher as it reads them."""
    model, told = student(), student(seed=1)
    engine = built(model)
    stop = int(engine(PROMPTS, **options()).completion_ids[0, 3])
    rollouts = engine(PROMPTS, **{**options(), "eos_ids": [stop]})
    assert not rollouts.completion_mask.all(), "one answer ends before another"
    prompts = [[20, 21, *prompt] for prompt in PROMPTS]
    engine.sync(told)
    read = engine.read(prompts, rollouts)
    mask = rollouts.completion_mask
    for reader, prompt_ids, recorded in ((model, PROMPTS, rollouts.recorded), (told, prompts, read)):
        with torch.no_grad():
            hidden = completion_hidden(reader, prompt_ids, rollouts.completion_ids, mask, 0)
            logprobs = OutputHead.of(reader)(hidden).log_softmax(-1)
        own = logprobs.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)
        top = logprobs.topk(TOP)
        torch.testing.assert_close(recorded.logprob[mask], own[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(recorded.top_logprob[mask], top.values[mask], rtol=1e-4, atol=1e-4)
        assert torch.equal(recorded.top_ids[mask], top.indices[mask])
        assert not recorded.logprob[~mask].any()


@pytest.mark.parametrize("brought", [False, True])
def test_both_routes_find_the_same_candidates(tmp_path, brought):
    """In answers that the engine writes, and in the rows' own, of which it reads the student's side too."""
    rows = tiny.ROWS
    if brought:
        turns = {"completion": [50, 60, 70, 80, 90], "completion_mask": [True, True, False, True, True]}
        rows = [{**row, **turns} for row in rows]
    made = trainer(tmp_path, rows=rows)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.teacher.model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    made.engine.sync(made.model)
    batches = [MicroBatch.of(list(made.train_dataset), made.prompts)]
    (engine,) = made._written(batches)
    ours = dataclasses.replace(engine, rollouts=dataclasses.replace(engine.rollouts))
    (engine,) = scored_by_engine([engine], made.engine, made.teacher, made.loss)
    (ours,) = scored_by_forwards([ours], made.student, made.student_head(), made.teacher, made.loss, made.pad_id)
    mask = engine.rollouts.completion_mask
    for name in ("student_logprob", "teacher_logprob"):
        mine, expected = (getattr(scored.scores, name)[mask] for scored in (engine, ours))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert (engine.candidates >= 0).sum() >= 9 and torch.equal(engine.candidates, ours.candidates)
    assert torch.equal(engine.wishes.student_preferred, ours.wishes.student_preferred)
    assert torch.equal(engine.wishes.teacher_preferred, ours.wishes.teacher_preferred)
    at = engine.candidates.clamp_min(0).unsqueeze(-1).expand(-1, -1, TOP)
    recorded = engine.rollouts.recorded.top_ids.gather(1, at)
    known = (recorded == ours.wishes.promoted.unsqueeze(-1)).any(-1) & (engine.candidates >= 0)
    assert known.any() and torch.equal(engine.wishes.promoted[known], ours.wishes.promoted[known])

    keep = torch.zeros_like(mask)
    keep[1, 1] = keep[2, 0] = keep[2, 3] = True
    assert engine.teacher_hidden is None, "until it is known what is kept"
    kept, nothing = (
        made.teacher.kept_hidden(engine.teacher_prompt_ids, engine.rollouts, made.pad_id, each)
        for each in (keep, keep & False)
    )
    whole = ours.teacher_hidden
    torch.testing.assert_close(kept[2, :4], whole[2, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[1, :2], whole[1, :2], rtol=1e-4, atol=1e-5)
    assert not kept[0].any() and not kept[:, 4:].any() and not nothing.any()


def lora(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        (False, {}),
        (False, {"teacher": "live"}),
        (False, {"continuation_steps": [2]}),
        (True, {"teacher": "adapter_off"}),
        (True, {"continuation_steps": [2]}),
    ],
    ids=["frozen copy", "live", "copy, continued", "adapter off", "adapter, continued"],
)
def test_a_run_ends_in_the_weights_of_one_whose_trainer_scores(tmp_path, monkeypatch, adapter, settings):
    finals, entries, passes = [], [], []
    syncs, sync = [], VLLMEngine.sync
    monkeypatch.setattr(VLLMEngine, "sync", lambda self, model: syncs.append(model) or sync(self, model))
    for engine_scores in (False, True):
        model = lora(student()) if adapter else student()
        made = trainer(
            tmp_path,
            model,
            engine_scores=engine_scores,
            max_steps=4,
            learning_rate=1e-2 if adapter else 1e-3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **settings,
        )
        before = tiny.weights(model)
        passes.clear(), syncs.clear()
        # One pass for each part that trains; a teacher that shares the student's layers reads without gradients.
        model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        made.train()
        finals.append({name: value - before[name] for name, value in tiny.weights(model).items() if name in before})
        entries.append([entry for entry in made.state.log_history if "loss" in entry])
    plain, scored = finals
    assert max(change.abs().max() for change in plain.values()) > 1e-4
    for name in plain:
        torch.testing.assert_close(scored[name], plain[name], rtol=1e-2, atol=1e-6)

    assert len(syncs) == (4 if settings.get("teacher") == "live" else 8)
    own = not adapter and settings.get("teacher") != "live"
    # One without gradients as training begins, when the head is read again.
    assert passes.count(False) == 1 if own else passes.count(False) > 1
    for theirs, ours in zip(*entries, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3) and ours["kept_tokens"] == theirs["kept_tokens"]
        assert max(ours["engine_gap"], ours["engine_teacher_gap"]) < 1e-3
        assert not {"divergence", "tail_mass"} & ours.keys(), "not known, so not logged"
