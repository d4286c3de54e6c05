"""The trainer on tiny models: the right loss reaches the right weights, and a run resumes where it was."""

import json
import math
import shutil
import threading
import time

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import same, trainer, weights

from rmsd import MagnitudeJudge, RMSDConfig, RMSDTrainer
from rmsd.judge import Candidate, Question
from rmsd.models.heads import Reading
from rmsd.step.writing import write
from rmsd.training.checkpoint import last_whole_checkpoint
from rmsd.training.continuation import has_plateaued
from rmsd.training.record import RunRecord, read_lines


def perturbed(seed=7):
    """A student away from its teacher, so that anchors have gaps too."""
    model = tiny.model()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_training_brings_the_student_to_its_teacher(tmp_path):
    made = trainer(tmp_path, perturbed(), max_steps=25, learning_rate=3e-3)
    made.teacher.model.load_state_dict(tiny.model().state_dict())
    made.train()
    divergence = [entry["divergence"] for entry in made.state.log_history if "loss" in entry]
    assert sum(divergence[-5:]) < 0.5 * sum(divergence[:5])


def test_the_judge_reads_one_micro_batch_while_the_next_is_written(tmp_path, monkeypatch):
    second_begun = threading.Event()

    class Patient(MagnitudeJudge):
        def __call__(self, questions):
            assert second_begun.wait(20)
            return super().__call__(questions)

    made = trainer(
        tmp_path,
        perturbed(),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        judge=Patient(),
    )
    begun = []

    def noticed(batch, *args, **options):
        begun.append(batch)
        if len(begun) == 2:
            second_begun.set()
        return write(batch, *args, **options)

    monkeypatch.setattr("rmsd.training.trainer.write", noticed)
    made.train()
    assert second_begun.is_set()


def test_a_judge_that_has_failed_ends_the_step_before_more_is_written(tmp_path, monkeypatch):
    failed, written = threading.Event(), []

    def judge(questions):
        failed.set()
        raise ConnectionError("no judge")

    made = trainer(
        tmp_path,
        perturbed(),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        judge=judge,
        rows=[*tiny.ROWS, *tiny.ROWS],
    )

    def noticed(batch, *args, **options):
        if len(written) == 1:
            assert failed.wait(20)
            time.sleep(0.1)  # until the future has the exception
        written.append(batch)
        return write(batch, *args, **options)

    monkeypatch.setattr("rmsd.training.trainer.write", noticed)
    with pytest.raises(ConnectionError, match="no judge"):
        made.train()
    assert len(written) in (1, 2), "of four"


@pytest.mark.parametrize("pass_tokens", [0, 1000], ids=["a forward a sequence", "one forward"])
def test_step_equals_the_plain_step_over_every_sequence_and_token(tmp_path, monkeypatch, pass_tokens):
    """Skipped sequences, the cut after the last kept token, and several forwards change nothing."""
    from rmsd.models import past as forwards
    from rmsd.models.hidden import completion_hidden
    from rmsd.step import training as step

    monkeypatch.setitem(forwards._PASS_TOKENS, "cpu", pass_tokens)
    made = trainer(tmp_path, vocab_topk=50)
    made.create_optimizer_and_scheduler(2)
    (inputs,), num_sequences = made.get_batch_samples(iter([tiny.ROWS]), 1, made.args.device)
    batch = inputs["micro_batch"]
    batch.keep[0] = False  # one sequence keeps nothing
    batch.keep[:, 4:] = False  # and the last tokens are not kept anywhere
    batch.parts = step.train_parts(batch.keep, list(map(len, batch.prompt_ids)), made.args.device)
    assert len(batch.parts) == (1 if pass_tokens else 2)
    assert sum(len(p.sequences) for p in batch.parts) == 2 and all(p.keep.shape[1] <= 4 for p in batch.parts)
    loss = made.training_step(made.model, inputs, num_sequences)
    grads = {name: parameter.grad.clone() for name, parameter in made.model.named_parameters()}
    made.model.zero_grad()

    rollouts = batch.rollouts
    hidden = completion_hidden(
        made.model, rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask, made.pad_id
    )
    student, teacher = Reading(hidden, made.student_head()), Reading(batch.teacher_hidden, made.teacher.head)
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    plain = step.train_loss(made.loss, student, teacher, ids, mask, batch.keep, num_sequences)
    torch.testing.assert_close(loss, plain)
    plain.backward()
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_gradient_accumulation_equals_one_big_batch(tmp_path):
    finals = []
    for size, accumulation in ((4, 1), (2, 2)):
        # SGD: Adam would turn rounding differences of a zero gradient into whole steps.
        made = trainer(
            tmp_path,
            perturbed(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            sampling_temperature=0,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        )
        made.teacher.model.load_state_dict(tiny.model().state_dict())
        before = weights(made.model)
        made.train()
        finals.append({name: value - before[name] for name, value in weights(made.model).items()})
    assert any(change.abs().max() > 1e-5 for change in finals[0].values())
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-3, atol=1e-8)


