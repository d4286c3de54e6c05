"""One training step as functions of tensors: score, keep, train. The trainer only wires these to models."""

import torch
from torch import Tensor

from rmsd_kernels import TokenScores

from .loss import LinearRMSDLoss
from .modeling import OutputHead


def score(
    loss: LinearRMSDLoss,
    student_hidden: Tensor,  # (B, L, H)
    student_head: OutputHead,
    teacher_hidden: Tensor,  # (B, L, H')
    teacher_head: OutputHead,
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool
) -> tuple[TokenScores, Tensor]:
    """TokenScores of (B, L) and candidates (B, T), -1 for none."""
    return loss.candidates(
        *_heads(student_hidden, student_head, teacher_hidden, teacher_head),
        completion_ids, completion_mask, **_head_options(student_head, teacher_head),
    )  # fmt: skip


def train_part(keep: Tensor) -> tuple[Tensor, int]:
    """What of a batch reaches the student's forward and backward: the sequences that keep a token, (B',) int64 on the
    host, and the length up to the last kept token. No other token can have a gradient: attention is causal.

    Where nothing is kept it is one token, whose loss is 0 with zero gradients: other processes may have something to
    train on, and wait for this one in every layer's forward and backward."""
    if not keep.any():
        return torch.zeros(1, dtype=torch.int64), 1
    return keep.any(1).nonzero().squeeze(1), int(keep.any(0).nonzero().max()) + 1


def train_loss(
    loss: LinearRMSDLoss,
    student_hidden: Tensor,  # (B, L, H), differentiable
    student_head: OutputHead,
    teacher_hidden: Tensor,  # (B, L, H')
    teacher_head: OutputHead,
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool
    keep: Tensor,  # (B, L) bool, on the host
    num_sequences: Tensor | float,
) -> Tensor:
    """Scalar: this part's share of the loss of the whole batch, in which `num_sequences` sequences keep a token."""
    return loss(
        *_heads(student_hidden, student_head, teacher_hidden, teacher_head),
        completion_ids, completion_mask, keep, num_sequences=num_sequences,
        **_head_options(student_head, teacher_head),
    )  # fmt: skip


def _heads(student_hidden, student_head, teacher_hidden, teacher_head):
    # Under autocast a decoder may return another dtype than its head's weight has.
    return (
        student_hidden.to(student_head.weight.dtype), student_head.weight,
        teacher_hidden.to(teacher_head.weight.dtype), teacher_head.weight,
    )  # fmt: skip


def _head_options(student_head: OutputHead, teacher_head: OutputHead) -> dict:
    return dict(student_bias=student_head.bias, teacher_bias=teacher_head.bias, **student_head.transform)
