"""Every kernel by itself, in small: a first look at whether a change made one slower.

    python -m pytest benchmarks/bench_kernels.py --benchmark-enable --benchmark-max-time 0.3

By pytest-benchmark: on a GPU the host waits for the device after each call, so launches are timed too. Rows of 8,192
logits are in cache; what memory allows is bench_scores' and bench_divergence's question.
"""

import pytest
import torch

from benchmarks.common import DTYPES, assert_parity, default_device, logits
from rmsd_kernels import (
    linear_token_divergence,
    linear_token_logprobs,
    linear_token_scores,
    reference,
    scores_and_candidates,
    select_tokens,
    token_divergence,
    token_scores,
)
from rmsd_kernels.backends import PREFERRED_BACKENDS

ROWS, VOCAB, HIDDEN = 64, 8192, 64
DEVICE = default_device()
BACKEND = dict(backend=PREFERRED_BACKENDS[DEVICE])


@pytest.fixture(params=("fp32", "bf16"))
def made(request):
    """Student and teacher logits, sampled ids."""
    return logits(ROWS, VOCAB, DTYPES[request.param], DEVICE, seed=0)


@pytest.fixture(params=("fp32", "bf16"))
def models(request):
    """Student and teacher hidden states and heads, in the order of the linear functions."""
    generator = torch.Generator().manual_seed(0)
    shapes = 2 * ((ROWS, HIDDEN), (VOCAB, HIDDEN))
    return [torch.randn(shape, generator=generator).mul(0.6).to(DEVICE, DTYPES[request.param]) for shape in shapes]


def projected(models) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, in fp64."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (tensor.double() for tensor in models)
    return student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T


def doubles(made) -> tuple[torch.Tensor, torch.Tensor]:
    return made[0].double(), made[1].double()


def time(benchmark, run) -> None:
    """`run` is called once before by each test, to see that it is right, and Triton has compiled it then."""

    def until_done():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(until_done)


@pytest.mark.parametrize("divergence", ("reverse_kl", "jsd"))
def test_token_scores(benchmark, made, divergence):
    def run():
        return token_scores(*made, divergence=divergence, **BACKEND)

    truth = reference.token_scores(*doubles(made), made[2], divergence=divergence)
    assert_parity("scores", torch.stack(run()), torch.stack(truth), 1e-5)
    time(benchmark, run)


def test_scores_and_candidates(benchmark, made):
    student, teacher, ids = (tensor.view(4, ROWS // 4, *tensor.shape[1:]) for tensor in made)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def run():
        return scores_and_candidates(student, teacher, ids, mask, num_candidates=5, **BACKEND)

    scores, index = run()
    truth = reference.token_scores(student.double(), teacher.double(), ids)
    assert_parity("scores", torch.stack(scores), torch.stack(truth), 1e-5)
    gap = (scores.teacher_logprob - scores.student_logprob).abs()
    assert torch.equal(index, reference.select_tokens(gap, mask, num_tokens=5))
    time(benchmark, run)


def test_select_tokens(benchmark):
    score = torch.rand(64, 2048, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = score < 0.9

    def run():
        return select_tokens(score, mask, num_tokens=20, **BACKEND)

    assert torch.equal(run(), reference.select_tokens(score, mask, num_tokens=20))
    time(benchmark, run)


@pytest.mark.parametrize("vocab_topk", (None, 500))
def test_token_divergence_forward(benchmark, made, vocab_topk):
    def run():
        return token_divergence(*made[:2], vocab_topk=vocab_topk, **BACKEND)

    assert_parity("divergence", run(), reference.token_divergence(*doubles(made), vocab_topk=vocab_topk), 1e-5)
    time(benchmark, run)


@pytest.mark.parametrize("vocab_topk", (None, 500))
def test_token_divergence_backward(benchmark, made, vocab_topk):
    student, exact = made[0].requires_grad_(), made[0].detach().double().requires_grad_()
    total = token_divergence(student, made[1], vocab_topk=vocab_topk, **BACKEND).sum()

    def run():
        return torch.autograd.grad(total, student, retain_graph=True)[0]

    truth = reference.token_divergence(exact, made[1].double(), vocab_topk=vocab_topk).sum()
    tolerance = 1e-6 if made[0].dtype == torch.float32 else 1e-2  # bf16: the gradient is rounded
    assert_parity("gradient", run(), torch.autograd.grad(truth, exact)[0], tolerance)
    time(benchmark, run)


def test_linear_token_scores(benchmark, models):
    ids = torch.arange(ROWS, device=DEVICE)

    def run():
        return linear_token_scores(*models, ids, **BACKEND)

    truth = reference.token_scores(*projected(models), ids)
    assert_parity("scores", torch.stack(run()), torch.stack(truth), 1e-4)
    time(benchmark, run)


def test_linear_token_logprobs(benchmark, models):
    ids = torch.arange(ROWS, device=DEVICE)

    def run():
        return linear_token_logprobs(*models[:2], ids, **BACKEND)

    truth = reference.token_scores(*projected(models), ids)
    assert_parity("logprob", run().logprob, truth.student_logprob, 1e-4)
    time(benchmark, run)


def test_linear_token_divergence_forward_and_backward(benchmark, models):
    rows = torch.arange(0, ROWS, 16, device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in models[:2]]

    def run():
        total = linear_token_divergence(*models, rows=rows, **BACKEND).sum()
        return total, *torch.autograd.grad(total, leaves)

    exact = [tensor.detach().double().requires_grad_() for tensor in models]
    truth = reference.token_divergence(*(logits[rows] for logits in projected(exact))).sum()
    total, *grads = run()
    assert_parity("divergence", total, truth, 1e-4)
    tolerance = 1e-5 if models[0].dtype == torch.float32 else 5e-2  # bf16: the gradients are rounded
    for grad, expected in zip(grads, torch.autograd.grad(truth, exact[:2]), strict=True):
        assert_parity("gradient", grad, expected, tolerance)
    time(benchmark, run)
