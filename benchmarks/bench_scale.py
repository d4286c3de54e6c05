"""How time and memory grow with rows and with vocabulary, from hidden states to gradients.

All rows are scored, and 5 of every 512 trained on.

    python -m benchmarks.bench_scale [--quick --hidden 256 --repeats 9 --json --write docs/benchmarks]

Fitted are exponents, by least squares on log-log. Extra memory is what is held at once beside the inputs
and their gradients, with the workspace that is kept from call to call. Liger's chunked JSD trains on every row and is
there where that takes seconds. `--quick` leaves out the most rows, which take a minute a run on two cores; `--rows` and
`--vocab` name the largest of a smaller sweep.
"""

import argparse
import functools
import statistics
from math import log

import torch
from torch import Tensor

from benchmarks.bench_linear import NUM_KEPT, heads, liger, rmsd
from benchmarks.common import Result, assert_parity, command_line, compare, elapsed, input_sets, report
from rmsd_kernels import linear_token_scores, reference

SEQUENCE = 512
ROWS, VOCAB = (512, 2048, 8192, 32_768), 151_936
VOCABS = (8192, 16_384, 32_768, 65_536, 131_072, VOCAB, 262_144)
PEER_ROWS = 512
OURS = "scores, selection, divergence"
# Flat means an exponent of 0, and is allowed the same 0.05: the scores themselves are 28 bytes a row.
AIMS = dict(exponent_rows=1.05, exponent_vocab=1.05, memory_exponent_rows=0.05, megabytes=64.0)


def bench(rows: int, vocab: int, repeats: int, arguments: argparse.Namespace) -> list[Result]:
    device, sequences = arguments.device, max(1, rows // SEQUENCE)
    inputs = input_sets(lambda seed: heads(rows, arguments.hidden, vocab, device, seed), device)
    contestants = {OURS: functools.partial(rmsd, sequences=sequences, backend=arguments.backend)}
    if rows <= PEER_ROWS:
        contestants["Liger chunked JSD"] = liger
    trained = NUM_KEPT * sequences

    def check(name: str, outcome) -> None:
        check_few(name, outcome[1], inputs[0], trained if name == OURS else rows, arguments.backend)

    return compare(
        f"{trained} of {rows} rows, H {arguments.hidden}, V {vocab}, fp32",
        (rows, vocab),
        contestants,
        inputs,
        unavoidable_flops(rows, vocab, arguments.hidden),
        repeats,
        check,
        must_exist=inputs[0][0].nbytes + inputs[0][1].nbytes,
        unit="GFLOP/s",
    )


def unavoidable_flops(rows: int, vocab: int, hidden_size: int) -> int:
    """Both projections of every row; the kept rows' once more, and the two products of their gradient."""
    return (2 * rows + 4 * NUM_KEPT * max(1, rows // SEQUENCE)) * 2 * hidden_size * vocab


def check_few(name: str, grad_hidden: Tensor, inputs: tuple[Tensor, ...], trained: int, backend: str) -> None:
    """Eight rows' scores, and eight trained rows' gradient of the mean jsd, against fp64."""
    kept = grad_hidden.ne(0).any(-1).nonzero().flatten()
    assert len(kept) == trained, f"{name} trained on {len(kept)} rows, not {trained}"
    *models, sampled_ids = inputs
    student_hidden, student_weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in models)

    def truth_logits(rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        pairs = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
        return tuple(hidden[rows].double() @ weight.double().T for hidden, weight in pairs)

    if name == OURS:
        few = slice(-8, None)
        with torch.no_grad():
            scores = linear_token_scores(
                student_hidden[few],
                student_weight,
                teacher_hidden[few],
                teacher_weight,
                sampled_ids[few],
                backend=backend,
            )
        truth = reference.token_scores(*truth_logits(few), sampled_ids[few])
        for score_name, score in scores._asdict().items():
            assert_parity(score_name, score, getattr(truth, score_name), 1e-5)
    student, teacher = truth_logits(kept[-8:])
    student.requires_grad_()
    (grad_logits,) = torch.autograd.grad(reference.token_divergence(student, teacher, divergence="jsd").sum(), student)
    # The mean's gradient is that much smaller: held to the tolerance of a row of its own.
    grad = trained * grad_hidden[kept[-8:]]
    assert_parity(f"{name}: gradient", grad, grad_logits @ student_weight.double(), 1e-5)


def gemm_rate(rows: int, vocab: int, hidden_size: int, repeats: int, device: str) -> float:
    """GFLOP/s of one model's projection of a sequence, into memory that is there already: the roofline's height."""
    hidden, weight = (torch.randn(n, hidden_size, device=device) for n in (rows, vocab))
    logits = torch.empty(rows, vocab, device=device)
    project = functools.partial(torch.mm, hidden, weight.T, out=logits)
    project()
    seconds = statistics.median(elapsed(project, hidden.device) for _ in range(repeats))
    return 2 * rows * vocab * hidden_size / seconds / 1e9


def exponent(sizes: list[int], measured: list[float]) -> float:
    """b of the least-squares fit log(measured) = a + b log(size)."""
    return statistics.linear_regression([*map(log, sizes)], [*map(log, measured)]).slope


def fits(results: list[Result], rows: tuple[int, ...], vocabs: tuple[int, ...], vocab: int) -> dict[str, float]:
    """The exponents of time and memory, and the most memory."""
    ours = {(result.rows, result.vocab): result for result in results if result.contestant == OURS}
    by_rows, by_vocab = [ours[n, vocab] for n in rows], [ours[rows[0], v] for v in vocabs]
    return dict(
        exponent_rows=exponent([r.rows for r in by_rows], [r.milliseconds for r in by_rows]),
        exponent_vocab=exponent([r.vocab for r in by_vocab], [r.milliseconds for r in by_vocab]),
        memory_exponent_rows=exponent([r.rows for r in by_rows], [r.extra_megabytes for r in by_rows]),
        megabytes=max(result.extra_megabytes for result in ours.values()),
    )


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [], hidden=256, dtypes=(), quick="leave out the most rows")
    if arguments.sizes:  # the largest of a small sweep
        (top_rows, vocab), *_ = arguments.sizes
        rows, vocabs = (top_rows // 4, top_rows // 2, top_rows), (vocab // 4, vocab // 2, vocab)
    else:
        rows, vocabs, vocab = ROWS, VOCABS, VOCAB
    if arguments.quick:
        rows = rows[:-1]
    rate = gemm_rate(rows[0], vocab, arguments.hidden, arguments.repeats, arguments.device)
    results = []
    for n, v in sorted({(rows[0], v) for v in vocabs} | {(n, vocab) for n in rows}):
        # Two where a run takes ten seconds, one where it takes a minute.
        repeats = max(1, min(arguments.repeats, 32 * SEQUENCE // n))
        results += bench(n, v, repeats, arguments)
    found = fits(results, rows, vocabs, vocab)
    report(results, arguments, "scale", gemm_rate=rate, hidden=arguments.hidden, fits=found, aims=AIMS)
    if not arguments.json:
        print(f"\nA bare projection runs at {rate:.1f} GFLOP/s.")
        for name, what in (
            ("exponent_rows", "time ~ rows^"),
            ("exponent_vocab", "time ~ vocabulary^"),
            ("memory_exponent_rows", "extra memory ~ rows^"),
            ("megabytes", "most extra memory, MB: "),
        ):
            met = "met" if found[name] <= AIMS[name] else "MISSED"
            print(f"{what}{found[name]:.3f}, aim: at most {AIMS[name]:g}: {met}")


if __name__ == "__main__":
    main()
