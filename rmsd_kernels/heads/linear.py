"""The same functions from hidden states: logits exist for one chunk of rows at a time and never as a whole.

logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), then temperature. Hidden states are
(N, H) or (B, L, H), weights (V, H). A chunk's logits are fp32 whatever the inputs' dtype: rounding them to bf16
before the softmax is where other implementations lose the gradient's accuracy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..checks import check_head, check_heads, check_ids, check_options, check_rows, check_transform
from ..functional import _scores, divergence_of_rows, gradient_of_rows
from ..reference import TokenScores
from .partials import ShardScores, merged_scores, shard_scores
from .projection import (
    Heads,
    add_weight_gradient,
    backproject,
    column_tile,
    default_workspace_mb,
    no_rows,
    project,
    project_both,
    row_chunks,
    workspace_for,
)


def linear_token_scores(
    student_hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64
    student_weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H') | (B, L, H')
    teacher_weight: Tensor,  # (V, H')
    sampled_ids: Tensor,  # (N,) | (B, L)  int64
    *,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenScores:
    """`token_scores` of the logits that the hidden states project to, never holding (N, V).

    Args:
        logit_scale: factor on the projected logits (Cohere; 1 / logits_scaling for Granite).
        softcap: Gemma's final cap, applied after the scale; None for none.
        workspace_mb: room for one chunk's logits; None for 48 on a CPU and 1024 on a GPU.

    The other options are those of `token_scores`.

    A head that is the very same tensor for both models is read once a chunk for both.
    """
    check_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    check_transform(logit_scale, softcap, workspace_mb)
    width = student_weight.shape[0]
    check_options(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        vocab_size=vocab_size, width=width,
    )  # fmt: skip
    check_ids(sampled_ids, student_hidden.shape[:-1], student_hidden.device, vocab_size or width)
    backend = resolve_backend(backend, student_hidden, "linear_token_scores")
    options = dict(
        divergence=divergence, beta=beta, temperature=temperature, vocab_size=vocab_size or width,
        teacher_temperature=teacher_temperature or temperature, logit_scale=logit_scale, softcap=softcap,
        backend=backend,
    )  # fmt: skip
    student_hidden, teacher_hidden = student_hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)
    heads = Heads(student_weight, student_bias, teacher_weight, teacher_bias)
    shared = teacher_weight is student_weight and teacher_bias is student_bias

    def logits(part: slice, heads: Heads, workspace) -> tuple[Tensor, Tensor]:
        return project_both(student_hidden[part], teacher_hidden[part], heads, shared, workspace)

    return _scores_in_tiles(logits, heads, student_hidden, 2, workspace_mb, sampled_ids, options)


def _scores_in_tiles(logits, heads, hidden, models, workspace_mb, sampled_ids, options) -> TokenScores:
    """Scores of `logits(rows, heads, workspace)`, some rows and some columns at a time."""
    num_rows, width, ids = len(hidden), len(heads.student_weight), sampled_ids.flatten()
    workspace_mb = workspace_mb or default_workspace_mb(hidden.device.type)
    # A jsd's terms need both distributions normalised, so its rows stay whole.
    tile = width if options["divergence"] == "jsd" else column_tile(num_rows, models, width, workspace_mb)
    parts = row_chunks(num_rows, models * tile, workspace_mb)
    workspace = workspace_for(hidden, parts, models, tile)
    if tile < width:
        scores = _merged_tiles(logits, heads, tile, parts, workspace, ids, **options)
    else:
        chunks = [_scores(*logits(part, heads, workspace), ids[part], **options) for part in parts]
        scores = map(torch.cat, zip(*chunks, strict=True))
    return TokenScores(*(score.view(sampled_ids.shape) for score in scores))


def _merged_tiles(logits, heads, tile_width, parts, workspace, flat_ids, *, vocab_size, backend, **options):
    """Tiles of the vocabulary are merged as the shards of a split one are (partials.py)."""
    found, owners = [], []
    for start in range(0, vocab_size, tile_width):
        tile = slice(start, min(start + tile_width, vocab_size))
        columns = heads.columns(tile)
        room = None if workspace is None else workspace[:, : tile.stop - start]
        local_ids = (flat_ids - start).clamp(0, tile.stop - start - 1)
        chunks = [shard_scores(*logits(part, columns, room), local_ids[part], backend, options) for part in parts]
        found.append(ShardScores(*map(torch.cat, zip(*chunks, strict=True))))
        owners.append((flat_ids >= start) & (flat_ids < tile.stop))
    shards = ShardScores(*(torch.stack(tiles).double() for tiles in zip(*found, strict=True)))
    merged = merged_scores(shards, torch.stack(owners), options["divergence"])
    return (score.to(found[0].student_lse.dtype) for score in merged)


class TokenLogprobs(NamedTuple):
    """What one model alone says of each token; fp32."""

    logprob: Tensor  # of the sampled token
    lse: Tensor  # log-sum-exp of the scaled logits
    entropy: Tensor


def linear_token_logprobs(
    hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64
    weight: Tensor,  # (V, H)
    sampled_ids: Tensor,  # (N,) | (B, L)  int64
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """One model's side of `linear_token_scores`: half its projections. With the log-probabilities that a sampler
    recorded it is all that the criterion "logprob_gap" needs; the divergence needs both models' rows."""
    check_head("", hidden, weight, bias)
    check_transform(logit_scale, softcap, workspace_mb)
    width = weight.shape[0]
    check_options(
        divergence="reverse_kl", beta=0.5, temperature=temperature, teacher_temperature=None, vocab_size=vocab_size,
        width=width,
    )  # fmt: skip
    check_ids(sampled_ids, hidden.shape[:-1], hidden.device, vocab_size or width)
    options = dict(
        divergence="reverse_kl", beta=0.5, temperature=temperature, teacher_temperature=temperature,
        vocab_size=vocab_size or width, logit_scale=logit_scale, softcap=softcap,
        backend=resolve_backend(backend, hidden, "linear_token_logprobs"),
    )  # fmt: skip
    hidden = hidden.flatten(0, -2)

    def logits(part: slice, heads: Heads, workspace) -> tuple[Tensor, Tensor]:
        # The two-model scan with one row in both roles: it is in cache, and the projection is 20 times the scan.
        return (project(hidden[part], heads.student_weight, heads.student_bias, workspace),) * 2

    scores = _scores_in_tiles(logits, Heads(weight, bias, weight, bias), hidden, 1, workspace_mb, sampled_ids, options)
    return TokenLogprobs(scores.student_logprob, scores.student_lse, scores.student_entropy)


