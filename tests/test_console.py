"""What a terminal shows of a run, and that a pipe keeps the plain records."""

import ast
import io
import sys

import tiny
from rich.console import Console
from transformers import TrainerControl, TrainerState
from typer.testing import CliRunner

from rmsd import cli
from rmsd.training import console
from rmsd.training.console import TerminalLog


def shown(*entries, steps=200, seconds=2.0, monkeypatch):
    """The lines of log entries (step, logs), a step taking so many seconds."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    log = TerminalLog(Console(file=out, width=200))
    state, control = TrainerState(max_steps=steps, is_world_process_zero=True), TrainerControl()
    log.on_train_begin(None, state, control)
    for step, logs in entries:
        now[0] += seconds * (step - state.global_step)
        state.global_step = step
        log.on_log(None, state, control, logs=logs)
        if any(name.startswith("eval_") for name in logs):
            now[0] += 500  # an evaluation's own time
            log.on_evaluate(None, state, control)
    return out.getvalue().splitlines()


STEP = {"loss": 0.123456, "kept_tokens": 31.0, "candidates": 160.0, "rollout_tokens": 400.0, "skipped_steps": 0}


def test_a_step_is_a_line_that_a_person_reads(monkeypatch):
    evaluated = {"eval_zorblat_greedy": 0.8333, "eval_zorblat_sampled": 0.5, "eval_specificity": 1.0}
    lines = shown((1, STEP), (1, evaluated), (2, {**STEP, "skipped_steps": 1}), monkeypatch=monkeypatch)
    assert lines[0] == "step   1/200  loss 0.1235     kept 31 of 160  target -  200 tokens/s  6:38 left"
    assert lines[1] == "evaluated at step 1 zorblat greedy 0.833  zorblat sampled 0.5  specificity 1"
    # The evaluation's 500 seconds are no step's.
    line = "step   2/200  loss 0.1235     kept 31 of 160  target 0.83  200 tokens/s  6:36 left  skipped steps 1"
    assert lines[2] == line


def test_what_a_model_that_judges_was_asked_is_in_the_line(monkeypatch):
    (line,) = shown((1, {**STEP, "judge_requests": 8, "judge_tokens": 5120}), monkeypatch=monkeypatch)
    assert line.endswith("6:38 left  judge 8 requests, 5120 tokens")


def test_continuation_and_the_end_are_lines_too(monkeypatch):
    lines = shown((60, {"continuation": 1}), (200, {"train_runtime": 4000.4, "train_loss": 1}), monkeypatch=monkeypatch)
    assert lines == ["the student becomes the teacher (continuation 1)", "trained to step 200 in 1:06:40"]


def test_a_run_that_is_rolled_back_says_so(monkeypatch):
    lines = shown((40, {"rolled_back_from": 48}), monkeypatch=monkeypatch)
    assert lines == ["rolled back from step 48 to step 40, at half the rate"]


def test_another_process_than_the_first_prints_nothing():
    out = io.StringIO()
    state = TrainerState(max_steps=3, is_world_process_zero=False)
    TerminalLog(Console(file=out)).on_log(None, state, TrainerControl(), logs=STEP)
    assert out.getvalue() == ""


def test_a_terminal_gets_lines_and_a_pipe_the_plain_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")  # without colours
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        trainer = tiny.trainer(tmp_path, max_steps=1, disable_tqdm=False)
        console.show_lines(trainer)
        trainer.train()
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
        if terminal:
            assert lines[0].startswith("step 1/1  loss ") and " left" in lines[0] and not any("{" in x for x in lines)
        else:
            assert "kept_tokens" in ast.literal_eval(lines[0])


def test_quiet_leaves_the_plain_records(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("rmsd.run.recipe.load_recipe", lambda path, overrides: asked.append(overrides))
    monkeypatch.setattr("rmsd.run.train.train", lambda recipe: "")
    for options in ([], ["--quiet"]):
        assert CliRunner().invoke(cli.app, ["train", "a.yaml", "seed=1", *options]).exit_code == 0
    assert asked == [["seed=1"], ["seed=1", "train.disable_tqdm=true"]]
