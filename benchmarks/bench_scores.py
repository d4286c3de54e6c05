"""`token_scores` against TRL's full-logit divergence, torch.compile of that, and merely reading both tensors.

    python -m benchmarks.bench_scores [--rows 512 --vocab 49152 --dtype fp32 --repeats 15 --json]

TRL's function and the compiled one return the divergence alone; ours returns six more numbers a token. In bf16 they
also compute in bf16, so their result is only held to 0.5 nats there, where ours is held to 1e-5.
"""

import os

import torch

from benchmarks.common import DTYPES, assert_parity, command_line, compare, logits, report
from rmsd_kernels import reference, token_scores

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss


def bench(rows: int, vocab: int, dtype_name: str, repeats: int):
    student_logits, teacher_logits = logits(rows, vocab, DTYPES[dtype_name])
    sampled_ids = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()  # another shape or dtype would compile for any shape, which is slower
    compiled = torch.compile(compute_full_logit_self_distillation_loss)
    contestants = {
        "token_scores": lambda: token_scores(student_logits, teacher_logits, sampled_ids, backend="cpu"),
        # alpha = 1 is KL(student || teacher)
        "TRL": lambda: compute_full_logit_self_distillation_loss(
            student_logits, teacher_logits, distillation_alpha=1.0
        ),
        "torch.compile of TRL's": lambda: compiled(student_logits, teacher_logits, distillation_alpha=1.0),
        "sum of both": lambda: (student_logits.sum(), teacher_logits.sum()),
    }
    few = slice(0, 8)
    truth = reference.token_scores(student_logits[few].double(), teacher_logits[few].double(), sampled_ids[few])
    with torch.no_grad():
        for name, score in contestants["token_scores"]()._asdict().items():
            assert_parity(name, score[few], getattr(truth, name), 1e-5)
        for name in ("TRL", "torch.compile of TRL's"):
            tolerance = 1e-4 if dtype_name == "fp32" else 0.5
            assert_parity(name, contestants[name]()[few], truth.divergence, tolerance)
        logits_bytes = 2 * student_logits.nbytes
        # Read: both rows, an id. Written: seven numbers.
        num_bytes = logits_bytes + rows * (8 + 7 * 4)
        return compare(f"{rows} x {vocab} {dtype_name}", contestants, num_bytes, logits_bytes, repeats)


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [(512, 49_152), (256, 151_936)])
    results = [
        result
        for rows, vocab in arguments.sizes
        for dtype_name in arguments.dtype
        for result in bench(rows, vocab, dtype_name, arguments.repeats)
    ]
    report(results, arguments, "scores")


if __name__ == "__main__":
    main()
