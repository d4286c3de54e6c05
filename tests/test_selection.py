"""select_tokens and scores_and_candidates: exact, and against a loop."""

import math

import pytest
import torch
from conftest import device_of
from inputs import far_apart

from rmsd_kernels import criterion_score, scores_and_candidates, select_tokens, token_scores


def by_loop(score, mask, num_tokens, threshold):
    rows = []
    for values, allowed in zip(score.tolist(), mask.tolist(), strict=True):
        found = [i for i, v in enumerate(values) if allowed[i] and v > threshold]
        found = sorted(found, key=lambda i: (-values[i], i))[:num_tokens]
        rows.append(found + [-1] * (num_tokens - len(found)))
    return torch.tensor(rows, dtype=torch.int64).view(len(score), num_tokens)


def select(score, mask, backend, **options):
    device = device_of(backend)
    return select_tokens(score.to(device), mask.to(device), backend=backend, **options).cpu()


@pytest.mark.parametrize("length", [1, 2, 31, 300, 1500])
@pytest.mark.parametrize("num_tokens", [1, 20, 64])
def test_selection_equals_a_loop(num_tokens, length, backend):
    generator = torch.Generator().manual_seed(length)
    score = torch.randn(3, length, generator=generator)
    score[1] = score[1].round()  # ties
    score[2, ::3] = math.nan
    mask = torch.rand(3, length, generator=generator) < 0.7
    got = select(score, mask, backend, num_tokens=num_tokens, threshold=0.1)
    assert torch.equal(got, by_loop(score, mask, num_tokens, torch.tensor(0.1).item()))


def test_selection_by_hand(backend):
    score = torch.tensor([[1.0, 3.0, math.nan, 3.0, math.inf, 0.0, -1.0, 9.0]])
    mask = torch.tensor([[True] * 7 + [False]])
    assert select(score, mask, backend, num_tokens=6).tolist() == [[4, 1, 3, 0, -1, -1]]
    assert select(score, mask, backend, num_tokens=2, threshold=3.0).tolist() == [[4, -1]]
    assert select(score, ~mask, backend, num_tokens=2).tolist() == [[7, -1]]
    assert select(score, mask & False, backend, num_tokens=1).tolist() == [[-1]]
    below = torch.tensor([[-3.0, -0.0, 0.0, -1.0, -0.0]])  # the zeros tie, whatever their signs
    assert select(below, below < 1, backend, num_tokens=6, threshold=-4.0).tolist() == [[1, 2, 4, 3, 0, -1]]


def test_a_threshold_is_not_rounded_to_the_scores_dtype(backend):
    """The bf16 nearest to 0.1 is 0.10009765625, which is above it."""
    score = torch.tensor([[0.1, 0.2]], dtype=torch.bfloat16)
    assert select(score, score > 0, backend, num_tokens=2, threshold=0.1).tolist() == [[1, 0]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_select_from(shape, backend):
    got = select(torch.empty(shape), torch.empty(shape, dtype=torch.bool), backend, num_tokens=2)
    assert got.tolist() == [[-1, -1]] * shape[0]


@pytest.mark.parametrize("criterion", ["logprob_gap", "divergence", "entropy_gap"])
def test_candidates_are_the_selection_of_the_scores(criterion, backend):
    device = device_of(backend)
    student, teacher = far_apart((3, 9, 40))[:2]
    teacher[1, 2, 3] = -math.inf  # its divergence is infinite: never selected
    student[2, 4] = math.nan
    ids = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 5:] = False
    scores, index = scores_and_candidates(
        student.to(device),
        teacher.to(device),
        ids.to(device),
        mask.to(device),
        num_candidates=7,
        criterion=criterion,
        threshold=0.2,
        backend=backend,
    )
    alone = token_scores(student.to(device), teacher.to(device), ids.to(device), backend=backend)
    for got, expected in zip(scores, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    expected = by_loop(criterion_score(scores, criterion).cpu(), mask, 7, torch.tensor(0.2).item())
    assert torch.equal(index.cpu(), expected)
    assert 2 not in index[1]
    assert 4 not in index[2]
    assert (index[0] < 5).all()