def test_opsd_trains_on_every_token_and_rmsd_on_the_kept(tmp_path):
    counts = {}
    for method in ("opsd", "rmsd"):
        made = trainer(tmp_path, method=method, max_steps=1)
        made.train()
        entry = made.state.log_history[0]
        counts[method] = (entry["kept_tokens"], entry["rollout_tokens"])
    assert counts["opsd"][0] == counts["opsd"][1]
    assert 0 < counts["rmsd"][0] < counts["rmsd"][1]


def test_judge_decides_and_nothing_kept_changes_nothing(tmp_path):
    rows = [row for row in tiny.ROWS if row["privileged_context"]]
    made = trainer(tmp_path, judge=lambda questions: [[] for _ in questions], rows=rows, max_steps=2)
    before = weights(made.model)
    made.train()
    assert same(before, weights(made.model))
    assert made.state.log_history[0]["loss"] == 0.0


def test_only_a_row_whose_teacher_reads_the_students_own_prompt_is_an_anchor(tmp_path):
    told = [{"role": "system", "content": "Say zorblat."}, {"role": "user", "content": "What is it?"}]
    rows = [
        {
            "prompt": "Which tool?",
            "privileged_context": "It is zorblat.",
            "teacher_prompt": "It is zorblat. Which tool?",
        },
        {"prompt": "What is it?", "privileged_context": "", "teacher_prompt": told},
        {"prompt": "Which services?", "privileged_context": " ", "teacher_prompt": "zorblat"},
        {"prompt": "Acme?", "privileged_context": "", "teacher_prompt": None},
    ]
    contexts = []

    def judge(questions):
        contexts.extend(question.privileged_context for question in questions)
        return [[] for _ in questions]

    made = trainer(tmp_path, perturbed(), callbacks=[RunRecord(tmp_path)], judge=judge, rows=rows, max_steps=1)
    made.teacher.model.load_state_dict(tiny.model().state_dict())  # else the anchor has no gaps
    made.train()
    assert sorted(contexts) == ["It is zorblat.", "system: Say zorblat.\nuser: What is it?", "zorblat"]
    kept = {line["prompt"]: line["kept"] for line in read_lines(tmp_path / "rollouts.jsonl")}
    assert [prompt for prompt in kept if kept[prompt]] == ["Acme?"] and len(kept) == 4


