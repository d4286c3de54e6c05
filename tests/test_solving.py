"""Held-out requests of a task with an environment: what an evaluation, `rmsd eval` and `rmsd preflight` say of them.
And which checkpoint is the best by that."""

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from test_environments import CHAT, talkative
from test_episodes import TOKENIZER, Counter, call, stub

from rmsd.answers import episodes as module
from rmsd.answers.calls import Call
from rmsd.answers.environments import Environments
from rmsd.answers.prompts import Prompts
from rmsd.answers.rollout import eos_ids_of, generate
from rmsd.run import solving
from rmsd.run.evaluate import Evaluator
from rmsd.run.preflight import preflight
from rmsd.run.recipe import load_recipe
from rmsd.run.train import evaluate, train
from rmsd.tasks import Task, load_task
from rmsd.training.record import read_lines


@pytest.fixture(autouse=True)
def template_with_tools(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)


def test_an_evaluation_says_what_is_solved_in_how_many_turns_and_tokens_with_how_many_errors(monkeypatch):
    asked = []

    class Engine:
        def __init__(self, autocast):
            self.write = None

        def sync(self, model):
            self.write = stub([call("add", n=3), call("oops")], ["Done.", "Done."])

        def turns(self):
            return torch.no_grad()

        def __call__(self, prompt_ids, *, temperature, **options):
            asked.append((temperature, TOKENIZER.decode(prompt_ids[0])))
            return self.write(prompt_ids, **options)

    monkeypatch.setattr(solving, "TransformersEngine", Engine)
    environments = Environments(environment_factory=Counter)
    requests = [{"prompt": "Which tool?", "privileged_context": "zorblat"}] * 2
    task = Task([], [], ["Acme?"], {}, lambda answer: False, Counter, requests)
    model = tiny.model()
    episodes = module.Episodes(TOKENIZER, environments)
    evaluator = Evaluator(
        model,
        TOKENIZER,
        task,
        samples=1,
        max_new_tokens=200,
        episodes=episodes,
        prompts=Prompts(TOKENIZER, place="system", tools=environments.schemas),
    )
    evaluator.max_new_tokens = 3
    metrics = evaluator(model)
    tokens = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in (call("add", n=3), call("oops"), "Done.", "Done."))
    for how in ("greedy", "sampled"):
        assert metrics[f"solved_{how}"] == 0.5 and metrics[f"turns_{how}"] == 2.0
        assert metrics[f"tokens_{how}"] == tokens / 2 and metrics[f"tool_errors_{how}"] == 0.5
    assert {temperature for temperature, _ in asked} == {0.0, 0.5} and not any("zorblat" in text for _, text in asked)
    del asked[:]
    assert evaluator.told(model)["solved_greedy"] == 0.5 and asked[0][1].startswith("<|system|>zorblat<|end|>")


# Solved by a first turn of an even number of characters, which is what a model of random weights makes of its prompt.
TASK = """
from rmsd.tasks import Task, load_task

class Service:
    def reset(self, **row):
        self.lengths = []

    def say(self, length: int) -> str:
        \"\"\"Says how long a turn was.

        Args:
            length: Of the turn.
        \"\"\"
        self.lengths.append(length)
        return "ok"

    def get_reward(self) -> float:
        return float(SOLVED)

requests = [{"prompt": f"Which tool {i}?", "privileged_context": f"zorblat {7 * i}"} for i in range(6)]
TASK = Task(requests[:4], [], ["Acme?"], {}, lambda answer: False, Service, requests)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Of a model whose every turn is taken for a call."""
    monkeypatch.setattr(module, "calls_of", lambda text, names: [Call("say", {"length": len(text)})])

    def write(solved="self.lengths[0] % 2 == 0", **options):
        tiny.loud(talkative()).save_pretrained(tmp_path / "tiny")
        TOKENIZER.save_pretrained(tmp_path / "tiny")
        (tmp_path / "task.py").write_text(TASK.replace("SOLVED", solved))
        given = dict(use_cpu=True, vocab_topk=None, max_turns=2, max_completion_length=60, self_check=False)
        values = {
            "model": str(tmp_path / "tiny"),
            "task": str(tmp_path / "task.py"),
            "output_dir": str(tmp_path / "run"),
            "judge": {"kind": "magnitude"},
            "evaluate": {"samples": 0, "max_new_tokens": 60},
            "train": {**given, "per_device_train_batch_size": 2, "max_steps": 3, "disable_tqdm": True, **options},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "recipe.yaml")

    return write


def shares(tmp_path):
    """(untold, told) that the saved model solves, by its first turns as `generate` writes them."""
    model = talkative().from_pretrained(tmp_path / "tiny").eval()
    task, eos_ids = load_task(str(tmp_path / "task.py")), eos_ids_of(model, TOKENIZER)
    prompts = Prompts(TOKENIZER, tools=Environments(environment_factory=task.environment).schemas)
    options = dict(max_new_tokens=60, pad_id=0, eos_ids=eos_ids, temperature=0.0)
    found = []
    for encoded in (prompts.student, prompts.teacher):
        written = generate(model, list(map(encoded, task.requests)), **options)
        turns = [ids[mask].tolist() for ids, mask in zip(written.completion_ids, written.completion_mask, strict=True)]
        assert all(turn[-1] in eos_ids for turn in turns), "a turn that is cut calls nothing"
        found.append(sum(len(TOKENIZER.decode(turn[:-1])) % 2 == 0 for turn in turns) / len(turns))
    assert found[0] != found[1]
    return found


def test_preflight_says_what_is_solved_untold_and_told(recipe, tmp_path):
    said = preflight(recipe(), prompts=6)
    untold, told = shares(tmp_path)
    assert "obedience: share of 6 held-out requests that are solved, greedily" in said
    assert f"{untold:>8.2f}  untold, in 2.0 turns, 0% of calls in error" in said
    assert f"{told:>8.2f}  told, in 2.0 turns, 0% of calls in error" in said
    assert f"The told teacher obeys in {told:.0%} of answers (untold {untold:.0%})" in said


def test_eval_says_beside_before_and_after_what_the_told_model_solves(recipe, tmp_path):
    lines = [line.split() for line in evaluate(recipe(), str(tmp_path / "tiny")).splitlines()]
    untold, told = shares(tmp_path)
    assert lines[0] == ["before", "told", "after"]
    assert next(line for line in lines if line[0] == "solved_greedy")[1:] == [
        f"{share:.3f}" for share in (untold, told, untold)
    ]


def test_the_best_model_by_score_is_what_is_saved(recipe, tmp_path):
    """All is solved from the start, so the score is what is left after drift, and the first checkpoint's the best."""
    options = dict(load_best_model_at_end=True, metric_for_best_model="score", save_steps=1, learning_rate=1e-2)
    made = recipe("1", **options, min_gap=0.0)
    made.evaluate.every = 1
    train(made)
    run = tmp_path / "run"
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3], "the best one is evaluated at the end"
    _, first, second, third, best = (line["score"] for line in lines)
    assert first == best > max(second, third)
    saved, first, last = (
        load_file(run / name / "model.safetensors") for name in ("model", "checkpoint-1", "checkpoint-3")
    )
    assert all(torch.equal(saved[name], first[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)
