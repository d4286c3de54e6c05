"""From hidden states to gradients: score every row, keep five, differentiate those; against losses on all rows.

    python -m benchmarks.bench_linear [--rows 512 --vocab 49152 --hidden 576 --repeats 9 --json]

Liger's chunked JSD and the plain JSD train on every row, ours on the five that matter: that is the method, not a trick
of the kernel. "the bare GEMMs" are the products that cannot be avoided, with nothing in between: the projections of
every row, and the kept rows' projections and gradients.
"""

import warnings

import torch
from torch import Tensor

from benchmarks.common import Result, assert_parity, command_line, compare, report
from rmsd_kernels import linear_token_divergence, linear_token_logprobs, linear_token_scores, reference, select_tokens

with warnings.catch_warnings(action="ignore"):  # of triton, which has no driver on a CPU
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

NUM_KEPT = 5


def heads(rows: int, hidden_size: int, vocab: int) -> list[Tensor]:
    """Hidden states and weights whose logits spread over about 3; the teacher's weights are the student's, moved."""
    generator = torch.Generator().manual_seed(0)
    student_hidden = torch.randn(rows, hidden_size, generator=generator)
    teacher_hidden = student_hidden + 0.3 * torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) * 3 / hidden_size**0.5
    moved = weight + 0.1 * torch.randn(vocab, hidden_size, generator=generator) / hidden_size**0.5
    return [student_hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, moved]


def bench(rows: int, vocab: int, hidden_size: int, repeats: int) -> list[Result]:
    student_hidden, student_weight, teacher_hidden, teacher_weight = models = heads(rows, hidden_size, vocab)
    sampled_ids = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, rows, dtype=torch.bool)
    with torch.no_grad():
        recorded = linear_token_logprobs(student_hidden, student_weight, sampled_ids).logprob

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return loss, *torch.autograd.grad(loss, (student_hidden, student_weight))

    def train(teacher_logprob: Tensor, student_logprob: Tensor):
        gap = (teacher_logprob - student_logprob).abs().unsqueeze(0)
        kept = select_tokens(gap, mask, num_tokens=NUM_KEPT)[0]
        return gradients(linear_token_divergence(*models, rows=kept, divergence="jsd").mean())

    def rmsd():
        with torch.no_grad():
            scores = linear_token_scores(*models, sampled_ids)
        return train(scores.teacher_logprob, scores.student_logprob)

    def rmsd_recorded():
        with torch.no_grad():
            teacher = linear_token_logprobs(teacher_hidden, teacher_weight, sampled_ids)
        return train(teacher.logprob, recorded)

    liger_loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

    def liger():
        return gradients(liger_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, sampled_ids))

    def plain():
        logits = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
        return gradients(reference.token_divergence(*logits, divergence="jsd").mean())

    logits = torch.empty(rows, vocab)
    few = torch.randn(NUM_KEPT, vocab)

    def gemms(*projected: tuple[Tensor, Tensor]):
        with torch.no_grad():
            for hidden, weight in projected:
                torch.mm(hidden, weight.T, out=logits)
            for hidden, weight in ((student_hidden, student_weight), (teacher_hidden, teacher_weight)):
                hidden[:NUM_KEPT] @ weight.T
            return few @ student_weight, few.T @ student_hidden[:NUM_KEPT]

    student, teacher = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
    check(models, sampled_ids, rmsd(), rmsd_recorded(), liger())
    product = 2 * hidden_size * vocab  # FLOPs of a row's projection
    shared = dict(
        logits_bytes=2 * 4 * rows * vocab, repeats=repeats, unit="GFLOP/s",
        must_exist=student_hidden.nbytes + student_weight.nbytes,
    )  # fmt: skip
    name = f"{NUM_KEPT} of {rows} rows, H {hidden_size}, V {vocab}, fp32"
    both = {"scores, selection, divergence": rmsd, "Liger chunked JSD": liger, "plain JSD": plain,
            "the bare GEMMs": lambda: gemms(student, teacher)}  # fmt: skip
    teacher_only = {"student's log-probabilities recorded": rmsd_recorded, "Liger chunked JSD": liger,
                    "the bare GEMMs": lambda: gemms(teacher)}  # fmt: skip
    return [
        *compare(f"gradients, {name}", both, (2 * rows + 4 * NUM_KEPT) * product, **shared),
        *compare(f"recorded, {name}", teacher_only, (rows + 4 * NUM_KEPT) * product, **shared),
    ]


def check(models: list[Tensor], sampled_ids: Tensor, rmsd, rmsd_recorded, liger) -> None:
    """Ours on the rows it kept and Liger's on all, each against the formula in fp64."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (x.detach().double() for x in models)
    kept = rmsd[1].ne(0).any(-1)
    assert kept.sum() == NUM_KEPT
    assert all(torch.equal(one, other) for one, other in zip(rmsd, rmsd_recorded, strict=True))
    for name, (loss, grad_hidden, grad_weight), rows in (("ours", rmsd, kept), ("Liger", liger, kept | True)):
        hidden, weight = student_hidden[rows].requires_grad_(), student_weight.clone().requires_grad_()
        logits = hidden @ weight.T, teacher_hidden[rows] @ teacher_weight.T
        truth = reference.token_divergence(*logits, divergence="jsd").mean()
        truth_hidden, truth_weight = torch.autograd.grad(truth, (hidden, weight))
        assert_parity(f"{name}: loss", loss, truth, 1e-5)
        assert_parity(f"{name}: gradient by the hidden states", grad_hidden[rows], truth_hidden, 1e-6)
        assert_parity(f"{name}: gradient by the weight", grad_weight, truth_weight, 1e-6)


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [(512, 49_152)], hidden=576, dtypes=())
    results = [r for rows, vocab in arguments.sizes for r in bench(rows, vocab, arguments.hidden, arguments.repeats)]
    report(results, arguments, "linear")


if __name__ == "__main__":
    main()
