"""Rollouts made elsewhere: rows that bring their completion are trained on as they stand, tool turns left out."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import perturbed
from tiny import same, trainer, weights

from rmsd.answers.completions import rollouts_of
from rmsd.answers.data import checked_dataset, checked_rows, load_rows
from rmsd.models.heads import Reading
from rmsd.run.recipe import load_recipe
from rmsd.run.train import train
from rmsd.step.micro_batch import MicroBatch
from rmsd.step.training import settle, train_loss
from rmsd.step.writing import write
from rmsd.training.record import RunRecord, read_lines

TURNS = [("The tool is", True), (" [search: zorblat]", False), (" called zorblat.", True)]


def multi_turn(turns=TURNS):
    """Token ids and mask of an answer in turns."""
    ids, mask = [], []
    for text, written in turns:
        turn = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
        ids += turn
        mask += [written] * len(turn)
    return {"completion": ids, "completion_mask": mask}


def rows(**extra):
    return [{**row, **multi_turn(), **extra} for row in tiny.ROWS]


def prepared(made, rows):
    """What the trainer makes of one micro-batch."""
    batch = MicroBatch.of(rows, made.prompts)
    made._judge(made._scored([batch]))
    settle(batch, made.teacher, made.pad_id)
    return batch


def no_generation(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is to be generated")

    monkeypatch.setattr("rmsd.answers.engines.generate", refuse)


def test_training_on_recorded_rollouts_equals_training_on_them_as_they_are_sampled(tmp_path, monkeypatch):
    options = dict(max_steps=1, optim="sgd", max_grad_norm=0.0)
    sampled = trainer(tmp_path / "a", perturbed(), **options)
    sampled.teacher.model.load_state_dict(tiny.model().state_dict())
    kept = {}

    def remember(batch, *args, **options):
        write(batch, *args, **options)
        for row, ids, mask in zip(
            batch.rows, batch.rollouts.completion_ids, batch.rollouts.completion_mask, strict=True
        ):
            kept[str(row["prompt"])] = ids[mask].tolist()
        return batch

    monkeypatch.setattr("rmsd.training.trainer.write", remember)
    before = weights(sampled.model)
    sampled.train()

    no_generation(monkeypatch)
    recorded = [{**row, "completion": kept[str(row["prompt"])]} for row in checked_rows(tiny.ROWS)]
    given = trainer(tmp_path / "b", perturbed(), rows=recorded, **options)
    given.teacher.model.load_state_dict(tiny.model().state_dict())
    given.train()
    after = weights(sampled.model)
    assert max((after[name] - before[name]).abs().max() for name in after) > 1e-5
    for name, value in weights(given.model).items():
        torch.testing.assert_close(value, after[name], rtol=1e-4, atol=1e-7)


def test_tool_turns_are_read_but_never_scored_selected_or_trained_on(tmp_path, monkeypatch):
    no_generation(monkeypatch)
    asked = []

    def judge(questions):
        asked.extend(questions)
        return [[candidate.position for candidate in question.candidates] for question in questions]

    made = trainer(
        tmp_path,
        perturbed(),
        rows=rows(),
        judge=judge,
        callbacks=[RunRecord(tmp_path)],
        num_candidates=50,
        num_kept=50,
        max_steps=1,
    )
    made.train()
    mask = multi_turn()["completion_mask"]
    written = {i for i, value in enumerate(mask) if value}
    assert len(asked) == 3 and "[search: zorblat]" in "".join(asked[0].tokens), "a judge reads the whole answer"
    for line in read_lines(tmp_path / "rollouts.jsonl"):
        assert len(line["tokens"]) == len(mask)
        assert set(line["candidates"]) <= written and set(line["kept"]) <= written
        assert [value is None for value in line["divergence"]] == [not value for value in mask]
        assert line["unwritten"] == [i for i, value in enumerate(mask) if not value]
    entry = made.state.log_history[0]
    assert entry["rollout_tokens"] == 4 * len(written) and entry["candidates"] <= 4 * len(written)


def test_opsd_trains_on_what_the_student_wrote_alone(tmp_path):
    made = trainer(tmp_path, perturbed(), rows=rows(), method="opsd", max_steps=1)
    made.train()
    assert made.state.log_history[0]["kept_tokens"] == 4 * sum(multi_turn()["completion_mask"])


def test_a_tool_turn_changes_what_follows_it_and_padding_does_not(tmp_path):
    """The forward attends to tool turns; their own tokens get no gradient through the loss."""
    made = trainer(tmp_path, perturbed(), rows=rows())
    short, long = multi_turn(TURNS[:1]), multi_turn()
    together = prepared(made, [{**tiny.ROWS[0], **short}, {**tiny.ROWS[0], **long}])
    alone = prepared(made, [{**tiny.ROWS[0], **short}])
    length = len(short["completion"])
    torch.testing.assert_close(together.rollouts.student_hidden[0, :length], alone.rollouts.student_hidden[0, :length])
    other = multi_turn([TURNS[0], (" [search: nothing]", False), TURNS[2]])
    changed = prepared(made, [{**tiny.ROWS[0], **other}])
    last = together.rollouts.student_hidden[1, len(long["completion"]) - 1]
    assert (changed.rollouts.student_hidden[0, -1] - last).abs().max() > 1e-4


def test_the_training_forward_reads_tool_turns_too(tmp_path):
    made = trainer(tmp_path, perturbed(), rows=rows())
    made.teacher.model.load_state_dict(tiny.model().state_dict())
    batch = prepared(made, [{**row, **multi_turn()} for row in tiny.ROWS])
    loss = made.training_step(made.model, batch.inputs(), 4.0)
    rollouts = batch.rollouts
    student = Reading(rollouts.student_hidden, made.student_head())
    teacher = Reading(batch.teacher_hidden, made.teacher.head)
    plain = train_loss(made.loss, student, teacher, rollouts.completion_ids, rollouts.completion_mask, batch.keep, 4.0)
    assert plain > 1e-3
    torch.testing.assert_close(loss, plain)


def test_text_is_tokenised_as_it_stands_and_an_empty_rollout_is_skipped_and_counted(tmp_path):
    text = [{**row, "completion": "The tool"} for row in tiny.ROWS[:3]] + [{**tiny.ROWS[3], "completion": ""}]
    made = trainer(tmp_path, perturbed(), rows=text, max_steps=1)
    made.train()
    entry = made.state.log_history[0]
    count = len(tiny.tokenizer()("The tool", add_special_tokens=False)["input_ids"])
    assert entry["rollout_tokens"] == 3 * count and entry["empty_rollouts"] == 1 and entry["kept_sequences"] <= 3

    empty = trainer(tmp_path, perturbed(), rows=[{**row, "completion": ""} for row in tiny.ROWS], max_steps=1)
    before = weights(empty.model)
    empty.train()
    assert same(before, weights(empty.model)) and empty.state.log_history[0]["empty_rollouts"] == 4


def test_masks_and_padding():
    made = rollouts_of(
        [{"completion": [5, 6, 7], "completion_mask": [True, False, True]}, {"completion": [8]}],
        [[1], [2]],
        tiny.tokenizer(),
        0,
        "cpu",
    )
    assert made.completion_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert made.completion_mask.tolist() == [[True, False, True], [True, False, False]]
    assert made.attention_mask.tolist() == [[True, True, True], [True, False, False]]


GOOD = json.dumps({**tiny.ROWS[0], **multi_turn()})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD[:40], "line 3: not JSON"),
        (json.dumps(tiny.ROWS[0]), "line 3: has no 'completion'"),
        (json.dumps({**tiny.ROWS[0], "completion": [1, "a"]}), "line 3: completion must be a string or a list of"),
        (json.dumps({**tiny.ROWS[0], "completion": [1, 2], "completion_mask": [1]}), "line 3: completion_mask has 1"),
        (json.dumps({**tiny.ROWS[0], "completion": [1], "completion_mask": ["no"]}), "line 3: completion_mask must be"),
    ],
)
def test_a_broken_line_is_named_by_number(tmp_path, line, message):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError) as error:
        load_rows(path, completions=True)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": [5, 100_000]}, "row 0: completion holds token id 100000; the model has 300"),
        ({"completion": [5] * 250}, "row 0: the prompt and its completion take"),
        ({"completion": "The tool", "completion_mask": [True]}, "row 0: completion_mask has 1 entries"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_training(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rows=[{**tiny.ROWS[0], **change}])


def test_what_only_a_later_row_brings_is_there():
    later = {**tiny.ROWS[0], **multi_turn(), "teacher_prompt": "Told."}
    first, second = checked_rows([{**tiny.ROWS[0], "completion": [5, 6]}, later])
    assert second["completion_mask"] == multi_turn()["completion_mask"] and second["teacher_prompt"] == "Told."
    assert first["completion_mask"] is None and first["teacher_prompt"] is None
    made = rollouts_of([first, second], [[1], [2]], tiny.tokenizer(), 0, "cpu")
    assert made.completion_mask.sum(1).tolist() == [2, sum(multi_turn()["completion_mask"])]
    assert "completion" not in checked_rows([{**tiny.ROWS[0], "completion": None}])[0], "nobody brings one"


@pytest.mark.parametrize("checked", [checked_rows, lambda rows: checked_dataset(Dataset.from_list(rows))])
@pytest.mark.parametrize(("one", "other"), [("a", [1]), ("a", None), (None, "a")])
def test_text_and_ids_do_not_mix_nor_are_there_some_without(checked, one, other):
    if checked is not checked_rows and isinstance(other, list):
        pytest.skip("a table's column has one type")
    with pytest.raises(ValueError, match="row 1: completions are all text"):
        checked([{**tiny.ROWS[0], "completion": one}, {**tiny.ROWS[0], "completion": other}])


def test_a_recipe_trains_on_a_file_of_rollouts(tmp_path, monkeypatch):
    no_generation(monkeypatch)
    tiny.model().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path}/tiny\nrollouts: {tmp_path}/rollouts.jsonl\njudge: {{kind: magnitude}}\n"
        f"output_dir: {tmp_path}/run\ntrain: {{max_steps: 2, use_cpu: true, save_strategy: no, learning_rate: 1e-2,"
        " min_gap: 0}\n"
    )
    assert "report" in train(load_recipe(recipe))
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny", "run/model"))
    assert not same(before, after)
    with pytest.raises(ValueError, match="one of rollouts, data"):
        load_recipe(recipe, ["data=rows.jsonl"])
