"""Guided rollouts: a share of the answers is the told teacher's, and is marked."""

from unittest import mock

import pytest
import tiny
import torch
from test_environments import CHAT
from test_episodes import Counter, add_two, call, stub, texts
from tiny import trainer

from rmsd import RMSDConfig
from rmsd.answers.rollout import generate
from rmsd.step import writing
from rmsd.step.writing import guided_rows
from rmsd.training.record import RunRecord, read_lines

LONG = dict(max_completion_length=12, guided_rollouts=1.0)


def batch_of(made):
    """The first step's micro-batch, as the trainer hands it on."""
    batches, _ = made.get_batch_samples(iter([tiny.ROWS]), 1, made.args.device)
    return batches[0]["micro_batch"]


def test_told_rows_are_answered_by_the_teacher_under_its_own_prompt_and_anchors_by_the_student(tmp_path):
    made = trainer(tmp_path, **LONG)
    # Another model than the student, so that whose answer it is can be seen.
    made.teacher.model = tiny.model(seed=7)
    batch = batch_of(made)
    assert batch.guided == [0, 2, 3]
    seeds = made._seeds(0, 4)
    options = dict(max_new_tokens=12, pad_id=made.pad_id, eos_ids=made.eos_ids)
    for i in range(4):
        told = i in batch.guided
        model, prompt = (made.teacher.model, batch.teacher_prompt_ids) if told else (made.student, batch.prompt_ids)
        alone = generate(model, [prompt[i]], seed=[seeds[i]], **options)
        mask = batch.rollouts.completion_mask[i]
        assert batch.rollouts.completion_ids[i][mask].tolist() == alone.completion_ids[0].tolist()
    assert batch.rollouts.prompt_ids == batch.prompt_ids, "the student reads them under its own prompt"


def test_what_is_scored_of_a_guided_answer_is_the_students_own_forward(tmp_path):
    made = trainer(tmp_path, **LONG)
    batch = batch_of(made)
    student, ids = made.student, batch.rollouts.completion_ids
    for i in batch.guided:
        answer = ids[i][batch.rollouts.completion_mask[i]]
        read = torch.tensor([[*batch.prompt_ids[i], *answer]])
        logits = student(read).logits[0, len(batch.prompt_ids[i]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(batch.scores.student_logprob[i, : len(answer)], expected, rtol=1e-4, atol=1e-4)


def test_they_are_marked_in_the_record_and_counted_in_the_log(tmp_path):
    trainer(tmp_path, callbacks=[RunRecord(tmp_path)], **LONG).train()
    lines = read_lines(tmp_path / "rollouts.jsonl")
    assert [line.get("guided", False) for line in lines] == [bool(line["privileged_context"]) for line in lines]
    assert [line["guided_rollouts"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3, 3]


def test_the_share_is_drawn_by_each_answers_seed():
    rows = [{"privileged_context": "x"}] * 2000
    chosen = guided_rows(rows, 0.25, range(2000))
    assert 400 < len(chosen) < 600
    assert guided_rows(rows[:10], 0.25, range(10)) == [i for i in chosen if i < 10], "not by who else is in the batch"


def test_without_them_nothing_is_marked(tmp_path):
    batch = batch_of(trainer(tmp_path))
    assert batch.guided is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(guided_rollouts=1.5), r"guided_rollouts must lie in \[0, 1\], not 1.5"),
        (dict(guided_rollouts=0.5, fsdp=True), "guided_rollouts needs engine=transformers, and no fsdp"),
    ],
)
def test_what_they_do_not_go_with_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RMSDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_in_an_episode_the_teachers_calls_are_acted_on_and_what_tools_say_is_nobodys(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", CHAT)
    made = trainer(tmp_path, **{**LONG, "max_completion_length": 80}, called=dict(environment_factory=Counter))
    write = stub([call("add", n=3)] * 3, ["Done."] * 3)
    write.turns, write.sync = mock.MagicMock(), lambda model: None
    monkeypatch.setattr(writing, "TransformersEngine", lambda autocast: write)
    rows = [dict(row) for row in tiny.ROWS]
    batch = batch_of(made)
    assert batch.guided == [0, 2, 3]
    assert [episode.reward == 1.0 for episode in batch.episodes] == [True, False, True, True]
    told = [made.prompts.teacher(rows[i]) for i in batch.guided]
    first, second = (prompt_ids for prompt_ids, *_ in write.asked)
    assert first == told and all(ids[: len(begun)] == begun for ids, begun in zip(second, told, strict=True))
    assert batch.rollouts.prompt_ids == [made.prompts.student(row) for row in rows]
    said = [(True, call("add", n=3) + "<|end|>"), (False, "<|tool|>now 3<|end|><|assistant|>"), (True, "Done.<|end|>")]
    assert [texts(batch.rollouts, i) for i in batch.guided] == [said] * 3
    write.turns.return_value.__enter__.assert_called_once_with()  # so that what it has read is kept between turns
    # What the environment says at its end is told to the teacher that reads, as after an episode of the student's.
    assert all("it came to 3" in str(batch.teacher_prompts[i]) for i in batch.guided)


def test_a_guided_episode_needs_what_it_is_told_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", CHAT)
    with pytest.raises(ValueError, match="guided_rollouts needs a privileged context that is there before"):
        trainer(tmp_path, guided_rollouts=0.5, called=dict(tools=[add_two], context_after=lambda row, said: "x"))
