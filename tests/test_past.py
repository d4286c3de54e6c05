"""Keys and values that are kept: the beginning that prompts share, and earlier turns, change nothing but the time."""

import pytest
import tiny
import torch

from rmsd.answers.engines import TransformersEngine
from rmsd.answers.rollout import generate, hidden_states
from rmsd.models import past as module
from rmsd.models.hidden import completion_hidden
from rmsd.models.past import Past, by_beginning

EOS = tiny.tokenizer().eos_token_id
SHARED = list(range(40, 100))
PROMPTS = [[*SHARED, 7, 8, 9], [*SHARED, 11], [*SHARED, 7, 12, 13, 14, 15]]
OPTIONS = dict(max_new_tokens=6, pad_id=EOS, eos_ids=[EOS], temperature=1.0, seed=3)


CPU = torch.device("cpu")


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
    monkeypatch.setattr(module, "pass_tokens", lambda device: 10**9)
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


READ = [[*SHARED, 7, 8, 9], [50, 51], [*SHARED, 11], [50, 52, 53], [*SHARED, 7, 12, 13, 14, 15]]
IDS = torch.arange(5 * 6).view(5, 6) + 20
MASK = torch.arange(6) < torch.tensor([[6], [2], [0], [6], [3]])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_prompts_that_begin_alike_are_read_from_one_beginning(kind):
    model = tiny.model(kind)
    shapes = forwards(model)
    with torch.no_grad():
        read = completion_hidden(model, READ, IDS, MASK, EOS)
        assert (1, len(SHARED)) in shapes and max(tokens for _, tokens in shapes) == len(SHARED)
        del shapes[:]
        one = completion_hidden(model, READ, IDS, MASK, EOS, one_forward=True)
    assert shapes == [(5, len(SHARED) + 5 + 6)]
    torch.testing.assert_close(read[MASK], one[MASK], rtol=1e-4, atol=1e-5)
    assert read.isfinite().all()


def test_what_is_trained_on_or_cannot_be_kept_is_read_whole():
    model = tiny.model()
    shapes = forwards(model)
    completion_hidden(model, READ, IDS, MASK, EOS)
    assert (1, len(SHARED)) not in shapes, "a gradient goes through the beginning"
    model.train()
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        del shapes[:]
        read = completion_hidden(model, READ, IDS, MASK, EOS)
        assert (1, len(SHARED)) not in shapes, "under gradient checkpointing some versions drop a cache"
        torch.testing.assert_close(read[MASK], completion_hidden(model.eval(), READ, IDS, MASK, EOS)[MASK])
        windows = tiny.model("mistral", sliding_window=8)
        assert completion_hidden(windows, READ, IDS, MASK, EOS)[MASK].isfinite().all()


def test_prompts_are_parted_by_what_they_begin_with():
    manual, other = list(range(100, 400)), list(range(500, 900))
    prompts = [[*manual, 1], [7, 8], [*other, 1], [*manual, 2, 3], [*other, 4], [7, 9], [*manual, 5]]
    parted = sorted(by_beginning(prompts, CPU))
    assert parted == [([0, 3, 6], 300), ([1, 5], 0), ([2, 4], 400)]
    assert by_beginning([[7, 8], [7, 9], [7, 1]], CPU) == [([0, 1, 2], 0)], "little is shared: a pass costs more"
    assert by_beginning([manual, manual], CPU) == [([0, 1], 299)], "the last token is left to read"
    assert by_beginning([[7]], CPU) == [([0], 0)]