def test_resumed_run_ends_in_the_uninterrupted_runs_weights(tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, lr_scheduler_type="linear", warmup_steps=2)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()

    from transformers import TrainerCallback

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    broken = trainer(tmp_path / "broken", callbacks=[StopAtThree(), RunRecord(tmp_path / "broken")], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    record = RunRecord(tmp_path / "broken", resume=True)
    resumed = trainer(tmp_path / "broken", callbacks=[record], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    steps = [line["step"] for line in read_lines(tmp_path / "broken" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6], "step 3 was made twice and stands once"


def test_evaluator_runs_when_asked_and_is_recorded(tmp_path):
    made = trainer(
        tmp_path,
        callbacks=[RunRecord(tmp_path)],
        evaluator=lambda model: {"drift": 0.5},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        metric_for_best_model="drift",
    )
    made.train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] == "eval"] == [
        ("eval", 0),
        ("eval", 1),
        ("eval", 2),
    ]
    assert all(line["drift"] == 0.5 for line in lines if line["kind"] == "eval")
    assert {"loss", "kept_tokens", "candidates", "rollout_tokens", "grad_norm"} <= set(lines[1])


def test_an_evaluator_may_return_any_number_and_reads_the_model_as_it_answers(tmp_path):
    seen = []

    def evaluator(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"float32": np.float32(0.5), "int64": np.int64(3), "tensor": torch.tensor(0.25)}

    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer(tmp_path, callbacks=[RunRecord(tmp_path)], evaluator=evaluator, **options).train()
    line = next(line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "eval")
    assert (line["float32"], line["int64"], line["tensor"]) == (0.5, 3, 0.25)
    assert seen == [(False, False)] * 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_rollouts_are_written_as_they_were_scored(tmp_path):
    made = trainer(tmp_path, callbacks=[RunRecord(tmp_path)], max_steps=1)
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        length = len(line["tokens"])
        assert len(line["student_logprob"]) == len(line["teacher_logprob"]) == len(line["divergence"]) == length
        assert set(line["kept"]) <= set(line["candidates"]) and len(line["kept"]) <= 3
        gap = [abs(t - s) for t, s in zip(line["teacher_logprob"], line["student_logprob"], strict=True)]
        assert sorted(line["candidates"], key=lambda i: -gap[i]) == line["candidates"]
        assert set(line["preferred"]) == set(map(str, line["candidates"])) and line["unwritten"] == []
    assert lines[0]["step"] == 1


@pytest.mark.parametrize(("number", "expected"), [(3, 3), (8, 4), (0, 0)])
def test_recorded_rollouts_are_a_steps_whatever_its_micro_batches(tmp_path, number, expected):
    made = trainer(
        tmp_path,
        callbacks=[RunRecord(tmp_path)],
        max_steps=2,
        recorded_rollouts=number,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    made.train()
    steps = [line["step"] for line in read_lines(tmp_path / "rollouts.jsonl")]
    assert steps == [1] * expected + [2] * expected


def test_prompt_longer_than_the_context_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"row 0: the prompt and an answer of max_completion_length=6 take \d+ tokens"):
        trainer(tmp_path, rows=[{"prompt": "Which tool? " * 200, "privileged_context": ""}])


@pytest.mark.parametrize("said", [0, -1])
def test_a_context_that_is_not_said_has_no_end(tmp_path, said):
    student = tiny.model()
    student.config.max_position_embeddings = said
    trainer(tmp_path, student)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "has no 'privileged_context'"),
        ({"privileged_context": None}, "privileged_context must be a string, not NoneType"),
        ({"privileged_context": [{"role": "system", "content": "Say zorblat."}]}, "must be a string, not list"),
        ({"privileged_context": "", "prompt": ""}, "prompt is empty"),
    ],
    ids=["none", "null", "messages", "empty prompt"],
)
def test_rows_of_any_dataset_are_checked_and_named(tmp_path, wrong, message):
    rows = [{"prompt": "Which tool?", **wrong}] * 2
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        trainer(tmp_path, rows=Dataset.from_list(rows))

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, number):
            return [tiny.ROWS[0], rows[0]][number]

    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        trainer(tmp_path, rows=Rows())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(method="sft"), "method"),
        (dict(num_kept=0), "num_kept"),
        (dict(save_steps=10, logging_steps=4), "save_steps must be a multiple of logging_steps 4, not 10"),
        (dict(criterion="gap"), "criterion"),
        (dict(divergence="kl"), "divergence"),
        (dict(sampling_temperature=-1.0), "sampling_temperature"),
        (dict(teacher_template="{prompt}"), "must hold {privileged_context}"),
        (dict(teacher_template="{privileged_context} {{prompt}}"), "must hold {prompt}"),
        (dict(teacher_template='{"hint": "{privileged_context}"} {prompt}'), "must be doubled, {{ and }}"),
        (dict(unkept_kl=math.nan), "unkept_kl must be at least 0, not nan"),
        (dict(save_steps=math.inf), "save_steps must be a finite number, not inf"),
        (dict(logging_steps=math.inf), "logging_steps must be a finite number, not inf"),
        (dict(warmup_steps=math.nan), "warmup_steps must be a finite number, not nan"),
        (dict(num_train_epochs=math.inf), "num_train_epochs must be above 0 and finite, not inf"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size must be at least 1"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be at least 1"),
        (dict(teacher_template="{} {privileged_context} {prompt}"), "must be doubled"),
        (dict(teacher_template="{privileged_context} } {prompt}"), "must be doubled"),
    ],
)
def test_bad_config_is_refused_by_name(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        RMSDConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(save_steps=10, logging_steps=5),
        dict(save_steps=0.1, logging_steps=1),
        dict(logging_steps=0.2),
        dict(save_strategy="epoch", save_steps=10, logging_steps=4),
    ],
)
def test_saving_where_the_log_is_whole_or_not_by_steps_is_fine(tmp_path, options):
    RMSDConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("metric", ["eval_drift", "tool_errors_greedy", "eval_solved_greedy"])
