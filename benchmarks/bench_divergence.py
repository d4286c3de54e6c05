"""`RMSDLoss` with its gradient against TRL's full-logit loss, and the vocabulary top-k against torch.topk and gather.

    python -m benchmarks.bench_divergence [--rows 512 --vocab 49152 --dtype fp32 --repeats 15 --json]

The losses train on different tokens (5 of a sequence against all), so RMSDLoss is held to its own torch backend in fp64
and not to TRL's number. The top-k divergences are the same quantity, TRL's own function for it renormalises.
"""

import argparse
import os
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
    logits,
    report,
    written_by_part,
)
from rmsd import RMSDLoss
from rmsd_kernels import reference, token_divergence

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.sdft.loss_utils import (
    compute_full_logit_self_distillation_loss,
    compute_topk_self_distillation_loss,
)

NUM_KEPT, VOCAB_TOPK = 5, 500


def bench_loss(rows: int, vocab: int, dtype_name: str, arguments: argparse.Namespace) -> list[Result]:
    def make(seed: int) -> tuple[Tensor, ...]:
        tensors = logits(rows, vocab, DTYPES[dtype_name], arguments.device, seed)
        student, teacher, ids = (tensor.unsqueeze(0) for tensor in tensors)
        return student.requires_grad_(), teacher, ids, torch.ones_like(ids, dtype=torch.bool)

    ours = RMSDLoss(num_kept=NUM_KEPT, vocab_topk=VOCAB_TOPK, backend=arguments.backend)

    def rmsd(student_logits, teacher_logits, sampled_ids, mask):
        loss = ours(student_logits, teacher_logits, sampled_ids, mask)
        return loss, *torch.autograd.grad(loss, student_logits)

    def trl(student_logits, teacher_logits, sampled_ids, mask):
        loss = compute_full_logit_self_distillation_loss(student_logits, teacher_logits, distillation_alpha=1.0).mean()
        return loss, *torch.autograd.grad(loss, student_logits)

    inputs = input_sets(make, arguments.device)
    student_logits, teacher_logits, *_ = inputs[0]

    def check(name: str, outcome) -> None:
        if name != "RMSDLoss":
            return
        loss, grad = outcome
        kept = grad.ne(0).any(-1)
        assert kept.sum() == NUM_KEPT
        # The rows kept, in fp64: their mean divergence and its gradient.
        truth_logits = student_logits.detach()[kept].double().requires_grad_()
        truth = reference.token_divergence(truth_logits, teacher_logits[kept].double(), vocab_topk=VOCAB_TOPK).mean()
        (truth_grad,) = torch.autograd.grad(truth, truth_logits)
        assert_parity("RMSDLoss", loss, truth, 1e-5)
        assert_parity("RMSDLoss' gradient", grad[kept], truth_grad, 1e-6 if dtype_name == "fp32" else 1e-3)

    # Read: both tensors once, the kept rows twice more. Written: the gradient.
    num_bytes = 3 * student_logits.nbytes + 4 * NUM_KEPT * vocab * student_logits.element_size()
    work = f"loss and gradient, {NUM_KEPT} of {rows} x {vocab} {dtype_name}"
    return compare(
        work,
        (rows, vocab),
        {"RMSDLoss": rmsd, "TRL, full logits": trl},
        inputs,
        num_bytes,
        arguments.repeats,
        check,
        must_exist=student_logits.nbytes,
    )


@torch.no_grad()
def bench_topk(rows: int, vocab: int, dtype_name: str, arguments: argparse.Namespace) -> list[Result]:
    def make(seed: int) -> tuple[Tensor, ...]:
        return logits(rows, vocab, DTYPES[dtype_name], arguments.device, seed)[:2]

    options = dict(vocab_topk=VOCAB_TOPK, tail="renorm")
    contestants = {
        "token_divergence": lambda student, teacher: token_divergence(
            student, teacher, **options, backend=arguments.backend
        ),
        "TRL: torch.topk and gather": lambda student, teacher: compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=VOCAB_TOPK, distillation_alpha=1.0, distillation_add_tail=False
        ),
        "torch.topk alone": lambda student, teacher: torch.topk(student, VOCAB_TOPK),
    }
    inputs = input_sets(make, arguments.device)
    truth = reference.token_divergence(*(tensor[:8].double() for tensor in inputs[0]), **options)
    # TRL computes in bf16, and breaks bf16's many ties otherwise.
    tolerances = {"token_divergence": 1e-5, "TRL: torch.topk and gather": 1e-4 if dtype_name == "fp32" else 0.5}

    def check(name: str, outcome) -> None:
        if name in tolerances:
            assert_parity(name, outcome[:8], truth, tolerances[name])

    work = f"top-{VOCAB_TOPK} of {rows} x {vocab} {dtype_name}"
    return compare(work, (rows, vocab), contestants, inputs, 2 * inputs[0][0].nbytes, arguments.repeats, check)


def parts(arguments: argparse.Namespace) -> Iterator[list[Result]]:
    losses, topks = arguments.sizes or [(512, 49_152)], arguments.sizes or [(64, 151_936)]
    for dtype_name in arguments.dtype:
        for rows, vocab in losses:
            yield bench_loss(rows, vocab, dtype_name, arguments)
        for rows, vocab in topks:
            yield bench_topk(rows, vocab, dtype_name, arguments)


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [])
    report(written_by_part(parts(arguments), arguments, "divergence"), arguments, "divergence")


if __name__ == "__main__":
    main()
