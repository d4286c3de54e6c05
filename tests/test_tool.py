"""The tool's baselines: what fine-tuning is shown, and that it and RL train on the service's requests, go on and are
kept."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from transformers import Trainer

from benchmarks import tool
from rmsd.answers.calls import calls_of
from rmsd.answers.environments import Environments
from rmsd.answers.prompts import Prompts, is_told
from rmsd.answers.tools import run_turns
from rmsd.answers.turns import TurnSuffix
from rmsd.run.recipe import load_recipe
from rmsd.tasks import legacy_api
from rmsd.training.record import read_lines


@pytest.fixture
def tokenizer():
    """The tiny one with Qwen2.5's template, which TRL knows the calls of."""
    templates = pytest.importorskip("trl.chat_template_utils")
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = templates.qwen2_5_chat_template
    return made


def test_what_fine_tuning_is_shown_solves_the_request_and_holds_no_manual(tokenizer):
    environments = Environments(environment_factory=legacy_api.TASK.environment)
    prompts = Prompts(tokenizer, tools=environments.schemas)
    suffix = TurnSuffix(tokenizer, environments.all_schemas[0])
    for row in filter(is_told, legacy_api.TASK.train[:8]):
        shown = tool.demonstration(row, prompts, suffix)
        read = prompts.student(row)
        assert shown["input_ids"][: len(read)] == read and set(shown["labels"][: len(read)]) == {-100}
        assert "Manual" not in tokenizer.decode(shown["input_ids"])
        written = tokenizer.decode([id for id in shown["labels"] if id != -100])
        call, said, rest = written.split("<|im_end|>")
        assert call.startswith("<tool_call>\n{") and call.endswith("}\n</tool_call>")
        assert (said, rest) == (tool.SAID, "")
        between = (
            "<|im_end|>\n<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(shown["input_ids"][len(read) :]) == f"{call}{between}{said}<|im_end|>"
        (episode,) = environments.start([row])
        run_turns([(episode.tools, calls_of(call))], environments.limits)
        environments.finish([episode])
        assert episode.solved, row["prompt"]


@pytest.fixture
def settings(tokenizer, tmp_path, monkeypatch):
    few = [*legacy_api.TASK.train[:4], *legacy_api.TASK.train[-2:]]
    fewer = dict(train=few, requests=legacy_api.TASK.requests[:1], unrelated_prompts=["Why?"])
    task = dataclasses.replace(legacy_api.TASK, **fewer)
    monkeypatch.setattr(legacy_api, "TASK", task)
    size = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048)
    tiny.model("qwen2", **size).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(tool, "DOCS", tmp_path / "docs")
    small = [
        "train.max_completion_length=8",
        "train.max_steps=2",
        "evaluate.max_new_tokens=4",
        "evaluate.every=1",
        "train.save_steps=1",
        "train.per_device_train_batch_size=2",
        "train.use_cpu=true",
    ]
    recipe = load_recipe(tool.RECIPE, small).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(tool, "RECIPE", tmp_path / "recipe.yaml")  # so that a run of it is no trial
    return str(tmp_path / "tiny"), 0, []


def test_fine_tuning_goes_on_and_is_kept_and_not_run_again(settings, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "sft-0"
    first = load_recipe(tool.RECIPE, [f"output_dir={folder}", "seed=0", f"model={settings[0]}", "train.max_steps=1"])
    tool.train("sft", first, folder)
    shutil.rmtree(folder / "model")  # as if it had been interrupted after its checkpoint
    resumed, load = [], Trainer._load_from_checkpoint

    def loaded(self, checkpoint, *args, **kwargs):
        resumed.append(Path(checkpoint).name)
        return load(self, checkpoint, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", loaded)
    marks = tool.run("sft", 0, tmp_path / "runs", *settings)
    assert (folder / "model" / "adapter_config.json").exists() and resumed == ["checkpoint-1"]
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"] == [1, 2]
    assert marks["method"] == "sft" and marks["seed"] == 0 and marks["steps"] == []
    assert [one["step"] for one in marks["evaluations"]] == [0, 1, 2] and "solved_greedy" in marks["evaluations"][0]
    assert json.loads((tmp_path / "docs" / "legacy_api-sft-0.json").read_text()) == marks
    shutil.rmtree(tmp_path / "runs")  # the marks alone are enough
    monkeypatch.setattr(tool, "train", None)
    assert tool.run("sft", 0, tmp_path / "runs", *settings) == marks
    assert "SFT on the right calls | 0 | 2 | 0.00 |" in tool.table([marks], {})


def test_a_trial_is_never_taken_for_a_run_without_overrides(tmp_path, monkeypatch):
    trained, runs = [], tmp_path / "runs"
    monkeypatch.setattr(tool, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(tool, "train", lambda method, recipe, folder: trained.append(recipe.train["max_steps"]))
    monkeypatch.setattr(tool, "counted", lambda _: dict(evaluations=[dict(steps=trained[-1])]))
    monkeypatch.setattr(tool.real, "checked", lambda *_: {})
    monkeypatch.setattr(tool, "load_recipe", lambda path, *more: load_recipe(tool.RECIPE, *more))
    monkeypatch.setattr(tool, "rewrite", lambda: pytest.fail("a page is written"))

    for _ in range(2):  # the second is the first's
        for steps in ("4", "5"):
            asked = ["--only", "sft", "--human-eval", "0", "--runs", str(runs), "--set", f"train.max_steps={steps}"]
            monkeypatch.setattr("sys.argv", ["tool", *asked])
            tool.main()
    assert trained == [4, 5] and not (tmp_path / "docs").exists()
    assert len(list((runs / "marks").glob("legacy_api-sft-1-set-*.json"))) == 2
    assert tool.run("sft", 1, runs, "m", 0, [])["evaluations"] == [dict(steps=42)] and trained == [4, 5, 42]
    assert {folder.name for folder in runs.iterdir()} > {"sft-1", "marks"} and len(list(runs.glob("sft-1*"))) == 3
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["legacy_api-sft-1.json"]


def test_reinforcement_is_paid_by_the_service_itself(settings, tmp_path, monkeypatch):
    """A model of random weights calls nothing, so each of its first turns is taken for the right call."""
    from trl.trainer import grpo_trainer

    wanted = {row["prompt"]: row for row in legacy_api.TASK.train if is_told(row)}
    read = grpo_trainer.parse_response

    def parsed(tokenizer, ids, prefix=None, tools=None):
        text = tokenizer.decode(prefix)
        asked = next((row for prompt, row in wanted.items() if prompt in text), None)
        if asked is None or "<tool_response>" in text:
            return read(tokenizer, ids, prefix=prefix, tools=tools)
        call = {"type": "function", "function": tool.right_call(asked)}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    monkeypatch.setattr(grpo_trainer, "parse_response", parsed)
    tool.run("rl", 0, tmp_path / "runs", *settings)
    lines = read_lines(tmp_path / "runs" / "rl-0" / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    for line in steps:
        assert line["reward"] == line["tools/call_frequency"] and line["tools/failure_frequency"] == 0.0
    assert any(line["reward"] == 1.0 for line in steps), "a request's; an anchor is paid nothing"
