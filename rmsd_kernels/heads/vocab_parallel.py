"""The linear functions where the output head's vocabulary is split over the ranks of a process group.

Rank i of P holds rows [start_i, start_i + V_i) of both heads, in rank order; shards may differ in size. Hidden states,
ids and options are the same on every rank, and so are the results, to the bit. No row of logits ever leaves its rank;
partials.py says what does, and why it is enough:

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

from ..reference import TokenScores
from . import partials
from .projection import add_weight_gradient, backproject, no_rows
from .shards import Heads, agree


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
    heads = Heads(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    options = dict(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    shard = agree(
        "vocab_parallel_linear_token_scores",
        heads,
        options,
        group,
        vocab_size,
        workspace_mb,
        backend,
        sampled_ids=sampled_ids,
    )
    options["teacher_temperature"] = teacher_temperature or temperature
    with torch.no_grad():
        scores = _scores(shard, shard.cut(heads.flat()), sampled_ids.flatten().long(), options, workspace_mb)
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
    heads = Heads(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    options = dict(
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    topk = dict(vocab_topk=vocab_topk, tail=tail)
    shard = agree(
        "vocab_parallel_linear_token_divergence",
        heads,
        options,
        group,
        vocab_size,
        workspace_mb,
        backend,
        rows=rows,
        **topk,
    )
    options["teacher_temperature"] = teacher_temperature or temperature
    heads = heads.flat()
    if rows is None:
        rows = torch.arange(len(heads.student_hidden), device=student_hidden.device)
    if not rows.numel() or not len(heads.student_hidden):
        return no_rows(rows, heads.student_hidden, heads.student_weight, heads.student_bias)
    if vocab_topk is not None and vocab_topk >= shard.vocab_size:
        topk["vocab_topk"] = None
    heads = shard.cut(heads)
    index = rows.clamp_min(0)
    return _ShardedDivergence.apply(
        heads.student_hidden[index], heads.student_weight, heads.student_bias,
        heads.teacher_hidden.detach()[index], heads.teacher_weight.detach(),
        None if heads.teacher_bias is None else heads.teacher_bias.detach(),
        rows >= 0, shard, options, topk, workspace_mb,
    )  # fmt: skip


class _ShardedDivergence(torch.autograd.Function):
    """Divergence of R gathered rows; the backward projects each chunk again instead of keeping (R, V_i)."""

    @staticmethod
    def forward(
        ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        live, shard, options, topk, workspace_mb,
    ):  # fmt: skip
        heads = Heads(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
        ctx.shard, ctx.options, ctx.chunks = shard, options, shard.chunks(heads, workspace_mb)
        if topk["vocab_topk"] is None:
            ctx.gradient = _gradient
            result, *saved = _divergence(shard, heads, options, ctx.chunks)
        else:
            ctx.gradient = _topk_gradient
            chunks = [_topk_divergence(shard, heads.logits(part), options, **topk) for part in ctx.chunks]
            result, *saved = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(*heads, live & result.isfinite(), *saved)
        return result.masked_fill(~live, 0.0).to(torch.promote_types(student_hidden.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_divergence):
        heads, live, saved = Heads(*ctx.saved_tensors[:6]), ctx.saved_tensors[6], ctx.saved_tensors[7:]
        sum_dtype = torch.promote_types(heads.student_weight.dtype, torch.float32)
        grad_hidden, grad_weight, grad_bias = grads = [
            torch.zeros_like(tensor, dtype=sum_dtype) if needed else None
            for tensor, needed in zip(heads[:3], ctx.needs_input_grad[:3], strict=True)
        ]
        with torch.autocast(grad_divergence.device.type, enabled=False):
            for part in ctx.chunks:
                logits, upstream = heads.logits(part), grad_divergence[part].unsqueeze(-1)
                grad_logits = ctx.gradient(ctx.shard, logits, ctx.options, *(tensor[part] for tensor in saved))
                grad_logits = partials.through_transform(grad_logits, logits[0], ctx.options)
                grad_logits = torch.where(live[part].unsqueeze(-1), grad_logits * upstream, 0.0)
                if grad_hidden is not None:
                    grad_hidden[part] = backproject(grad_logits, heads.student_weight)
                if grad_weight is not None:
                    add_weight_gradient(grad_weight, grad_logits, heads.student_hidden[part], live[part])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        if grad_hidden is not None:
            # Summed in fp32: rounded to bf16 on every rank first, P roundings would add up.
            dist.all_reduce(grad_hidden, group=ctx.shard.group)
        return *(grad if grad is None else grad.to(heads.student_weight.dtype) for grad in grads), *(None,) * 8


# ---- partials over chunks and ranks --------------------------------------------------------------------------------


def _scores(shard, heads, sampled_ids, options, workspace_mb) -> TokenScores:
    """Seven (N,) scores in fp64."""
    chunks = shard.chunks(heads, workspace_mb)
    local_ids = (sampled_ids - shard.start).clamp(0, max(shard.width - 1, 0))
    mine = _shard_scores(shard, heads, local_ids, options, chunks)
    every = partials.ShardScores(*shard.gather(torch.stack(mine)).unbind(1))
    owner = torch.stack([(sampled_ids >= start) & (sampled_ids < stop) for start, stop in shard.ranges])
    scores = partials.merged_scores(every, owner, options["divergence"])
    if options["divergence"] != "jsd":
        return scores
    divergence = _jsd(shard, heads, scores.student_lse, scores.teacher_lse, options, chunks)
    return scores._replace(divergence=torch.where(owner.any(0), divergence, math.nan))


def _divergence(shard, heads, options, chunks) -> tuple[Tensor, ...]:
    """(R,) divergence and both log-sum-exps, in fp64."""
    no_ids = torch.zeros(len(heads.student_hidden), dtype=torch.int64, device=heads.student_hidden.device)
    mine = _shard_scores(shard, heads, no_ids, options, chunks)
    wanted = torch.stack([mine.divergence, mine.student_lse, mine.teacher_lse])
    divergences, student_lses, teacher_lses = shard.gather(wanted).unbind(1)
    student_lse, teacher_lse = student_lses.logsumexp(0), teacher_lses.logsumexp(0)
    if options["divergence"] == "jsd":
        return _jsd(shard, heads, student_lse, teacher_lse, options, chunks), student_lse, teacher_lse
    divergence = partials.merged_divergence(
        divergences, student_lses - student_lse, teacher_lses - teacher_lse, options["divergence"]
    )
    valid = student_lse.isfinite() & teacher_lse.isfinite()
    return tuple(torch.where(valid, value, math.nan) for value in (divergence, student_lse, teacher_lse))


def _shard_scores(shard, heads, local_ids, options, chunks) -> partials.ShardScores:
    """This rank's, of all rows."""
    if options["divergence"] == "jsd":  # a shard's own jsd is of no use; the other one takes a visit less
        options = dict(options, divergence="reverse_kl")
    parts = [partials.shard_scores(*heads.logits(part), local_ids[part], shard.backend, options) for part in chunks]
    return partials.ShardScores(*map(torch.cat, zip(*parts, strict=True)))


