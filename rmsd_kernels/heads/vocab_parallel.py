"""The linear functions where the output head's vocabulary is split over the ranks of a process group.

Rank i of P holds rows [start_i, start_i + V_i) of both heads, in rank order; shards may differ in size. Hidden states,
ids and options are the same on every rank, and so are the results, to the bit. No row of logits ever leaves its rank;
merge.py and topk.py say what does, and why it is enough:

    scores, divergence      one all-gather of 28 bytes a token from each rank (12 for a divergence); 56 and 24 in fp64
    a jsd                   a second of 4 bytes, and a second projection: it needs the whole row's log-sum-exps first
    vocab_topk=k            one of 32 + 8 min(k, largest V_i) bytes a row from each rank, for each chunk of rows
    backward                one of 16 bytes a row for each chunk (none with vocab_topk), and an all-reduce of the
                            hidden states' gradient, in fp32, where they need one

Each call first exchanges 32 bytes a rank: the shards' sizes, and whether the arguments are good everywhere, so that bad
ones raise on all ranks instead of leaving some to wait. With NCCL alone
a GPU's host waits there, once a call.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..options import Options
from ..reference import TokenScores
from . import merge, topk
from .merge import ShardScores
from .projection import Models, add_weight_gradient, backproject, differentiable_once, no_rows
from .shards import Shard, agree


def vocab_parallel_linear_token_scores(
    student_hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64, the same on every rank
    student_weight: Tensor,  # (V_i, H), this rank's shard
    teacher_hidden: Tensor,  # (N, H') | (B, L, H')
    teacher_weight: Tensor,  # (V_i, H')
    sampled_ids: Tensor,  # (N,) | (B, L)  int64 into the whole vocabulary
    *,
    group: "dist.ProcessGroup | None" = None,
    student_bias: Tensor | None = None,  # (V_i,)
    teacher_bias: Tensor | None = None,  # (V_i,)
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
    """`linear_token_scores` of the whole vocabulary, of which this rank holds a shard. Every rank must call it.

    Args:
        group: None for the default group; its ranks' order is the shards' order.
        vocab_size: real columns of the whole vocabulary; the padding may span several shards.

    The other options are those of `linear_token_scores`.

    Raises:
        TypeError, ValueError: naming the argument, on every rank (the rank it came from raises its own error, the
            others a ValueError that quotes it). A process without an initialised group is refused: its head would be
            whole, and `linear_token_scores` is there for that. A group of one rank is served.
    """
    models = Models(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    shard, options = agree(
        "vocab_parallel_linear_token_scores",
        models,
        group,
        workspace_mb,
        sampled_ids=sampled_ids,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    models = shard.cut(models.flat())
    with torch.no_grad():
        chunks = shard.chunks(models, workspace_mb)
        scores = _merged_scores(shard, models, sampled_ids.flatten().long(), chunks, options)
    return TokenScores(*(score.float().view(sampled_ids.shape) for score in scores))


def vocab_parallel_linear_token_divergence(
    student_hidden: Tensor,  # (N, H) | (B, L, H)  fp32 | fp16 | bf16 | fp64, the same on every rank
    student_weight: Tensor,  # (V_i, H), this rank's shard
    teacher_hidden: Tensor,  # (N, H') | (B, L, H')
    teacher_weight: Tensor,  # (V_i, H')
    *,
    rows: Tensor | None = None,  # (R,) int64
    group: "dist.ProcessGroup | None" = None,
    student_bias: Tensor | None = None,  # (V_i,)
    teacher_bias: Tensor | None = None,  # (V_i,)
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
    """`linear_token_divergence` of the whole vocabulary, of which this rank holds a shard. Every rank must call it, and
    run backward() with the same upstream gradient.

    Args:
        vocab_topk: the student's largest logits of the whole vocabulary, ties to the lower id.

    The other options are those of `linear_token_divergence` and `vocab_parallel_linear_token_scores`.

    Returns:
        (R,) fp32 (fp64 for fp64 inputs), the same on every rank. `student_hidden` gets its whole gradient on every rank
        (already summed: no all-reduce around it), the student's weight and bias their shard's; the teacher gets none.
    """
    models = Models(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    shard, options = agree(
        "vocab_parallel_linear_token_divergence",
        models,
        group,
        workspace_mb,
        rows=rows,
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
    if rows is None:
        rows = torch.arange(len(models.student_hidden), device=student_hidden.device)
    if not rows.numel() or not len(models.student_hidden):
        return no_rows(rows, models.student_hidden, models.student_weight, models.student_bias)
    models = shard.cut(models).rows(rows.clamp_min(0))
    return _ShardedDivergence.apply(*models, rows >= 0, shard, workspace_mb, options)


class _ShardedDivergence(torch.autograd.Function):
    """Divergence of R gathered rows; the backward projects each chunk again instead of keeping (R, V_i)."""

    @staticmethod
    def forward(ctx, *arguments):
        *models, live, shard, workspace_mb, options = arguments
        models = Models(*models)
        ctx.shard, ctx.options, ctx.chunks = shard, options, shard.chunks(models, workspace_mb)
        if options.vocab_topk is None:
            ctx.gradient = _gradient
            result, *saved = _merged_divergence(shard, models, ctx.chunks, options)
        else:
            ctx.gradient = _topk_gradient
            chunks = [_topk_divergence(shard, models.logits(part), options) for part in ctx.chunks]
            result, *saved = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(*models[:6], live & result.isfinite(), *saved)
        return result.masked_fill(~live, 0.0).to(torch.promote_types(models.student_hidden.dtype, torch.float32))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_divergence):
        *tensors, live = ctx.saved_tensors[:7]
        models, saved = Models(*tensors), ctx.saved_tensors[7:]
        hidden, weight = models.student_hidden, models.student_weight
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden, grad_weight, grad_bias = grads = [
            torch.zeros_like(tensor, dtype=sum_dtype) if needed else None
            for tensor, needed in zip(models[:3], ctx.needs_input_grad[:3], strict=True)
        ]
        with torch.autocast(grad_divergence.device.type, enabled=False):
            for part in ctx.chunks:
                logits, upstream = models.logits(part), grad_divergence[part].unsqueeze(-1)
                grad_logits = ctx.gradient(ctx.shard, logits, ctx.options, *(tensor[part] for tensor in saved))
                grad_logits = merge.through_transform(grad_logits, logits[0], ctx.options)
                grad_logits = torch.where(live[part].unsqueeze(-1), grad_logits * upstream, 0.0)
                if grad_hidden is not None:
                    grad_hidden[part] = backproject(grad_logits, weight)
                if grad_weight is not None:
                    add_weight_gradient(grad_weight, grad_logits, hidden[part], live[part], sum_dtype)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        if grad_hidden is not None:
            # Summed in fp32: rounded to bf16 on every rank first, P roundings would add up.
            dist.all_reduce(grad_hidden, group=ctx.shard.group)
        return *(grad if grad is None else grad.to(weight.dtype) for grad in grads), *(None,) * 8


# ---- over chunks and ranks -----------------------------------------------------------------------------------------


def _merged_scores(
    shard: Shard, models: Models, sampled_ids: Tensor, chunks: list[slice], options: Options
) -> TokenScores:
    """Seven (N,) scores in fp64."""
    local_ids = (sampled_ids - shard.start).clamp(0, max(shard.width - 1, 0))
    mine = _shard_scores(models, local_ids, chunks, options)
    every = ShardScores(*shard.gather(torch.stack(mine)).unbind(1))
    owner = torch.stack([(sampled_ids >= start) & (sampled_ids < stop) for start, stop in shard.ranges])
    scores = merge.merged_scores(every, owner, options.divergence)
    if options.divergence != "jsd":
        return scores
    divergence = _jsd(shard, models, scores.student_lse, scores.teacher_lse, chunks, options)
    return scores._replace(divergence=torch.where(owner.any(0), divergence, math.nan))


def _merged_divergence(shard: Shard, models: Models, chunks: list[slice], options: Options) -> tuple[Tensor, ...]:
    """(R,) divergence and both log-sum-exps, in fp64."""
    no_ids = torch.zeros(len(models.student_hidden), dtype=torch.int64, device=models.student_hidden.device)
    mine = _shard_scores(models, no_ids, chunks, options)
    wanted = torch.stack([mine.divergence, mine.student_lse, mine.teacher_lse])
    divergences, student_lses, teacher_lses = shard.gather(wanted).unbind(1)
    student_lse, teacher_lse = student_lses.logsumexp(0), teacher_lses.logsumexp(0)
    if options.divergence == "jsd":
        return _jsd(shard, models, student_lse, teacher_lse, chunks, options), student_lse, teacher_lse
    divergence = merge.merged_divergence(
        divergences, student_lses - student_lse, teacher_lses - teacher_lse, options.divergence
    )
    valid = student_lse.isfinite() & teacher_lse.isfinite()
    return tuple(torch.where(valid, value, math.nan) for value in (divergence, student_lse, teacher_lse))


def _shard_scores(models: Models, local_ids: Tensor, chunks: list[slice], options: Options) -> ShardScores:
    """This rank's, of all rows."""
    if options.divergence == "jsd":  # a shard's own jsd is of no use; the other one takes a visit less
        options = options._replace(divergence="reverse_kl")
    parts = [merge.shard_scores(*models.logits(part), local_ids[part], options) for part in chunks]
    return ShardScores(*map(torch.cat, zip(*parts, strict=True)))


