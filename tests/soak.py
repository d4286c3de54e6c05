"""Five hundred steps with the judge's cache on: `python tests/soak.py [--steps 500]`.

Resident memory and open files must not grow. The judge is an endpoint on loopback, asked about whatever its cache does
not hold; checkpoints are written and rotated.
"""

import argparse
import collections
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENAI_API_KEY", "none")

import psutil
import torch
from transformers import TrainerCallback

ALLOWED_MB = 4.0  # the log history alone, a dict a step, takes about one


class Watch(TrainerCallback):
    """Resident memory in MB and open files after every step."""

    def __init__(self):
        self.process = psutil.Process()
        self.memory, self.files = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.memory.append(self.process.memory_info().rss / 2**20)
        self.files.append(self.process.num_fds())


def soak(folder: Path, steps: int) -> tuple[Watch, dict]:
    import tiny
    from test_judge_server import Server, keep

    from rmsd.judge import CachedJudge, LLMJudge
    from rmsd.training.record import RunRecord

    torch.set_num_threads(1)
    server = Server()
    server.script, server.requests = [keep(1, 2)], collections.deque(maxlen=1)
    judge = CachedJudge(LLMJudge("m", base_url=server.url), folder / "cache")
    watch = Watch()
    made = tiny.trainer(
        folder / "run",
        callbacks=[watch, RunRecord(folder / "run")],
        judge=judge,
        max_steps=steps,
        teacher="ema",
        learning_rate=1e-4,
        save_strategy="steps",
        save_steps=50,
        save_total_limit=2,
    )
    made.train()
    server.http.shutdown()
    return watch, judge.stats


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        watch, stats = soak(Path(folder), steps)
    # The first fifth fills caches and pools; after it the middles of the next and of the last fifth are compared.
    fifth = steps // 5
    print(f"{steps} steps, judge's cache: {stats}")
    for start in range(0, steps, fifth):
        memory, files = watch.memory[start : start + fifth], watch.files[start : start + fifth]
        print(f"steps {start + 1:3}-{start + fifth:3}: {statistics.median(memory):7.1f} MB, {max(files)} files at most")
    growth = statistics.median(watch.memory[-fifth:]) - statistics.median(watch.memory[fifth : 2 * fifth])
    print(f"growth {growth:.1f} MB")
    assert growth < ALLOWED_MB
    assert max(watch.files[-fifth:]) <= max(watch.files[fifth : 2 * fifth])
    assert stats["misses"] and stats["hits"] + stats["misses"] > steps and not stats["corrupt"]
