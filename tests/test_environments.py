"""Training on episodes: a tiny model whose turns end early, and of which every turn is taken for a call."""

import json

import pytest
import tiny
import yaml
from test_episodes import Counter
from test_processes import launch
from tiny import same, weights

from rmsd.answers import episodes as module
from rmsd.answers.calls import Call
from rmsd.answers.engines import TransformersEngine
from rmsd.answers.rollout import Recorded, Rollouts
from rmsd.models.heads import OutputHead
from rmsd.run.recipe import load_recipe
from rmsd.run.train import train
from rmsd.training.record import RunRecord, read_lines

ROWS = [{**row, "start": i % 2} for i, row in enumerate(tiny.ROWS)]
OPTIONS = dict(max_completion_length=100, max_turns=3)


def talkative(kind="qwen2"):
    """A model whose turns end after a few tokens."""
    made = tiny.model(kind)
    made.generation_config.eos_token_id = [0, *range(100, 200)]
    return made


def call_always(text, names):
    return [Call(sorted(names)[0], {"n": 1 + len(text) % 2})]


# The tiny template behind whose first message the tools' names stand.
CHAT = tiny.CHAT.replace(
    "{% endfor %}",
    "{% if loop.first and tools %}<|system|>{% for t in tools %}{{ t.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% endfor %}",
    1,
)


@pytest.fixture(autouse=True)
def every_turn_calls(monkeypatch):
    monkeypatch.setattr(module, "calls_of", call_always)
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", CHAT)


def trainer(tmp_path, rows=ROWS, factory=Counter, **options):
    made = options.pop("trainer", {})
    callbacks = [RunRecord(tmp_path)]
    return tiny.trainer(
        tmp_path,
        talkative(),
        callbacks,
        rows=rows,
        called=dict(environment_factory=factory, **made),
        **{**OPTIONS, **options},
    )


def test_a_step_of_episodes_trains_on_the_students_turns_alone_and_says_what_happened(tmp_path):
    made = trainer(tmp_path)
    before = weights(made.model)
    made.train()
    assert not same(before, weights(made.model))
    lines = read_lines(tmp_path / "rollouts.jsonl")
    assert len(lines) == 8
    for line in lines:
        read = set(line["unwritten"])
        assert not read & {*line["candidates"], *line["kept"]}
        assert line["episode"]["turns"] == 1 + line["episode"]["calls"]
        said = "".join(line["tokens"][i] for i in sorted(read))
        assert said.count("<|tool|>now ") == line["episode"]["calls"], "a tool's turn is the tool's"
        assert "it came to" in line["privileged_context"], "the environment's feedback is what the teacher is told"
    assert any(line["episode"]["calls"] == 2 for line in lines) and any(line["kept"] for line in lines)
    assert any(line["prompt"].endswith("It is 1.") for line in lines), "what reset says is part of the prompt"
    first = made.state.log_history[0]
    assert first["turns"] == sum(line["episode"]["turns"] for line in lines[:4])
    assert first["calls"] == sum(line["episode"]["calls"] for line in lines[:4])
    assert first["solved"] == sum(line["episode"]["solved"] for line in lines[:4]) / 4
    assert first["dropped_rollouts"] == 0 and first["tool_errors"] == 0


def test_the_teacher_reads_the_same_turns_under_the_context_made_of_them(tmp_path):
    read = []

    def context_after(row, transcript):
        return f"{len(transcript)} messages"

    made = trainer(tmp_path, max_steps=1, teacher_place="system", trainer=dict(context_after=context_after))
    hidden = made.teacher.hidden
    made.teacher.hidden = lambda prompts, rollouts, pad: (
        read.append((prompts, rollouts)) or hidden(prompts, rollouts, pad)
    )
    made.train()
    ((prompts, rollouts),) = read
    for prompt, mask in zip(prompts, rollouts.completion_mask, strict=True):
        turns = int((mask[1:] & ~mask[:-1]).sum()) + int(mask[0])
        text = tiny.tokenizer().decode(prompt)
        assert text.startswith(f"<|system|>{2 * turns - 1} messages<|end|>"), (text, turns)
    assert not rollouts.completion_mask[rollouts.attention_mask].all(), "tools' turns are read"


