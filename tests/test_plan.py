"""Dry runs: what they print, what they refuse, that they touch nothing, and that the real run is within the plan."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmsd.run.skeleton
from rmsd.answers.data import checked_rows
from rmsd.answers.prompts import encode, fix_template_variables
from rmsd.cli import main
from rmsd.judge import LLMJudge
from rmsd.models.wheels import is_gguf, readable
from rmsd.run.judges import build_judge
from rmsd.run.plan import Plan
from rmsd.run.recipe import load_recipe, trainer_config
from rmsd.run.train import train
from rmsd.tasks import load_task
from rmsd.training.record import read_lines

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
QWEN = ROOT / "recipes" / "qwen3_4b_pinapple.yaml"


@pytest.fixture(autouse=True)
def offline(monkeypatch, environment):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """A tiny model and its tokenizer, as from a hub."""
    tiny.model("qwen3", max_position_embeddings=1024).save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def recipe(tmp_path, folder):
    rows = [*tiny.ROWS, {"prompt": "And now?", "privileged_context": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    values = {
        "model": str(folder),
        "data": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "judge": {"kind": "magnitude"},
        "train": {
            "use_cpu": True,
            "max_completion_length": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path


def planned(path, *overrides) -> Plan:
    recipe = load_recipe(path, ["dry_run=true", *overrides])
    task = load_task(recipe.task) if recipe.task else None
    rows = checked_rows(task.train) if task else checked_rows(map(json.loads, recipe.data.open()))
    judge = build_judge(recipe.judge, rows, dry_run=True)
    return Plan.of(recipe, trainer_config(recipe, recipe.output_dir), rows, judge, task)


# ---- what a dry run prints, and that it does nothing else ----------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_planned_offline_and_nothing_is_loaded_asked_or_written(path, tmp_path, monkeypatch):
    if is_gguf(model := load_recipe(path).model):
        try:
            readable(model)
        except FileNotFoundError as error:
            pytest.skip(str(error))

    def refuse(*arguments, **options):
        raise AssertionError("a dry run loads no weights and asks no judge")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(LLMJudge, "check", refuse)
    monkeypatch.setattr(LLMJudge, "_complete", refuse)
    monkeypatch.chdir(tmp_path)
    text = train(load_recipe(path, ["dry_run=true"]))
    for part in ("parameters", "memory a device", "most at once", "FLOPs a step", "judge", "steps"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_the_published_setting_in_numbers():
    plan = planned(QWEN)
    assert plan.sizes.total - plan.sizes.trained == 4_022_468_096, "Qwen3-4B's weights"
    assert (plan.steps, plan.args.continuation_steps, plan.step_size, plan.told) == (330, [300], 32, 8000)
    args = plan.args
    assert (args.num_candidates, args.num_kept, args.vocab_topk, args.divergence) == (20, 5, 500, "reverse_kl")
    assert plan.requests(plan.rollouts) == 8000 + 10_560 - 8816
    text = str(plan)
    assert "after step 300 the student becomes the teacher; 30 steps follow" in text
    assert "by the recipe's `architecture`: the hub does not answer" in text and "by 4 characters a token" in text
    held = float(next(line for line in text.splitlines() if "most at once" in line).split()[-1])
    assert f"counts {held:.1f} GiB: one GPU of 24 GB" in QWEN.read_text() and held < 24 * 0.9


@pytest.mark.parametrize(
    ("overrides", "times"),
    [
        (["train.num_train_epochs=1"], 2),  # of fewer than 500 steps
        (["train.num_train_epochs=20"], 3),
        (["train.max_steps=600"], 2),
        (["train.max_steps=600", "evaluate.every=250"], 4),
    ],
)
def test_evaluations_are_planned_as_often_as_the_run_makes_them(recipe, overrides, times):
    task = ["task=house_tool", "data=null", "train.per_device_train_batch_size=1"]
    plan = planned(recipe, *task, "train.gradient_accumulation_steps=1", *overrides)
    assert f"{times} times" in next(line for line in str(plan).splitlines() if line.startswith("evaluation"))
    made = {step for step in range(plan.steps + 1) if step % plan.args.eval_steps == 0} | {plan.steps}
    assert len(made) == times


def test_all_weights_on_eight_devices():
    """The second command in the recipe's comments."""
    command = re.search(r"torchrun (.*?)\nmodel:", QWEN.read_text(), re.DOTALL).group(1)
    plan = planned(QWEN, *re.findall(r"\S+=\S+", command))
    assert plan.sizes.trained == plan.sizes.total == 4_022_468_096
    assert "2 processes  4 processes  8 processes" in str(plan)
    held = float(next(line for line in str(plan).splitlines() if "most at once" in line).split()[-1])
    assert f"are {held:.1f} GiB on each" in QWEN.read_text() and held < 80 * 0.9