def _jsd(shard, heads, student_lse, teacher_lse, options, chunks) -> Tensor:
    every = [partials.shard_jsd(*heads.logits(part), student_lse[part], teacher_lse[part], options) for part in chunks]
    valid = student_lse.isfinite() & teacher_lse.isfinite()
    return torch.where(valid, shard.gather(torch.cat(every)).sum(0), math.nan)


def _gradient(shard, logits, options, student_lse, teacher_lse) -> Tensor:
    """(n, V_i) by scaled logits, for one chunk."""
    slopes = partials.shard_slopes(*logits, student_lse, teacher_lse, options)
    sums = shard.gather(partials.slope_sums(*slopes, options)).sum(0)
    return partials.gradient(*slopes, sums, options)


def _topk_divergence(shard, logits, options, vocab_topk, tail) -> tuple[Tensor, ...]:
    """(n,) divergence and what the gradient needs, for one chunk."""
    counts = [min(vocab_topk, stop - start) for start, stop in shard.ranges]
    partial, ids = partials.shard_candidates(*logits, counts[shard.rank], max(counts), options)
    merged = partials.MergedTopK(shard.gather(partial), counts, vocab_topk, tail, options)
    by_candidate = merged.by_candidate[:, shard.rank, : counts[shard.rank]]
    return merged.divergence, merged.student_lse, merged.by_other[:, shard.rank], by_candidate, ids


def _topk_gradient(shard, logits, options, *saved) -> Tensor:
    return partials.shard_topk_gradient(logits[0], *saved, options)
