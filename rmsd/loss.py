"""The drop-in losses: logits, or hidden states and head weights, in; a scalar out."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from rmsd_kernels import (
    TokenScores,
    linear_token_divergence,
    linear_token_scores,
    scores_and_candidates,
    select_tokens,
    token_divergence,
    token_scores,
)
from rmsd_kernels.checks import check_ids, check_mask, check_options, check_selection

from .criteria import FUSED, check_criterion, contrast_at, scored_by

log = logging.getLogger("rmsd")


@functools.cache
def _warn_of_dropped_mass() -> None:
    log.warning(
        "tail='drop' with reverse_kl over the vocab_topk largest logits is no divergence: where student and teacher "
        "agree its gradient still moves mass out of those entries, and nothing moves it back. Take tail='bucket'."
    )


class RMSDLoss(nn.Module):
    """Divergence from the teacher on the few tokens that matter.

    Candidates are the `num_candidates` positions with the largest criterion; `keep`, a judge's answer, says which of
    them bear on the wanted behaviour, and without one the `num_kept` largest are kept. The loss is the mean divergence
    over a sequence's kept tokens, then the mean over the sequences that kept any; 0 with zero gradients where none did.

    Args:
        num_candidates, num_kept: T and S of the method.
        criterion: "logprob_gap", "divergence", "entropy_gap", or one of rmsd.criteria; a token must exceed `threshold`.
        divergence, beta, vocab_topk, tail, temperature, backend: as in `rmsd_kernels.token_divergence`.

    `nonfinite_rows` counts, on the device, the kept rows whose divergence was not finite and which were left out.

    Source: "Bringing Capabilities in Distribution via Relevance-Masked Self-Distillation" (Applied Compute, 2026).
    """

    nonfinite_rows: Tensor

    def __init__(
        self,
        *,
        num_candidates: int = 20,
        num_kept: int = 5,
        criterion: str = "logprob_gap",
        threshold: float = 0.0,
        divergence: str = "reverse_kl",
        beta: float = 0.5,
        vocab_topk: int | None = 500,
        tail: str = "bucket",
        temperature: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        check_criterion(criterion)
        check_selection(num_tokens=num_candidates, threshold=threshold, name="num_candidates")
        check_selection(num_tokens=num_kept, threshold=threshold, name="num_kept")
        options: dict[str, Any] = dict(divergence=divergence, beta=beta, temperature=temperature)
        check_options(**options, teacher_temperature=None, vocab_size=None, width=1, vocab_topk=vocab_topk, tail=tail)
        if tail == "drop" and vocab_topk is not None:
            _warn_of_dropped_mass()
        self.num_candidates, self.num_kept = num_candidates, min(num_kept, num_candidates)
        self.criterion, self.threshold, self.temperature = criterion, threshold, temperature
        self.score_options = dict(**options, backend=backend)
        self.divergence_options = dict(**options, backend=backend, vocab_topk=vocab_topk, tail=tail)
        self.register_buffer("nonfinite_rows", torch.zeros((), dtype=torch.int64), persistent=False)

    def candidates(
        self,
        student_logits: Tensor,  # (B, L, V)
        teacher_logits: Tensor,  # (B, L, V)
        sampled_ids: Tensor,  # (B, L) int64
        completion_mask: Tensor,  # (B, L) bool
    ) -> tuple[TokenScores, Tensor]:
        """TokenScores of (B, L) and the candidates' positions, (B, num_candidates) int64, -1 where fewer qualify."""
        return self._select(student_logits, teacher_logits, sampled_ids, completion_mask, self.num_candidates)

    def contrast(
        self,
        student_logits: Tensor,  # (B, L, V)
        teacher_logits: Tensor,  # (B, L, V)
        contrast_logits: Tensor,  # (B, L, V): the teacher's, told something else in the same form
        sampled_ids: Tensor,  # (B, L) int64
        candidates: Tensor,  # (B, T) int64, -1 for none
    ) -> Tensor:
        """(B, T) fp32, nats by which each candidate hangs on what the context says; NaN where there is none. One that
        exceeds a floor, 0.5 or more, is relevant (ContrastJudge)."""
        row = torch.arange(candidates.shape[0], device=candidates.device).unsqueeze(1)
        at = row, candidates.clamp_min(0)
        student, teacher, contrast = (x[at].flatten(0, 1) for x in (student_logits, teacher_logits, contrast_logits))
        nats = contrast_at(student, teacher, contrast, sampled_ids[at].flatten(), self.temperature)
        return nats.view(candidates.shape).masked_fill(candidates < 0, torch.nan)

    def forward(
        self,
        student_logits: Tensor,  # (B, L, V), differentiable
        teacher_logits: Tensor,  # (B, L, V)
        sampled_ids: Tensor,  # (B, L) int64
        completion_mask: Tensor,  # (B, L) bool
        keep: Tensor | None = None,  # (B, L) bool
        *,
        num_sequences: Tensor | float | None = None,
        weights: Tensor | None = None,  # (B, L) floating
    ) -> Tensor:
        """Scalar loss, fp32. `num_sequences` replaces the number of this batch's sequences that kept a token: give the
        number in the whole batch when this is one of several micro-batches or ranks, and add the results. `weights` are
        factors on the tokens' divergences; nothing is divided by their sum."""
        shape = sampled_ids.shape
        _check_inputs(sampled_ids, completion_mask, student_logits)
        if keep is None:
            _, index = self._select(student_logits, teacher_logits, sampled_ids, completion_mask, self.num_kept)
            rows = _rows_at(index, shape[1])
        else:
            rows = _rows_where(keep, completion_mask)
            _check_kept_ids(sampled_ids, student_logits, student_logits.shape[-1], keep, completion_mask)
        divergence = token_divergence(student_logits, teacher_logits, rows=rows, **self.divergence_options)
        return self._mean(divergence, rows, shape, num_sequences, weights)

    def _select(self, student_logits, teacher_logits, sampled_ids, completion_mask, num_tokens):
        _check_inputs(sampled_ids, completion_mask, student_logits)
        if self.criterion not in FUSED:
            ids = sampled_ids.where(completion_mask, 0)
            scores = token_scores(student_logits, teacher_logits, ids, **self.score_options)
            return self._selected(scores, completion_mask, num_tokens)
        return scores_and_candidates(
            student_logits,
            teacher_logits,
            sampled_ids,
            completion_mask,
            num_candidates=num_tokens,
            criterion=self.criterion,
            threshold=self.threshold,
            **self.score_options,
        )

    def _selected(self, scores, completion_mask, num_tokens):
        score = scored_by(self.criterion, scores, completion_mask)
        return scores, select_tokens(score, completion_mask, num_tokens=num_tokens, threshold=self.threshold)

    def _mean(self, divergence: Tensor, rows: Tensor, shape: torch.Size, num_sequences, weights=None) -> Tensor:
        """(R,) divergences at (R,) rows of the flattened (B, L) axis -> the loss."""
        if weights is not None:
            if weights.shape != shape:
                raise ValueError(f"weights must be {tuple(shape)}, one a token, not {tuple(weights.shape)}")
            divergence = divergence * weights.detach().flatten()[rows.clamp_min(0)]
        finite = (rows >= 0) & divergence.detach().isfinite()
        if self.nonfinite_rows.device != rows.device:  # the module has no weights that would have been moved
            self.nonfinite_rows = self.nonfinite_rows.to(rows.device)
        self.nonfinite_rows += ((rows >= 0) & ~finite).sum()
        # Chosen, not multiplied: 0 * inf is NaN. Rows left out go to a slot of their own behind the last.
        slots = torch.where(finite, rows, shape.numel())
        dense = divergence.new_zeros(shape.numel() + 1).scatter(0, slots, torch.where(finite, divergence, 0.0))
        kept = torch.zeros_like(dense, dtype=torch.bool).scatter(0, slots, finite)
        dense, counts = dense[:-1].view(shape), kept[:-1].view(shape).sum(1)
        if num_sequences is None:
            num_sequences = (counts > 0).sum()
        # Where nothing was kept anywhere the loss is 0.
        num_sequences = num_sequences.clamp_min(1) if isinstance(num_sequences, Tensor) else max(num_sequences, 1)
        return (dense.sum(1) / counts.clamp_min(1)).sum() / num_sequences


