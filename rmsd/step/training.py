"""Train: what of a micro-batch reaches the student's forward and backward, and its share of the loss."""

import torch
from torch import Tensor

from ..answers.rollout import Rollouts
from ..answers.teacher import Teacher
from ..loss import LinearRMSDLoss
from ..models.heads import Reading, head_options
from ..models.hidden import by_length, row_lengths
from ..models.sharding import most_of_ranks
from ..models.transfer import to_device
from .judging import keep_mask
from .micro_batch import NO_PART, MicroBatch, TrainPart


def settle(batch: MicroBatch, teacher: Teacher, pad_id: int, one_forward: bool = False, unkept_kl: float = 0.0) -> None:
    """Fills in what training needs once the judge has answered: `keep`, `parts` (`train_parts`) and, where an engine
    scored, `teacher_hidden`; with `unkept_kl`, `untold_hidden`."""
    rollouts = batch.rollouts
    batch.keep = keep_mask(batch.kept, rollouts.completion_ids.shape)
    if batch.teacher_hidden is None:
        batch.teacher_hidden = teacher.kept_hidden(batch.teacher_prompt_ids, rollouts, pad_id, batch.keep)
    if unkept_kl:
        batch.untold_hidden = teacher.kept_hidden(batch.prompt_ids, rollouts, pad_id, batch.keep)
    prompt_lengths = list(map(len, batch.prompt_ids))
    batch.parts = train_parts(batch.keep, prompt_lengths, rollouts.completion_ids.device, one_forward)


def train_parts(
    keep: Tensor, prompt_lengths: list[int], device: torch.device, one_forward: bool = False
) -> list[TrainPart]:
    """What of a batch reaches the student's training forward and backward, from keep, (B, L) bool on the host: the
    sequences that keep a token, cut after the last one and, unless `one_forward`, parted by length. No other token can
    have a gradient: attention is causal."""
    if not keep.any():
        return [NO_PART]
    kept = keep.any(1).nonzero().squeeze(1)
    lengths = row_lengths(keep[kept])
    if one_forward:
        groups = [list(range(len(lengths)))]
    else:
        groups = by_length([prompt_lengths[i] for i in kept.tolist()], lengths, device)
    return [TrainPart(kept[group], keep[kept[group], : max(lengths[i] for i in group)]) for group in groups]


def same_number_of_parts(batches: list[MicroBatch], accelerator) -> None:
    """As many parts of each micro-batch on every rank: one with fewer waits for the others in forwards of its own."""
    most = most_of_ranks([len(batch.parts) for batch in batches], accelerator)
    for batch, count in zip(batches, most, strict=True):
        batch.parts += [NO_PART] * (count - len(batch.parts))


def part_of(batch: MicroBatch, part: TrainPart) -> tuple[Rollouts, Tensor]:
    """The answers of one part, and the teacher's hidden states of them."""
    length = part.keep.shape[1]
    sequences = to_device(part.sequences, batch.teacher_hidden.device)
    return batch.rollouts.of(part.sequences, length), batch.teacher_hidden[sequences, :length]


def unkept_of(keep: Tensor, completion_mask: Tensor) -> Tensor:
    """(B, L) bool, all on the host: tokens that the student wrote before its last kept one and that are not kept. Those
    after it have no forward in training."""
    return keep.flip(1).cumsum(1).flip(1).bool() & completion_mask & ~keep


def gap_weights(batch: MicroBatch, part: TrainPart, steepness: float | None) -> Tensor | None:
    """(B', L') in (0, 1): sigmoid(steepness * (log q(y) - log p(y))) of the written tokens. None for no weights."""
    if steepness is None:
        return None
    gap = batch.scores.teacher_logprob - batch.scores.student_logprob
    sequences = to_device(part.sequences, gap.device)
    return torch.sigmoid(steepness * gap[sequences, : part.keep.shape[1]]).nan_to_num(0.0)


def uncertain(batch: MicroBatch, part: TrainPart, above: float) -> Tensor:
    """(B', L') fp32: 1 where the teacher's entropy exceeds `above` nats, else 0."""
    entropy = batch.scores.teacher_entropy
    sequences = to_device(part.sequences, entropy.device)
    return (entropy[sequences, : part.keep.shape[1]] > above).float()


def train_loss(
    loss: LinearRMSDLoss,
    student: Reading,  # of B answers of L tokens, differentiable
    teacher: Reading,
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool
    keep: Tensor,  # (B, L) bool, on the host
    num_sequences: Tensor | float,
    weights: Tensor | None = None,  # (B, L) floating
) -> Tensor:
    """Scalar: these sequences' share of the loss of the whole step, in which `num_sequences` keep a token."""
    return loss(
        *student.linear,
        *teacher.linear,
        completion_ids,
        completion_mask,
        keep,
        num_sequences=num_sequences,
        weights=weights,
        **head_options(student, teacher),
    )
