"""The files in examples/ run against the versions that constraints.txt pins, each on a tiny model."""

import copy
import functools
import importlib.util
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from rmsd import MagnitudeJudge, RMSDTrainer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def model(tmp_path) -> str:
    """Sure enough of what it writes that a hint in its prompt changes it."""
    folder = tmp_path / "tiny"
    tiny.model(initializer_range=0.2).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def example(monkeypatch):
    """A function that imports a file of examples/ as a script finds it: beside the others."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name: str):
        for module in ("plain_loop", name):
            sys.modules.pop(module, None)
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def moved(trained: torch.nn.Module) -> float:
    before = tiny.model(initializer_range=0.2).state_dict()
    return max((trained.state_dict()[name] - weight).abs().max().item() for name, weight in before.items())


def test_the_plain_loop_learns(example, model):
    losses = example("plain_loop").main([model, "--steps", "10", "--length", "6", "--learning-rate", "3e-3"])
    assert len(losses) == 10 and sum(losses[5:]) / 5 < 0.6 * losses[0]


def test_the_plain_loop_s_logits_are_those_that_the_answer_was_drawn_from(example, model):
    """Each row alone, without padding, gives the same: on the left prompts are padded, on the right answers."""
    loop, student, tokenizer = example("plain_loop"), tiny.model(), tiny.tokenizer()
    prompts = loop.encode(tokenizer, ["Which tool?", "What is it called at Acme?"])
    answer = torch.tensor([[7, 9, 11], [12, tokenizer.eos_token_id, tokenizer.eos_token_id]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logits = loop.answer_logits(student, *prompts, answer, mask)
    for b, prompt in enumerate(["Which tool?", "What is it called at Acme?"]):
        ids, attended = loop.encode(tokenizer, [prompt])
        assert attended.all()
        alone = student(torch.cat([ids, answer[b : b + 1, mask[b]]], 1)).logits[0, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(logits[b, mask[b]], alone)


def test_the_loop_by_accelerate_trains(example, model, tmp_path, environment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    output = tmp_path / "out"
    trained = example("accelerate_loop").main(
        [model, "--steps", "2", "--length", "4", "--rows", "3", "--learning-rate", "1e-2", "--output", str(output)]
    )
    assert moved(trained) > 1e-3 and (output / "model.safetensors").is_file()


def test_a_judge_of_one_s_own_says_what_is_trained_on(example, model, tmp_path):
    judge = example("own_judge")
    words = sorted({word for word in map(tiny.tokenizer().decode, range(len(tiny.tokenizer()))) if word.isalpha()})
    kept = {}
    for name, wanted in {"none": ["no-such-word"], "all": words}.items():
        arguments = [model, "--steps", "1", "--length", "6", "--output", str(tmp_path / name), "--words", *wanted]
        kept[name] = judge.main(arguments).state.log_history[0]["kept_tokens"]
    assert kept["none"] == 0 < kept["all"]
    wanted = judge.WordJudge("zorblat").wanted
    assert wanted(" zor") and wanted("Z") and not wanted("x") and not wanted(" ")


def test_trl_s_trainer_trains_on_what_the_judge_keeps(example, model, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs TRL: pip install trl")
    module = example("trl_sdft")
    arguments = [model, "--steps", "2", "--length", "4", "--output", str(tmp_path / "out")]
    asked = []

    class FirstOnly:
        def __init__(self, known):
            pass

        def __call__(self, questions):
            asked.extend(questions)
            return [[q.candidates[0].position] if q.privileged_context else [] for q in questions]

    monkeypatch.setattr(module, "ContextJudge", FirstOnly)
    trainer = module.main(arguments)
    assert moved(trainer.model) > 1e-6
    logged = [entry["rmsd/kept_tokens"] for entry in trainer.state.log_history if "rmsd/kept_tokens" in entry]
    assert logged == [4, 4] and len(asked) == 8
    assert {q.prompt for q in asked} <= {row["prompt"] for row in module.ROWS}
    assert all(
        q.candidates and q.max_kept == 5 and q.tokens[c.position] == c.token for q in asked for c in q.candidates
    )

    monkeypatch.setattr(FirstOnly, "__call__", lambda self, questions: [[] for _ in questions])
    assert moved(module.main(arguments).model) == 0, "nothing kept, nothing trained"


@pytest.mark.long
def test_accelerate_launch_and_the_hub(model, tmp_path, hub):
    """As a user starts it; the Hub is one on loopback."""
    output = tmp_path / "out"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    arguments = [model, "--steps", "1", "--length", "4", "--output", str(output), "--hub", "me/model"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [*launcher, str(EXAMPLES / "own_judge.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.created[0]["name"] == "model"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert hub.files["model.safetensors"] == (output / "model.safetensors").read_bytes()


def test_trackers_are_told_every_step_s_numbers(example, model, tmp_path, monkeypatch):
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true", "TRACKIO_DIR": tmp_path}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))  # before the imports that read them
    for name in ("tensorboard", "trackio", "wandb"):
        pytest.importorskip(name, reason="needs the extra `trackers`")
    arguments = [model, "--steps", "2", "--length", "4", "--output", str(tmp_path / "out")]
    example("own_judge").main([*arguments, "--report-to", "tensorboard", "trackio", "wandb"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("train/kept_tokens")] == [1, 2]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    (database,) = tmp_path.glob("*.db")
    rows = sqlite3.connect(database).execute("select metrics from metrics").fetchall()
    assert any("train/kept_tokens" in str(metrics) for (metrics,) in rows)


def test_an_environment_tells_the_teacher_what_it_has_seen(example, tmp_path):
    """The rows say nothing themselves, so that without what it tells there would be nothing to learn. A tiny model of
    random weights calls nothing; test_episodes.py has those that do."""
    folder = tmp_path / "tiny"
    tiny.model(initializer_range=0.2, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer = copy.copy(tiny.tokenizer())
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + tiny.CHAT
    tokenizer.save_pretrained(folder)
    shop = example("environment")
    # The context judge would find none of its words in what random weights say.
    shop.RMSDTrainer = functools.partial(RMSDTrainer, judge=MagnitudeJudge())
    arguments = [str(folder), "--steps", "1", "--length", "8", "--output", str(tmp_path / "run")]
    assert moved(shop.main(arguments).model) > 0
    shop.Shop.feedback = lambda self: ""
    assert moved(shop.main(arguments).model) < 1e-6

    made = shop.Shop()
    made.reset(wanted=["plums", 12])
    assert made.get_reward() == 0.0
    made.order("plums", 1)
    assert made.get_reward() == 1.0
