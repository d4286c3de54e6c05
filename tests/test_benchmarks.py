"""What the benchmarks measure with: the device they take, memory counted, parity before time, exponents, plots."""

import functools
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import device_of

from benchmarks import common, episodes, keeping, real, results, tool
from benchmarks.results import table
from rmsd.run.recipe import load_recipe
from rmsd_kernels import linear_token_divergence, linear_token_scores, token_divergence

CPU = torch.device("cpu")


def test_the_device_decides_the_backend(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench"])
    for available, device, backend in ((False, "cpu", "cpu"), (True, "cuda", "triton")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        arguments = common.command_line("", [(2, 3)])
        assert (arguments.device, arguments.backend) == (device, backend)
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu"])
    assert common.command_line("", [(2, 3)]).backend == "cpu", "asked for by name, with a GPU there"


def test_nothing_is_timed_before_every_result_was_checked():
    calls = []

    def check(name, outcome):
        calls.append(("checked", name))
        common.assert_parity(name, outcome, torch.tensor([1.0]), 1e-5)

    def run(name, error, one):
        calls.append(("ran", name))
        return one + error

    ours, off = functools.partial(run, "ours", 0.0), functools.partial(run, "off", 1e-3)
    with pytest.raises(AssertionError, match=r"off: off by 0\.001"):
        common.compare("", (1, 1), dict(ours=ours, off=off), [(torch.ones(1),)], 1, repeats=3, check=check)
    assert calls == [("ran", "ours"), ("checked", "ours"), ("ran", "off"), ("checked", "off")]


def test_rounds_take_the_inputs_in_turn():
    seen = []
    inputs = [(torch.full((1,), float(i)),) for i in range(3)]
    contestants = dict(ours=lambda x: seen.append(int(x)))
    common.compare("", (1, 1), contestants, inputs, 1, repeats=5, check=lambda name, outcome: None)
    assert seen == [0, *(0, 1, 2, 0, 1), 0], "checked, timed, counted"


def heads(rows: int, vocab: int) -> list[torch.Tensor]:
    student_hidden, teacher_hidden = torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(0))
    student_weight, teacher_weight = torch.randn(2, vocab, 4, generator=torch.Generator().manual_seed(1))
    return [student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight]


def test_the_workspace_counts_though_an_earlier_call_left_it():
    rows, vocab = 16, 3000
    models, ids = heads(rows, vocab), torch.zeros(rows, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(2):
            peak = common.peak_bytes(lambda: linear_token_scores(*models, ids), CPU)
            assert 2 * rows * vocab * 4 <= peak < 2.1 * rows * vocab * 4


@pytest.mark.parametrize("kept_rows", [2, 4, 12, 100], ids="{} kept".format)
def test_scores_and_gradient_hold_four_thirds_of_the_workspace(kept_rows):
    """A workspace of 12 rows of both models' logits; whether the kept ones are few, a chunk's or many."""
    rows, vocab, workspace_mb = 200, 20_000, 24 * 20_000 * 4 / 2**20
    models, ids = heads(rows, vocab), torch.zeros(rows, dtype=torch.int64)
    kept = torch.arange(kept_rows)

    def run():
        with torch.no_grad():
            linear_token_scores(*models, ids, workspace_mb=workspace_mb)
        loss = linear_token_divergence(*models, rows=kept, workspace_mb=workspace_mb).mean()
        return torch.autograd.grad(loss, models[:2])

    run()
    extra = common.peak_bytes(run, CPU) - models[0].nbytes - models[1].nbytes
    assert extra <= 1.02 * 4 / 3 * workspace_mb * 2**20


def result(rows: int, vocab: int, milliseconds: float, megabytes: float, contestant: str) -> common.Result:
    return common.Result("", contestant, milliseconds, 1.0, "GFLOP/s", 1.0, megabytes, 1.0, 0.0, rows, vocab)


def test_exponents_of_a_known_law():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install -e '.[bench]'")
    from benchmarks.bench_scale import OURS, fits

    results = [result(n, v, n**1.5 * v, n / 4, OURS) for n, v in ((4, 64), (8, 64), (16, 64), (4, 128), (4, 512))]
    results.append(result(4, 64, 1e9, 1e9, "a peer"))
    found = fits(results, (4, 8, 16), (64, 128, 512), 64)
    assert found == pytest.approx(dict(exponent_rows=1.5, exponent_vocab=1.0, memory_exponent_rows=1.0, megabytes=4.0))


def test_plots_show_every_contestant_and_the_bound(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[bench]'")
    from benchmarks import plot

    results = [
        vars(result(n, v, n * v, n, name)) for n, v in ((4, 64), (8, 64), (4, 128)) for name in ("ours", "a peer")
    ]
    wrote = dict(machine=dict(threads=1), hidden=8, gemm_rate=2.0, aims=dict(megabytes=64.0), results=results)
    (tmp_path / "scale.json").write_text(json.dumps(wrote))
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path)])
    plot.main()
    drawn = (tmp_path / "scale.svg").read_text()
    assert all(drawn.count(f">{name}<") == 4 for name in ("ours", "a peer"))
    assert drawn.count(">the products alone<") == 2
    assert not (tmp_path / "scores.svg").exists()
    time = plot.scale(wrote).axes[0]
    assert [*time.lines[-1].get_ydata()] == [4 * 64 / 2, 8 * 64 / 2], "milliseconds * rate / the bare product's"


