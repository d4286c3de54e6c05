"""Rows split over programs, as a launch of few rows has them: within the error budget, and the same in every run."""

import importlib

import budget
import inputs
import pytest
import torch
from conftest import device_of, skip_unless_served

import rmsd_kernels as rk
from rmsd_kernels import reference


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """Every row, in the interpreter too, whose tiles are of 128 logits."""
    skip_unless_served("triton")
    module = importlib.import_module("rmsd_kernels.triton.split")
    monkeypatch.setattr(module, "FEW_ROWS", 64)
    return module


DEVICE = device_of("triton")
WIDTH = 331 if DEVICE == "cpu" else 9001  # two whole tiles and a ragged one
ALIGNED = WIDTH // 16 * 16 + 16  # so that every row begins at 16 bytes, and a top k keeps its groups' maxima


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("regime", inputs.REGIMES)
def test_regimes(regime, divergence):
    parts = list(inputs.REGIMES).index(regime) + budget.DIVERGENCES.index(divergence)
    case = inputs.REGIMES[regime]((1, WIDTH), budget.DTYPES[parts % 3])
    options = dict(divergence=divergence, beta=0.3, stable=regime == "offset")
    budget.check_divergence("triton", *case[:2], device=DEVICE, **options)


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("regime", inputs.REGIMES)
def test_scores(regime, divergence):
    parts = list(inputs.REGIMES).index(regime) + budget.DIVERGENCES.index(divergence)
    if parts % 3 and DEVICE == "cpu":
        pytest.skip("the interpreter takes a third of them, and every dtype")
    case = inputs.REGIMES[regime]((2, ALIGNED), budget.DTYPES[parts // 3 % 3])
    ids = inputs.sampled_ids(case)
    options = dict(divergence=divergence, beta=0.3, stable=regime == "offset")
    budget.check_scores("triton", *case[:2], ids, device=DEVICE, **options)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_candidates_come_after_every_part(divergence):
    case = inputs.far_apart((2, 2, ALIGNED), torch.bfloat16)
    student, teacher, ids = (part.to(DEVICE) for part in (*case[:2], inputs.sampled_ids(case)))
    mask = torch.ones_like(ids, dtype=torch.bool)
    scores, index = rk.scores_and_candidates(
        student, teacher, ids, mask, num_candidates=1, divergence=divergence, backend="triton"
    )
    alone = rk.token_scores(student, teacher, ids, divergence=divergence, backend="triton")
    assert all(map(torch.equal, scores, alone))  # the same in every run
    expected = reference.select_tokens(rk.criterion_score(scores, "logprob_gap"), mask, num_tokens=1)
    assert torch.equal(index, expected)


@pytest.mark.parametrize("tail", reference.TAILS)
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
def test_a_top_k_of_split_rows(tail, divergence):
    """Its first visit alone is split, and with it what is kept of each part for the search."""
    case = inputs.far_apart((2, ALIGNED), torch.bfloat16 if tail == "drop" else torch.float32)
    options = dict(device=DEVICE, divergence=divergence, tail=tail, vocab_topk=40)
    if DEVICE == "cpu" and tail != "drop" and divergence != "forward_kl":
        pytest.skip("the interpreter takes one divergence, and of the least tail every one")
    budget.check_divergence("triton", *case[:2], **options)


def test_a_part_without_mass_leaves_the_scores_as_they_are():
    case = inputs.far_apart((3, WIDTH))
    (student, teacher, _), ids = case, inputs.sampled_ids(case)
    tile = WIDTH * 2 // 5
    student[0, :tile] = teacher[0, :tile] = -inputs.INF
    student[1, -3:] = -inputs.INF
    teacher[0, -2] = -inputs.INF  # the reverse KL is infinite by the last part alone
    teacher[2, -1] = inputs.NAN
    got = budget.check_scores("triton", student, teacher, ids, device=DEVICE)
    assert got.divergence[0].isposinf()
    assert got.divergence[2].isnan()


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
def test_parts_without_mass_and_rows_that_are_none(divergence):
    """Bans that fill a whole part, in one model or in both; a NaN in the last part; chosen rows out of order."""
    student, teacher, _ = inputs.far_apart((6, WIDTH))
    tile = WIDTH * 2 // 5
    student[0, :tile] = teacher[0, :tile] = -inputs.INF
    student[1, -3:] = -inputs.INF
    teacher[2, :tile] = -inputs.INF  # the reverse KL is infinite there
    student[3, -1] = inputs.NAN
    teacher[4] = student[4]
    rows = torch.tensor([4, -1, 3, 0, 2, 1])
    got, _ = budget.check_divergence("triton", student, teacher, rows=rows, device=DEVICE, divergence=divergence)
    assert got[1] == 0
    assert got[2].isnan()
    assert got[4].isinf() == (divergence == "reverse_kl")


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
def test_a_row_is_the_same_in_every_run_and_beside_any_rows(divergence, split):
    student, teacher, _ = (part.to(DEVICE) if torch.is_tensor(part) else part for part in inputs.far_apart((5, WIDTH)))
    first = rk.token_divergence(student, teacher, divergence=divergence, backend="triton")
    again = rk.token_divergence(student, teacher, divergence=divergence, backend="triton")
    alone = rk.token_divergence(student[3:4], teacher[3:4], divergence=divergence, backend="triton")
    assert torch.equal(first, again)
    assert torch.equal(first[3:4], alone)
    split.FEW_ROWS = 4  # five rows are no longer few
    torch.testing.assert_close(rk.token_divergence(student, teacher, divergence=divergence, backend="triton"), first)


def test_which_rows_are_split(split):
    tile = dict(UNROLL=2, LANES=256, VEC=8)
    assert split.parts_of(5, 151_936, tile) == 38
    assert split.parts_of(64, 262_208, tile) == 65
    assert split.parts_of(65, 151_936, tile) == 1
    assert split.parts_of(5, 4096, tile) == 1
    assert split.parts_of(5, 2**20, tile) == 1  # more parts than are merged


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_programs_of_a_row_are_as_many_as_its_parts(divergence, split, monkeypatch):
    module = importlib.import_module("rmsd_kernels.triton.divergence")
    launched = []

    def recorded(kernel, programs, *arguments, **options):
        launched.append(programs)
        return launch(kernel, programs, *arguments, **options)

    launch = module.launch
    for of in (module, split):
        monkeypatch.setattr(of, "launch", recorded)
    student, teacher, _ = (part.to(DEVICE) if torch.is_tensor(part) else part for part in inputs.far_apart((2, WIDTH)))
    rk.token_divergence(student, teacher, divergence=divergence, backend="triton")
    assert launched == [6] * (2 if divergence == "jsd" else 1)
