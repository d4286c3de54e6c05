"""The operators as PyTorch's own machinery sees them: opcheck, torch.compile, autocast, strides, second derivatives."""

import inputs
import pytest
import torch
from conftest import device_of, skip_unless_served
from torch.utils._python_dispatch import TorchDispatchMode

import rmsd_kernels as rk
from rmsd_kernels import backends, ops
from rmsd_kernels.heads import projection
from rmsd_kernels.options import Options

OPTIONS = Options(
    divergence="jsd",
    beta=0.3,
    vocab_topk=5,
    tail="bucket",
    temperature=0.9,
    teacher_temperature=1.1,
    vocab_size=18,
    logit_scale=1.0,
    softcap=None,
    backend="",
)
TOPK = dict(vocab_topk=5, tail="bucket")


def batch(device="cpu", shape=(1, 3, 20), dtype=torch.float32):
    student, teacher, _ = inputs.far_apart(shape, dtype)
    ids = torch.arange(shape[0] * shape[1]).view(shape[:2]) % 18
    return student.to(device), teacher.to(device), ids.to(device), (ids % 3 != 1).to(device)


# ---- opcheck --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scores", "select", "scores_and_candidates", "divergence", "divergence_backward"])
def test_opcheck(kernels, device, name):
    student, teacher, ids, mask = batch(device)
    rows = torch.tensor([2, 0], device=device)  # no -1: its stats may be NaN, and to opcheck NaN is not NaN
    options = OPTIONS._replace(backend=kernels)
    if name == "scores":
        calls = [(student, teacher, ids, *options), (student, teacher, ids, *options._replace(softcap=9.0))]
    elif name == "select":
        calls = [(student[..., 0].contiguous(), mask, 2, 0.1, kernels)]
    elif name == "scores_and_candidates":
        calls = [(student, teacher, ids, mask, 2, "divergence", 0.0, *options)]
    elif name == "divergence":
        leaf = student.clone().requires_grad_()
        calls = [
            (leaf, teacher, rows, *options),
            (leaf, teacher, None, *options),
            (leaf, teacher, rows, *options._replace(vocab_topk=None)),
        ]
    else:
        divergence, stats = ops.divergence(student, teacher, rows, *options)
        calls = [(torch.ones_like(divergence), student, teacher, rows, stats, *options)]
    if kernels == "triton" and device == "cpu":
        calls = calls[:1]  # the operator is the same for all backends, and the interpreter takes 10 s a call
    for arguments in calls:
        torch.library.opcheck(getattr(ops, name), arguments)


def test_stats_have_the_number_that_ops_says(kernels, device):
    student, teacher, *_ = batch(device)
    divergence, stats = ops.divergence(student, teacher, None, *OPTIONS._replace(backend=kernels))
    assert divergence.shape == (3,) and stats.shape == (3, ops.NUM_STATS)


def test_an_operator_refuses_rows_that_are_not_there():
    """The checks of a compiled call see no values; the row behind the last may be anybody's memory."""
    skip_unless_served("cpu")
    student, teacher = (logits[:, :2] for logits in batch()[:2])
    for row in (2, -2):
        with pytest.raises(ValueError, match=rf"^rows must lie in \[0, 2\), or be -1, not {row}"):
            ops.divergence(student, teacher, torch.tensor([0, row]), *OPTIONS._replace(backend="cpu"))


# ---- torch.compile --------------------------------------------------------------------------------------------------

# The whole call must be one graph; aot_eager traces forward and backward without generating code.
COMPILE = dict(fullgraph=True, dynamic=True, backend="aot_eager")


def scores(student, teacher, ids, mask, backend):
    return rk.token_scores(student, teacher, ids, divergence="forward_kl", temperature=0.8, backend=backend)


def candidates(student, teacher, ids, mask, backend):
    found, index = rk.scores_and_candidates(student, teacher, ids, mask, num_candidates=2, backend=backend)
    return *found, index, rk.select_tokens(found.divergence, mask, num_tokens=3, backend=backend)


def divergence(student, teacher, ids, mask, backend):
    rows = torch.where(mask.flatten(), torch.arange(mask.numel(), device=mask.device), -1)
    picked = rk.token_divergence(student, teacher, rows=rows, **TOPK, backend=backend)
    return rk.token_divergence(student, teacher, backend=backend), picked


def linear(student, teacher, ids, mask, backend):
    weight = torch.linspace(-1, 1, 30 * student.shape[-1], device=student.device).view(30, -1)
    heads = student, weight, teacher, weight
    return (
        *rk.linear_token_scores(*heads, ids, softcap=9.0, backend=backend),
        rk.linear_token_divergence(*heads, softcap=9.0, backend=backend),
    )


