"""`python -m rmsd_kernels.env` tells the truth: what it says a backend takes is what an operation then takes."""

import itertools
import subprocess
import sys

import pytest
import torch

import rmsd_kernels
from rmsd_kernels import backends, checks, env


def rows_of(report: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(operation, dtype) -> (backend, why), as printed for CPU tensors."""
    table = report.split("backend='auto' for cpu tensors\n")[1].split("\n\n")[0]
    found = {}
    for line in table.splitlines():
        operation, *rest = line.split()
        if operation.startswith("backend="):
            continue
        dtypes = [word.rstrip(",") for word in itertools.takewhile(lambda word: "float" in word, rest)]
        backend, *why = rest[len(dtypes) :]
        found |= {(operation, dtype): (backend, " ".join(why)) for dtype in dtypes}
    return found


def test_every_public_operation_and_dtype_is_listed():
    functions = {
        name for name in rmsd_kernels.__all__ if name not in ("TokenLogprobs", "TokenScores", "criterion_score")
    }
    assert set(env.OPERATIONS) == functions
    dtypes = {str(dtype).removeprefix("torch.") for dtype in checks.LOGIT_DTYPES}
    assert set(rows_of(env.report())) == {(operation, dtype) for operation in functions for dtype in dtypes}


def test_the_backend_it_names_is_the_one_taken():
    for (operation, dtype), (backend, why) in rows_of(env.report()).items():
        tensor = torch.zeros(1, dtype=getattr(torch, dtype))
        assert backends.resolve_backend("auto", tensor, operation) == backend
        assert why


def test_it_says_why_a_backend_is_not_taken(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda backend, tensor: "its moon is not full")
    report = env.report()
    assert {backend for backend, _ in rows_of(report).values()} == {"torch"}
    assert {why for _, why in rows_of(report).values()} == {"cpu cannot: its moon is not full"}
    assert "backend='triton': its moon is not full" in report


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package-here"))
    lines = env.report().splitlines()
    assert f"  torch         {torch.__version__}" in lines
    assert "  no-such-package-here not installed" in lines


def test_a_namesake_in_the_same_environment_is_named(tmp_path, monkeypatch):
    """The chemistry package's distribution, import package and script have this project's short name."""
    assert env.namesakes() == [] and "too: whichever" not in env.report()
    for name, contents in (("rmsd", "top_level.txt"), ("dock", "entry_points.txt"), ("other", None)):
        folder = tmp_path / f"{name}-1.7.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.7.0\n")
        if contents:
            text = "rmsd\n" if contents == "top_level.txt" else "[console_scripts]\nrmsd = dock:main\n"
            (folder / contents).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert env.namesakes() == ["dock 1.7.0", "rmsd 1.7.0"]
    (line,) = (line for line in env.report().splitlines() if line.startswith("  rmsd 1.7.0 has the import name"))
    assert "environments of their own" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said():
    assert env.devices()["cuda"].startswith("none: ")
    assert "for cuda tensors" not in env.report()


def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "rmsd_kernels.env"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"rmsd_kernels {rmsd_kernels.__version__}")
    assert not result.stderr
