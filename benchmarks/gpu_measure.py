"""The kernels of gpu_static's roofline, timed on the GPU that is here: `python -m benchmarks.gpu_measure`.

    python -m benchmarks.gpu_measure [--rows 8192 --vocab 151936 --repeats 15 --write FILE]

The tensors are many times the last-level cache, so every run reads memory. What the same GPU moves when it copies a
tensor, and when it only sums one up, is measured in the same run.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch

from benchmarks.common import DTYPES, elapsed, machine
from rmsd_kernels import triton as kernels
from rmsd_kernels.options import Options

SEQUENCE, NUM_CANDIDATES, VOCAB_TOPK, SOFTCAP = 512, 20, 500, 30.0


def runs(variant: str, student, teacher, sampled_ids):
    """A function that launches `variant` on (B, L, V) logits, and the bytes that it must move."""
    name, _, *rest = variant.split()
    options = Options(
        divergence=next((word for word in rest if word in ("forward_kl", "jsd")), "reverse_kl"),
        beta=0.5,
        vocab_topk=VOCAB_TOPK if "top-k" in rest else None,
        tail=rest[-1] if "top-k" in rest else "bucket",
        temperature=1.0,
        teacher_temperature=1.0,
        vocab_size=student.shape[-1],
        logit_scale=1.0,
        softcap=SOFTCAP if "softcap" in rest else None,
        backend="triton",
    )
    both = student.numel() * 2 * student.element_size()
    if name == "scores":
        return lambda: kernels.scores(student, teacher, sampled_ids, options), both
    if name == "scores+candidates":
        chosen = torch.ones_like(sampled_ids, dtype=torch.bool), NUM_CANDIDATES, "logprob_gap", 0.0
        return lambda: kernels.scores_and_candidates(student, teacher, sampled_ids, *chosen, options), both
    rows = torch.arange(sampled_ids.numel(), device=student.device)
    if name == "divergence":
        return lambda: kernels.divergence(student, teacher, rows, options), both
    result, stats = kernels.divergence(student, teacher, None, options)
    upstream = torch.ones_like(result)
    # Every row: that is OPSD's backward, and no memset of zeros beside the kernel.
    return lambda: kernels.divergence_backward(upstream, student, teacher, None, stats, options), both * 3 // 2


def measured(run, repeats: int, device: torch.device) -> float:
    """Milliseconds, median; the first launches compile and warm up."""
    for _ in range(3):
        run()
    return 1e3 * statistics.median(elapsed(run, device) for _ in range(repeats))


def ceilings(device: torch.device, repeats: int) -> dict[str, float]:
    """TB/s that a copy moves, read and written, and that a sum reads: of 4 GiB."""
    source, target = (torch.ones(2**30, device=device) for _ in range(2))
    copy = measured(functools.partial(target.copy_, source), repeats, device)
    read = measured(source.sum, repeats, device)
    return dict(copy=2 * source.nbytes / copy / 1e9, read=source.nbytes / read / 1e9)


def main() -> None:
    # These turn Triton's interpreter off for the whole process, and `runs` is also tried with it.
    from benchmarks.gpu_compile import variants
    from benchmarks.gpu_static import TOKENS, VOCABULARY

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=TOKENS)
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--write", type=Path, help="gets a line of JSON for each, as soon as it is measured")
    arguments = parser.parse_args()
    rows, vocab = arguments.rows, arguments.vocab
    if not torch.cuda.is_available():
        raise SystemExit("gpu_measure times a GPU, and there is none; `python -m benchmarks.gpu_static` needs none")
    device = torch.device("cuda")
    print(", ".join(f"{name} {value}" for name, value in machine("cuda").items()))
    rates = ceilings(device, arguments.repeats)
    print(f"A copy moves {rates['copy']:.2f} TB/s, a sum reads {rates['read']:.2f} TB/s.\n")
    print("| kernel | measured, ms | TB/s | of a copy's rate |\n|---|---|---|---|")
    for variant in variants():
        # A few rows are split by themselves; part_sums belongs to that. Aligned rows are never without groups.
        if variant.split()[0] in ("select", "part_sums") or "split" in variant or "without groups" in variant:
            continue
        dtype = DTYPES[variant.split()[1]]
        pad = 1 if "unaligned" in variant else 0  # an odd stride: rows that begin anywhere
        generator = torch.Generator(device).manual_seed(0)
        shape = max(1, rows // SEQUENCE), min(rows, SEQUENCE), vocab + pad
        student = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(3)
        teacher = torch.randn(shape, generator=generator, device=device, dtype=dtype).add_(student)
        sampled_ids = torch.randint(vocab, shape[:2], generator=generator, device=device)
        run, moved = runs(variant, student[..., :vocab], teacher[..., :vocab], sampled_ids)
        milliseconds = measured(run, arguments.repeats, device)
        rate = moved / milliseconds / 1e9
        print(f"| {variant} | {milliseconds:.3g} | {rate:.2f} | {rate / rates['copy']:.0%} |", flush=True)
        if arguments.write:
            line = dict(kernel=variant, milliseconds=milliseconds, terabytes_a_second=rate, rows=rows, vocab=vocab)
            with arguments.write.open("a") as out:
                out.write(json.dumps(line | dict(gpu=torch.cuda.get_device_name(), copies=rates["copy"])) + "\n")
        del student, teacher, run


if __name__ == "__main__":
    main()
