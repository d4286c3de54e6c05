"""`token_scores` against TRL's full-logit divergence, torch.compile of that, and merely reading both tensors.

    python -m benchmarks.bench_scores [--rows 512 --vocab 49152 --dtype fp32 --repeats 15 --json]

TRL's function and the compiled one return the divergence alone; ours returns six more numbers a token. In bf16 they
also compute in bf16, so their result is only held to 0.5 nats there, where ours is held to 1e-5.
"""

import argparse
import os

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
from rmsd_kernels import reference, token_scores

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss


def bench(rows: int, vocab: int, dtype_name: str, arguments: argparse.Namespace) -> list[Result]:
    def make(seed: int) -> tuple[Tensor, ...]:
        return logits(rows, vocab, DTYPES[dtype_name], arguments.device, seed)

    torch.compiler.reset()  # another shape or dtype would compile for any shape, which is slower
    compiled = torch.compile(compute_full_logit_self_distillation_loss)
    contestants = {
        "token_scores": lambda student, teacher, ids: token_scores(student, teacher, ids, backend=arguments.backend),
        # alpha = 1 is KL(student || teacher)
        "TRL": lambda student, teacher, _: compute_full_logit_self_distillation_loss(
            student, teacher, distillation_alpha=1.0
        ),
        "torch.compile of TRL's": lambda student, teacher, _: compiled(student, teacher, distillation_alpha=1.0),
        "sum of both": lambda student, teacher, _: (student.sum(), teacher.sum()),
    }
    inputs = input_sets(make, arguments.device)
    student_logits, teacher_logits, sampled_ids = (tensor[:8] for tensor in inputs[0])
    truth = reference.token_scores(student_logits.double(), teacher_logits.double(), sampled_ids)

    def check(name: str, outcome) -> None:
        if name == "token_scores":
            for score_name, score in outcome._asdict().items():
                assert_parity(score_name, score[:8], getattr(truth, score_name), 1e-5)
        elif name != "sum of both":
            assert_parity(name, outcome[:8], truth.divergence, 1e-4 if dtype_name == "fp32" else 0.5)

    # Read: both rows, an id. Written: seven numbers.
    num_bytes = 2 * inputs[0][0].nbytes + rows * (8 + 7 * 4)
    with torch.no_grad():
        work = f"{rows} x {vocab} {dtype_name}"
        return compare(work, (rows, vocab), contestants, inputs, num_bytes, arguments.repeats, check)


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [(512, 49_152), (256, 151_936)])
    parts = (
        bench(rows, vocab, dtype_name, arguments) for rows, vocab in arguments.sizes for dtype_name in arguments.dtype
    )
    report(written_by_part(parts, arguments, "scores"), arguments, "scores")


if __name__ == "__main__":
    main()
