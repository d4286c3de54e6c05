"""DeepSpeed ZeRO-3, really run: two gloo processes that hold the weights in parts. Skips where it is not installed."""

from pathlib import Path

import pytest
import tiny
import torch
import zero3_ranks
from safetensors.torch import load_file
from test_processes import launch

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")


@pytest.mark.parametrize(
    ("lora", "tied"), [(True, True), (False, False), (False, True)], ids=["LoRA", "all weights", "a tied head"]
)
def test_two_processes_end_in_the_weights_of_one_without_it(tmp_path, lora, tied):
    """Of two micro-batches a step; the head is among what is trained."""
    for run in ("one", "two"):
        tiny.model(tie_word_embeddings=tied, initializer_range=0.1).save_pretrained(tmp_path / run / "tiny")
        tiny.tokenizer().save_pretrained(tmp_path / run / "tiny")
    losses = [
        entry["loss"] for entry in zero3_ranks.main(tmp_path / "one", lora, 4).state.log_history if "loss" in entry
    ]
    assert len(losses) == 3
    script = Path(__file__).parent / "zero3_ranks.py"
    result = launch("torchrun", tmp_path / "two", lora, program=[script])
    assert result.returncode == 0, result.stderr[-3000:]

    name = "adapter_model.safetensors" if lora else "model.safetensors"
    one, two = (load_file(tmp_path / run / "model" / name) for run in ("one", "two"))
    before = {} if lora else load_file(tmp_path / "one" / "tiny" / name)
    assert one.keys() <= two.keys() and before.keys() <= one.keys()
    trained = [name for name in one if "lora_B" in name] if lora else before
    assert max((one[name] - before.get(name, 0.0)).abs().max() for name in trained) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6)
