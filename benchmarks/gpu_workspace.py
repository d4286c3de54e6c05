"""How large a chunk's room should be on a GPU: `python -m benchmarks.gpu_workspace`.

    python -m benchmarks.gpu_workspace [--rows 2048 --vocab 151936 --hidden 2560 --repeats 5 --write FILE]

Scores from hidden states in bf16, with less and more room for the logits of a chunk of rows. On a CPU it runs as well,
for a look at the command.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch

from benchmarks.common import default_device, elapsed, machine
from rmsd_kernels import linear_token_scores

WORKSPACES = (1024, 128, 256, 512, 2048, 4096)  # MB; today's first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="gets a line of JSON for each, as soon as it is measured")
    arguments = parser.parse_args()
    device = default_device()
    print(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    made = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    hidden = [torch.randn(arguments.rows, arguments.hidden, **made).bfloat16() for _ in range(2)]
    heads = [torch.randn(arguments.vocab, arguments.hidden, **made).mul_(0.05).bfloat16() for _ in range(2)]
    ids = torch.randint(arguments.vocab, (arguments.rows,), **made)
    inputs = hidden[0], heads[0], hidden[1], heads[1], ids
    print("| workspace, MB | ms |\n|---|---|")
    for workspace_mb in WORKSPACES:
        with torch.no_grad():
            run = functools.partial(linear_token_scores, *inputs, workspace_mb=workspace_mb)
            run()  # compiles
            times = [elapsed(run, torch.device(device)) for _ in range(arguments.repeats)]
        milliseconds = 1e3 * statistics.median(times)
        print(f"| {workspace_mb} | {milliseconds:.3g} |", flush=True)
        if arguments.write:
            line = dict(workspace_mb=workspace_mb, milliseconds=milliseconds, rows=arguments.rows, device=device)
            with arguments.write.open("a") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
