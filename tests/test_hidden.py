"""Which sequences share a forward."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmsd.models import past
from rmsd.models.hidden import by_length, completion_hidden, row_lengths
from rmsd.step.training import train_parts

CPU = torch.device("cpu")


def tokens(groups, prompts, lengths, each):
    return sum(len(g) * (max(prompts[i] for i in g) + max(lengths[i] for i in g)) + each for g in groups)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=7),
    st.integers(0, 300),
)
def test_groups_are_the_cheapest_cut_of_the_sequences_in_order_of_length(pairs, each):
    prompts, lengths = map(list, zip(*pairs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(past._PASS_TOKENS, "cpu", each)
        groups = by_length(prompts, lengths, CPU)
    assert sorted(i for group in groups for i in group) == list(range(len(pairs)))

    order = sorted(range(len(pairs)), key=lambda i: (lengths[i], prompts[i]))
    cheapest = float("inf")
    for cuts in range(2 ** (len(pairs) - 1)):  # bit i: cut behind the i-th
        every, group = [], []
        for place, i in enumerate(order):
            group.append(i)
            if cuts >> place & 1 or place == len(order) - 1:
                every.append(group)
                group = []
        cheapest = min(cheapest, tokens(every, prompts, lengths, each))
    assert tokens(groups, prompts, lengths, each) == cheapest


def test_like_lengths_share_a_forward_and_others_do_not():
    assert by_length([5] * 4, [20, 21, 22, 23], CPU) == [[0, 1, 2, 3]]
    assert sorted(map(sorted, by_length([5] * 4, [20, 400, 21, 401], CPU))) == [[0, 2], [1, 3]]
    assert sorted(map(sorted, by_length([5, 300, 6, 5], [20] * 4, CPU))) == [[0, 2, 3], [1]], "prompts count too"


def test_a_batch_is_cut_to_what_it_keeps_and_parted_by_length():
    keep = torch.zeros(4, 500, dtype=torch.bool)
    keep[0, 7] = keep[1, 400] = keep[1, 2] = keep[3, 9] = True  # sequence 2 keeps nothing
    parts = train_parts(keep, [5] * 4, CPU)
    assert sorted((part.sequences.tolist(), part.keep.shape[1]) for part in parts) == [([0, 3], 10), ([1], 401)]
    assert all(torch.equal(part.keep, keep[part.sequences, : part.keep.shape[1]]) for part in parts)
    (together,) = train_parts(keep, [5] * 4, CPU, one_forward=True)
    assert together.sequences.tolist() == [0, 1, 3] and together.keep.shape == (3, 401)
    (nothing,) = train_parts(keep & False, [5] * 4, CPU)
    assert nothing.sequences.tolist() == [0] and nothing.keep.shape == (1, 1) and not nothing.keep.any()


def test_lengths_reach_to_the_last_true_entry():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert row_lengths(mask) == [3, 0, 4] and row_lengths(mask[:, :0]) == [0, 0, 0] and row_lengths(mask[:0]) == []


@pytest.mark.parametrize("pass_tokens", [0, 1000], ids=["a forward a sequence", "all together"])
@pytest.mark.parametrize("length", [6, 0])
def test_several_forwards_give_the_hidden_states_of_one(monkeypatch, length, pass_tokens):
    model, calls = tiny.model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompts = [[7, 8, 9], [7], [8, 9, 10, 11], [9]]
    ids = torch.arange(4 * length).view(4, length) + 20
    mask = torch.arange(length) < torch.tensor([[6], [2], [0], [3]])
    with torch.no_grad():
        one = completion_hidden(model, prompts, ids, mask, 0, one_forward=True)
        monkeypatch.setitem(past._PASS_TOKENS, "cpu", pass_tokens)
        calls.clear()
        several = completion_hidden(model, prompts, ids, mask, 0)
    assert several.shape == one.shape == (4, length, 32)
    assert len(calls) == (1 if pass_tokens else 4)
    torch.testing.assert_close(several[mask], one[mask])
    assert several.isfinite().all()
