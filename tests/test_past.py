"""Keys and values that are kept: the beginning that prompts share, and earlier turns, change nothing but the time."""

import pytest
import tiny
import torch

from rmsd.answers import past as module
from rmsd.answers.engines import TransformersEngine
from rmsd.answers.past import Past
from rmsd.answers.rollout import generate, hidden_states

EOS = tiny.tokenizer().eos_token_id
SHARED = list(range(40, 100))
PROMPTS = [[*SHARED, 7, 8, 9], [*SHARED, 11], [*SHARED, 7, 12, 13, 14, 15]]
OPTIONS = dict(max_new_tokens=6, pad_id=EOS, eos_ids=[EOS], temperature=1.0, seed=3)


def forwards(model):
    """Tokens of each forward's batch, as (B, tokens)."""
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_shared_beginning_is_read_once_and_the_answers_are_the_same(kind, monkeypatch):
    model = tiny.model(kind)
    shapes = forwards(model)
    shared = generate(model, PROMPTS, **OPTIONS)
    assert shapes[:2] == [(1, len(SHARED)), (3, 5)]
    monkeypatch.setattr(module, "LEAST_SHARED", 10**9)
    del shapes[:]
    alone = generate(model, PROMPTS, **OPTIONS)
    assert shapes[0] == (3, len(SHARED) + 5)
    assert shared.completion_ids.tolist() == alone.completion_ids.tolist()
    mask = shared.completion_mask
    torch.testing.assert_close(shared.student_hidden[mask], alone.student_hidden[mask], rtol=1e-4, atol=1e-5)
    fresh = generate(model, PROMPTS, **OPTIONS)
    fresh.student_hidden = None
    torch.testing.assert_close(
        shared.student_hidden[mask], hidden_states(model, fresh, EOS)[mask], rtol=1e-4, atol=1e-5
    )


def next_turn(prompts, rollouts, said):
    written = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    return [p + ids[mask].tolist() + add for p, (ids, mask), add in zip(prompts, written, said, strict=True)]


def test_a_turn_goes_on_from_the_cache_of_the_one_before():
    model = tiny.model("qwen2")
    ends = [id for id in range(100, 200)]  # so that answers end at different places
    options = {**OPTIONS, "eos_ids": ends}
    engine = TransformersEngine()
    engine.sync(model)
    shapes = forwards(model)
    with engine.turns():
        first = engine(PROMPTS, **options)
        lengths = first.completion_mask.sum(1).tolist()
        assert len(set(lengths)) > 1, lengths
        prompts = next_turn(PROMPTS, first, [[5, 6], [21, 22, 23], []])[:2][::-1]  # one ended; the order is another
        del shapes[:]
        second = engine(prompts, **{**options, "seed": 4})
        assert shapes[0][0] == 2 and shapes[0][1] <= 1 + 3 + 1, "only what is new is read, and the token sampled last"
        third = engine(next_turn(prompts, second, [[30, 31], [32]]), **{**options, "seed": 5})
    anew = engine(prompts, **{**options, "seed": 4})
    assert second.completion_ids.tolist() == anew.completion_ids.tolist()
    mask = second.completion_mask
    torch.testing.assert_close(second.student_hidden[mask], anew.student_hidden[mask], rtol=1e-4, atol=1e-5)
    anew = engine(next_turn(prompts, anew, [[30, 31], [32]]), **{**options, "seed": 5})
    assert third.completion_ids.tolist() == anew.completion_ids.tolist()


def test_other_prompts_are_read_anew_and_nothing_is_kept_after_the_turns():
    engine = TransformersEngine()
    engine.sync(tiny.model())
    with engine.turns():
        engine(PROMPTS, **OPTIONS)
        other = engine([[1, 2, 3]], **OPTIONS)
        assert engine._past is not None
    assert engine._past is None
    assert other.completion_ids.tolist() == engine([[1, 2, 3]], **OPTIONS).completion_ids.tolist()


def test_a_model_without_a_cache_reads_everything():
    model = tiny.model("openai-gpt", n_embd=32, n_layer=2, n_head=2)
    assert Past.empty(model, model.device) is None
    assert generate(model, PROMPTS, **OPTIONS).completion_ids.shape[0] == len(PROMPTS)


def test_a_model_with_sliding_windows_reads_everything():
    model = tiny.model("mistral", sliding_window=8)
    assert Past.empty(model, "cpu") is None and generate(model, PROMPTS, **OPTIONS).completion_mask.any()
