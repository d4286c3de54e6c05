"""What every test shares: which backends there are and on what device they are tried.

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors; with one, the same tests run them compiled.
"""

import importlib
import os

# Several workers share the cores, and OpenMP threads that spin for each other on busy ones are many times slower; read
# when torch is loaded, and inherited by the processes that tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported

BACKENDS = ("torch", "cpu", "triton")

# Deadlines would time the machine; the seed is fixed so that a failure is the same for everyone, bar in "thorough".
_shared = dict(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("default", max_examples=60, derandomize=True, database=None, **_shared)
settings.register_profile("thorough", max_examples=2000, print_blob=True, **_shared)
settings.register_profile("mutations", derandomize=True, database=None, phases=(Phase.generate,), **_shared)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def device_of(backend: str) -> str:
    """Where `backend` is tried: Triton on the GPU where there is one and it is not interpreted, all else on the CPU."""
    return "cuda" if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def skip_unless_served(backend: str, dtype: torch.dtype = torch.float32) -> None:
    from rmsd_kernels.backends import why_not

    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        pytest.skip("triton: no GPU and TRITON_INTERPRET is not 1")
    if reason := why_not(backend, torch.empty(0, dtype=dtype, device=device_of(backend))):
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture
def environment():
    """TrainingArguments asks accelerate for FSDP through variables, which would stay for every later trainer."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def server():
    """A judge's server on loopback that keeps the second candidate and the first."""
    from judge_endpoint import Server, keep

    made = Server()
    made.script = [keep(2, 1)]
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def hub():
    from hub_server import Hub

    made = Hub()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    skip_unless_served(request.param)
    return request.param


@pytest.fixture(params=("cpu", "triton"))
def kernels(request) -> str:
    """The backends with kernels of their own."""
    skip_unless_served(request.param)
    return request.param


@pytest.fixture
def device(request) -> str:
    name = next(name for name in ("backend", "kernels") if name in request.fixturenames)
    return device_of(request.getfixturevalue(name))


@pytest.fixture(scope="session")
def production_tiles() -> dict:
    """What `small_tiles` replaced."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def small_tiles(production_tiles):
    """Interpreted kernels get tiles of 128 logits and 16 positions in place of 4,096 and 1,024: a row of 331 logits is
    then several tiles and a ragged one, and costs a quarter of the time. tests/test_gpu_code.py sees the real ones."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        launch = importlib.import_module("rmsd_kernels.triton.launch")
    except ImportError:
        return
    production_tiles.update(launch.TILES)
    for dtype, tile in launch.TILES.items():
        launch.TILES[dtype] = launch.Tile(unroll=8 // tile.vec, lanes=8 * tile.vec, vec=2)
    # Rows are not split: the tests' few rows all would be, and tests/test_split.py splits them.
    importlib.import_module("rmsd_kernels.triton.split").FEW_ROWS = 0
    for module in ("scores", "candidates"):
        importlib.import_module(f"rmsd_kernels.triton.{module}").BLOCK_L = 16


@pytest.fixture(scope="session")
def chrome(tmp_path_factory):
    from browser import chromium

    with chromium(tmp_path_factory.mktemp("chrome")) as chrome:
        yield chrome


@pytest.fixture
def reader(chrome):
    from browser import Reader

    reader = Reader(chrome)
    reader.complaints()  # of an earlier test
    yield reader
    chrome.execute_script("try { localStorage.clear() } catch {}")
    assert reader.complaints() == []