def test_the_command_line_prints_the_plan(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rmsd", "train", str(recipe), "dry_run=true", "judge.kind=context"])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().out
    assert not left.value.code and said.startswith("plan (a dry run") and "context: no requests" in said
    assert "parameters\n" in said and "by the model's own config" in said


# ---- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.divergence=kl"], "train: divergence must be one of"),
        (["data=none.jsonl"], "data file none.jsonl does not exist"),
        (["train.max_completion_length=2000"], "row 0: the prompt and an answer"),
        (["train.teacher=adapter_off"], "needs a lora section"),
        (
            ["lora.r=4", "train.fsdp=true", "train.continuation_steps=[1]"],
            "ZeRO-3 cannot keep a second adapter",
        ),
        (["architecture.model_type=qwen3", "architecture.hidden_size=33"], "architecture.hidden_size is 33; the"),
        (["architecture.hidden_size=32"], "architecture needs model_type"),
        (["model=some/model"], "cannot be planned: "),
        (["model=a/b", "architecture.model_type=qwen9"], "transformers knows no 'qwen9'"),
        (["model=a/b", "architecture.model_type=qwen3", "architecture.hiden_size=1"], "a qwen3 config has no such key"),
        (["judge.kind=llm", "judge.model=m", "judge.template=none.jinja"], "none.jinja"),
    ],
)
def test_what_would_stop_the_run_stops_the_dry_run(recipe, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(load_recipe(recipe, ["dry_run=true", *overrides]))
    assert message in str(error.value)


def test_an_adapter_s_folder_is_planned_as_the_run_takes_it(recipe, folder, tmp_path):
    """Its teacher may be the model without it, and a second one has no shards."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    own = f"model={tmp_path / 'adapter'}"
    assert "(LoRA)" in str(planned(recipe, own, "train.teacher=adapter_off"))
    with pytest.raises(ValueError, match="cannot keep a second adapter"):
        planned(recipe, own, "train.fsdp=true", "train.continuation_steps=[1]")


def test_architecture_stands_in_for_a_hub_that_is_away_not_for_a_model_that_it_does_not_have(recipe, monkeypatch):
    overrides = ["model=a/b", "architecture.model_type=qwen3"]
    assert planned(recipe, *overrides).tokenizer is None
    monkeypatch.setattr(rmsd.run.skeleton, "_hub_answers", lambda: True)
    with pytest.raises(FileNotFoundError, match="'a/b' cannot be planned"):
        planned(recipe, *overrides)


def test_whether_the_hub_answers(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    assert not rmsd.run.skeleton._hub_answers(), "offline mode is not left"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert rmsd.run.skeleton._hub_answers()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not rmsd.run.skeleton._hub_answers()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="resume=true"):
        train(load_recipe(recipe, ["dry_run=true"]))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("use_cpu", "bf16", "on_gpu"), [(True, False, False), (True, True, False), (False, True, True)]
)
def test_the_workspace_is_that_of_the_device_the_run_is_for(recipe, monkeypatch, use_cpu, bf16, on_gpu):
    """Where there is no GPU, 16 bits without use_cpu are asked for by a plan for one alone."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    values = yaml.safe_load(recipe.read_text())
    if not use_cpu:
        del values["train"]["use_cpu"]
    recipe.write_text(yaml.safe_dump(values))
    plan = planned(recipe, f"train.bf16={str(bf16).lower()}")
    assert plan.on_gpu == on_gpu
    (line,) = (line for line in plan._memory().splitlines() if "chunk at a time" in line)
    assert line.split()[-1] == ("1.00" if on_gpu else "0.05")


def test_bf16_is_planned_where_it_cannot_be_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    values = yaml.safe_load(recipe.read_text())
    del values["train"]["use_cpu"]
    recipe.write_text(yaml.safe_dump(values))
    overrides = ["train.bf16=true"]
    assert trainer_config(load_recipe(recipe, ["dry_run=true", *overrides]), tmp_path).bf16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="bf16"):
            trainer_config(load_recipe(recipe, overrides), tmp_path)


# ---- beside the real run -------------------------------------------------------------------------------------------


