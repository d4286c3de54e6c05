"""A run that goes wrong stops, says why, and can go on from before it did; one that is well is left alone."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import same, trainer, weights

from rmsd.training import health
from rmsd.training.health import SIGNS, Collapsed, Sign, find_collapse, repeated_ngrams
from rmsd.training.record import RunRecord, read_lines

# ---- what is counted -----------------------------------------------------------------------------------------------


def test_repeated_ngrams_are_those_that_stood_before_in_the_same_answer():
    ids = torch.tensor([[7, 7, 7, 7, 7, 7], [1, 2, 3, 4, 1, 2], [7, 7, 7, 7, 9, 9]])
    mask = torch.tensor([[True] * 6, [True] * 6, [True] * 4 + [False] * 2])
    repeated, count = repeated_ngrams(ids, mask)
    assert (repeated.item(), count.item()) == (2, 3 + 3 + 1)
    large = torch.tensor([[150_000, 3, 151_935, 0] * 4])
    assert tuple(map(int, repeated_ngrams(large, torch.ones_like(large).bool()))) == (9, 13)
    assert tuple(map(int, repeated_ngrams(ids[:, :3], mask[:, :3]))) == (0, 0)


def test_the_log_holds_what_is_watched(tmp_path):
    """Rows 1 and 3 of 4 are told something, row 2 is an anchor: before the first step its teacher is the student."""
    made = trainer(tmp_path, max_steps=3)
    made.train()
    first, *_, last = [entry for entry in made.state.log_history if "loss" in entry]
    assert first["anchor_divergence"] < 1e-4 < first["divergence"] and last["anchor_divergence"] > 1e-4
    assert 0.0 <= first["repetition"] <= 1.0 and 0.0 <= first["clipped_share"] <= 1.0
    assert 0.0 < first["student_entropy"] < 6.0
    told = trainer(tmp_path, max_steps=1, rows=[row for row in tiny.ROWS if row["privileged_context"]])
    told.train()
    assert "anchor_divergence" not in told.state.log_history[0], "of no row it is no number"


# ---- what is found -------------------------------------------------------------------------------------------------


def entries(values, name="tail_mass", every=1):
    return [{"loss": 1.0, "step": every * (i + 1), name: value} for i, value in enumerate(values)]


def test_a_sign_is_a_mean_over_steps_beside_the_starts():
    assert find_collapse(entries([0.02] * 20)) is None
    assert find_collapse(entries([0.02] * 20 + [0.9])) is None, "one odd step"
    assert find_collapse(entries([0.02] * 3 + [0.9] * 4)) is None, "of so few nobody can tell"
    assert find_collapse(entries([0.9] * 20)) is None, "it was so from the start"
    found = find_collapse(entries([0.02] * 20 + [0.9] * 3))
    assert (found.sign.name, found.step, found.well) == ("tail_mass", 23, 20)
    assert found.value == pytest.approx((2 * 0.02 + 3 * 0.9) / 5) and found.start == pytest.approx(0.02)
    found = find_collapse(entries([0.02] * 2 + [0.9], every=10))
    assert (found.step, found.well) == (30, 20), "an entry of ten steps is a mean already"
    assert find_collapse([*entries([0.02] * 20 + [0.9] * 5), {"step": 25, "eval_drift": 0.1}]) is None, "said once"


def test_a_sign_that_few_steps_have_is_followed_back_to_its_first():
    """Anchors are not in every step. These had drifted since the second that had one."""
    logged = {1: 0.0, 4: 1.42, 6: 1.16, 9: 0.3, 10: 0.16, 17: 1.52, 18: 1.2}
    history = [
        {"loss": 1.0, "step": step, **({"anchor_divergence": logged[step]} if step in logged else {})}
        for step in range(1, 19)
    ]
    found = find_collapse(history)
    assert (found.sign.name, found.step, found.well) == ("anchor_divergence", 18, 1)


def test_that_a_short_length_limit_cuts_most_answers_is_no_sign():
    """The demo's answers, of which six in ten are cut from the start: this run was well, and was stopped at step 8."""
    cut = [0.625, 0.625, 0.75, 1.0, 0.875, 1.0, 0.875, 0.875]
    assert find_collapse(entries([*cut, *[1.0] * 12], name="clipped_share")) is None
    assert find_collapse(entries([0.3] * 5 + [0.95] * 15, name="clipped_share")).sign.name == "clipped_share"