def _jsd(
    shard: Shard, models: Models, student_lse: Tensor, teacher_lse: Tensor, chunks: list[slice], options: Options
) -> Tensor:
    every = [merge.shard_jsd(*models.logits(part), student_lse[part], teacher_lse[part], options) for part in chunks]
    valid = student_lse.isfinite() & teacher_lse.isfinite()
    return torch.where(valid, shard.gather(torch.cat(every)).sum(0), math.nan)


def _gradient(shard: Shard, logits, options: Options, student_lse: Tensor, teacher_lse: Tensor) -> Tensor:
    """(n, V_i) by scaled logits, for one chunk."""
    slopes = merge.shard_slopes(*logits, student_lse, teacher_lse, options)
    sums = shard.gather(merge.slope_sums(*slopes, options)).sum(0)
    return merge.gradient_from_sums(*slopes, sums, options)


def _topk_divergence(shard: Shard, logits, options: Options) -> tuple[Tensor, ...]:
    """(n,) divergence and what the gradient needs, for one chunk."""
    counts = [min(options.vocab_topk, stop - start) for start, stop in shard.ranges]
    partial, ids = topk.shard_candidates(*logits, counts[shard.rank], max(counts), options)
    merged = topk.MergedTopK(shard.gather(partial), counts, options)
    by_candidate = merged.by_candidate[:, shard.rank, : counts[shard.rank]]
    return merged.divergence, merged.student_lse, merged.by_other[:, shard.rank], by_candidate, ids


def _topk_gradient(shard: Shard, logits, options: Options, *saved: Tensor) -> Tensor:
    return topk.shard_topk_gradient(logits[0], *saved, options)
