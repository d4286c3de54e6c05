"""The linear forms where something is wrong with a row or unusual around the call: NaN, padding, inference mode,
autocast."""

import threading

import pytest
import torch
from test_linear import N, inputs, to

from rmsd_kernels import linear_token_divergence, linear_token_scores
from rmsd_kernels.heads import projection


@pytest.mark.parametrize("workspace_mb", [None, 0.002], ids=["one chunk", "chunks"])
def test_a_hidden_state_that_is_not_finite_leaves_the_head_s_gradient_alone(backend, device, workspace_mb):
    """It has no share of the loss; nor has row 0 where rows of -1 stand in for it."""
    made = to(inputs(bias=False), device)
    made["student_weight"].requires_grad_()

    def head_gradient(rows, nan=None):
        hidden = made["student_hidden"].clone()
        if nan is not None:
            hidden[nan] = torch.nan
        rows = torch.tensor(rows, device=device)
        options = dict(rows=rows, workspace_mb=workspace_mb, backend=backend)
        result = linear_token_divergence(hidden.requires_grad_(), *list(made.values())[1:], **options)
        finite = torch.where(result.isfinite(), result, 0.0).sum()
        return torch.autograd.grad(finite, [hidden, made["student_weight"]])

    for rows, nan in (([2, -1, 5], 0), ([2, 4, 5], 4)):
        hidden, weight = head_gradient(rows, nan)
        expected_hidden, expected_weight = head_gradient([2, 5])
        torch.testing.assert_close(hidden, expected_hidden)
        torch.testing.assert_close(weight, expected_weight)


def test_columns_behind_the_vocabulary_may_hold_anything(backend, device):
    made = to(inputs(), device)
    for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
        made[name][100:] = torch.nan
    names = ("student_hidden", "student_weight", "student_bias")
    leaves = [made[name].requires_grad_() for name in names]

    def gradients(vocab_size, **made):
        positional = [made.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
        result = linear_token_divergence(*positional, **made, vocab_size=vocab_size, backend=backend)
        return torch.autograd.grad(result.sum(), leaves)

    cut = {name: x[:100] if name.endswith(("weight", "bias")) else x for name, x in made.items()}
    for grad, expected in zip(gradients(100, **made), gradients(None, **cut), strict=True):
        torch.testing.assert_close(grad, expected)
        assert grad.isfinite().all() and grad.any()


def test_a_workspace_made_in_inference_mode_serves_later_calls(monkeypatch):
    monkeypatch.setattr(projection, "_per_thread", threading.local())
    made = inputs(bias=False)
    arguments = *made.values(), torch.zeros(N, dtype=torch.int64)
    with torch.inference_mode():
        expected = linear_token_scores(*arguments)
    torch.testing.assert_close(linear_token_scores(*arguments), expected)


@pytest.mark.parametrize("workspace_mb", [None, 0.002], ids=["one chunk", "chunks"])
def test_a_backward_under_autocast_is_the_same(workspace_mb):
    made = inputs(bias=False)
    leaves = [made[name].requires_grad_() for name in ("student_hidden", "student_weight")]
    gradients = []
    for autocast in (False, True):
        result = linear_token_divergence(*made.values(), workspace_mb=workspace_mb)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(result.sum(), leaves))
    assert all(map(torch.equal, *gradients))


def test_a_second_derivative_is_refused_and_not_left_out():
    made = inputs(bias=False)
    hidden = made["student_hidden"].requires_grad_()
    loss = linear_token_divergence(*made.values()).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + grad.square().sum()).backward()
