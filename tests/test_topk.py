"""The student's top k, id by id: the same on every backend, whatever the logits and however they are searched."""

import importlib

import inputs
import pytest
import torch

import rmsd_kernels as rk
from rmsd_kernels import reference


@pytest.fixture(params=["histograms", "counts"])
def search(request, backend, monkeypatch):
    """The Triton kernels have two ways, by what the compiler makes of a histogram."""
    if backend == "triton":
        module = importlib.import_module("rmsd_kernels.triton.divergence")
        monkeypatch.setattr(module, "histograms_are_atomic", lambda target: request.param == "histograms")
    elif request.param == "counts":
        pytest.skip("one way alone")
    return request.param


def rows(width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(width, generator=generator)
    zeros = torch.where(torch.arange(width) % 3 == 0, -0.0, 0.0)
    made = dict(
        distinct=normal - 8.0,  # below the 0 that a lane without a group must not count as
        tied=(2 * normal).round() / 2,
        constant=torch.full((width,), 1.25),
        zeros=zeros,  # -0.0 ties with 0.0
        zeros_within=torch.where(torch.rand(width, generator=generator) < 0.3, normal, zeros),
        negative=-(2 * normal.abs()).round() - 1.0,
        few=torch.where(torch.arange(width) % 90 == 7, normal, -inputs.INF),  # fewer than k are finite
        rising=normal.sort().values,  # whole groups are below 0
        banned=torch.where(torch.rand(width, generator=generator) < 0.6, -inputs.INF, normal),
    )
    return {name: row.to(dtype) for name, row in made.items()}


def check_support(backend, device, student, k):
    """Which logits have gradient under "renorm": the support, but for those of -inf, which have none. One logit alone
    has none either: under "drop" its term has a gradient of one sign at it, and of the other at all others."""
    teacher = inputs.far_apart(student.shape, student.dtype).teacher
    leaf = student.to(device, copy=True).requires_grad_()
    if k == 1:
        got = rk.token_divergence(leaf, teacher.to(device), vocab_topk=1, tail="drop", backend=backend)
        want = reference.token_divergence(student.double(), teacher.double(), vocab_topk=1, tail="drop")
        torch.testing.assert_close(got.detach().double().cpu(), want, rtol=1e-4, atol=1e-7)
        (grad,) = torch.autograd.grad(got.sum() * 2**14, leaf)
        sign = grad.cpu().sign()
        is_alone = sign * sign.sum(-1, keepdim=True) < 0
        assert is_alone.nonzero().tolist() == reference.topk_support(student, 1).nonzero().tolist()
        return
    result = rk.token_divergence(leaf, teacher.to(device), vocab_topk=k, tail="renorm", backend=backend)
    (grad,) = torch.autograd.grad(result.sum() * 2**14, leaf)  # fp16 holds none below 6e-8
    got, want = grad.cpu() != 0, reference.topk_support(student, k) & student.isfinite()
    assert (got != want).nonzero().tolist() == []


KINDS = ("distinct zeros few", "tied zeros_within rising", "constant negative banned")


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("k", [1, 2, 33, 40, 499, 500, 519, 520])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_support_is_the_references(backend, device, search, dtype, k, kinds):
    if backend == "triton" and device == "cpu":
        if dtype != torch.bfloat16 and k != 33:
            pytest.skip("the interpreter takes every k in bf16, whose ties are the most")
        takes_all = k == 499 or (k == 500 and search == "histograms")
        if not takes_all and kinds != KINDS[k % 3]:
            pytest.skip(f"the interpreter takes {KINDS[k % 3]} at k = {k}, and leaves out {kinds}")
    made = rows(520, dtype)
    check_support(backend, device, torch.stack([made[kind] for kind in kinds.split()]), k)


@pytest.mark.parametrize("kind", " ".join(KINDS).split())
@pytest.mark.parametrize("k", [4095, 4096, 4104])
def test_the_support_of_a_large_k(backend, device, search, k, kind, monkeypatch):
    """The last k is the whole row."""
    if backend == "triton" and device == "cpu":
        if k == 4104 and search == "counts":
            pytest.skip("nothing is searched at k = V")
        taken = {4095: "zeros", 4096: "tied"}.get(k, kind)
        if kind != taken:
            pytest.skip(f"the interpreter takes {taken} at k = {k}, and leaves out {kind}")
        launch = importlib.import_module("rmsd_kernels.triton.launch")  # as few tiles as there can be
        monkeypatch.setitem(launch.TILES, torch.bfloat16, launch.Tile(unroll=2, lanes=128, vec=8))
    check_support(backend, device, rows(4104, torch.bfloat16)[kind][None], k)


@pytest.mark.parametrize(
    ("row", "k"),
    [
        ("constant", 256),  # the first 256 ids, which are counted together, and the next of them begins with a tie
        ("zeros", 176),  # as many as are 0.0: the first 176 ids of either sign
    ],
)
def test_the_support_ends_where_ties_fit_exactly(backend, device, search, row, k):
    check_support(backend, device, rows(264, torch.bfloat16)[row][None], k)


def test_the_support_within_many_groups(backend, device, search):
    """More groups than are listed at once, and more logits that reach the k-th largest maximum than k."""
    made = rows(1160, torch.bfloat16)
    check_support(backend, device, made["tied"][None], 50)


def test_the_support_of_rows_that_are_not_aligned(backend, device, search):
    made = rows(203, torch.bfloat16)
    check_support(backend, device, torch.stack([made["tied"], made["zeros_within"]])[:, 2:], 100)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.5, 1.0)], ids=str)
def test_banned_logits_fill_up_a_support(backend, device, search, temperatures):
    """The lowest ids among them, where fewer than k logits are finite; what the teacher has there counts."""
    student = torch.full((1, 264), -inputs.INF)
    student[0, 100:110] = inputs.far_apart((10,)).student
    teacher = inputs.far_apart((1, 264)).teacher
    options = dict(vocab_topk=20, tail="renorm", temperature=temperatures[0], teacher_temperature=temperatures[1])
    got = rk.token_divergence(student.to(device), teacher.to(device), **options, backend=backend)
    torch.testing.assert_close(got.cpu(), reference.token_divergence(student, teacher, **options), rtol=1e-5, atol=0)
