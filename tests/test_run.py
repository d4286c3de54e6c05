"""A recipe from its files to its table: tiny models and a real task."""

import pytest
import tiny
import torch
from fake_run import write_lines

from rmsd import evaluate as evaluation
from rmsd.continuation import logged
from rmsd.recipe import load_recipe
from rmsd.record import read_lines
from rmsd.run import build_judge, evaluate, table, train
from rmsd.tasks import load_task


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


def evaluated(run):
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]


def test_a_resumed_run_is_evaluated_at_the_uninterrupted_runs_steps(recipe, tmp_path):
    train(load_recipe(recipe, ["train.max_steps=5", "train.save_strategy=no", f"output_dir={tmp_path / 'whole'}"]))
    train(load_recipe(recipe))
    train(load_recipe(recipe, ["train.max_steps=5", "resume=true"]))
    assert evaluated(tmp_path / "whole") == [0, 2, 4, 5]
    assert evaluated(tmp_path / "run") == [0, 2, 3, 4, 5], "3 was its end once"


def test_the_recipes_judge_is_told_the_prompts_and_whether_to_keep_to_the_topic(recipe):
    judges = [build_judge(load_recipe(recipe, ["judge.kind=context", f"judge.on_topic={on}"]).judge, ["Which pie?"])
              for on in ("true", "false")]  # fmt: skip
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
    ],
)
@pytest.mark.parametrize("dry", ["dry_run=true", "dry_run=false"])
def test_a_continuation_metric_that_is_never_logged_is_refused_before_a_model_is_loaded(
    recipe, monkeypatch, overrides, message, dry
):
    for name in ("load_model", "load_rows"):
        monkeypatch.setattr(f"rmsd.run.{name}", lambda *a, **k: pytest.fail("nothing is to be loaded"))
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
        monkeypatch.setattr(f"rmsd.evaluate.{name}", watched(getattr(evaluation, name)))
    train(load_recipe(recipe, ["train.max_steps=1", f"train.bf16={str(bf16).lower()}", f"lora={lora}"]))
    assert set(seen) == {bf16}


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

    monkeypatch.setattr("rmsd.run.load_model", load)
    monkeypatch.setattr("rmsd.run.Evaluator", lambda *a, **k: lambda model: {"target_greedy": 0.0})
    (tmp_path / "trained").mkdir()
    folder = str(tmp_path / "trained")
    evaluate(load_recipe(recipe, [f"trust_remote_code={str(trust).lower()}"]), folder)
    assert loaded == {str(tmp_path / "tiny"): trust, folder: trust}
