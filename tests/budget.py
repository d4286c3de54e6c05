"""The error budget of docs/kernels.md, "Accuracy", and what the kernels' tests measure with it.

Truth is `reference.py` in fp64 on the fp64 upcast of the very inputs that the kernel gets, so rounding the inputs is
nobody's error. Plain torch in the same dtype is `reference.py` on those inputs with a row's log-sum-exp taken off its
logits as they are: scores in fp32, gradients rounded to the logits' dtype by autograd. That is the strictest reading
for fp16 and bf16: log_softmax in bf16 itself is a thousand times less accurate. It runs on the kernel's device: a GPU's
exponential is good to 2e-7, and not to half a unit in the last place. Rows with an offset are held to more
(`stable=True`): to `reference.py` as it is, which takes the largest logit off first, and which tests/test_reference.py
holds to torch.log_softmax; so is the backend `torch`, which is that file.

A kernel's largest error over a tensor may be twice plain torch's largest, plus 1e-6. NaN and infinities must be where
the truth has them.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor

import rmsd_kernels as rk
from rmsd_kernels import dispatch, reference
from rmsd_kernels.options import Options, complete_options

DIVERGENCES = reference.DIVERGENCES
TAILS = (None, *reference.TAILS)  # None: the whole vocabulary
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LINEAR_ONLY = {"logit_scale", "softcap"}  # options that the functions from logits do not have


def assert_within_budget(got: Tensor, plain: Tensor, truth: Tensor, what: str, rounding: float = 0.0) -> None:
    """`rounding` is the least error to credit plain torch with; see tests/test_fuzz.py."""
    got, plain, truth = (tensor.detach().cpu().double() for tensor in (got, plain, truth))
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    for kind in ("isnan", "isposinf", "isneginf"):
        have, want = getattr(torch, kind)(got), getattr(torch, kind)(truth)
        assert torch.equal(have, want), f"{what}: {kind} at {have.nonzero().tolist()}, not {want.nonzero().tolist()}"
    finite = truth.isfinite()
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    plain_errors = (plain - truth)[finite & plain.isfinite()].abs()
    plain_error = max(rounding, plain_errors.max().item() if plain_errors.numel() else 0.0)
    assert error <= 2 * plain_error + 1e-6, f"{what}: off by {error:.3g}, plain torch by {plain_error:.3g}"


def rounding_of(truth: Tensor, dtype: torch.dtype) -> float:
    """A unit in the last place of the largest finite entry: the error of one row that plain torch rounds with luck."""
    finite = truth.detach()[truth.isfinite()].abs()
    return finite.max().item() * torch.finfo(dtype).eps if finite.numel() else 0.0


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _options(backend: str, logits: Tensor, options: dict) -> Options:
    """Of the layer below the public functions, where logits too may have a scale and a softcap."""
    return complete_options("a test", logits, logits.shape[-1], **options, backend=backend)


def _scores(backend, student, teacher, ids, **options) -> rk.TokenScores:
    if not LINEAR_ONLY & options.keys():
        return rk.token_scores(student, teacher, ids, backend=backend, **options)
    return dispatch.scores_of_rows(student, teacher, ids, _options(backend, student, options))


def plain_torch(stable: bool):
    """A context in which `reference.py` is plain torch."""
    if stable:
        return contextlib.nullcontext()
    return mock.patch.object(reference, "row_peaks", lambda logits: logits.new_zeros(()).expand(*logits.shape[:-1], 1))


def check_scores(
    backend, student, teacher, ids, *, device="cpu", allow_rounding=0.0, stable=False, **options
) -> rk.TokenScores:
    """Holds every score of `backend` to the budget; inputs are made on the CPU."""
    got = _scores(backend, student.to(device), teacher.to(device), ids.to(device), **options)
    with plain_torch(stable or backend == "torch"):
        plain = _scores("torch", student.to(device), teacher.to(device), ids.to(device), **options)
    truth = reference.token_scores(flat(student.double()), flat(teacher.double()), ids.reshape(-1), **options)
    for name in rk.TokenScores._fields:
        have, want = getattr(got, name), getattr(truth, name).view(ids.shape)
        assert have.dtype == torch.float32
        rounding = rounding_of(want, torch.float32) + allow_rounding if allow_rounding else 0.0
        assert_within_budget(have, getattr(plain, name), want, name, rounding)
    return got


def _divergence(backend, student, teacher, rows, **options) -> tuple[Tensor, Tensor]:
    """(divergence, gradient by the student's logits), each row's divergence weighing something else."""
    student = student.detach().requires_grad_()
    if not LINEAR_ONLY & options.keys():
        result = rk.token_divergence(student, teacher, rows=rows, backend=backend, **options)
    else:
        result = dispatch.divergence_of_rows(student, teacher, rows, _options(backend, student, options))
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device).view_as(result)
    (grad,) = torch.autograd.grad(result, student, weights)
    return result, grad


def check_divergence(
    backend, student, teacher, *, rows=None, device="cpu", allow_rounding=0.0, stable=False, **options
):
    """Holds the divergence and its gradient to the budget; returns both."""
    on_device = [None if tensor is None else tensor.to(device) for tensor in (student, teacher, rows)]
    got, got_grad = _divergence(backend, *on_device, **options)
    with plain_torch(stable or backend == "torch"):
        plain, plain_grad = _divergence("torch", *on_device, **options)
    truth, truth_grad = _divergence("torch", student.double(), teacher.double(), rows, **options)
    assert got.dtype == torch.float32
    assert got_grad.dtype == student.dtype
    rounding = rounding_of(truth, torch.float32) + allow_rounding if allow_rounding else 0.0
    assert_within_budget(got, plain, truth, "divergence", rounding)
    rounding = rounding_of(truth_grad, student.dtype) + allow_rounding if allow_rounding else 0.0
    assert_within_budget(got_grad, plain_grad, truth_grad, "gradient", rounding)
    return got, got_grad
