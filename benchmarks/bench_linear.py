"""From hidden states to gradients: score every row, keep five, differentiate those; against losses on all rows.

    python -m benchmarks.bench_linear [--rows 512 --vocab 49152 --hidden 576 --dtype fp32 --repeats 9 --json]

Liger's chunked JSD and the plain JSD train on every row, ours on the five that matter: that is the method, not a trick
of the kernel. "the bare GEMMs" are the products that cannot be avoided, with nothing in between: the projections of
every row, and the kept rows' projections and gradients.
"""

import argparse
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.common import (
    DTYPES,
    Result,
    assert_parity,
    command_line,
    compare,
    input_sets,
    report,
    written_by_part,
)
from rmsd_kernels import linear_token_divergence, linear_token_logprobs, linear_token_scores, reference, select_tokens

with warnings.catch_warnings(action="ignore"):  # of triton, which has no driver on a CPU
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

NUM_KEPT = 5
RECORDED = "student's log-probabilities recorded"


def heads(
    rows: int, hidden_size: int, vocab: int, device: str, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Hidden states and weights whose logits spread over about 3, the teacher's weights being the student's, moved;
    and sampled ids."""
    made = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
    student_hidden = torch.randn(rows, hidden_size, **made)
    teacher_hidden = student_hidden + 0.3 * torch.randn(rows, hidden_size, **made)
    weight = torch.randn(vocab, hidden_size, **made) * 3 / hidden_size**0.5
    moved = weight + 0.1 * torch.randn(vocab, hidden_size, **made) / hidden_size**0.5
    student = (tensor.to(dtype).requires_grad_() for tensor in (student_hidden, weight))
    return *student, teacher_hidden.to(dtype), moved.to(dtype), torch.randint(vocab, (rows,), **made)


def gradients(loss: Tensor, student_hidden: Tensor, student_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return loss, *torch.autograd.grad(loss, (student_hidden, student_weight))


def train_on_kept(models, teacher_logprob: Tensor, student_logprob: Tensor, sequences: int, backend: str):
    """The jsd of five rows of every sequence, those with the largest gap."""
    gap = (teacher_logprob - student_logprob).abs().view(sequences, -1)
    kept = select_tokens(gap, torch.ones_like(gap, dtype=torch.bool), num_tokens=NUM_KEPT, backend=backend)
    rows = (kept + gap.shape[1] * torch.arange(sequences, device=gap.device)[:, None]).flatten()
    return gradients(linear_token_divergence(*models, rows=rows, divergence="jsd", backend=backend).mean(), *models[:2])


def rmsd(*inputs: Tensor, sequences: int, backend: str):
    *models, sampled_ids = inputs
    with torch.no_grad():
        scores = linear_token_scores(*models, sampled_ids, backend=backend)
    return train_on_kept(models, scores.teacher_logprob, scores.student_logprob, sequences, backend)


def liger(*inputs: Tensor):
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    return gradients(loss(*inputs), *inputs[:2])


def plain(student_hidden, student_weight, teacher_hidden, teacher_weight, sampled_ids):
    logits = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    return gradients(reference.token_divergence(*logits, divergence="jsd").mean(), student_hidden, student_weight)


def bench(rows: int, vocab: int, dtype_name: str, arguments: argparse.Namespace) -> Iterator[list[Result]]:
    device, backend, hidden_size, dtype = arguments.device, arguments.backend, arguments.hidden, DTYPES[dtype_name]
    inputs = input_sets(lambda seed: heads(rows, hidden_size, vocab, device, seed, dtype), device)

    def logprobs(hidden: Tensor, weight: Tensor, sampled_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return linear_token_logprobs(hidden, weight, sampled_ids, backend=backend).logprob

    # What the sampler noted as it sampled; of no cost to the loss.
    recorded = [(*models, ids, logprobs(*models[:2], ids)) for *models, ids in inputs]

    def rmsd_recorded(*inputs: Tensor):
        *models, sampled_ids, student_logprob = inputs
        return train_on_kept(models, logprobs(*models[2:], sampled_ids), student_logprob, 1, backend)

    logits = torch.empty(rows, vocab, device=device, dtype=dtype)
    few = torch.randn(NUM_KEPT, vocab, device=device, dtype=dtype)

    @torch.no_grad()
    def gemms(student_hidden, student_weight, teacher_hidden, teacher_weight, *, models: str = "both"):
        if models == "both":
            torch.mm(student_hidden, student_weight.T, out=logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=logits)
        for hidden, weight in ((student_hidden, student_weight), (teacher_hidden, teacher_weight)):
            hidden[:NUM_KEPT] @ weight.T
        return few @ student_weight, few.T @ student_hidden[:NUM_KEPT]

    ours = functools.partial(rmsd, sequences=1, backend=backend)
    expected = ours(*inputs[0])

    def check(name: str, outcome) -> None:
        if "GEMM" in name:
            return
        if "recorded" in name:
            assert all(torch.equal(one, other) for one, other in zip(outcome, expected, strict=True))
        kept = outcome[1].ne(0).any(-1)
        assert kept.sum() == (NUM_KEPT if name in ("scores, selection, divergence", RECORDED) else rows)
        check_gradients(name, outcome, inputs[0], kept)

    product = 2 * hidden_size * vocab  # FLOPs of a row's projection
    shared = dict(
        repeats=arguments.repeats,
        unit="GFLOP/s",
        check=check,
        must_exist=inputs[0][0].nbytes + inputs[0][1].nbytes,
    )
    name = f"{NUM_KEPT} of {rows} rows, H {hidden_size}, V {vocab}, {dtype_name}"
    both, teacher_only = {"scores, selection, divergence": ours}, {RECORDED: rmsd_recorded}
    peers = {"Liger chunked JSD": lambda *inputs: liger(*inputs[:5]), "plain JSD": lambda *inputs: plain(*inputs[:5])}
    for work, contestant, sets, projected in (
        ("gradients", both, inputs, 2 * rows),
        ("recorded", teacher_only, recorded, rows),
    ):
        models = "both" if work == "gradients" else "teacher"
        bare = {"the bare GEMMs": lambda *inputs, models=models: gemms(*inputs[:4], models=models)}
        # Peers allocate gigabytes, after which whoever comes next takes page faults: the floor has rounds of its own.
        for others in (peers, bare):
            flops = (projected + 4 * NUM_KEPT) * product
            yield compare(f"{work}, {name}", (rows, vocab), {**contestant, **others}, sets, flops, **shared)


def check_gradients(name: str, outcome, inputs: tuple[Tensor, ...], rows: Tensor) -> None:
    """The mean jsd of `rows` and its gradients, against the formula in fp64. In bf16 gradients are rounded, and peers'
    logits as well: they are held to a share of the largest."""
    loss, grad_hidden, grad_weight = outcome
    student_hidden, student_weight, teacher_hidden, teacher_weight = (x.detach().double() for x in inputs[:4])
    hidden, weight = student_hidden[rows].requires_grad_(), student_weight.clone().requires_grad_()
    logits = hidden @ weight.T, teacher_hidden[rows] @ teacher_weight.T
    truth = reference.token_divergence(*logits, divergence="jsd").mean()
    truth_hidden, truth_weight = torch.autograd.grad(truth, (hidden, weight))
    is_low, is_peer = inputs[0].dtype == torch.bfloat16, "JSD" in name
    assert_parity(f"{name}: loss", loss, truth, 5e-2 if is_low and is_peer else 1e-5)
    share = (0.1 if is_peer else 0.01) if is_low else 0.0
    for what, got, expected in (
        ("hidden states", grad_hidden[rows], truth_hidden),
        ("weight", grad_weight, truth_weight),
    ):
        tolerance = max(1e-6, share * expected.abs().max().item())
        assert_parity(f"{name}: gradient by the {what}", got, expected, tolerance)


def bf16_errors(vocab: int, hidden_size: int) -> dict[str, list[float]]:
    """Relative error, in norm, of the bf16 gradients by hidden states and weight, against fp64 from the same inputs:
    ours, those through logits rounded to bf16, and the fp64 gradients themselves once rounded to bf16."""
    *models, _ = (
        x.detach().bfloat16() if x.is_floating_point() else x for x in heads(64, hidden_size, vocab, "cpu", 0)
    )

    def through_logits(student_hidden, student_weight, teacher_hidden, teacher_weight):
        return reference.token_divergence(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)

    def gradients_of(divergence, dtype=torch.bfloat16):
        student = [x.to(dtype).requires_grad_() for x in models[:2]]
        return torch.autograd.grad(divergence(*student, *(x.to(dtype) for x in models[2:])).mean(), student)

    truth = gradients_of(through_logits, torch.float64)
    found = {
        "ours": gradients_of(linear_token_divergence),
        "logits rounded to bf16": gradients_of(through_logits),
        "fp64, rounded to bf16": [x.bfloat16() for x in truth],
    }
    return {
        name: [((x.double() - t).norm() / t.norm()).item() for x, t in zip(grads, truth, strict=True)]
        for name, grads in found.items()
    }


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [(512, 49_152)], hidden=576, dtypes=("fp32",))
    parts = (
        part
        for rows, vocab in arguments.sizes
        for dtype_name in arguments.dtype
        for part in bench(rows, vocab, dtype_name, arguments)
    )
    report(written_by_part(parts, arguments, "linear"), arguments, "linear")
    if not arguments.json:
        print("\n| error of the bf16 gradients, 64 rows | by hidden states | by weight |\n|---|---|---|")
        for name, errors in bf16_errors(arguments.sizes[0][1], arguments.hidden).items():
            print(f"| {name} | {' | '.join(f'{error:.2%}' for error in errors)} |")


if __name__ == "__main__":
    main()