@pytest.mark.parametrize("name", ["tail_mass", "repetition"])
def test_a_share_that_begins_high_can_still_pass_its_limit(name):
    assert find_collapse(entries([0.8] * 20, name=name)) is None
    assert find_collapse(entries([0.8] * 5 + [0.99] * 15, name=name)).sign.name == name
    assert find_collapse(entries([1.0] * 20, name=name)) is None, "it was so from the start"


def test_a_loss_below_zero_is_a_sign():
    found = find_collapse(entries([0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.1, -0.1, -0.1], name="loss"))
    assert found.sign.name == "loss" and found.sign.falls
    learns = [1.0 - 0.02 * i for i in range(40)] + [0.2] * 20
    found = find_collapse(entries([*learns, -0.1, -0.2, -0.9, -0.9, -0.9], name="loss"))
    assert 60 <= found.well < found.step, "that a loss falls is no sign"


# ---- what is done --------------------------------------------------------------------------------------------------

# The tiny model has no health to lose: any entry from step 5 on is taken for a collapse that began after step 4.
ALWAYS = (Sign("rollout_tokens", lambda start: -1.0 if start else 0.0, "it is a test"),)


@pytest.fixture
def from_step_5(monkeypatch):
    def found(history):
        step = history[-1]["step"]
        return health.Collapse(ALWAYS[0], step, 24.0, 1.0, 4) if step >= 5 else None

    monkeypatch.setattr(health, "find_collapse", found)


OPTIONS = dict(max_steps=8, save_strategy="steps", save_steps=1)


def test_it_stops_in_one_line_that_says_what_to_do(tmp_path, from_step_5):
    made = trainer(tmp_path, callbacks=[RunRecord(tmp_path)], tail="drop", vocab_topk=20, **OPTIONS)
    with pytest.raises(Collapsed) as error:
        made.train()
    line = str(error.value)
    assert "\n" not in line and "step 5: rollout_tokens is 24 (5 steps' mean), 1 at the start: it is a test" in line
    assert f"after step 4, {tmp_path / 'checkpoint-4'} is from before" in line and "set tail=bucket" in line
    assert "remove" not in line, "it is the last"
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "checkpoint-5").exists(), "the collapsed model is no checkpoint"


def test_it_says_how_to_resume_from_before_where_later_checkpoints_stand_in_the_way(tmp_path, monkeypatch):
    collapsed = health.Collapse(ALWAYS[0], 3, 24.0, 1.0, 1)
    monkeypatch.setattr(health, "find_collapse", lambda history: collapsed if history[-1]["step"] == 3 else None)
    with pytest.raises(Collapsed, match=r"; for resume=true to go on from checkpoint-1, remove those after it$"):
        trainer(tmp_path, **OPTIONS).train()


def test_it_says_so_and_goes_on(tmp_path, from_step_5, caplog):
    made = trainer(tmp_path, on_collapse="warn", **OPTIONS)
    made.train()
    assert made.state.global_step == 8
    assert [record.levelname for record in caplog.records if "collapsed" in record.message] == ["WARNING"]
    assert "lower learning_rate, now 0.01" in caplog.text


