"""Several processes train as one: started by torchrun and accelerate, whole copies (DDP) and shards (FSDP2), over gloo.

Launches of two processes: about a minute on one core.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from test_judge_server import keep
from vllm_fake import Drawn, served

from rmsd import RMSDConfig
from rmsd.answers.vllm_engine import check_vllm
from rmsd.models.sharding import check_sharded_teacher, check_sharding
from rmsd.run.recipe import load_recipe
from rmsd.run.train import train
from rmsd.training.record import read_lines

ROOT = Path(__file__).parents[1]
# So much longer that they have a forward of their own, which some of the ranks then have and others do not.
LONG = [{**row, "prompt": "Which tool deploys services at Acme? " * 4} for row in tiny.ROWS[::3]]
CONTRAST = dict(kind="contrast", contrast_floor=0.0)
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2",
    # Not --cpu, which starts one process, or mpirun; the recipe's use_cpu is what keeps it off GPUs.
    "accelerate": "accelerate.commands.launch --num_processes 2 --use_fsdp --fsdp_version 2 "
    "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_cpu_ram_efficient_loading false",
}


@pytest.fixture
def recipe(tmp_path, server, monkeypatch):
    """Sampled answers, which two processes draw as one does; SGD, for Adam would turn rounding into whole steps; a
    threshold, for an anchor's gaps are rounding until something is learned."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def write(model, rows=tiny.ROWS, contrast=False, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model.save_pretrained(tmp_path / "tiny")
        tiny.tokenizer().save_pretrained(tmp_path / "tiny")
        settings = dict(
            max_steps=3,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            max_completion_length=6,
            threshold=1e-5,
            min_gap=0.0,  # of a model of random weights they are small
            vocab_topk=None,
            save_strategy="no",
        )
        values = {
            "model": str(tmp_path / "tiny"),
            "data": str(tmp_path / "rows.jsonl"),
            # Or contrast proposes, by a second reading of the teacher's, and the endpoint has the last word.
            "judge": {"kind": "llm", "model": "m", "base_url": server.url} | (CONTRAST if contrast else {}),
            "train": {**settings, **options},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "recipe.yaml"

    return write


def launch(launcher, *arguments, program=("-m", "rmsd", "train")):
    starter = ["-m", *LAUNCHERS[launcher].split()] if launcher else []
    command = [sys.executable, *starter, *map(str, (*program, *arguments))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=400)  # with two of vLLM's engines 60 s, on two idle cores
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher passes it on
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize(
    ("launcher", "tied", "size", "options"),
    [
        ("torchrun", False, 1, {}),
        ("torchrun", True, 2, {"rows": tiny.ROWS[:2] + LONG, "contrast": True}),
        pytest.param(
            "accelerate",
            True,
            2,
            {
                "contrast": True,
                "teacher": "ema",
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "save_steps": 2,
                "rows": [*tiny.ROWS, *LONG, *tiny.ROWS[:2]],
            },
            marks=pytest.mark.long,
        ),
    ],
    ids=["torchrun, DDP", "torchrun, DDP, contrast, long prompts", "accelerate, FSDP2, contrast, long prompts"],
)
def test_two_processes_end_in_the_weights_of_one_with_the_whole_batch(
    tmp_path, recipe, server, launcher, tied, size, options
):
    path = recipe(tiny.model(tie_word_embeddings=tied), **options)
    train(load_recipe(path, [f"output_dir={tmp_path / 'one'}", f"train.per_device_train_batch_size={2 * size}"]))
    asked = len(server.requests)
    server.requests.clear()

    a_rank = f"train.per_device_train_batch_size={size}"
    result = launch(launcher, path, f"output_dir={tmp_path / 'two'}", a_rank)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(server.requests) == asked > 0, "once a rollout, whichever process has it"
    assert result.stdout.count("report.html") == 1, "one process prints"

    before, single, double = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "tiny", tmp_path / "one" / "model", tmp_path / "two" / "model")
    )
    assert before.keys() == single.keys() == double.keys() - {"lm_head.weight"} | before.keys()
    assert max((single[name] - before[name]).abs().max() for name in before) > 1e-3
    for name in before:
        torch.testing.assert_close(double[name], single[name], rtol=1e-4, atol=2e-6)

    single, double = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in double] == [line["step"] for line in single] == [1, 2, 3]
    assert any(line["kept_sequences"] == 1 for line in single) or options, "one process had nothing to train on"
    for a, b in zip(single, double, strict=True):
        for name in ("rollout_tokens", "candidates", "kept_tokens", "kept_sequences"):
            assert a[name] == b[name]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b["divergence"] == pytest.approx(
            a["divergence"], rel=1e-3
        )

    if launcher == "accelerate":
        checkpoint = tmp_path / "two" / "checkpoint-2"
        assert (checkpoint / "pytorch_model_fsdp_0").is_dir(), "the shards, so there were some"
        shutil.rmtree(tmp_path / "two" / "checkpoint-3")
        uninterrupted = load_file(tmp_path / "two" / "model" / "model.safetensors")
        shutil.rmtree(tmp_path / "two" / "model")
        result = launch(launcher, path, f"output_dir={tmp_path / 'two'}", a_rank, "resume=true")
        assert result.returncode == 0, result.stderr[-3000:]
        resumed = load_file(tmp_path / "two" / "model" / "model.safetensors")
        assert [line["step"] for line in read_lines(tmp_path / "two" / "metrics.jsonl")] == [1, 2, 3]
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "engine_scores"), [("torchrun", False), ("accelerate", True)], ids=["DDP", "FSDP2, engine_scores"]
)
def test_each_process_has_a_vllm_engine_of_its_own(tmp_path, launcher, engine_scores):
    """Two end in the weights of one with the whole batch, each by what its own engine wrote; the process group outlives
    the engines."""
    try:
        check_vllm()
    except ImportError:
        pytest.skip("needs vLLM: make vllm, or pip install 'rmsd-kernels[vllm]' on a GPU")
    script = ROOT / "tests" / "vllm_ranks.py"
    ended = {}
    for name, (how, size) in {"one": (None, 4), "two": (launcher, 2)}.items():
        (tmp_path / name).mkdir()
        result = launch(how, tmp_path / name, size, engine_scores, program=[script])
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
        ended[name] = [torch.load(path) for path in sorted((tmp_path / name).glob("*.pt"))]
    (one,), (first, second) = ended["one"], ended["two"]
    assert first["ranks"] == second["ranks"] == [0, 1]
    assert max(change.abs().max() for change in one["changes"].values()) > 1e-4
    for name, change in one["changes"].items():
        assert torch.equal(first["changes"][name], second["changes"][name])
        torch.testing.assert_close(first["changes"][name], change, rtol=1e-2, atol=1e-6)
    for mine, theirs, whole_batch in zip(first["prompts"], second["prompts"], one["prompts"], strict=True):
        assert len(mine) == len(theirs) == 2 and sorted(mine + theirs) == sorted(whole_batch)
    for rank in (first, second):
        assert rank["trained on its own"] and len(rank["gaps"]) == 3 and max(rank["gaps"]) < 1e-3


