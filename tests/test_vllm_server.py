"""The client of a vLLM server, against answers that are made up; vllm_server_cases.py runs a real one."""

import threading

import httpx
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from vllm_fake import Drawn, FakeVLLM

from rmsd import RMSDConfig
from rmsd.answers import server as module
from rmsd.answers.server import VLLMServer
from rmsd.answers.vllm_server import VLLMServerEngine

URL = "http://server:8000/v1"
OPTIONS = dict(max_new_tokens=2, pad_id=0, eos_ids=[0], temperature=0.0)


@pytest.fixture
def vllm(monkeypatch):
    made, client = FakeVLLM(), httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=httpx.MockTransport(made), **options))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return made


def lora(**more):
    return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **more))


def engine(tmp_path, model, **changed):
    return VLLMServerEngine(model, **{"url": URL, "folder": tmp_path, "max_length": 100, "seconds": 60, **changed})


def test_a_server_that_is_away_is_asked_again(vllm):
    dead = httpx.Response(500, json={"error": {"message": "EngineCore encountered an issue."}})
    vllm.away = [httpx.ConnectError("refused"), httpx.Response(503), dead, httpx.ReadError("reset")]
    assert VLLMServer(URL, 60)("/weight_info").json() == {"weight_version": "default"}
    vllm.away = [httpx.Response(400, text="bad")]
    assert VLLMServer(URL, 60)("/weight_info").status_code == 400, "of the request, so an answer"


@pytest.mark.parametrize(
    ("error", "why"),
    [(httpx.ConnectError("refused"), "refused"), (httpx.ReadTimeout(""), "ReadTimeout")],
    ids=["dead", "slow"],
)
def test_a_server_that_stays_away_is_given_up_in_one_line(vllm, error, why):
    vllm.away = [error] * 9
    with pytest.raises(ConnectionError, match=rf"at .* has not answered for 0.1 seconds \({why}\): .* resume=true"):
        VLLMServer(URL, 0.1)("/weight_info")
    assert len(vllm.away) == 8


def test_a_run_that_has_lost_its_server_is_resumed_and_ends_as_it_would_have(monkeypatch, tmp_path):
    """Nothing is lost but the step that was under way."""
    drawn, client, dies = Drawn(max_model_len=256), httpx.Client, []

    def answered(request):
        if dies and len(drawn.asked()) > 2:  # the third step's adapter is there, and its answers are not
            raise httpx.ReadError("reset")
        return drawn(request)

    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=httpx.MockTransport(answered), **options))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def run(name, **resumed):
        steps = dict(save_strategy="steps", save_steps=1, max_steps=4, optim="sgd")
        made = tiny.trainer(tmp_path / name, lora(), engine="vllm_server", engine_url=URL, engine_seconds=0.1, **steps)
        made.train(**resumed)
        return tiny.weights(made.student)

    whole = run("whole")
    drawn.posted.clear()
    dies.append(True)
    with pytest.raises(ConnectionError, match="resume=true"):
        run("cut")
    dies.clear()
    assert tiny.same(run("cut", resume_from_checkpoint=True), whole)
    assert not tiny.same(whole, tiny.weights(lora()))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("refused"), "no vLLM server answers at http://server:8000/v1"),
        (httpx.InvalidURL("Invalid port: '80a'"), "no vLLM server answers at .*, or set engine_url"),
        (httpx.Response(200, json={"data": ["model"]}), "does engine_url end in /v1"),
        (httpx.Response(401), "set the environment variable VLLM_API_KEY"),
        (httpx.Response(404), "does engine_url end in /v1"),
        (httpx.Response(200, text="<html>"), "does engine_url end in /v1"),
    ],
)
def test_what_is_no_such_server_is_known_before_a_run(vllm, tmp_path, answer, message):
    vllm.away = [answer]
    with pytest.raises(ConnectionError, match=message):
        engine(tmp_path, lora())


def test_the_length_that_a_server_takes_is_known_before_a_run(vllm, tmp_path):
    with pytest.raises(ValueError, match=r"100 tokens, and 101 are needed: .*--max-model-len 101"):
        engine(tmp_path, lora(), max_length=101)


