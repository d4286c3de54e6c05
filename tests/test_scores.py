"""token_scores of every backend, by the error budget against fp64, over regimes, shapes, values and options."""

import importlib

import budget
import inputs
import pytest
import torch
from conftest import skip_unless_served

import rmsd_kernels as rk
from rmsd_kernels.dispatch import scores_of_rows
from rmsd_kernels.options import complete_options


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("regime", inputs.REGIMES)
def test_regimes(backend, device, regime, dtype, divergence):
    case = inputs.REGIMES[regime]((2, 328), dtype)
    budget.check_scores(
        backend, *case[:2], inputs.sampled_ids(case), device=device, divergence=divergence, stable=regime == "offset"
    )


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("name", inputs.CASES)
def test_shapes_and_values(backend, device, name, divergence):
    if inputs.too_slow_to_interpret(name, backend, device):
        pytest.skip("70,000 programs take the interpreter an hour")
    cycle = list(inputs.CASES).index(name) + budget.DIVERGENCES.index(divergence)
    for dtype in [budget.DTYPES[cycle % 3]] if backend == "triton" else budget.DTYPES:
        case = inputs.make(name, dtype, backend)
        ids = inputs.sampled_ids(case)
        got = budget.check_scores(backend, *case[:2], ids, device=device, divergence=divergence, **case.options)
        assert all(score.shape == ids.shape and score.device.type == device for score in got)


OPTIONS = {
    "temperature": dict(temperature=0.6),
    "two temperatures": dict(temperature=1.7, teacher_temperature=0.4),
    "beta": dict(beta=0.1, divergence="jsd"),
    "softcap": dict(softcap=5.0),
    "scale": dict(logit_scale=0.25),
    "all": dict(temperature=0.6, teacher_temperature=1.3, softcap=8.0, logit_scale=1.5, vocab_size=301, beta=0.8),
}


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backend, device, option, divergence):
    options = {"divergence": divergence, **OPTIONS[option]}
    dtype = budget.DTYPES[(list(OPTIONS).index(option) + budget.DIVERGENCES.index(divergence)) % 3]
    case = inputs.far_apart((2, 331), dtype)
    case.student[:, 5] = case.teacher[1, 5] = -inputs.INF  # a softcap must not give a banned token mass
    ids = torch.tensor([1, 300])
    budget.check_scores(backend, *case[:2], ids, device=device, **options)


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_leading_shape_comes_back(backend, device, leading):
    case = inputs.far_apart((*leading, 40))
    ids = inputs.sampled_ids(case)
    got = budget.check_scores(backend, *case[:2], ids, device=device)
    assert all(score.shape == leading for score in got)


def test_int32_ids_and_strided_ids_are_the_same_ids(backend, device):
    case = inputs.far_apart((2, 3, 40))
    ids = inputs.sampled_ids(case)
    logits = [tensor.to(device) for tensor in case[:2]]
    expected = rk.token_scores(*logits, ids.to(device), backend=backend)
    strided = torch.stack([ids, ids * 0 + 39], -1)[..., 0].to(device)
    for same in (ids.int().to(device), strided):
        for have, want in zip(rk.token_scores(*logits, same, backend=backend), expected, strict=True):
            assert torch.equal(have, want)


def test_an_id_outside_the_vocabulary_gives_nan_and_no_stray_read(backend, device):
    """On a GPU ids are not looked at on the host. What is then called, on the CPU too."""
    case = inputs.far_apart((1, 4, 40))
    ids = torch.tensor([[-1, 3, 39, 40]])
    tensors = [tensor.to(device) for tensor in (*case[:2], ids)]
    options = complete_options("a test", tensors[0], 40, vocab_size=39, backend=backend)
    got = torch.stack(scores_of_rows(*tensors, options))
    assert got.isnan().cpu().all(0).tolist() == [[True, False, True, True]]
    assert got[:, 0, 1].isfinite().all()


def test_scores_carry_no_gradient(backend, device):
    case = inputs.far_apart((2, 40))
    student = case.student.to(device).requires_grad_()
    got = rk.token_scores(student, case.teacher.to(device), torch.tensor([0, 1], device=device), backend=backend)
    assert not any(score.requires_grad for score in got)


def test_production_tiles_agree(production_tiles, monkeypatch):
    """The interpreter's other tests run with small tiles; once with the real ones: a whole tile and a ragged one."""
    skip_unless_served("triton")
    if not production_tiles:
        pytest.skip("not interpreted: every test runs with the real tiles")
    launch = importlib.import_module("rmsd_kernels.triton.launch")
    for dtype, tile in production_tiles.items():
        monkeypatch.setitem(launch.TILES, dtype, tile)
    for dtype, width in ((torch.float32, 8200), (torch.bfloat16, 8200), (torch.float16, 8197)):
        case = inputs.far_apart((1, width), dtype)
        budget.check_scores("triton", *case[:2], torch.tensor([8193]))