@pytest.mark.long
def test_processes_share_a_vllm_server_and_the_first_sends_the_adapter(tmp_path, recipe):
    """Each asks for its own rows, and none before the adapter is there: together what one process asks."""
    path = recipe(tiny.model())
    ended, asked = [], []
    for name, size in {"one": 4, "two": 2}.items():
        fake = Drawn(max_model_len=256)
        with served(fake) as url:
            run = [path, f"output_dir={tmp_path / name}", f"train.per_device_train_batch_size={size}", "lora.r=4"]
            run += ["judge.kind=magnitude", "engine=vllm_server", f"train.engine_url={url}"]
            if name == "one":
                train(load_recipe(*run[:1], run[1:]))
            else:
                result = launch("torchrun", *run)
                assert result.returncode == 0, result.stderr[-3000:]
        steps = fake.asked()
        adapters = [{adapter for adapter, _, _ in step} for step in steps]
        assert len(steps) == 3 and all(len(named) == 1 for named in adapters) and len(set.union(*adapters)) == 3
        asked.append([sorted(pair for _, *pair in step) for step in steps])
        ended.append(load_file(tmp_path / name / "model" / "adapter_model.safetensors"))
    assert asked[0] == asked[1] and all(len(step) == len(tiny.ROWS) for step in asked[0])
    one, two = ended
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 1e-4
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6)


def test_a_rank_that_fails_stops_the_others_with_its_error(tmp_path, recipe, server):
    """The judge refuses one row's question and leaves the others unanswered: the process that has it says so at once,
    and neither waits."""

    def refuse(body):
        if "Which services?" in body["messages"][0]["content"]:
            return 401, {}, {"error": {"message": "no"}}
        time.sleep(150)
        return keep(1)

    server.script = [refuse]
    path = recipe(tiny.model(), [{**row, "privileged_context": "It is called zorblat."} for row in tiny.ROWS])
    started = time.monotonic()
    result = launch("torchrun", path, f"output_dir={tmp_path / 'two'}", "train.per_device_train_batch_size=2")
    assert result.returncode != 0 and time.monotonic() - started < 120
    said = [line for line in result.stderr.splitlines() if re.match(r"rmsd: rank \d: judge 'm' at .* failed: ", line)]
    assert len(said) == 1 and "Error code: 401" in said[0], result.stderr[-3000:]
    assert not list((tmp_path / "two").glob("model/*"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 2}, "fsdp needs several processes: start with torchrun or accelerate launch"),
        ({"version": 1}, "fsdp_config.version must be 2"),
        ({"version": 2, "cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading .* must be false"),
    ],
)
def test_sharding_that_cannot_be_is_refused(tmp_path, environment, config, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, fsdp=True, fsdp_config=config)


def test_deepspeed_on_a_cpu_is_refused():
    """accelerate would train without it and say nothing."""
    with pytest.raises(ValueError, match=r"deepspeed needs GPUs, .* on CPUs use DDP or fsdp"):
        check_sharding(SimpleNamespace(distributed_type="MULTI_CPU"), SimpleNamespace(deepspeed={"bf16": {}}))


def test_a_second_adapter_is_refused_under_shards(tmp_path):
    plain = RMSDConfig(output_dir=str(tmp_path), use_cpu=True)
    check_sharded_teacher(True, plain)
    for options in (dict(teacher="ema"), dict(continuation_steps=[1]), dict(continuation_metric="loss")):
        args = RMSDConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        check_sharded_teacher(False, args)
        with pytest.raises(ValueError, match="fsdp and ZeRO-3 cannot keep a second adapter"):
            check_sharded_teacher(True, args)
    with pytest.raises(ValueError, match="and a new adapter"):
        check_sharded_teacher(True, plain, trained_before=True)