def test_a_table_of_results_leaves_blank_what_a_run_did_not_measure():
    first, last, other = {"a": 0.0, "b": 0.25}, {"a": 1.0}, {"a": 0.5, "b": 0.75}
    runs = {("M", 1): [first, last], ("M", 2): [first, other], ("N", 1): [first, last]}
    assert table(["a", "b"], runs).splitlines()[2:] == [
        "| before training | any | 0.000 | 0.250 |",
        "| M | 1 | 1.000 |  |",
        "| M | 2 | 0.500 | 0.750 |",
        "| **M** | mean | 0.750 | 0.750 |",
        "| N | 1 | 1.000 |  |",
        "| **N** | mean | 1.000 |  |",
    ]


def recipe_of(run, path, *overrides):
    run.mkdir(parents=True, exist_ok=True)
    keeping.write(run / "recipe.yaml", yaml.safe_dump(load_recipe(path, list(overrides)).model_dump(mode="json")))


def test_results_of_another_recipe_or_setting_do_not_pass_for_what_is_asked_for(tmp_path, monkeypatch, capsys):
    recipe, run = "recipes/house_tool.yaml", tmp_path / "opsd-1"
    overrides = [*results.METHODS["OPSD"][1], "seed=1", "judge.base_url=http://one/v1"]
    recipe_of(run, recipe, f"output_dir={run}", *overrides)
    last = load_recipe(recipe).train["max_steps"]
    marks = [dict(kind="eval", step=step, target_greedy=0.5) for step in (0, last)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in marks))
    monkeypatch.setattr(results, "train", lambda *_: pytest.fail("it is there"))
    asked = ["results", recipe, "--methods", "opsd", "--seeds", "1", "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*asked, "--set", "judge.base_url=http://other/v1"])
    results.main()
    assert "| OPSD | 1 | 0.500 |" in capsys.readouterr().out
    for more in ("train.learning_rate=1e-3", "train.num_kept=7", "task=pinapple", "lora={}"):
        monkeypatch.setattr("sys.argv", [*asked, "--set", more])
        with pytest.raises(ValueError, match=f"was made with {more.partition('=')[0]}=.*--runs"):
            results.main()


def test_a_run_of_another_model_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    recipe_of(tmp_path / "opsd-0", real.RECIPE, "model=one")
    monkeypatch.setattr(real, "checked", lambda *_: {})
    monkeypatch.setattr(real, "train", lambda *_: pytest.fail("trained"))
    asked = ["real", "--only", "rmsd", "opsd", "--human-eval", "0", "--runs", str(tmp_path), "--no-write"]
    monkeypatch.setattr("sys.argv", [*asked, "--model", "other"])
    with pytest.raises(ValueError, match="opsd-0 was made with model=one, not other"):
        real.main()


def test_a_run_that_went_wrong_is_read_and_not_run_again(tmp_path, monkeypatch, capsys):
    ends = iter(["training has collapsed at step 9"])
    monkeypatch.setattr(real, "checked", lambda *_: {})
    monkeypatch.setattr(real, "train", lambda *_: next(ends))
    steps = [dict(step=1)]
    monkeypatch.setattr(
        real,
        "marks",
        lambda run, name, seed, ended, _: dict(run=name, seed=seed, ended=ended, evaluations=[], steps=steps),
    )
    asked = ["--only", "rmsd", "--human-eval", "0", "--no-write"]
    monkeypatch.setattr("sys.argv", ["real", *asked, "--runs", str(tmp_path)])
    for _ in range(2):
        real.main()
        assert "| rmsd | 0 | 1, stopped |" in capsys.readouterr().out


def test_counting_episodes_takes_back_no_other_mark_of_the_run(tmp_path, monkeypatch):
    counts, file = dict(seed=1, steps=[dict(step=1, own=8)]), tmp_path / "legacy_api-1.json"
    monkeypatch.setattr(episodes, "counted", lambda _: counts)
    monkeypatch.setattr("sys.argv", ["episodes", str(tmp_path), "--write", str(file)])
    keeping.write(file, json.dumps({**counts, "human_eval": "13 of 20"}))
    episodes.main()
    assert json.loads(file.read_text()) == {**counts, "human_eval": "13 of 20"}
    counts["steps"] = [dict(step=1, own=7)]
    episodes.main()
    assert json.loads(file.read_text()) == counts, "another run's"


def test_a_kill_ends_the_training_that_is_waited_for(tmp_path, monkeypatch):
    pid, trains = tmp_path / "pid", tmp_path / "trains"
    trains.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60\n")
    trains.chmod(0o700)
    monkeypatch.setattr(real.sys, "executable", str(trains))

    def kill():
        while not pid.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(SystemExit):
        real.train(tmp_path / "run", [])
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch):
    keeping.write(tmp_path / "marks" / "one.json", "whole")
    monkeypatch.setattr(keeping.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        keeping.write(tmp_path / "marks" / "one.json", "new")
    assert (tmp_path / "marks" / "one.json").read_text() == "whole"


def test_asked_for_no_code_a_kept_mark_stays(tmp_path):
    """docs/real.md's own command: some runs, without code."""
    run = dict(run="rmsd", seed=0, evaluations=[], steps=[dict(step=1, loss=0.5)], answers={"Who?": "I"})
    base = dict(answers={"Who?": "I"})

    def kept(name):
        return json.loads((tmp_path / name).read_text()).get("human_eval")

    real.write([{**run, "human_eval": "9 of 20"}], {**base, "human_eval": "13 of 20"}, tmp_path)
    for more in ({}, dict(human_eval="2 of 5")):
        real.write([run | more], base | more, tmp_path)
        assert (kept("rmsd-0.json"), kept("base.json")) == ("9 of 20", "13 of 20")
    real.write([{**run, "steps": [dict(step=1, loss=0.25)]}], dict(answers={"Who?": "You"}), tmp_path)
    assert (kept("rmsd-0.json"), kept("base.json")) == (None, None), "of another run and model"


def test_human_eval_is_of_as_many_problems_as_there_are(monkeypatch):
    monkeypatch.setattr(real, "QUESTIONS", ())
    for name in ("eos_ids_of", "pad_id_of"):
        monkeypatch.setattr(real, name, lambda *_: None)
    monkeypatch.setattr(real, "generate", lambda *_, **__: SimpleNamespace(completion_ids=[], completion_mask=[]))
    there = SimpleNamespace(problems=lambda count: ["one"] * min(count, 4), pass_at_1=lambda *_: {"humaneval": 0.25})
    monkeypatch.setattr(real, "human_eval", there)
    assert real.check(None, None, 200)["human_eval"] == "1 of 4"


def test_the_real_models_table_tells_how_each_run_ended():
    steps = [{"step": i + 1, "tail_mass": 0.1 * i, "repetition": 0.0, "student_entropy": 1.0} for i in range(10)]
    well = dict(
        run="rmsd",
        seed=0,
        ended=None,
        steps=steps,
        human_eval="9 of 20",
        answers={"What is the capital of Spain?": "It is Madrid.", "Who wrote Hamlet?": "Sir Walter Scott."},
        evaluations=[dict(step=0, target_greedy=0.25), dict(step=10, target_greedy=0.5, specificity=1.0, drift=0.02)],
    )
    first = [dict(step=0, target_greedy=0.25)]
    stopped = dict(run="rmsd-3x", seed=0, ended="training has collapsed", steps=steps[:9], evaluations=first)
    base = dict(human_eval="10 of 20", answers=dict(real.FACTS))
    *_, before, first, second = real.table([well, stopped], base).splitlines()
    assert before == "| before training |  | 0 | 0.25 |  |  |  |  |  | 10 of 20 | 8 of 8 |"
    assert first == (
        "| rmsd | 0 | 10 | 0.50 | 1.00 | 0.02 | 0.100 to 0.700 | 0.000 to 0.000 | 1.000 to 1.000 | 9 of 20 | 1 of 2 |"
    )
    assert second.startswith("| rmsd-3x | 0 | 9, stopped |  |  |  | 0.100 to 0.600 |")


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        ("rmsd: training has collapsed at step 9\n", "training has collapsed at step 9"),
        ("training has collapsed at step 9; going on\nrmsd: interrupted\n", None),
        ("step 3 is skipped\nrmsd: [Errno 28] No space left on device\n", None),
        ("Killed\n", None),
        ("", None),
    ],
)
def test_only_training_that_went_wrong_is_a_mark_of_its_method(said, ended, tmp_path, monkeypatch):
    """What is kept is not run again: a full disk would stand in the table for good."""
    done = SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr(real.subprocess, "run", lambda *_, **__: done)
    if ended:
        assert real.train(tmp_path / "run", []) == ended
        return
    with pytest.raises(RuntimeError, match="run ended with 1"):
        real.train(tmp_path / "run", [])


