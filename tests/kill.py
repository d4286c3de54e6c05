"""Kills one run again and again: `python tests/kill.py [--kills 10] [--episode-kills 3] [--seed 0]`.

A tiny model trains in a process that is killed (SIGKILL) at random moments, among them while a checkpoint is written.
Every restart must go on from the last whole checkpoint, and the end must be the uninterrupted run's, bit for bit. So
does a second run, whose rollouts are episodes with an environment.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file

import rmsd.run.train
from rmsd.run.recipe import load_recipe
from rmsd.training.checkpoint import last_whole_checkpoint
from rmsd.training.record import read_lines

# Forked, so that a start costs no imports; this process itself computes nothing and starts no threads.
fork = multiprocessing.get_context("fork")


# Whatever a turn says is taken for a call, for random weights write none. What the environment draws, says and feeds
# back follows from its row and from what was called before.
ENVIRONMENT = """
import random

from rmsd.answers import episodes
from rmsd.answers.calls import Call

episodes.calls_of = lambda text, names: [Call("draw", {"upto": 1 + len(text) % 9})]

class ENVIRONMENT:
    def reset(self, prompt, **row):
        self.chance, self.drawn = random.Random(str(prompt)), []

    def draw(self, upto: int) -> str:
        \"\"\"Draws a number.

        Args:
            upto: The largest.
        \"\"\"
        self.drawn.append(self.chance.randint(0, upto))
        return f"drew {self.drawn[-1]}"

    def feedback(self) -> str:
        return f"zorblat {sum(self.drawn)}"
"""


def prepare(folder: Path, steps: int, episodes: bool) -> None:
    import tiny
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer, more = tiny.model(), tiny.tokenizer(), ""
    if episodes:
        model.generation_config.eos_token_id = [0, *range(100, 200)]  # turns end
        tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + tiny.CHAT
        (folder / "environment.py").write_text(ENVIRONMENT)
        more = f"environment: {folder}/environment.py\n"
    length = "max_completion_length: 60, max_turns: 2" if episodes else "max_completion_length: 6"
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS * 3))
    (folder / "recipe.yaml").write_text(
        f"model: {folder}/tiny\ndata: {folder}/rows.jsonl\njudge: {{kind: magnitude, cache: {folder}/cache}}\n"
        f"{more}train: {{max_steps: {steps}, save_steps: 2, save_total_limit: 3, use_cpu: true, {length},"
        " learning_rate: 1e-3, lr_scheduler_type: cosine, warmup_steps: 5, per_device_train_batch_size: 4,"
        " teacher: ema, vocab_topk: null, disable_tqdm: true}\n"
    )


def train(folder: Path, name: str) -> None:
    os.dup2(os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    rmsd.run.train.train(load_recipe(folder / "recipe.yaml", [f"output_dir={folder / name}", "resume=true"]))


def start(function, *arguments):
    process = fork.Process(target=function, args=arguments)
    process.start()
    return process


def finish(process) -> None:
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def step_of(run: Path) -> int:
    """The last step that the run has logged."""
    lines = read_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def kill_at_random(folder: Path, steps: int, chance: random.Random) -> dict:
    """Starts or resumes the run, lets it go on for a few steps, and kills it. Returns what was found after."""
    run = folder / "killed"
    whole = last_whole_checkpoint(run)
    resumed = int(whole.name.rpartition("-")[2]) if whole else 0
    before = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else 0
    process = start(train, folder, "killed")
    target = min(resumed + chance.randint(1 if resumed else 3, 7), steps - 1)  # the first leaves a checkpoint
    # Metrics are rewritten up to the checkpoint when training begins: until then they are the last process's.
    while process.is_alive() and not (
        (run / "metrics.jsonl").exists()
        and (run / "metrics.jsonl").stat().st_mtime_ns != before
        and step_of(run) >= target
    ):
        time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.06))
    assert process.is_alive(), f"died by itself: {(folder / 'killed.log').read_text()[-2000:]}"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    steps_made = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps_made == list(range(1, len(steps_made) + 1)) and len(steps_made) >= target > resumed
    torn = [path for path in run.glob("checkpoint-*") if not (path / "trainer_state.json").exists()]
    return {"resumed": resumed, "reached": steps_made[-1], "torn": len(torn)}


def kill_and_compare(folder: Path, kills: int, seed: int, steps: int, episodes: bool = False) -> list[dict]:
    """Raises AssertionError where a promise is broken."""
    chance = random.Random(seed)
    finish(start(prepare, folder, steps, episodes))
    finish(start(train, folder, "whole"))
    found = [kill_at_random(folder, steps, chance) for _ in range(kills)]
    finish(start(train, folder, "killed"))
    whole, killed = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole), "the weights differ"
    lines = {name: read_lines(folder / name / "metrics.jsonl") for name in ("whole", "killed")}
    assert [line["step"] for line in lines["killed"]] == list(range(1, steps + 1))
    assert [line["loss"] for line in lines["whole"]] == [line["loss"] for line in lines["killed"]]
    rollouts = {name: read_lines(folder / name / "rollouts.jsonl") for name in ("whole", "killed")}
    assert rollouts["whole"] == rollouts["killed"] and len(rollouts["whole"]) >= steps
    if episodes:
        assert all(line["episode"]["calls"] == 1 for line in rollouts["whole"]), "turns that call"
        assert len({line["privileged_context"] for line in rollouts["whole"]}) > 5, "what the environment drew is told"
    initial = load_file(folder / "tiny" / "model.safetensors")
    assert not all(torch.equal(whole[name], initial[name]) for name in whole), "nothing was trained"
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--episode-kills", type=int, default=3, help="of a run with an environment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    for episodes, kills in ((False, options.kills), (True, options.episode_kills)):
        if not kills:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = kill_and_compare(Path(folder), kills, options.seed, options.steps, episodes)
        for number, kill in enumerate(found, 1):
            print(f"kill {number:2}: resumed from step {kill['resumed']}, killed after step {kill['reached']}", end="")
            print(f", {kill['torn']} checkpoint torn" if kill["torn"] else "")
        torn = sum(kill["torn"] > 0 for kill in found)
        print(
            f"{len(found)} kills{' of episodes' * episodes}, {torn} while a checkpoint was written; {options.steps} "
            "steps; weights and rollouts equal bit for bit"
        )
