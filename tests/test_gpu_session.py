"""benchmarks/gpu_session.sh with stages of the tests' own: what ran is kept, whatever happens to the rest."""

import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/gpu_session.sh"


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


def test_every_stage_of_its_own_is_skipped_without_a_gpu(tmp_path):
    """And each begins by asking, so nothing is computed on a CPU and called a GPU's."""
    text = SCRIPT.read_text()
    stages = [line for line in text.splitlines() if line.strip().startswith('echo "') and "|" in line.split(";")[0]]
    stages = [line for line in stages if "skipped" not in line and "====" not in line]
    assert len(stages) >= 9
    assert all("|needs_gpu " in line for line in stages)