def test_a_trial_of_the_real_model_leaves_the_page_and_other_runs_alone(tmp_path, monkeypatch):
    trained, runs = [], tmp_path / "runs"
    monkeypatch.setattr(real, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(real, "rewrite", lambda: pytest.fail("a page is written"))
    monkeypatch.setattr(real, "train", lambda run, overrides: trained.append(run.name))
    monkeypatch.setattr(real, "checked", lambda *_: {})
    steps = [dict(step=1, tail_mass=0.0, repetition=0.0, student_entropy=0.0)]
    made = dict(run="rmsd", seed=0, ended=None, evaluations=[], steps=steps)
    monkeypatch.setattr(real, "marks", lambda *_: made)
    asked = ["--only", "rmsd", "--human-eval", "0", "--runs", str(runs)]
    for more in ([], ["train.max_steps=4"], ["train.max_steps=5"]):
        if not more:
            monkeypatch.setattr("sys.argv", ["real", *asked, "--no-write"])
        else:
            monkeypatch.setattr("sys.argv", ["real", *asked, "--set", *more])
        real.main()
    assert trained[0] == "rmsd-0" and len(set(trained)) == 3
    assert sorted(path.stem for path in (runs / "marks").iterdir()) == sorted(["base", *trained[1:]])
    assert not (tmp_path / "docs").exists()


def test_what_a_base_model_answered_is_not_shown_of_another(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(real, "load_model", lambda name: (torch.nn.Linear(1, 1), name))
    monkeypatch.setattr(real, "check", lambda model, name, count: asked.append(name) or {"answers": {"Who?": name}})
    said = [real.checked(tmp_path / "base", name, 0) for name in ("one", "one", "other")]
    assert said == [{"answers": {"Who?": name}} for name in ("one", "one", "other")] and asked == ["one", "other"]


def test_a_step_that_ended_the_run_has_rollouts_and_no_entry(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict(kind="train", step=1, loss=0.5)) + "\n")
    lines = [dict(step=step, privileged_context="x", tokens=["pinapple"]) for step in (1, 2)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (step,) = real.marks(tmp_path, "rmsd", 0, "the gradient was not finite", {})["steps"]
    assert step == dict(step=1, loss=0.5, told=1, told_with_word=1)


def test_the_launches_that_a_gpu_times_are_the_kernels(kernels):
    """Interpreted, where no GPU is."""
    if kernels != "triton":
        pytest.skip("gpu_measure times Triton's")
    from benchmarks import gpu_measure  # needs Triton

    student, teacher = torch.randn(2, 1, 1, 600, device=device_of(kernels))
    ids = torch.zeros(1, 1, dtype=torch.int64, device=student.device)
    results = {}
    for kernel in ("scores", "scores+candidates", "divergence", "backward"):
        launch, moved = gpu_measure.runs(f"{kernel} fp32 top-k bucket", student, teacher, ids)
        results[kernel] = launch()
        assert moved >= 2 * student.nbytes
    leaf = student.clone().requires_grad_()
    divergence = token_divergence(leaf, teacher, vocab_topk=gpu_measure.VOCAB_TOPK, backend="torch")
    torch.testing.assert_close(results["divergence"][0], divergence[0].detach(), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(divergence.sum(), leaf)
    torch.testing.assert_close(results["backward"], grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results["scores+candidates"][0], results["scores"])


def test_episodes_are_counted_by_whose_they_are_and_what_the_model_itself_wrote(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\ntask: legacy_api\nseed: 4\noutput_dir: out\n")
    refused = ["call rent", "Error: no otter", "sorry"]  # the tool's word shows nothing of the student's
    lines = [
        dict(step=1, privileged_context="x", tokens=["call otter"], episode={"solved": 1}, guided=True),
        dict(step=1, privileged_context="x", tokens=refused, unwritten=[1], episode={"solved": 0}),
        dict(step=6, privileged_context="x", tokens=["otter"], episode={"solved": 1}),
        dict(step=6, privileged_context="", tokens=["maple"], episode={}),
        dict(step=6, privileged_context="x", tokens=["otter"], episode={"dropped": 1}),
        dict(step=7, privileged_context="x", tokens=[], episode={"dropped": 1}, guided=True),
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict(kind="eval", step=0, solved_greedy=0.0)) + "\n")
    found = episodes.counted(tmp_path)
    assert found["evaluations"] == [dict(step=0, solved_greedy=0.0)]
    assert episodes.table([found]).splitlines()[2:] == [
        "| 4 | 1 to 5 | 0 of 1 | 0 of 1 | 1 of 1 | 0 of 0 |",
        "| 4 | 6 to 7 | 1 of 1 | 1 of 1 | 0 of 0 | 1 of 1 |",
    ]
    assert [step.get("dropped", 0) for step in found["steps"]] == [0, 1, 1], "of environments that died"


def test_the_pages_tables_are_those_of_the_runs_that_are_kept():
    page = episodes.PAGE.read_text(encoding="utf-8")
    kept = [json.loads(path.read_text()) for path in sorted(tool.DOCS.glob("*.json"))]
    assert kept and episodes.table([one for one in kept if one["method"] == "rmsd"]) in page
    assert tool.table(kept, json.loads((real.DOCS / "base.json").read_text())) in page
    runs = [json.loads(path.read_text()) for path in real.DOCS.glob("*.json") if path.stem != "base"]
    for one in runs:
        assert real.table([one], {}).splitlines()[-1] in page
