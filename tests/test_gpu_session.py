"""benchmarks/gpu_session.sh with stages of the tests' own: what ran is kept, whatever happens to the rest."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest

from benchmarks import common

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/gpu_session.sh"
PEERS = ("bench_divergence", "bench_linear", "bench_scores")  # what compares with other packages


@pytest.fixture
def started(tmp_path):
    """A session, started with the given stages; killed at the end if it still runs."""
    processes = []

    def start(*stages: str, **environment: str) -> subprocess.Popen:
        (tmp_path / "stages").write_text("".join(f"{stage}\n" for stage in stages))
        variables = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path / "cache"), **environment)
        command = [SCRIPT, tmp_path / "out", tmp_path / "stages"]
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, start_new_session=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out/session.jsonl").read_text().splitlines()]


def stages() -> str:
    """The script's own, each on one line."""
    text = SCRIPT.read_text().replace("\\\n", "")
    found = re.findall(r'^ *echo "([^"=]+\|\d+\|[^"]+)"$', text, re.M)
    return "\n".join(found)


def test_one_stage_that_fails_or_hangs_costs_the_others_nothing(started, tmp_path):
    session = started(
        "good|20|echo '{\"measured\": 1}' >> $RECORD",
        "bad|20|echo it broke; exit 3",
        "hangs|1|trap '' TERM; while :; do sleep 0.1; done",
        "elsewhere|20|needs no-such-tool --option",
        "last|20|echo one > $TRITON_CACHE_DIR/kernel",
    )
    assert session.wait() == 1  # one failed
    card, *rest = lines(tmp_path)
    assert card["card"] and card["commit"]
    assert rest.pop(0) == {"measured": 1}
    results = {line["stage"]: line["result"] for line in rest}
    wanted = {"good": "passed", "bad": "failed", "hangs": "out of time", "elsewhere": "skipped", "last": "passed"}
    assert results == wanted
    log = (tmp_path / "out/session.log").read_text()
    assert "it broke" in log and "skipped: no no-such-tool" in log
    with tarfile.open(tmp_path / "out/triton-cache.tar") as cache:
        assert "./kernel" in cache.getnames()


def test_what_ran_before_the_session_was_killed_is_there(started, tmp_path):
    session = started("first|20|true", "second|60|sleep 60")
    deadline = time.monotonic() + 30
    while not (tmp_path / "out/session.log").exists() or "second" not in (tmp_path / "out/session.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(session.pid, signal.SIGKILL)
    assert [line.get("result") for line in lines(tmp_path)] == [None, "passed"]


def test_no_stage_starts_when_the_time_is_up(started, tmp_path):
    assert started("late|20|touch ran", SESSION_SECONDS="4").wait() == 0
    assert lines(tmp_path)[1] == {"stage": "late", "result": "no time left", "status": 0, "seconds": 0}


def test_a_second_session_begins_with_what_the_first_compiled(started, tmp_path):
    assert started("compiles|20|echo one > $TRITON_CACHE_DIR/kernel").wait() == 0
    (tmp_path / "cache/kernel").unlink()
    assert started("finds it|20|grep one $TRITON_CACHE_DIR/kernel").wait() == 0


def test_a_session_does_not_fail_for_what_failed_in_an_earlier_one(started):
    assert started("bad|20|exit 3").wait() == 1
    assert started("good|20|true").wait() == 0


def test_a_stage_whose_package_is_not_installed_is_skipped(started, tmp_path):
    session = started("absent|20|needs_package no_such_peer echo ran", "there|20|needs_package json echo ran it all")
    assert session.wait() == 0
    assert [line["result"] for line in lines(tmp_path)[1:]] == ["skipped", "passed"]
    _, skipped, _, ran = (tmp_path / "out/session.log").read_text().splitlines()
    assert skipped.startswith("skipped: no no_such_peer (pip install") and ran == "ran it all"


@pytest.mark.parametrize("script", PEERS)
def test_a_benchmark_asks_for_what_it_is_compared_with(script):
    packages = re.findall(r"^ *from (trl|liger_kernel)\b", (ROOT / f"benchmarks/{script}.py").read_text(), re.M)
    (stage,) = re.findall(rf"^.*\|needs_gpu (.*) \$PYTHON -m benchmarks\.{script} ", stages(), re.M)
    assert stage.split() == ["needs_package", packages[0]] and len({*packages}) == 1


@pytest.mark.parametrize("script", PEERS)
def test_a_benchmark_that_is_cut_off_keeps_what_it_measured(script, tmp_path, monkeypatch):
    """Nobody is timed, so nobody's package need be here."""
    losses = dict.fromkeys(
        ("compute_full_logit_self_distillation_loss", "compute_topk_self_distillation_loss", "LigerFusedLinearJSDLoss"),
        pytest.fail,
    )
    for peer in ("trl.experimental.sdft.loss_utils", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, peer, types.SimpleNamespace(**losses))
    spec = importlib.util.spec_from_file_location(script, ROOT / f"benchmarks/{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    left = [common.Result("first", "ours", 1.0, 1.0, "GB/s", 1.0, 0.0, 0.0, 0.0)]

    def compare(*arguments, **options):
        assert left, "cut off"
        return [left.pop()]

    monkeypatch.setattr(module, "compare", compare)
    size = ["--rows", "6", "--vocab", "600", "--device", "cpu", "--dtype", "fp32", "bf16"]
    monkeypatch.setattr("sys.argv", [script, *size, "--write", str(tmp_path)])
    with pytest.raises(AssertionError, match="cut off"):
        module.main()
    (kept,) = tmp_path.iterdir()
    assert kept.name == f"{script.removeprefix('bench_')}.json"
    assert [result["work"] for result in json.loads(kept.read_text())["results"]] == ["first"]


def test_every_stage_of_its_own_is_skipped_without_a_gpu(tmp_path):
    """And each begins by asking, so nothing is computed on a CPU and called a GPU's."""
    named = [line for line in stages().splitlines() if "|" in line]
    assert len(named) >= 9
    assert all("|needs_gpu " in line for line in named)
