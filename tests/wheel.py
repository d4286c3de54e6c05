"""`make wheel-test`: the sdist and the wheel as somebody else gets them, in minutes, so apart from `make test`.

`python -m build` makes both; a fresh environment that has torch takes the wheel, then the sdist, then the sdist where
there is no compiler. Each time the kernels must load, or their absence be said, and an operation must run.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "build" / "dist"
SERVES = """
import torch
from rmsd_kernels import token_scores

logits, ids = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
assert token_scores(logits, logits, ids, backend={!r}).divergence.abs().max() < 1e-6
"""


def run(*command: str | Path, **environment: str) -> str:
    """Its output; in a folder that holds none of the sources."""
    print("$", *command, flush=True)
    # Of torch the build and the environment must have the one that is pinned.
    environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), **environment}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(list(map(str, command)), cwd=elsewhere, env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def kernels(python: Path) -> str:
    """What `rmsd env` says of the C++ kernels."""
    said = run(python.with_name("rmsd"), "env")
    return re.search(r"^  cpu .*; (.*)$", said, re.MULTILINE)[1]


def main() -> None:
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl"), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("rmsd", "rmsd_kernels"):
        for path in (ROOT / package).rglob("*.*"):
            held = path.relative_to(ROOT).as_posix() in names
            assert held or path.suffix in (".pyc", ".so"), f"the wheel has no {path}"
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]

    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet"]
        run(*pip, "--no-compile", "torch", "numpy")
        run(*pip, wheel)
        assert re.fullmatch(r"C\+\+ kernels of (avx512|avx2|default)", kernels(python)), kernels(python)
        run(python, "-c", SERVES.format("cpu"))

        again = [*pip, "--force-reinstall", "--no-deps", "--no-cache-dir", sdist]
        run(*again, RMSD_BUILD_CAPABILITIES="default")
        assert kernels(python) == "C++ kernels of default"
        run(python, "-c", SERVES.format("cpu"))

        run(*again, PATH=str(python.parent), CXX="no-such-compiler")
        assert "are not built: install a C++20 compiler" in kernels(python), kernels(python)
        run(python, "-c", SERVES.format("auto"))
    print("1 passed, 0 failed")


if __name__ == "__main__":
    for old in DIST.glob("*") if DIST.exists() else ():
        old.unlink()
    main()
