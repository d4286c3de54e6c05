"""Two options that are not built, timed on the GPU that is here: `python -m benchmarks.gpu_options`.

    python -m benchmarks.gpu_options [--rows 4096 --vocab 151936 --hidden 2560 --chunk 512 --repeats 7 --write FILE]

A JSD whose rows are each read by a cluster of processors: fewer rows are then under way at once, so that L2 may still
hold them for the second visit. And scores from hidden states whose chunks are scanned on a second stream, while the
next chunk's product runs. Nothing in the package changes; each result is compared before it is timed. Clusters need a
GPU of compute capability 9.0 or above.
"""

import argparse
import contextlib
import functools
import importlib
import json
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_measure import measured, runs
from rmsd_kernels import triton as kernels
from rmsd_kernels.options import Options, complete_options
from rmsd_kernels.triton import launch

CLUSTERS = (1, 2, 4, 8)


@contextlib.contextmanager
def clusters(num_ctas: int, dtype: torch.dtype):
    """Each program is a cluster of `num_ctas` blocks, and its tile as many times wider."""
    tile = launch.TILES[dtype]

    def launch_clusters(kernel, programs: int, _tensor: Tensor, **arguments) -> None:
        options = launch.register_limit(arguments) | dict(num_warps=tile.lanes // 32, num_ctas=num_ctas)
        kernel[(programs,)](**arguments, **options, num_stages=1, enable_fp_fusion=True)

    with (
        mock.patch.dict(launch.TILES, {dtype: tile._replace(lanes=tile.lanes * num_ctas)}),
        mock.patch.object(importlib.import_module("rmsd_kernels.triton.divergence"), "launch", launch_clusters),
    ):
        yield


def scores_in_chunks(
    hidden: list[Tensor],  # the student's and the teacher's, (N, H)
    weights: list[Tensor],  # (V, H)
    ids: Tensor,  # (N,)
    chunk: int,
    options: Options,
    stream: torch.cuda.Stream | None,
) -> Tensor:
    """(7, N) scores; on `stream`, where there is one, a chunk is scanned beside the next one's product."""
    products = torch.cuda.current_stream()
    rooms = [
        [torch.empty(1, chunk, len(weight), dtype=weight.dtype, device="cuda") for weight in weights] for _ in "ab"
    ]
    is_scanned: list[torch.cuda.Event | None] = [None, None]
    found = []
    for number, start in enumerate(range(0, hidden[0].shape[0], chunk)):
        room = rooms[number % 2]
        if stream and is_scanned[number % 2]:
            products.wait_event(is_scanned[number % 2])
        for rows, weight, logits in zip(hidden, weights, room, strict=True):
            torch.mm(rows[start : start + chunk], weight.T, out=logits[0])
        if stream:
            stream.wait_stream(products)
        with torch.cuda.stream(stream):
            found.append(kernels.scores(*room, ids[None, start : start + chunk], options)[:, 0])
            if stream:
                is_scanned[number % 2] = stream.record_event()
    if stream:
        products.wait_stream(stream)
    return torch.cat(found, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--chunk", type=int, default=512, help="rows of a chunk; it divides --rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, help="gets a line of JSON for each, as soon as it is measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_options times a GPU, and there is none")
    rows, vocab, device = arguments.rows, arguments.vocab, torch.device("cuda")
    made = dict(generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=torch.bfloat16)

    def report(option: str, run) -> None:
        milliseconds = measured(run, arguments.repeats, device)
        print(f"| {option} | {milliseconds:.3g} |", flush=True)
        if arguments.write:
            with arguments.write.open("a") as out:
                out.write(json.dumps(dict(option=option, milliseconds=milliseconds, rows=rows, vocab=vocab)) + "\n")

    print("| option | ms |\n|---|---|")
    ids = torch.randint(vocab, (rows,), device="cuda", generator=made["generator"])
    if torch.cuda.get_device_capability() >= (9, 0):
        student = torch.randn(1, rows, vocab, **made).mul_(3)
        teacher = torch.randn(1, rows, vocab, **made).add_(student)
        run, _ = runs("divergence bf16 jsd", student, teacher, ids[None])
        expected = run()[0]
        for num_ctas in CLUSTERS:
            with clusters(num_ctas, torch.bfloat16):
                torch.testing.assert_close(run()[0], expected, rtol=1e-4, atol=1e-6)
                report(f"jsd, clusters of {num_ctas}", run)
        del student, teacher, run
    hidden = [torch.randn(rows, arguments.hidden, **made) for _ in range(2)]
    weights = [torch.randn(vocab, arguments.hidden, **made).mul_(0.05) for _ in range(2)]
    options = complete_options("gpu_options", hidden[0], vocab)
    in_chunks = functools.partial(scores_in_chunks, hidden, weights, ids, arguments.chunk, options)
    second = torch.cuda.Stream()
    assert torch.equal(in_chunks(None), in_chunks(second)), "a chunk was scanned before its product was there"
    report("scores in chunks, one stream", functools.partial(in_chunks, None))
    report("scores in chunks, scanned on a second stream", functools.partial(in_chunks, second))


if __name__ == "__main__":
    main()