@pytest.mark.long
@pytest.mark.parametrize("function", [scores, candidates, divergence, linear], ids=lambda f: f.__name__)
def test_compiled_equals_eager_at_every_shape(backend, device, function):
    torch._dynamo.reset()
    compiled = torch.compile(function, **COMPILE)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for shape in ((3, 2, 20), (2, 4, 27)):  # no size of 1: torch.compile specialises on it

        def run(function, shape=shape):
            student, teacher, ids, mask = batch(device, shape)
            student.requires_grad_()
            results = function(student, teacher, ids, mask, backend)
            total = sum(result.sum() for result in results if result.requires_grad)
            return *results, *(torch.autograd.grad(total, student) if isinstance(total, torch.Tensor) else ())

        for have, want in zip(run(compiled), run(function), strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-6)
    if backend != "torch" and function is not linear:  # whose number of chunks is in the graph
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1, "the second shape compiled anew"


@pytest.mark.long
def test_tiles_of_the_vocabulary_compile(monkeypatch):
    monkeypatch.setattr(projection, "_TILE_COLUMNS", 16)  # of 30
    monkeypatch.setitem(projection.WORKSPACE_MB, "cpu", 4 * 2 * 16 * 8 / 2**20)
    student, teacher, ids, _ = batch("cpu")
    weight = torch.linspace(-1, 1, 30 * student.shape[-1]).view(30, -1)

    def tiled(student, teacher):
        return rk.linear_token_scores(student, weight, teacher, weight, ids, backend="torch")

    torch._dynamo.reset()
    for have, want in zip(torch.compile(tiled, **COMPILE)(student, teacher), tiled(student, teacher), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-6)


def test_compiled_code_holds_the_operator_and_not_the_reference(kernels, device):
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    student, teacher, ids, mask = batch(device)
    torch.compile(scores, fullgraph=True, backend=keep)(student, teacher, ids, mask, kernels)
    assert any("rmsd_kernels" in str(node.target) for node in graphs[0].graph.nodes)
    assert not any("exp" in str(node.target) for node in graphs[0].graph.nodes)


# ---- autocast, dtypes -----------------------------------------------------------------------------------------------


def test_autocast_changes_nothing(backend, device):
    """Kernels take logits as they are; the linear forms keep their products' fp32."""
    student, teacher, ids, mask = batch(device)
    plain = candidates(student, teacher, ids, mask, backend), linear(student, teacher, ids, mask, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = candidates(student, teacher, ids, mask, backend), linear(student, teacher, ids, mask, backend)
    for have, want in zip((*cast[0], *cast[1]), (*plain[0], *plain[1]), strict=True):
        assert have.dtype == want.dtype and torch.equal(have, want)


def test_backward_under_autocast(backend, device):
    student, teacher, *_ = batch(device)
    grads = []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            rk.token_divergence(leaf, teacher, backend=backend).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


# ---- with and without the dispatcher ---------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Names of this package's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names |= {function.name()} if function.namespace == "rmsd_kernels" else set()
        return function(*args, **(kwargs or {}))


def everything(backend, student, teacher, ids, mask):
    leaf = student.clone().requires_grad_()
    scores, index = rk.scores_and_candidates(student, teacher, ids, mask, num_candidates=2, backend=backend)
    divergence = rk.token_divergence(leaf, teacher, rows=ids.new_tensor([1, -1, 0, 1]), **TOPK, backend=backend)
    divergence.sum().backward()
    return [*rk.token_scores(student, teacher, ids, backend=backend), *scores, index, divergence.detach(), leaf.grad]


def test_eager_code_and_the_operators_give_the_same_bits(backend, device, monkeypatch):
    """Whoever watches the dispatcher sees every operator; where nobody does, none is called."""
    arguments = batch(device)
    with Seen() as seen:
        watched = everything(backend, *arguments)
    names = ("scores", "scores_and_candidates", "divergence", "divergence_backward")
    assert seen.names == ({f"rmsd_kernels::{name}" for name in names} if backend != "torch" else set())

    def refuse(*_):
        raise AssertionError("an operator was called")

    for name in names:
        monkeypatch.setattr(ops, name, refuse)
    assert all(map(torch.equal, everything(backend, *arguments), watched))


# ---- second derivatives ---------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused_by_name(kernels, device):
    student, teacher, *_ = batch(device)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(
        rk.token_divergence(student, teacher, backend=kernels).sum(), student, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"no second derivative.*differentiate once, or pass backend='torch'"):
        grad.sum().backward()


def test_the_reference_has_a_second_derivative():
    student, teacher, *_ = batch()
    student.requires_grad_()
    result = rk.token_divergence(student, teacher, backend="torch").sum()
    (grad,) = torch.autograd.grad(result, student, create_graph=True)
    grad.square().sum().backward()
    assert student.grad.abs().sum() > 0


def test_derivatives_by_torch_func_are_refused_and_not_zero(kernels, device):
    student, teacher, *_ = batch(device)

    def divergence(student):
        return rk.token_divergence(student, teacher, backend=kernels).sum()

    for derivative in (torch.func.grad(divergence), lambda x: torch.func.jvp(divergence, (x,), (x,))):
        with pytest.raises(RuntimeError, match=r"^token_divergence's kernels have no derivative by torch\.func"):
            derivative(student)


# ---- inference mode -------------------------------------------------------------------------------------------------


def test_a_teacher_of_inference_mode_serves_a_student_that_learns():
    skip_unless_served("cpu")
    student, teacher, *_ = batch()
    with torch.inference_mode():
        inferred = teacher.clone()
    leaf = student.requires_grad_()
    grads = [
        torch.autograd.grad(rk.token_divergence(leaf, logits, backend="cpu").sum(), leaf)[0]
        for logits in (teacher, inferred)
    ]
    assert torch.equal(*grads) and grads[0].any()


# ---- strides --------------------------------------------------------------------------------------------------------

# What of the vocabulary's size a call may allocate: nothing, where each row is contiguous.
CONTIGUOUS_ROWS = {
    "shifted": lambda x: x[:, :-1],
    "length first": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
    "columns cut": lambda x: x[..., 3:40],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1),
}