def linear_token_divergence(
    student_hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64
    student_weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H') | (B, L, H')
    teacher_weight: Tensor,  # (V, H')
    *,
    rows: Tensor | None = None,  # (R,) int64
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    vocab_topk: int | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`token_divergence` of the projected logits at `rows`; only those rows reach the head, forward and backward.

    Args:
        rows: int64 into the flattened leading axis, None for all; -1 gives 0. Rows not named get exactly zero gradient.

    The other options are those of `token_divergence` and `linear_token_scores`.

    Returns:
        (R,) fp32 (fp64 for fp64 inputs), differentiable in `student_hidden`, `student_weight` and `student_bias`.
    """
    check_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    check_transform(logit_scale, softcap, workspace_mb)
    width = student_weight.shape[0]
    check_options(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        vocab_size=vocab_size, width=width, vocab_topk=vocab_topk, tail=tail,
    )  # fmt: skip
    student_hidden, teacher_hidden = student_hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)
    if rows is None:
        rows = torch.arange(student_hidden.shape[0], device=student_hidden.device)
    check_rows(rows, student_hidden.shape[0], student_hidden.device)
    options = dict(
        divergence=divergence, beta=beta, vocab_topk=vocab_topk, tail=tail, temperature=temperature,
        teacher_temperature=teacher_temperature or temperature, vocab_size=vocab_size or width,
        logit_scale=logit_scale, softcap=softcap,
        backend=resolve_backend(backend, student_hidden, "linear_token_divergence"),
    )  # fmt: skip
    if not rows.numel() or not student_hidden.shape[0]:
        return no_rows(rows, student_hidden, student_weight, student_bias)
    shared = teacher_weight is student_weight and teacher_bias is student_bias
    if options["vocab_size"] < width:  # what lies behind it is padding that may hold anything
        heads = Heads(student_weight, student_bias, teacher_weight, teacher_bias).columns(slice(vocab_size))
        student_weight, student_bias, teacher_weight, teacher_bias = heads
    # Detached also for torch.compile, which refuses one tensor twice, as a head shared by both roles would be.
    return _LinearDivergence.apply(
        student_hidden[rows.clamp_min(0)], student_weight, student_bias,
        teacher_hidden.detach()[rows.clamp_min(0)], teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), rows >= 0, shared,
        workspace_mb or default_workspace_mb(student_hidden.device.type), options,
    )  # fmt: skip


class _LinearDivergence(torch.autograd.Function):
    """Divergence of R gathered rows in chunks. The backward uses the logits again where they are few, as a sequence's
    kept rows are, and else projects each chunk again instead of keeping (R, V)."""

    @staticmethod
    def forward(
        ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        live, shared, workspace_mb, options,
    ):  # fmt: skip
        heads = Heads(student_weight, student_bias, teacher_weight, teacher_bias)
        num_rows, width = student_hidden.shape[0], student_weight.shape[0]
        # The workspace stays, full as the scores left it, so what is held beside it is a third of it at most: the
        # gradient by a chunk's logits (a quarter), or that and the logits of both models from forward to backward.
        ctx.chunks = row_chunks(num_rows, 4 * width, workspace_mb)
        keeps = any(ctx.needs_input_grad) and len(row_chunks(num_rows, 3 * 3 * width, workspace_mb)) == 1
        ctx.options, ctx.shared = options, shared
        result = []
        workspace = None if keeps else workspace_for(student_hidden, ctx.chunks, 2, width)
        for part in ctx.chunks:
            logits = project_both(student_hidden[part], teacher_hidden[part], heads, shared, workspace)
            result.append(divergence_of_rows(*logits, None, **options))
        kept, result = logits if keeps else (), torch.cat(result)
        ctx.save_for_backward(student_hidden, teacher_hidden, live & result.isfinite(), *heads, *kept)
        return result.masked_fill(~live, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_divergence):
        student_hidden, teacher_hidden, live, *heads = ctx.saved_tensors
        heads, kept = Heads(*heads[:4]), heads[4:]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight = heads.student_weight
        grad_hidden = torch.zeros_like(student_hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        grad_divergence = grad_divergence.masked_fill(~live, 0.0)
        workspace = None if kept else workspace_for(student_hidden, ctx.chunks, 2, len(weight))
        with torch.autocast(weight.device.type, enabled=False):
            for part in ctx.chunks:
                logits = kept or project_both(student_hidden[part], teacher_hidden[part], heads, ctx.shared, workspace)
                grad_logits = gradient_of_rows(grad_divergence[part], *logits, **ctx.options)
                if needs_hidden:
                    grad_hidden[part] = backproject(grad_logits, weight)
                if needs_weight:
                    grad_weight = add_weight_gradient(grad_weight, grad_logits, student_hidden[part], live[part])
                if needs_bias:
                    grad_bias = grad_logits.sum(0) if grad_bias is None else grad_bias.add_(grad_logits.sum(0))
                del grad_logits  # before the next chunk makes its own
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(heads.student_bias.dtype) if needs_bias else None,
            *(None,) * 7,
        )
