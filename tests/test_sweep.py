"""Ten architectures of the sweep, chosen to differ: each trains two steps after the self-check."""

import pytest
import sweep

DIFFER = (
    "bloom",  # eager attention alone, biases by distance
    "cohere",  # logits scaled
    "gemma3_text",  # sliding windows
    "gpt2",  # positions learnt, other names for everything
    "gpt_oss",  # experts, sinks beside the attention
    "mamba",  # a state in the place of attention
    "opt",  # a decoder inside the decoder
    "qwen3_moe",  # experts behind a router
    "phi",  # a head with a bias
    "olmo2",  # norms after the layers
)


@pytest.mark.parametrize("kind", DIFFER)
def test_architectures_that_differ_train_or_are_refused_in_one_line(kind):
    result, said = sweep.tried(kind)
    assert result == "trains", said


def test_a_broken_one_is_no_refusal(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("size mismatch\nof two lines")

    monkeypatch.setattr(sweep.tiny, "trainer", fails)
    assert sweep.tried("llama") == ("broken", "RuntimeError: size mismatch")
