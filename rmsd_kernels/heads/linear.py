"""The same functions from hidden states: logits exist for one chunk of rows at a time and never as a whole.

logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), then temperature. Hidden states are
(N, H) or (B, L, H), weights (V, H). A chunk's logits are fp32 whatever the inputs' dtype: rounding them to bf16
before the softmax is where other implementations lose the gradient's accuracy.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_head, check_heads, check_ids, check_rows, check_workspace
from ..dispatch import divergence_and_stats, gradient_of_rows, scores_of_rows
from ..options import Options, complete_options
from ..reference import TokenScores
from .merge import ShardScores, merged_scores, shard_scores
from .projection import (
    Models,
    add_weight_gradient,
    backproject,
    column_tile,
    default_workspace_mb,
    differentiable_once,
    no_rows,
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

    The other options, what is returned and what is raised are those of `token_scores`.

    A head that is the very same tensor for both models is read once a chunk for both.
    """
    models = Models(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    models = _checked(models, workspace_mb)
    options = complete_options(
        "linear_token_scores",
        student_hidden,
        len(student_weight),
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    check_ids(sampled_ids, student_hidden.shape[:-1], student_hidden.device, options.vocab_size)
    return _scores_in_tiles(models.flat(), sampled_ids, workspace_mb, options)


def _checked(models: Models, workspace_mb: float | None) -> Models:
    heads = models._asdict()
    del heads["shared"]
    check_heads(**heads)
    check_workspace(workspace_mb)
    same = models.teacher_weight is models.student_weight and models.teacher_bias is models.student_bias
    return models._replace(shared=same)


def _scores_in_tiles(models: Models, sampled_ids: Tensor, workspace_mb: float | None, options: Options) -> TokenScores:
    """Some rows and some columns at a time."""
    num_rows, width, ids = len(models.student_hidden), len(models.student_weight), sampled_ids.flatten().long()
    workspace_mb = workspace_mb or default_workspace_mb(models.student_hidden.device.type)
    # A jsd's terms need both distributions normalised, so its rows stay whole.
    tile = width if options.divergence == "jsd" else column_tile(num_rows, models.count, width, workspace_mb)
    parts = row_chunks(num_rows, models.count * tile, workspace_mb)
    workspace = workspace_for(models.student_hidden, parts, models.count, tile)
    if tile < width:
        scores = _merged_tiles(models, tile, parts, workspace, ids, options)
    else:
        chunks = [scores_of_rows(*models.logits(part, workspace), ids[part], options) for part in parts]
        scores = map(torch.cat, zip(*chunks, strict=True))
    return TokenScores(*(score.view(sampled_ids.shape) for score in scores))


def _merged_tiles(models: Models, tile_width: int, parts: list[slice], workspace, flat_ids: Tensor, options: Options):
    """Tiles of the vocabulary are merged as the shards of a split one are (merge.py)."""
    found, owners = [], []
    for start in range(0, options.vocab_size, tile_width):
        tile = slice(start, min(start + tile_width, options.vocab_size))
        columns = models.columns(tile)
        room = None if workspace is None else workspace[:, : tile.stop - start]
        local_ids = (flat_ids - start).clamp(0, tile.stop - start - 1)
        chunks = [shard_scores(*columns.logits(part, room), local_ids[part], options) for part in parts]
        found.append(ShardScores(*map(torch.cat, zip(*chunks, strict=True))))
        owners.append((flat_ids >= start) & (flat_ids < tile.stop))
    shards = ShardScores(*(torch.stack(tiles).double() for tiles in zip(*found, strict=True)))
    merged = merged_scores(shards, torch.stack(owners), options.divergence)
    return (score.float() for score in merged)


class TokenLogprobs(NamedTuple):
    """What one model alone says of each token: of `sampled_ids`' shape, fp32, in nats."""

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
    recorded it is all that the criterion "logprob_gap" needs; the divergence needs both models' rows. Its options and
    what it raises are those of `linear_token_scores`."""
    check_head("", hidden, weight, bias)
    check_workspace(workspace_mb)
    options = complete_options(
        "linear_token_logprobs",
        hidden,
        len(weight),
        temperature=temperature,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    check_ids(sampled_ids, hidden.shape[:-1], hidden.device, options.vocab_size)
    scores = _scores_in_tiles(Models(hidden, weight, bias).flat(), sampled_ids, workspace_mb, options)
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
        (R,) fp32 (fp64 for fp64 inputs) in nats, differentiable once in `student_hidden`, `student_weight` and
        `student_bias`. What is raised is as in `token_divergence`; here no backend has a second derivative.
    """
    models = Models(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    models = _checked(models, workspace_mb)
    options = complete_options(
        "linear_token_divergence",
        student_hidden,
        len(student_weight),
        divergence=divergence,
        beta=beta,
        vocab_topk=vocab_topk,
        tail=tail,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    models = models.flat()
    num_rows = len(models.student_hidden)
    if rows is None:
        rows = torch.arange(num_rows, device=student_hidden.device)
    check_rows(rows, num_rows, student_hidden.device)
    if not rows.numel() or not num_rows:
        return no_rows(rows, models.student_hidden, student_weight, student_bias)
    if options.vocab_size < len(student_weight):  # what lies behind it is padding that may hold anything
        models = models.columns(slice(options.vocab_size))
    workspace_mb = workspace_mb or default_workspace_mb(student_hidden.device.type)
    return _LinearDivergence.apply(*models.rows(rows.clamp_min(0)), rows >= 0, workspace_mb, options)


class _LinearDivergence(torch.autograd.Function):
    """Divergence of R gathered rows in chunks. The backward uses the logits again where they are few, as a sequence's
    kept rows are, and else projects each chunk again instead of keeping (R, V)."""

    @staticmethod
    def forward(ctx, *arguments):
        *models, live, workspace_mb, options = arguments
        models = Models(*models)
        num_rows, width = len(models.student_hidden), len(models.student_weight)
        # The workspace stays, full as the scores left it, so what is held beside it is a third of it at most: the
        # gradient by a chunk's logits (a quarter), or that and the logits of both models from forward to backward.
        ctx.chunks = row_chunks(num_rows, 4 * width, workspace_mb)
        keeps = any(ctx.needs_input_grad) and len(row_chunks(num_rows, 3 * 3 * width, workspace_mb)) == 1
        ctx.options, ctx.shared = options, models.shared
        result, stats = [], []
        workspace = None if keeps else workspace_for(models.student_hidden, ctx.chunks, 2, width)
        for part in ctx.chunks:
            logits = models.logits(part, workspace)
            of_chunk, of_backward = divergence_and_stats(*logits, options)
            result.append(of_chunk)
            stats.append(of_backward)
        kept, result = logits if keeps else (), torch.cat(result)
        # The torch backend has none.
        stats = torch.cat(stats) if stats[0] is not None else None
        ctx.save_for_backward(*models[:6], live & result.isfinite(), stats, *kept)
        return result.masked_fill(~live, 0.0)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_divergence):
        *tensors, live, stats = ctx.saved_tensors[:8]
        models, kept = Models(*tensors, shared=ctx.shared), ctx.saved_tensors[8:]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight, hidden = models.student_weight, models.student_hidden
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        grad_divergence = grad_divergence.masked_fill(~live, 0.0)
        workspace = None if kept else workspace_for(hidden, ctx.chunks, 2, len(weight))
        with torch.autocast(weight.device.type, enabled=False):
            for part in ctx.chunks:
                logits = kept or models.logits(part, workspace)
                grad_logits = gradient_of_rows(
                    grad_divergence[part], *logits, None if stats is None else stats[part], ctx.options
                )
                if needs_hidden:
                    grad_hidden[part] = backproject(grad_logits, weight)
                if needs_weight:
                    # One chunk's product is the gradient; several are summed in fp32.
                    dtype = weight.dtype if len(ctx.chunks) == 1 else grad_logits.dtype
                    grad_weight = add_weight_gradient(grad_weight, grad_logits, hidden[part], live[part], dtype)
                if needs_bias:
                    grad_bias = grad_logits.sum(0) if grad_bias is None else grad_bias.add_(grad_logits.sum(0))
                del grad_logits  # before the next chunk makes its own
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(models.student_bias.dtype) if needs_bias else None,
            *(None,) * 7,
        )