@pytest.mark.parametrize("teacher", ["initial", "ema"])
def test_it_goes_on_from_before_at_half_the_rate_once(tmp_path, monkeypatch, teacher):
    """The same weights as a run that was resumed from that checkpoint at that rate."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, teacher=teacher, lr_scheduler_type="linear")
    rates = {}

    def found(history):
        step, again = history[-1]["step"], any("rolled_back_from" in entry for entry in history)
        rates[again, step] = history[-1].get("learning_rate")
        return health.Collapse(ALWAYS[0], step, 24.0, 1.0, 3) if step == 5 and not again else None

    monkeypatch.setattr(health, "find_collapse", found)
    made = trainer(tmp_path / "run", callbacks=[RunRecord(tmp_path / "run")], on_collapse="rollback", **options)
    made.train()
    assert made.state.global_step == 6
    assert rates[True, 3] == pytest.approx(rates[False, 3] / 2) and rates[True, 5] == pytest.approx(rates[False, 5] / 2)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "rollback"] == [2]
    # Killed after step 4 of the second attempt and resumed, it is still at half the rate and ends the same.
    resumed = trainer(tmp_path / "run", on_collapse="rollback", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert same(weights(resumed.model), weights(made.model))
    # And at half of another rate, where the user asks for one.
    half = rates[True, 6]
    made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))  # the same trainer, after an interrupt
    assert rates[True, 6] == pytest.approx(half)
    slower = trainer(tmp_path / "run", on_collapse="rollback", **options, learning_rate=1e-3)
    slower.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert rates[True, 6] == pytest.approx(half / 10)


def test_a_second_collapse_ends_the_run(tmp_path, from_step_5):
    made = trainer(tmp_path, on_collapse="rollback", **OPTIONS)
    with pytest.raises(Collapsed, match="it was rolled back before"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-[5-9]")), "what is resumed is from before"


def test_a_run_that_is_started_after_a_collapse_keeps_its_rate(tmp_path, from_step_5, monkeypatch):
    made = trainer(tmp_path, **OPTIONS)
    with pytest.raises(Collapsed):
        made.train()
    monkeypatch.setattr(health, "find_collapse", lambda history: None)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert {entry["learning_rate"] for entry in made.state.log_history if "loss" in entry} == {1e-2}
    assert not any("rolled_back_from" in entry for entry in made.state.log_history)


def test_the_checkpoint_that_a_run_goes_back_to_is_not_evaluated_anew(tmp_path, from_step_5):
    evaluated = dict(evaluator=lambda model: {"score": 1.0}, eval_on_start=True, eval_strategy="steps", eval_steps=8)
    made = trainer(tmp_path, on_collapse="rollback", **evaluated, **OPTIONS)
    with pytest.raises(Collapsed, match="it was rolled back before"):
        made.train()
    assert [entry["step"] for entry in made.state.log_history if "eval_score" in entry] == [0]


def test_rollback_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs checkpoints"):
        trainer(tmp_path, on_collapse="rollback")
    with pytest.raises(ValueError, match="on_collapse must be one of stop, rollback, warn, not 'halt'"):
        trainer(tmp_path, on_collapse="halt")


# ---- runs of real models, replayed -----------------------------------------------------------------------------------

RUNS = sorted((Path(__file__).parent / "data" / "health").glob("*.json"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_that_collapsed_are_stopped_and_those_that_were_well_are_not(path):
    """Entry by entry, as the log brings them. A collapse is found before step 20; where only every fifth step is known,
    from what is known."""
    run = json.loads(path.read_text(encoding="utf-8"))
    steps = run["steps"]
    found = next(filter(None, (find_collapse(steps[: i + 1]) for i in range(len(steps)))), None)
    if run["collapsed"]:
        assert found is not None and found.step < 20
    else:
        assert found is None


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.name)
def test_each_sign_alone_is_seen_in_a_run_that_collapsed(sign):
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RUNS]
    collapsed = [run["steps"] for run in runs if run["collapsed"]]
    assert any(find_collapse(steps[: i + 1], [sign]) for steps in collapsed for i in range(len(steps)))


def test_there_are_runs_of_both_kinds():
    assert {json.loads(path.read_text(encoding="utf-8"))["collapsed"] for path in RUNS} == {True, False}
