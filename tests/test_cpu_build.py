"""The C++ build: three instruction sets chosen at run time, threads, memory, installing where it cannot be built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import peak_bytes
from rmsd_kernels import backends, cpu, reference, scores_and_candidates, token_divergence, token_scores

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(cpu.why_not(torch.empty(0)) is not None, reason="the C++ kernels are not built")


def runnable() -> list[str]:
    """What this processor can run, best first."""
    have = torch.backends.cpu.get_cpu_capability().lower()
    best = have if have in cpu.CAPABILITIES else "default"
    return list(cpu.CAPABILITIES[cpu.CAPABILITIES.index(best) :])


@pytest.fixture
def use_build(monkeypatch):
    """A function that makes the kernels use the build of a name."""

    def use(name: str) -> None:
        monkeypatch.setenv("RMSD_CPU_CAPABILITY", name)
        cpu.library.cache_clear()

    yield use
    monkeypatch.undo()
    cpu.library.cache_clear()


def inputs(rows: int = 37, vocab: int = 5003, dtype: torch.dtype = torch.float32):
    """An odd number of rows, so that threads get unequal shares; a ragged vocabulary of three tiles."""
    generator = torch.Generator().manual_seed(0)
    student_logits = torch.randn(rows, vocab, generator=generator) * 3
    teacher_logits = student_logits + torch.randn(rows, vocab, generator=generator)
    sampled_ids = torch.randint(vocab, (rows,), generator=generator)
    return student_logits.to(dtype), teacher_logits.to(dtype), sampled_ids


def everything(student_logits, teacher_logits, sampled_ids, divergence: str) -> list[torch.Tensor]:
    """What every kernel gives: scores, divergence and gradient over the vocabulary and its top k, candidates."""
    shared = dict(divergence=divergence, backend="cpu")
    results = list(token_scores(student_logits, teacher_logits, sampled_ids, **shared))
    for options in (dict(), dict(vocab_topk=50, tail="bucket")):
        leaf = student_logits.clone().requires_grad_()
        result = token_divergence(leaf, teacher_logits, **shared, **options)
        results += [result.detach(), *torch.autograd.grad(result.sum(), leaf)]
    mask = torch.ones(1, len(sampled_ids), dtype=torch.bool)
    batch = (student_logits[None], teacher_logits[None], sampled_ids[None], mask)
    return [*results, scores_and_candidates(*batch, num_candidates=5, **shared)[1]]


@pytest.mark.parametrize("name", cpu.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_build_keeps_to_the_reference(name, dtype, use_build):
    if name not in runnable():
        pytest.skip(f"this processor does not run {name}")
    use_build(name)
    assert f"_{name}." in cpu.library()._name
    student_logits, teacher_logits, sampled_ids = inputs(dtype=dtype)
    for divergence in reference.DIVERGENCES:
        options = dict(divergence=divergence)
        got = token_scores(student_logits, teacher_logits, sampled_ids, **options, backend="cpu")
        truth = reference.token_scores(student_logits.double(), teacher_logits.double(), sampled_ids, **options)
        for field, have, want in zip(got._fields, got, truth, strict=True):
            assert (have - want).abs().max() < 2e-6, (divergence, field)


def test_environment_chooses_only_among_what_the_processor_runs(use_build):
    use_build("avx1024")
    assert cpu.why_not(torch.empty(0)) == f"RMSD_CPU_CAPABILITY=avx1024: this processor runs {', '.join(runnable())}"
    assert backends.resolve_backend("auto", torch.empty(0), "token_scores") == "torch"
    with pytest.raises(ValueError, match="RMSD_CPU_CAPABILITY=avx1024"):
        backends.resolve_backend("cpu", torch.empty(0), "token_scores")


def test_without_a_library_it_says_how_to_build(monkeypatch, use_build):
    use_build("default")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    assert "(default) are not built: install a C++20 compiler" in cpu.why_not(torch.empty(0))


def test_a_wheel_of_one_instruction_set_serves_processors_that_have_more(monkeypatch, use_build):
    if runnable()[0] == "default":
        pytest.skip("this processor has no more")
    use_build("")
    assert cpu.capability() == runnable()[0]
    find = cpu.importlib.util.find_spec
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: find(name) if "default" in name else None)
    assert cpu.capability() == "default"
    assert cpu.why_not(torch.empty(0)) is None and "_default." in cpu.library()._name


def test_a_library_that_does_not_load_beside_this_torch_says_so(tmp_path, monkeypatch, use_build):
    """As one built with a torch that has a function which this one lacks."""
    (tmp_path / "lib.cpp").write_text(
        'extern "C" int of_another_torch(); extern "C" int f() { return of_another_torch(); }'
    )
    library = tmp_path / "lib.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, tmp_path / "lib.cpp"], check=True)
    use_build("default")
    monkeypatch.setattr(cpu, "_library_file", lambda name: str(library))
    reason = cpu.why_not(torch.empty(0))
    assert f"do not load beside torch {torch.__version__}" in reason and "of_another_torch" in reason
    assert backends.resolve_backend("auto", torch.empty(0), "token_scores") == "torch"


@pytest.mark.parametrize("divergence", reference.DIVERGENCES)
def test_threads_change_no_bit(divergence):
    """Rows belong to one thread each; more threads than rows, and shares that do not come out even, included."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(*inputs(), divergence)
        for number in (2, 3, 64):
            torch.set_num_threads(number)
            for have, want in zip(everything(*inputs(), divergence), alone, strict=True):
                assert torch.equal(have, want), number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_stays_below_a_hundredth_of_the_logits(dtype):
    student_logits, teacher_logits, sampled_ids = inputs(rows=64, vocab=20_000, dtype=dtype)
    limit = 2 * student_logits.nbytes / 100
    assert peak_bytes(lambda: token_scores(student_logits, teacher_logits, sampled_ids, backend="cpu")) < limit
    assert peak_bytes(lambda: token_divergence(student_logits, teacher_logits, vocab_topk=500, backend="cpu")) < limit
    # The count would see it: one copy of a tensor is fifty times the limit.
    assert peak_bytes(lambda: student_logits.clone()) > 40 * limit


def test_backward_holds_the_gradient_and_no_more():
    student_logits, teacher_logits, _ = inputs(rows=64, vocab=20_000)
    student_logits.requires_grad_()
    rows = torch.tensor([3, 60, -1])

    def run():
        return torch.autograd.grad(
            token_divergence(student_logits, teacher_logits, rows=rows, backend="cpu").sum(), student_logits
        )

    assert student_logits.nbytes < peak_bytes(run) < 1.01 * student_logits.nbytes
    (grad,) = run()
    assert grad.ne(0).any(-1).nonzero().flatten().tolist() == [3, 60]
    assert grad.data_ptr() % 64 == 0


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext` of a copy, as pip would run it."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "build_backend.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    shutil.copytree(ROOT / "rmsd_kernels", tmp_path / "rmsd_kernels", ignore=shutil.ignore_patterns("*.so"))
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_no_compiler_warns_and_installs(tmp_path):
    done = build(tmp_path, CXX="/no/such/compiler", CC="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels are NOT built" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_no_torch_warns_and_installs(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by a test')")
    done = build(tmp_path, PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels are NOT built (torch cannot be imported: hidden by a test" in done.stderr


def test_no_build_is_for_this_machine_alone():
    assert "native" not in (ROOT / "setup.py").read_text()
