"""`vllm serve`, really run on loopback: `make server-test`.

One server for all: a minute or two to start. Its model is the tiny student of vllm_cases.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from vllm_cases import PROMPTS, options, student, trainer

from rmsd.answers.engines import TOP
from rmsd.answers.rollout import generate
from rmsd.answers.vllm_server import VLLMServerEngine
from rmsd.models.heads import OutputHead
from rmsd.models.hidden import completion_hidden

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Served:
    """A server's process, which can be killed and started again at the same address."""

    def __init__(self, folder):
        student().save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.process = folder, None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        settings = dict(
            VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
            VLLM_SERVER_DEV_MODE="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_LOGGING_LEVEL="ERROR",
        )
        # The module, not `vllm serve`: the CPU build is packaged as vllm-cpu, whose version that command asks for.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder / "model")]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "160"]
        command += ["--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--generation-config", "vllm"]
        command += ["--lora-target-modules", *LAYERS]
        with open(self.folder / "log.txt", "a") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self):
        for _ in range(600):
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()[-3000:]
            try:
                return httpx.get(self.url + "/models").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.5)
        raise TimeoutError("the server did not start")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make vllm")
    made = Served(tmp_path_factory.mktemp("served"))
    made.start()
    made.wait()
    yield made
    made.kill()


def lora(model, **changed):
    torch.manual_seed(0)
    config = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, LoraConfig(**{**config, **changed}))