@pytest.mark.parametrize("make", [lora, tiny.model], ids=["adapter", "all weights"])
def test_a_server_that_restarted_empty_is_sent_the_weights_again(vllm, tmp_path, make):
    model = make()
    made = engine(tmp_path, model)
    made.sync(model)
    vllm.posted, vllm.forgets = [], 1
    rollouts = made([[5, 6]], **OPTIONS)
    assert rollouts.completion_ids.tolist() == [[7, 0]]
    assert rollouts.recorded.logprob.tolist() == [[-0.5, -float("inf")]]
    loads = "/v1/load_lora_adapter" if make is lora else "/collective_rpc"
    assert vllm.paths().count(loads) == 1 and vllm.paths().count("/v1/completions") == 2
    vllm.forgets = 9
    with pytest.raises(ConnectionError, match="has lost the weights 3 times"):
        made([[5, 6]], **OPTIONS)


def test_an_adapter_that_tokens_switch_on_is_refused(vllm, tmp_path):
    """The server would apply it at every token."""
    with pytest.raises(ValueError, match="use engine=transformers"):
        engine(tmp_path, lora(alora_invocation_tokens=[5]))


def test_where_a_request_fails_those_under_way_are_not_waited_for(vllm, tmp_path, monkeypatch):
    made = engine(tmp_path, lora())
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def completed(body):
        if body["prompt"] == [5]:
            begun.wait(60)
            raise ConnectionError("refused")
        begun.set()
        may_end.wait(20)
        ended.set()

    monkeypatch.setattr(made, "_completed", completed)
    with pytest.raises(ConnectionError, match="refused"):
        made([[5], [6]], **OPTIONS)
    assert not ended.is_set()
    may_end.set()


def test_of_a_quantised_student_the_adapter_alone_is_sent(vllm, tmp_path):
    """A server may hold the base model quantised alike; the trainer's packed integers are nobody else's."""
    model = lora()
    for base in [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]:
        packed = torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8)
        base.weight = torch.nn.Parameter(packed, requires_grad=False)
    engine(tmp_path, model).sync(model)
    (sent,) = tmp_path.rglob("*.safetensors")
    weights = load_file(sent)
    assert len(weights) == 2 * 14 and all(".lora_" in name and weights[name].dtype == torch.float32 for name in weights)


def test_the_weights_before_are_dropped_once_the_next_are_there(vllm, tmp_path):
    model = lora()
    made = engine(tmp_path, model)
    made.sync(model)
    (first,) = vllm.loaded
    made.sync(model)
    (second,) = vllm.loaded
    assert first != second and [each.name for each in tmp_path.iterdir()] == [second]
    with model.disable_adapter():
        made.sync(model)
    assert not vllm.loaded and not list(tmp_path.iterdir()), "the base model is there already"
    made([[5, 6]], **OPTIONS)
    assert vllm.posted[-1][1]["model"] == "base"


@pytest.mark.parametrize("named", [False, True], ids=["its own folder", "a folder that may be shared"])
def test_a_run_leaves_nothing_where_it_ends_and_its_own_folder_without_what_a_killed_one_left(
    monkeypatch, tmp_path, named
):
    drawn, client = Drawn(max_model_len=256), httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=httpx.MockTransport(drawn), **options))
    folder = tmp_path / "shared" if named else tmp_path / "run" / "engine"
    left, other = folder / f"rmsd-{'0a' * 16}", folder / "rmsd-notes"
    for each in (left, other):
        each.mkdir(parents=True)
    drawn.loaded.add(left.name)
    options = dict(engine="vllm_server", engine_url=URL, engine_folder=str(folder) if named else None)
    tiny.trainer(tmp_path / "run", lora(), **options).train()
    assert {*folder.iterdir()} == ({left, other} if named else {other})
    assert drawn.loaded == ({left.name} if named else set())


def test_a_server_that_is_gone_is_not_waited_for_at_the_end(vllm, tmp_path):
    model = lora()
    made = engine(tmp_path, model)
    made.sync(model)
    vllm.away = [httpx.ConnectError("refused")]
    made.finish()
    assert not vllm.away and not list(tmp_path.iterdir())
    made.sync(model)
    made([[5, 6]], **OPTIONS)
    assert [each.name for each in tmp_path.iterdir()] == [vllm.posted[-1][1]["model"]]


def test_options_of_the_server_are_checked(tmp_path):
    with pytest.raises(ValueError, match="engine_url must begin with http"):
        RMSDConfig(output_dir=str(tmp_path), engine_url="localhost:8000")
    with pytest.raises(ValueError, match="engine_seconds must be above 0"):
        RMSDConfig(output_dir=str(tmp_path), engine_seconds=0)