def test_candidates_and_kept_tokens_are_of_each_turn_on_request(tmp_path):
    options = dict(num_candidates=2, num_kept=1, max_steps=1)
    trainer(tmp_path / "turn", selection_unit="turn", **options).train()
    trainer(tmp_path / "rollout", **options).train()

    def of_turns(line, name):
        starts = [i for i in range(len(line["tokens"])) if i not in line["unwritten"]]
        turns = {i: sum(j in line["unwritten"] and j - 1 in starts for j in range(i)) for i in starts}
        return [turns[i] for i in line[name]]

    per_turn, per_rollout = (read_lines(tmp_path / name / "rollouts.jsonl") for name in ("turn", "rollout"))
    for line in per_turn:
        turns = line["episode"]["turns"]
        counts = [of_turns(line, "candidates").count(turn) for turn in range(turns)]
        assert max(counts) <= 2 and len(line["kept"]) <= turns
    assert any(len(line["candidates"]) > 2 and len(line["kept"]) > 1 for line in per_turn)
    assert all(len(line["candidates"]) <= 2 and len(line["kept"]) <= 1 for line in per_rollout)


class Dying(Counter):
    def reset(self, prompt=None, **row):
        super().reset(**row)
        if "Acme" in str(prompt):
            raise RuntimeError("no database")


def test_a_rollout_whose_environment_died_is_dropped_and_counted(tmp_path):
    made = trainer(tmp_path, factory=Dying, max_steps=1)
    made.train()
    entry = made.state.log_history[0]
    assert entry["dropped_rollouts"] == 1 and entry["empty_rollouts"] == 1 and entry["kept_sequences"] == 3
    assert sum("dropped" in line["episode"] for line in read_lines(tmp_path / "rollouts.jsonl")) == 1


class Longwinded(Counter):
    def reset(self, prompt=None, **row):
        return "It is so. " * 100 if "services" in str(prompt) else super().reset(**row)


def test_a_reset_that_says_more_than_the_model_holds_drops_its_rollout(tmp_path):
    """gpt2's positions are a table: a token past its end is an error."""
    made = tiny.trainer(
        tmp_path,
        talkative("gpt2"),
        [RunRecord(tmp_path)],
        rows=ROWS,
        called=dict(environment_factory=Longwinded),
        **OPTIONS,
        max_steps=1,
    )
    made.train()
    entry = made.state.log_history[0]
    assert entry["dropped_rollouts"] == 1 and entry["kept_sequences"] == 3
    assert not any("It is so." in line["prompt"] for line in read_lines(tmp_path / "rollouts.jsonl"))


def test_a_context_made_after_the_rollout_that_the_model_cannot_hold_drops_it(tmp_path):
    """The tiny model has 256 positions; past them it would read nonsense, and an engine would end the run."""

    def context_after(row, transcript):
        return "It came to one. " * (60 if "services" in row["prompt"] else 1)

    made = trainer(tmp_path, max_steps=1, trainer=dict(context_after=context_after))
    made.train()
    entry = made.state.log_history[0]
    assert entry["dropped_rollouts"] == 1 and entry["kept_sequences"] == 3
    (dropped,) = (line for line in read_lines(tmp_path / "rollouts.jsonl") if line["episode"].get("dropped"))
    assert dropped["privileged_context"] == ROWS[3]["privileged_context"]


def test_a_step_whose_environments_all_died_trains_nothing(tmp_path):
    made = trainer(tmp_path, rows=[ROWS[2]] * 4, factory=Dying, max_steps=1)
    before = weights(made.model)
    made.train()
    assert same(before, weights(made.model)) and made.state.log_history[0]["dropped_rollouts"] == 4
    assert "solved" not in made.state.log_history[0], "of no rollout that was graded it is no number"


