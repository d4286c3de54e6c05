"""Proof on a real model: every method on the published task, with what each learned and what each forgot.

    python -m benchmarks.proof                          # all that is not there yet, one run after the other: days
    python -m benchmarks.proof --quick                  # OPSD beside RMSD, one seed, 30 steps: under 90 minutes
    python -m benchmarks.proof --only opsd rmsd_contrast --seeds 0 1 2
    python -m benchmarks.proof --plan                   # what is there and what is still to run
    python -m benchmarks.proof --table                  # docs/proof.md's table from what is there

The model is Qwen2.5-Coder-0.5B-Instruct, the task the spelling "pinapple". A run is a folder under runs/proof and a
small file of marks under docs/proof, written as it ends. A run that is there is not run again, one that was interrupted
goes on. With --set it is a trial: its folder has a name of its own, its marks are kept in runs/proof/marks, and no page
is written. `methods` says what is run, `baselines` trains by other means than ours, `table` prints.
"""