class LinearRMSDLoss(RMSDLoss):
    """`RMSDLoss` from hidden states and head weights: the logits of all tokens never exist together, and only the
    kept rows reach the head's backward. Takes the same options."""

    def candidates(  # type: ignore[override]  # hidden states and heads where RMSDLoss takes logits
        self,
        student_hidden: Tensor,  # (B, L, H)
        student_weight: Tensor,  # (V, H)
        teacher_hidden: Tensor,  # (B, L, H')
        teacher_weight: Tensor,  # (V, H')
        sampled_ids: Tensor,  # (B, L) int64
        completion_mask: Tensor,  # (B, L) bool
        **head: Any,
    ) -> tuple[TokenScores, Tensor]:
        """As RMSDLoss.candidates; `head` may hold student_bias, teacher_bias, logit_scale, softcap, workspace_mb."""
        heads = (student_hidden, student_weight, teacher_hidden, teacher_weight)
        return self._select_linear(heads, sampled_ids, completion_mask, self.num_candidates, head)

    def contrast(  # type: ignore[override]
        self,
        student_hidden: Tensor,  # (B, L, H)
        student_weight: Tensor,  # (V, H)
        teacher_hidden: Tensor,  # (B, L, H')
        teacher_weight: Tensor,  # (V, H')
        contrast_hidden: Tensor,  # (B, L, H'): the teacher's, told something else in the same form
        sampled_ids: Tensor,  # (B, L) int64
        candidates: Tensor,  # (B, T) int64, -1 for none
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> Tensor:
        """As RMSDLoss.contrast. Only the candidates' rows are projected, a sequence at a time."""

        def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float() * logit_scale
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        nats = torch.full(candidates.shape, torch.nan, device=candidates.device)
        with torch.no_grad():
            for b, index in enumerate(candidates):
                at = index.clamp_min(0)
                logits = (
                    projected(student_hidden[b, at], student_weight, student_bias),
                    projected(teacher_hidden[b, at], teacher_weight, teacher_bias),
                    projected(contrast_hidden[b, at], teacher_weight, teacher_bias),
                )
                nats[b] = contrast_at(*logits, sampled_ids[b, at], self.temperature)
        return nats.masked_fill(candidates < 0, torch.nan)

    def forward(  # type: ignore[override]
        self,
        student_hidden: Tensor,  # (B, L, H), differentiable
        student_weight: Tensor,  # (V, H), differentiable
        teacher_hidden: Tensor,  # (B, L, H')
        teacher_weight: Tensor,  # (V, H')
        sampled_ids: Tensor,  # (B, L) int64
        completion_mask: Tensor,  # (B, L) bool
        keep: Tensor | None = None,  # (B, L) bool
        *,
        num_sequences: Tensor | float | None = None,
        weights: Tensor | None = None,  # (B, L) floating
        **head: Any,
    ) -> Tensor:
        """As RMSDLoss.forward; `head` may hold student_bias, teacher_bias, logit_scale, softcap, workspace_mb."""
        heads = (student_hidden, student_weight, teacher_hidden, teacher_weight)
        shape = sampled_ids.shape
        _check_inputs(sampled_ids, completion_mask, student_hidden)
        if keep is None:
            _, index = self._select_linear(heads, sampled_ids, completion_mask, self.num_kept, head)
            rows = _rows_at(index, shape[1])
        else:
            rows = _rows_where(keep, completion_mask)
            _check_kept_ids(sampled_ids, student_hidden, student_weight.shape[0], keep, completion_mask)
        divergence = linear_token_divergence(
            student_hidden, student_weight, teacher_hidden, teacher_weight, rows=rows, **head, **self.divergence_options
        )
        return self._mean(divergence, rows, shape, num_sequences, weights)

    def _select_linear(self, heads, sampled_ids, completion_mask, num_tokens, head):
        _check_inputs(sampled_ids, completion_mask, heads[0])
        scores = linear_token_scores(*heads, sampled_ids.where(completion_mask, 0), **head, **self.score_options)
        return self._selected(scores, completion_mask, num_tokens)


def _rows_at(index: Tensor, length: int) -> Tensor:
    """(B, S) positions, -1 for none -> (B*S,) rows of the flattened (B, L) axis, -1 for none."""
    first = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * length
    return torch.where(index >= 0, index + first, -1).flatten()


def _rows_where(keep: Tensor, completion_mask: Tensor) -> Tensor:
    """(B, L) bool -> (R,) rows of the flattened axis, -1 for none.

    A judge answers on the host, so `keep` may stay on the CPU: then R is the number kept, or 1. On a GPU R is B*L,
    since counting would sync. The kernels skip rows of -1; a head is multiplied with all of them."""
    check_mask(keep, completion_mask.shape, getattr(keep, "device", completion_mask.device), "keep")
    if keep.device.type == "cpu":
        moves = keep.device != completion_mask.device
        if moves and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # A replay would copy from this call's memory, freed by then.
            raise ValueError(f"keep must be on {completion_mask.device} where a CUDA graph is captured, not on the CPU")
        rows = keep.flatten().nonzero().squeeze(1)
        if not rows.numel() and keep.numel():
            rows = rows.new_tensor([-1])  # the head still gets a gradient, of zeros, which other processes wait for
        rows = rows.to(completion_mask.device, non_blocking=True)
    else:
        rows = torch.where(keep.flatten(), torch.arange(keep.numel(), device=keep.device), -1)
    return torch.where(completion_mask.flatten()[rows.clamp_min(0)], rows, -1) if rows.numel() else rows


def _check_inputs(sampled_ids: Tensor, completion_mask: Tensor, of: Tensor) -> None:
    """`of`: logits or hidden states of (B, L, ...). Where they or the ids are not shifted, the mask is not to blame."""
    if of.ndim == 3 and sampled_ids.shape != of.shape[:2]:
        raise ValueError(
            f"sampled_ids must be {tuple(of.shape[:2])}, one id a row, not {tuple(sampled_ids.shape)}: row i is the "
            "distribution that id i was drawn from"
        )
    check_mask(completion_mask, sampled_ids.shape, sampled_ids.device, "completion_mask")


def _check_kept_ids(sampled_ids: Tensor, of: Tensor, limit: int, keep: Tensor, completion_mask: Tensor) -> None:
    """`of`: logits or hidden states of (B, L, ...). Ids are looked at on a CPU alone, where the masks are too."""
    kept = keep & completion_mask if sampled_ids.device.type == "cpu" else None
    check_ids(sampled_ids, of.shape[:2], of.device, limit, kept)