def trained(model):
    """A LoRA that changes what the model says."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def connected(served, tmp_path, model, **changed) -> VLLMServerEngine:
    return VLLMServerEngine(
        model, url=served.url, folder=tmp_path, max_length=160, **{"seconds": 600, "num_top": TOP, **changed}
    )


def assert_same_answers(engine, model):
    ours, plain = engine(PROMPTS, **options()), generate(model, PROMPTS, **options())
    assert torch.equal(ours.completion_mask, plain.completion_mask)
    assert torch.equal(ours.completion_ids[ours.completion_mask], plain.completion_ids[plain.completion_mask])


def assert_recorded(recorded, model, prompt_ids, rollouts):
    mask = rollouts.completion_mask
    with torch.no_grad():
        hidden = completion_hidden(model, prompt_ids, rollouts.completion_ids, mask, 0)
        logprobs = OutputHead.of(model)(hidden).log_softmax(-1)
    own = logprobs.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(recorded.logprob[mask], own[mask], rtol=1e-4, atol=1e-4)
    top = logprobs.topk(TOP)
    torch.testing.assert_close(recorded.top_logprob[mask], top.values[mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(recorded.top_ids[mask], top.indices[mask])


def test_an_adapter_is_sent_alone_and_one_server_is_student_and_teacher(served, tmp_path):
    """The teacher is the base model; the server tells them apart by what is asked for, not by when."""
    model = trained(lora(student()))
    engine = connected(served, tmp_path, model)
    engine.sync(model)
    (sent,) = tmp_path.rglob("*.safetensors")
    assert sent.stat().st_size < 0.2 * (served.folder / "model" / "model.safetensors").stat().st_size
    assert_same_answers(engine, model)
    rollouts = engine(PROMPTS, **options())
    assert_recorded(rollouts.recorded, model, PROMPTS, rollouts)
    prompts = [[20, 21, *prompt] for prompt in PROMPTS]
    with model.disable_adapter():
        engine.sync(model)
        assert_recorded(engine.read(prompts, rollouts), model, prompts, rollouts)
        assert_same_answers(engine, model)
        assert not torch.equal(engine(PROMPTS, **options()).completion_ids, rollouts.completion_ids)
    assert not list(tmp_path.rglob("*.safetensors")), "what is no longer used is removed"
    known = [each["id"] for each in httpx.get(served.url + "/models").json()["data"]]
    assert not any(name.startswith("rmsd-") for name in known)


def test_all_weights_follow_by_files_and_answers_are_of_the_last_ones(served, tmp_path):
    model, first = student(seed=1), student()
    engine = connected(served, tmp_path, model)
    engine.sync(model)
    assert_same_answers(engine, model)
    before = engine(PROMPTS, **options()).completion_ids
    engine.sync(first)  # what the server was started with, for the other tests
    assert_same_answers(engine, first)
    assert not torch.equal(engine(PROMPTS, **options()).completion_ids, before)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_answers_follow_from_the_seed_alone(served, tmp_path):
    model = lora(student())
    engine = connected(served, tmp_path, model)
    engine.sync(model)

    def sampled(prompts, seed):
        rollouts = engine(prompts, **{**options(), "temperature": 1.5, "seed": seed})
        return [row[mask].tolist() for row, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)]

    first = sampled(PROMPTS, [1, 2, 3])
    assert sampled(PROMPTS[1:], [2, 3]) == first[1:] and sampled(PROMPTS, [4, 5, 6]) != first


@pytest.mark.parametrize("engine_scores", [False, True])
def test_a_run_ends_where_it_ends_with_vllm_in_process(served, tmp_path, engine_scores):
    finals, entries = [], []
    for engine in ("vllm", "vllm_server"):
        model = lora(student())
        made = trainer(
            tmp_path / engine,
            model,
            engine=engine,
            engine_scores=engine_scores,
            engine_url=served.url,
            max_steps=3,
            learning_rate=1e-2,
        )
        before = tiny.weights(model)
        made.train()
        finals.append({name: value - before[name] for name, value in tiny.weights(model).items()})
        entries.append([entry for entry in made.state.log_history if "loss" in entry])
    plain, ours = finals
    assert max(change.abs().max() for change in plain.values()) > 1e-4
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-2, atol=1e-6)
    gaps = [entry[name] for entry in entries[1] for name in entry if name.startswith("engine_")]
    assert len(gaps) == (6 if engine_scores else 3) and 0 < max(gaps) < 1e-3


def test_a_server_with_other_weights_ends_the_run(served, tmp_path):
    made = trainer(tmp_path, lora(student(seed=1)), engine="vllm_server", engine_scores=False, engine_url=served.url)
    with pytest.raises(RuntimeError, match="does not hold the student's weights"):
        made.train()


def test_what_it_cannot_be_sent_is_refused_before_a_run(served, tmp_path):
    beside, saved = lora(student()), lora(student(), modules_to_save=["lm_head"])
    beside.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"LoRA adapter alone, and .*norm.weight is trained beside it"):
        connected(served, tmp_path, beside)
    with pytest.raises(ConnectionError, match=r"refuses the adapter: .*modules_to_save"):
        connected(served, tmp_path, saved).sync(saved)
    with pytest.raises(ValueError, match=r"runs on a CPU, .* tied to the embedding"):
        connected(served, tmp_path, student(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"sequences of 160 tokens, and 161 are needed: .* --max-model-len 161"):
        VLLMServerEngine(lora(student()), url=served.url, folder=tmp_path, max_length=161, seconds=1)
    wide = lora(student(), r=16)
    with pytest.raises(ConnectionError, match=r"refuses the adapter: .*rank") as error:
        connected(served, tmp_path, wide).sync(wide)
    assert "\n" not in str(error.value)


def test_a_server_that_dies_and_comes_back_empty_is_sent_the_weights_again(served, tmp_path):
    """And the answers are those that it would have given. One that stays away ends the run in one line."""
    model = trained(lora(student()))
    engine = connected(served, tmp_path, model)
    engine.sync(model)
    before = engine(PROMPTS, **options()).completion_ids
    served.kill()
    impatient = engine._server._seconds
    engine._server._seconds = 1.0
    with pytest.raises(ConnectionError, match=r"has not answered for 1 seconds .* resume=true") as error:
        engine(PROMPTS, **options())
    assert "\n" not in str(error.value)
    with pytest.raises(ConnectionError, match="no vLLM server answers at"):
        connected(served, tmp_path, model)
    engine._server._seconds = impatient
    served.start()
    assert torch.equal(engine(PROMPTS, **options()).completion_ids, before)
