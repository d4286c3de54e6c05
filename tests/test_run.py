"""A recipe from its files to its table: tiny models and a real task."""

import pytest
import tiny

from rmsd.recipe import load_recipe
from rmsd.record import read_lines
from rmsd.run import train


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
