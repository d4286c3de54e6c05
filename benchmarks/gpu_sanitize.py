"""Every kernel once on a few rows, for a tool that watches each load.

    compute-sanitizer python -m benchmarks.gpu_sanitize

Rows are ragged, start at odd columns, and their ids, masks and chosen rows reach past what is there.
"""

import itertools

import torch

import rmsd_kernels as rk
from rmsd_kernels.reference import DIVERGENCES, TAILS

SHAPE = (2, 3, 9001)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_sanitize runs the kernels on a GPU, and there is none")
    made = dict(generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    ids = torch.tensor([[0, 8998, -1], [9000, 5, 2**40]], device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = torch.tensor([5, -1, 0, 99], device="cuda")
    for dtype, odd in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        width = SHAPE[-1] - (0 if odd else 1)  # 9000 columns begin at multiples of 16 bytes
        student, teacher = (torch.randn(*SHAPE[:-1], width, **made).to(dtype)[..., odd:] for _ in range(2))
        for divergence in DIVERGENCES:
            rk.scores_and_candidates(student, teacher, ids, mask, num_candidates=2, divergence=divergence)
            for chosen, topk in itertools.product((None, rows), ({}, *(dict(vocab_topk=70, tail=t) for t in TAILS))):
                leaf = student.detach().requires_grad_()
                rk.token_divergence(leaf, teacher, rows=chosen, divergence=divergence, **topk).sum().backward()
        torch.cuda.synchronize()
        print(f"{dtype}, {'odd' if odd else 'even'} columns: done", flush=True)


if __name__ == "__main__":
    main()
