"""One training step as functions of tensors: score, keep, train. The trainer only wires these to models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmsd_kernels import TokenScores, linear_token_scores, select_tokens

from ..loss import LinearRMSDLoss
from ..models.heads import OutputHead
from ..models.hidden import by_length, lengths_of


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


def widest_gaps(
    loss: LinearRMSDLoss,
    student_logprob: Tensor,  # (B, L) fp32
    teacher_logprob: Tensor,  # (B, L) fp32
    completion_mask: Tensor,  # (B, L) bool
) -> Tensor:
    """Candidates (B, T), -1 for none, by the criterion logprob_gap from log-probabilities alone."""
    gap = (teacher_logprob - student_logprob).abs()
    gap = gap.where(gap.isfinite(), torch.nan)  # never qualifies
    return select_tokens(gap, completion_mask, num_tokens=loss.num_candidates, threshold=loss.threshold)


def at_kept(tensor: Tensor, keep: Tensor) -> Tensor:
    """(B, L, ...) -> (R, ...), at the true entries of `keep`, (B, L) bool on the host."""
    return tensor[tuple(index.to(tensor.device) for index in keep.nonzero(as_tuple=True))]


@torch.no_grad()
def kept_scores(
    loss: LinearRMSDLoss,
    student_hidden: Tensor,  # (B, L, H)
    student_head: OutputHead,
    teacher_hidden: Tensor,  # (B, L, H')
    teacher_head: OutputHead,
    completion_ids: Tensor,  # (B, L) int64
    keep: Tensor,  # (B, L) bool, on the host
) -> TokenScores:
    """Of the kept tokens, (R,) each."""
    student_hidden, teacher_hidden, ids = (at_kept(x, keep) for x in (student_hidden, teacher_hidden, completion_ids))
    return linear_token_scores(
        *_heads(student_hidden, student_head, teacher_hidden, teacher_head),
        ids, **_head_options(student_head, teacher_head), **loss.score_options,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainPart:
    """Sequences that share a forward and backward of the student; both tensors on the host."""

    sequences: Tensor  # (B',) int64, of the batch's
    keep: Tensor  # (B', L') bool: theirs, up to the last kept token


# Trains on one token, with a loss of 0 and zero gradients. For a batch that keeps nothing, and for a process with fewer
# parts than another, which waits for it in every layer's forward and backward.
NO_PART = TrainPart(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))


def train_parts(
    keep: Tensor, prompt_lengths: list[int], device: torch.device, one_forward: bool = False
) -> list[TrainPart]:
    """What of a batch reaches the student's training forward and backward, from keep, (B, L) bool on the host: the
    sequences that keep a token, cut after the last one and, unless `one_forward`, parted by length. No other token can
    have a gradient: attention is causal."""
    if not keep.any():
        return [NO_PART]
    kept = keep.any(1).nonzero().squeeze(1)
    lengths = lengths_of(keep[kept])
    if one_forward:
        groups = [list(range(len(lengths)))]
    else:
        groups = by_length([prompt_lengths[i] for i in kept.tolist()], lengths, device)
    return [TrainPart(kept[group], keep[kept[group], : max(lengths[i] for i in group)]) for group in groups]


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