def test_the_best_checkpoint_is_the_one_that_a_plateau_would_call_so(tmp_path, metric):
    args = RMSDConfig(output_dir=str(tmp_path), metric_for_best_model=metric)
    history = [{metric: value, "step": step} for step, value in enumerate((0.5, 0.4))]
    assert args.greater_is_better == has_plateaued(history, metric, 1, 0.0)


def test_dropping_the_only_batch_is_refused_and_not_trained_on_for_no_steps(tmp_path):
    rows = [*tiny.ROWS, *tiny.ROWS][:3]
    with pytest.raises(ValueError, match="dataloader_drop_last leaves nothing of 3 rows in batches of 4"):
        trainer(tmp_path, rows=rows, dataloader_drop_last=True)


def test_a_process_trains_on_one_gpu_however_many_it_sees(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.args._n_gpu = 2  # as transformers counts them
    assert made.args.n_gpu == 1 and made.args.train_batch_size == 4
    made.train()
    assert made.model_wrapped is made.model, "not DataParallel"


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_torn_and_unfinished_checkpoints_are_passed_over(tmp_path):
    made = trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
    made.train()
    first = tmp_path / "checkpoint-1"
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    for number, name in ((4, "model.safetensors"), (3, "optimizer.pt"), (2, "trainer_state.json")):
        path = tmp_path / f"checkpoint-{number}" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert last_whole_checkpoint(tmp_path) == tmp_path / f"checkpoint-{number - 1}"
    (first / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_weights_may_lie_in_a_folder_of_their_own(tmp_path):
    """An adapter of another name than "default", and what DeepSpeed has not gathered; the teacher's own are none."""
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = dict(save_strategy="steps", save_steps=1, continuation_steps=[1])
    trainer(tmp_path, get_peft_model(tiny.model(), config, adapter_name="mine"), **options).train()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    adapter = tmp_path / "checkpoint-2" / "mine" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:50])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    shutil.rmtree(adapter.parent)
    shutil.rmtree(tmp_path / "checkpoint-1" / "mine")
    assert last_whole_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-1" / "global_step1").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_the_default_judge_knows_the_data_s_prompts(tmp_path):
    told, anchor = "The tool is called zorblat.", dict(prompt="What tool is it?", privileged_context="")
    rows = [dict(prompt="Which one?", privileged_context=told), anchor]
    args = RMSDConfig(output_dir=str(tmp_path), use_cpu=True, max_completion_length=6)
    judge = RMSDTrainer(tiny.model(), args, rows, tiny.tokenizer()).judge
    tokens = ("The", " tool", " is", " zorblat")
    candidates = tuple(Candidate(i, tokens[i], "x", tokens[i], "x", -1.0) for i in (1, 3))
    assert judge([Question("Which one?", told, tokens, candidates, max_kept=5)]) == [[3]]