def test_a_real_run_takes_the_planned_steps_and_no_more_requests_than_planned(recipe, tmp_path, server):
    overrides = ["judge.kind=llm", "judge.model=m", f"judge.base_url={server.url}", "train.min_gap=0"]
    plan = planned(recipe, *overrides)
    assert not server.requests, "a plan asks nothing"
    train(load_recipe(recipe, overrides))
    steps = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    # Five rows in micro-batches of two: an epoch is a step of four and one of one.
    assert len(steps) == plan.steps == 6
    assert len(server.requests) == 3 * plan.told == 9, "each row with a context, once an epoch"
    assert len(server.requests) <= plan.requests(plan.rollouts) and plan.rollouts == 24
    assert plan.requests(plan.step_size) == 3


def test_a_row_with_a_teacher_prompt_of_its_own_is_planned_as_told(recipe, tmp_path):
    llm = ["judge.kind=llm", "judge.model=m", "judge.base_url=http://127.0.0.1:9/v1"]
    before = planned(recipe, *llm)
    own = {"prompt": "And?", "privileged_context": "", "teacher_prompt": "Say zorblat. " * 20 + "And?"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(own) + "\n" + rows.read_text())
    after = planned(recipe, *llm)
    assert (before.told, after.told) == (3, 4) and "6 rows: 4 with privileged context, 2 anchors" in str(after)
    assert after._tokens_judged() > before._tokens_judged() + 100, "the judge reads it"


def test_opsd_and_other_judges_ask_nothing(recipe):
    llm = ["judge.kind=llm", "judge.model=m", "judge.base_url=http://127.0.0.1:9/v1"]
    assert planned(recipe, *llm).requests(100) > 0
    assert planned(recipe, *llm, "method=opsd").requests(100) == planned(recipe).requests(100) == 0


def test_no_more_are_planned_to_be_kept_than_there_are_candidates(recipe):
    for number, kept in ((7, 7), (30, 20)):
        assert f"; {kept} kept of 20 candidates at most" in str(planned(recipe, f"train.num_kept={number}"))


def test_rollouts_that_rows_bring_are_measured_and_not_sampled(recipe, tmp_path):
    rows = [{**tiny.ROWS[0], "completion": "It is zorblat."}, {**tiny.ROWS[1], "completion": "No."}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = train(load_recipe(recipe, ["dry_run=true", "data=null", f"rollouts={tmp_path / 'rollouts.jsonl'}"]))
    lengths = [len(tiny.tokenizer()(row["completion"])["input_ids"]) for row in rows]
    assert f"answer {sum(lengths) / 2:.0f}\n" in text
    assert "sampling" not in text and "KV cache" not in text and "student reads its answer" in text


def test_the_published_recipe_trains_a_tiny_model(folder, tmp_path, server):
    """Everything but its size: LoRA in bfloat16, gradient checkpointing, the LLM judge, the continuation, its task."""
    pytest.importorskip("peft", reason="needs peft: pip install 'rmsd-kernels[peft]'")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template = tiny.CHAT + "{% if enable_thinking %}{% endif %}"  # a variable of Qwen3's
    tokenizer.save_pretrained(folder)
    run = tmp_path / "run"
    overrides = [
        f"model={folder}",
        "architecture=null",
        f"output_dir={run}",
        f"judge.base_url={server.url}",
        f"judge.cache={tmp_path / 'judge'}",
        "evaluate.every=2",
        "evaluate.samples=0",
        "evaluate.max_new_tokens=2",
        "train.max_steps=3",
        "train.continuation_steps=[2]",
        "train.per_device_train_batch_size=2",
        "train.max_completion_length=6",
        "train.save_steps=2",
        "train.use_cpu=true",
        "train.disable_tqdm=true",
    ]
    most = planned(QWEN, *overrides).requests(3 * 4)
    train(load_recipe(QWEN, overrides))
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "continuation"] == [2]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert 0 < len(server.requests) <= most == 12
    assert (run / "model" / "adapter_model.safetensors").exists()
    saved = AutoTokenizer.from_pretrained(run / "model").chat_template
    assert saved == "{%- set enable_thinking = false -%}" + template


def test_template_variables_are_fixed_for_every_prompt(monkeypatch):
    tokenizer = tiny.tokenizer()
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% if thinks is defined and not thinks %}quick {{ n }} {{ messages[0].content }}{% endif %}",
    )
    fix_template_variables(tokenizer, {})
    with pytest.raises(ValueError, match="leaves out what a message says"):
        encode(tokenizer, "Hi")
    fix_template_variables(tokenizer, {"thinks": False, "n": 'a"b'})
    assert tokenizer.decode(encode(tokenizer, "Hi")) == 'quick a"b Hi'
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        fix_template_variables(tokenizer, {"thinks": False})