def test_a_resumed_run_ends_in_the_uninterrupted_runs_weights_and_episodes(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    last = [
        [line for line in read_lines(tmp_path / name / "rollouts.jsonl") if line["step"] > 2]
        for name in ("whole", "resumed")
    ]
    assert last[0] == last[1] and any(line["episode"]["calls"] for line in last[0])


class Recording(TransformersEngine):
    """An engine that records log-probabilities and no hidden states, as vLLM does; `off` by so many nats."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off, self.tokens = off, []

    def __call__(self, prompt_ids, **options):
        written = super().__call__(prompt_ids, **options)
        logprobs = OutputHead.of(self._model)(written.student_hidden).float().log_softmax(-1)
        own, top = logprobs.gather(-1, written.completion_ids.unsqueeze(-1)).squeeze(-1), logprobs.topk(2)
        self.tokens.append(int(written.completion_mask.sum()))
        recorded = Recorded(own + self.off, top.indices, top.values)
        return Rollouts(prompt_ids, written.completion_ids, written.completion_mask, recorded=recorded)


def test_the_logged_gap_is_a_mean_over_the_tokens_of_an_entry_s_micro_batches(tmp_path):
    class OffByCalls(Recording):
        def __call__(self, prompt_ids, **options):
            self.off += 0.1
            return super().__call__(prompt_ids, **options)

    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=2)
    made = tiny.trainer(tmp_path, talkative(), max_completion_length=30, **options)
    made.engine = OffByCalls()
    made.train()
    (gap,) = (entry["engine_gap"] for entry in made.state.log_history if "loss" in entry)
    tokens = made.engine.tokens
    assert len(set(tokens)) > 1, "of answers of several lengths"
    assert gap == pytest.approx(sum(0.1 * n * count for n, count in enumerate(tokens, 1)) / sum(tokens), abs=1e-3)


def test_an_engine_that_records_is_checked_over_all_turns_of_an_episode(tmp_path):
    made = trainer(tmp_path)
    made.engine = Recording()
    made.train()
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["calls"] > 0 for entry in entries] == [True, True]
    assert all(0 < entry["engine_gap"] < 1e-4 for entry in entries), "a rounding"
    made = trainer(tmp_path / "off")
    made.engine = Recording(off=0.6)
    with pytest.raises(RuntimeError, match=r"differ from the student's by 0\.60 nats"):
        made.train()

    class DyingAtTheEnd(Counter):
        def get_reward(self):
            raise RuntimeError("no database")

    made = trainer(tmp_path / "died", factory=DyingAtTheEnd, max_steps=1)
    made.engine = Recording()
    made.train()
    entry = made.state.log_history[0]
    assert entry["dropped_rollouts"] == 4 and "engine_gap" not in entry, "nothing is left to check it by"


# ---- the command line -----------------------------------------------------------------------------------------------

# The environment is a file of the user's own; here it also has every turn taken for a call, in whichever process. Of
# rows that go "on" an episode has three turns, of others one.
FILE = """
from rmsd.answers import episodes
from rmsd.answers.calls import Call

episodes.calls_of = lambda text, names: [Call("go_on", {})] if "go_on" in names else []

class On:
    def reset(self, **row): ...
    def go_on(self) -> str:
        "Goes on."
        return "on and on"
    def get_reward(self):
        return 1.0

class Off:
    def reset(self, **row): ...
    def stop(self) -> str:
        "Stops."
        return ""

ENVIRONMENT = {"on": On, "off": Off}
"""


@pytest.fixture
def recipe(tmp_path):
    def write(kinds, **options):
        talkative().save_pretrained(tmp_path / "tiny")
        tiny.tokenizer().save_pretrained(tmp_path / "tiny")
        (tmp_path / "env.py").write_text(FILE)
        rows = [{**row, "environment": kind} for row, kind in zip(tiny.ROWS, kinds, strict=True)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": str(tmp_path / "tiny"),
            "data": str(tmp_path / "rows.jsonl"),
            "environment": str(tmp_path / "env.py"),
            "output_dir": str(tmp_path / "run"),
            "judge": {"kind": "magnitude"},
            "train": {**OPTIONS, "use_cpu": True, "vocab_topk": None, "save_strategy": "no", "max_steps": 2, **options},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "recipe.yaml"

    return write


def test_a_recipe_names_a_file_with_its_environments(recipe, tmp_path):
    path = recipe(["on", "off", "off", "on"], per_device_train_batch_size=4)
    plan = train(load_recipe(path, ["dry_run=true", "train.continuation_metric=tool_errors"]))
    assert "3 turns at most" in plan and "tools: go_on, stop" in plan and "where tool_errors plateaus" in plan
    train(load_recipe(path))
    lines = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert {line["episode"]["turns"] for line in lines} == {1, 3}
    page = (tmp_path / "run" / "report.html").read_text()
    assert '"turns":3' in page.replace(" ", "") or '"turns": 3' in page
    with pytest.raises(ValueError, match="this task has none"):
        train(load_recipe(path, ["environment=house_tool", f"output_dir={tmp_path}/other"]))


@pytest.mark.long
def test_processes_with_episodes_of_unequal_length_do_not_wait_for_each_other_for_ever(recipe, tmp_path):
    """One prompt a process and step: an episode of three turns on one beside one of a single turn on the other."""
    result = launch("torchrun", recipe(["on", "off", "on", "off"], per_device_train_batch_size=1, max_steps=4))
    assert result.returncode == 0, result.stderr[-3000:]
    steps = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert len(steps) == 4 and any(line["turns"] == 4 for line in steps), "3 turns beside 1"