class Copies(TorchDispatchMode):
    """Records operators that wrote a tensor as large as `numel`."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, tuple | list) else [result]:
            fresh = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in held
            if fresh and x.numel() >= self.numel:
                self.names.append(str(function))
        return result


@pytest.mark.parametrize("layout", CONTIGUOUS_ROWS)
def test_no_copy_where_rows_are_contiguous(kernels, device, layout):
    student, teacher = (CONTIGUOUS_ROWS[layout](x) for x in batch(device, (2, 3, 64))[:2])
    ids = torch.zeros(student.shape[:2], dtype=torch.int64, device=device)
    expected = rk.token_scores(student.contiguous(), teacher.contiguous(), ids, backend=kernels)
    with Copies(student.numel()) as copies:
        got = rk.token_scores(student, teacher, ids, backend=kernels)
        rk.token_divergence(student, teacher, backend=kernels)
    assert not copies.names
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-6)


def test_a_row_that_is_not_contiguous_is_copied_and_right(kernels, device):
    student, teacher, ids, _ = batch(device, (2, 3, 64))
    turned = [x.mT.contiguous().mT for x in (student, teacher)]
    with Copies(student.numel()) as copies:
        got = rk.token_scores(*turned, ids, backend=kernels)
    assert len(copies.names) == 2, "the premise of the test above: a copy is seen where there is one"
    for have, want in zip(got, rk.token_scores(student, teacher, ids, backend=kernels), strict=True):
        assert torch.equal(have, want)


def test_a_view_that_is_yet_to_be_negated(kernels, device):
    """As the imaginary part of a conjugate is: torch sets a bit and leaves the memory."""
    student, teacher, ids, _ = batch(device)

    def everything(student, teacher):
        leaf = student.detach().requires_grad_()
        divergence = rk.token_divergence(leaf, teacher, backend=kernels)
        grads = torch.autograd.grad(divergence.sum(), leaf)
        return *rk.token_scores(student, teacher, ids, backend=kernels), divergence.detach(), *grads

    got, want = everything(torch._neg_view(student), torch._neg_view(teacher)), everything(-student, -teacher)
    assert all(map(torch.equal, got, want))


def test_scores_of_a_leaf_that_needs_a_gradient_are_not_of_its_graph(backend, device):
    student, teacher, ids, mask = batch(device)
    found, _ = rk.scores_and_candidates(student.requires_grad_(), teacher, ids, mask, backend=backend)
    assert not any(score.requires_grad for score in found)


def test_auto_takes_the_kernels_of_the_device(kernels):
    device = device_of(kernels)
    if kernels == "triton" and device == "cpu":
        pytest.skip("auto gives CPU tensors to the C++ kernels, interpreted Triton or not")
    assert backends.resolve_backend("auto", torch.empty(0, device=device), "test") == kernels
