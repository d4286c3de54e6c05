"""The linear forms: the same numbers from hidden states, and never the logits of all rows."""

import pytest
import torch
from budget import DIVERGENCES, assert_within_budget
from conftest import skip_unless_served
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmsd_kernels
from rmsd_kernels import linear_token_divergence, linear_token_logprobs, linear_token_scores
from rmsd_kernels.heads import projection
from rmsd_kernels.reference import scaled_logits, token_divergence, token_scores

N, V, H, H2 = 9, 120, 8, 6
HEAD = dict(logit_scale=0.5, softcap=4.0)


def inputs(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = dict(
        student_hidden=(N, H),
        student_weight=(V, H),
        teacher_hidden=(N, H2),
        teacher_weight=(V, H2),
        student_bias=(V,),
        teacher_bias=(V,),
    )
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made if bias else {name: x for name, x in made.items() if "bias" not in name}


def projected(made, dtype, head=HEAD):
    """(student, teacher) logits from the true inputs, softcapped and scaled."""
    made = {name: x.to(dtype) for name, x in made.items()}
    return tuple(
        scaled_logits(made[f"{role}_hidden"] @ made[f"{role}_weight"].T + made.get(f"{role}_bias", 0), **head)
        for role in ("student", "teacher")
    )


@pytest.fixture(params=[1024, 24], ids=["whole rows", "tiles"])
def tiles(request, monkeypatch):
    """The least columns of a tile: more than the tests' vocabulary, or a fifth of it. Every tile costs an interpreted
    kernel seconds."""
    monkeypatch.setattr(projection, "_TILE_COLUMNS", request.param)


def to(made, device):
    return {name: x.to(device) for name, x in made.items()}


def test_scores_of_fp64_are_fp32_too(tiles):
    *positional, _, _ = inputs(torch.float64).values()
    got = linear_token_scores(*positional, torch.arange(N), workspace_mb=0.003)
    assert {score.dtype for score in got} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_from_hidden_states(divergence, dtype, backend, device, tiles):
    made = inputs(dtype)
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    heads = to(made, device)
    positional = [heads.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    got = linear_token_scores(
        *positional, ids.to(device), **heads, **HEAD, divergence=divergence, backend=backend, workspace_mb=0.003
    )
    truth = token_scores(*projected(made, torch.float64), ids, divergence=divergence)
    plain = token_scores(*projected(made, torch.float32), ids, divergence=divergence)
    for name in got._fields:
        assert_within_budget(getattr(got, name), getattr(plain, name), getattr(truth, name), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_topk", [None, 10])
def test_divergence_and_every_gradient(vocab_topk, dtype, backend, device):
    made = inputs(dtype)
    rows = torch.tensor([4, -1, 0, 8])
    names = ("student_hidden", "student_weight", "student_bias")
    upstream = torch.tensor([1.0, 2.0, -0.5, 3.0])

    def ours():
        leaves = {n: x.to(device).requires_grad_(n in names) for n, x in made.items()}
        heads = dict(leaves)
        positional = [heads.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
        result = linear_token_divergence(
            *positional,
            rows=rows.to(device),
            **heads,
            **HEAD,
            vocab_topk=vocab_topk,
            workspace_mb=0.002,
            backend=backend,
        )
        return result, torch.autograd.grad(result, [leaves[n] for n in names], upstream.to(device))

    def direct(dtype):
        leaves = {n: x.to(dtype).requires_grad_(n in names) for n, x in made.items()}
        student, teacher = projected(leaves, dtype)
        # The support is of the logits before softcap, which keeps their order.
        result = token_divergence(student, teacher, vocab_topk=vocab_topk)[rows.clamp_min(0)] * (rows >= 0)
        return result, torch.autograd.grad(result, [leaves[n] for n in names], upstream.to(dtype))

    (got, grads), (plain, plain_grads), (truth, truth_grads) = ours(), direct(torch.float32), direct(torch.float64)
    assert_within_budget(got, plain, truth, "divergence")
    for name, grad, plain_grad, truth_grad in zip(names, grads, plain_grads, truth_grads, strict=True):
        assert grad.dtype == dtype
        assert_within_budget(grad, plain_grad.to(dtype), truth_grad, name)
    others = [i for i in range(N) if i not in (4, 0, 8)]
    assert not grads[0][others].any(), "rows not named get exactly zero"


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes; a view of what it was given is none."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


class Products(TorchDispatchMode):
    """Counts the matrix products that read a weight of V rows."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.count = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += any(isinstance(x, torch.Tensor) and self.vocab in x.shape for x in args[-2:])
        return function(*args, **(kwargs or {}))


def test_a_head_of_both_models_is_read_once_a_chunk():
    made = inputs(bias=False)
    ids = torch.zeros(N, dtype=torch.int64)
    student, weight = made["student_hidden"], made["student_weight"]
    same, copy = (student, weight, student.flip(0), weight), (student, weight, student.flip(0), weight.clone())
    for function, arguments in ((linear_token_scores, (ids,)), (linear_token_divergence, ())):
        with Products(V) as once:
            got = function(*same, *arguments)
        with Products(V) as twice:
            expected = function(*copy, *arguments)
        torch.testing.assert_close(got, expected)
        assert (once.count, twice.count) == (1, 2)


def test_few_rows_are_projected_once_for_forward_and_backward():
    """Two projections and the two products of the gradient; in two chunks, each of them, and both projections again."""
    made = inputs(bias=False)
    made["student_hidden"].requires_grad_()
    made["student_weight"].requires_grad_()
    counts = []
    for workspace_mb in (None, 4 * 4 * V * 5 / 2**20):
        with Products(V) as products:
            linear_token_divergence(*made.values(), workspace_mb=workspace_mb, backend="torch").sum().backward()
        counts.append(products.count)
    assert counts == [4, 2 * 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_models_logprobs(backend, device, dtype, tiles):
    made = inputs(dtype)
    hidden, weight, bias = made["student_hidden"], made["student_weight"], made["student_bias"]
    ids = torch.arange(N)
    options = dict(HEAD, workspace_mb=0.002, temperature=0.7)
    arguments = [x.to(device) for x in (hidden, weight, ids)]
    got = linear_token_logprobs(*arguments, bias=bias.to(device), **options, backend=backend)

    def direct(dtype):
        logits = hidden.to(dtype) @ weight.to(dtype).T + bias.to(dtype)
        logits = scaled_logits(logits, temperature=0.7, **HEAD)
        logprobs = logits.log_softmax(-1)
        return logprobs[ids, ids], logits.logsumexp(-1), -(logprobs.exp() * logprobs).sum(-1)

    for name, plain, truth in zip(got._fields, direct(torch.float32), direct(torch.float64), strict=True):
        assert_within_budget(getattr(got, name), plain, truth, name)


def test_a_tile_that_finfo_min_masks(backend, device, tiles):
    made, ids = inputs(), torch.arange(N)
    made["student_bias"][40:] = made["teacher_bias"][40:] = torch.finfo(torch.float32).min
    plain, truth = (token_scores(*projected(made, d, {}), ids) for d in (torch.float32, torch.float64))
    heads = to(made, device)
    positional = [heads.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    got = linear_token_scores(*positional, ids.to(device), **heads, workspace_mb=0.003, backend=backend)
    for name in got._fields:
        assert_within_budget(getattr(got, name), getattr(plain, name), getattr(truth, name), name)


@pytest.mark.parametrize("faint", [False, True], ids=["", "the student's mass there underflows"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tiles_without_mass_and_rows_that_are_no_distribution(divergence, backend, device, tiles, faint):
    """Columns that one model or both rule out, whole tiles of them among these; ids there; NaN; padding."""
    made, ids = inputs(), torch.tensor([0, 30, 45, 60, 80, 99, 5, 46, 99])
    made["student_bias"][40:90] = -torch.inf
    if faint:
        made["student_bias"][:40] -= 800
    made["teacher_bias"][:50] = -torch.inf
    made["student_hidden"][3], made["teacher_hidden"][4] = torch.nan, torch.nan
    made["teacher_bias"][100:] = torch.nan  # padding
    options = dict(divergence=divergence, vocab_size=100)
    heads = to(made, device)
    positional = [heads.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    got = linear_token_scores(*positional, ids.to(device), **heads, **options, workspace_mb=0.003, backend=backend)
    plain, truth = (token_scores(*projected(made, d, {}), ids, **options) for d in (torch.float32, torch.float64))
    assert truth.student_lse.isnan().sum() == 2 and (truth.student_logprob == -torch.inf).any()
    for name in got._fields:
        assert_within_budget(getattr(got, name), getattr(plain, name), getattr(truth, name), name)


def test_many_rows_are_projected_in_tiles_and_few_as_they_are(monkeypatch):
    """A product of few rows would read the weight for little work."""
    shapes = []

    def noted(hidden, weight, *rest):
        shapes.append((len(hidden), len(weight)))
        return project(hidden, weight, *rest)

    project = projection.project
    monkeypatch.setattr(projection, "project", noted)
    for rows in (600, 20):
        hidden, weight = torch.randn(rows, 4), torch.randn(5000, 4)
        linear_token_scores(hidden, weight, hidden, weight + 1, torch.zeros(rows, dtype=torch.int64), workspace_mb=8)
    assert shapes[::2] == shapes[1::2], "one product for each model"
    assert shapes[::2] == [(300, 2048)] * 4 + [(300, 904)] * 2 + [(20, 5000)]


def test_a_tile_s_rows_begin_where_a_vector_load_may():
    """On a GPU an odd width takes loads of 4 bytes and another variant of the kernel."""
    assert all(projection.column_tile(rows, 2, 152_001, 48) % 64 == 0 for rows in (100, 300, 333, 500, 600))


# ---- 16-bit weights on a GPU, seen without one -----------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 3])
def test_every_product_of_16_bit_weights_takes_them_as_they_are_on_a_gpu(chunks, monkeypatch):
    """No operand is brought to fp32, and what is summed over chunks is summed in fp32."""
    low, full = torch.bfloat16, torch.float32
    products, product = [], projection._product

    def noted(first, second, out_dtype):
        products.append((first.dtype, second.dtype, out_dtype))
        return product(first, second, out_dtype)

    monkeypatch.setattr(projection, "_product", noted)
    monkeypatch.setattr(projection, "_takes_low_precision", lambda tensor: True)
    made = {n: x.requires_grad_(n.startswith("student")) for n, x in inputs(low, bias=False).items()}
    workspace_mb = 4 * 4 * V * N / chunks / 2**20 if chunks > 1 else None
    linear_token_divergence(*made.values(), workspace_mb=workspace_mb).sum().backward()
    logits, of_hidden = [(low, low, full)] * 2, [(low, low, full)]
    of_weight = [(low, low, low if chunks == 1 else full)]
    assert products == logits * chunks + [*(logits if chunks > 1 else []), *of_hidden, *of_weight] * chunks
    assert made["student_weight"].grad.dtype == low


def test_a_gpu_takes_16_bit_operands_and_a_cpu_does_not():
    with FakeTensorMode():
        assert projection._takes_low_precision(torch.empty(1, device="cuda"))
        assert not projection._takes_low_precision(torch.empty(1))


def test_a_16_bit_product_of_the_gradient_keeps_the_budget(monkeypatch):
    """As a GPU computes it: gradients by the logits are rounded to the weight's dtype, and summed in fp32."""
    made = inputs(torch.bfloat16, bias=False)
    names = ("student_hidden", "student_weight")

    def gradients(dtype, function):
        leaves = {n: x.to(dtype).requires_grad_(n in names) for n, x in made.items()}
        return torch.autograd.grad(function(leaves).sum(), [leaves[n] for n in names])

    def direct(leaves):
        return token_divergence(leaves["student_hidden"] @ leaves["student_weight"].T, teacher_logits.to(kind(leaves)))

    def kind(leaves):
        return leaves["student_hidden"].dtype

    teacher_logits = made["teacher_hidden"].double() @ made["teacher_weight"].double().T
    truth = gradients(torch.float64, direct)
    rounded = gradients(torch.bfloat16, direct)  # the model's own 16-bit head
    monkeypatch.setattr(projection, "_takes_low_precision", lambda tensor: True)
    for workspace_mb in (None, 0.002):

        def linear(leaves, workspace_mb=workspace_mb):
            return linear_token_divergence(*leaves.values(), workspace_mb=workspace_mb)

        ours = gradients(torch.bfloat16, linear)
        for name, grad, plain, exact in zip(names, ours, rounded, truth, strict=True):
            error, theirs = ((x.double() - exact).norm() / exact.norm() for x in (grad, plain))
            assert error < 2**-8 and error < theirs / 2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "no tiles"])
def test_a_processor_s_bf16_tiles_are_used_where_they_are_exact_and_for_nothing_else(dtype, tiles, monkeypatch):
    monkeypatch.setattr(projection, "_has_bf16_tiles", lambda: tiles)
    matmul, seen = torch.backends.mkldnn.matmul, []
    before = matmul.fp32_precision

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm:
                seen.append(matmul.fp32_precision)
            return function(*args, **(kwargs or {}))

    hidden, weight = torch.randn(3, 4, dtype=dtype), torch.randn(7, 4, dtype=dtype)
    with Precisions():
        got = projection.project(hidden, weight, None)
    assert seen == ["bf16" if tiles and dtype == torch.bfloat16 else before]
    assert matmul.fp32_precision == before
    torch.testing.assert_close(got, hidden.float() @ weight.float().T)
    with pytest.raises(RuntimeError):
        projection.project(hidden, weight[:, :3], None)
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("workspace_mb", [None, 0.002], ids=["kept", "projected again"])
def test_rows_are_scanned_once_forward_and_once_backward(backend, workspace_mb, monkeypatch):
    """The forward's statistics are kept, not found again from logits that are projected again."""
    skip_unless_served(backend)
    calls = []
    kernels = rmsd_kernels.backends.implementation(backend)
    for name in ("divergence", "divergence_backward"):
        function = getattr(kernels, name)

        def counted(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(kernels, name, counted)
    made = inputs(bias=False)
    made["student_hidden"].requires_grad_()
    linear_token_divergence(*made.values(), workspace_mb=workspace_mb, backend=backend).sum().backward()
    assert calls.count("divergence") == calls.count("divergence_backward") == (1 if workspace_mb is None else 9)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 100])
def test_chunks_are_of_equal_size(num_rows):
    chunks = projection.row_chunks(num_rows, 100, 8 * 400 / 2**20)
    sizes = [part.stop - part.start for part in chunks]
    assert sum(sizes) == num_rows and max(sizes) <= 8 and max(sizes) - min(sizes) <= 1
    assert [part.start for part in chunks[1:]] == [part.stop for part in chunks[:-1]]
    assert len(chunks) == max(1, -(-num_rows // 8))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_logits_of_all_rows_never_exist(backend):
    skip_unless_served(backend)
    rows, vocab, hidden_size = 600, 2000, 4
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    ids = torch.zeros(rows, dtype=torch.int64)
    options = dict(workspace_mb=1, backend=backend)
    with Largest() as largest:
        linear_token_scores(hidden, weight, hidden, weight, ids, **options)
        linear_token_divergence(hidden, weight, hidden.detach(), weight.detach(), **options).sum().backward()
    assert largest.numel <= 2**20 / 4 < rows * vocab / 4


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_only_named_rows_reach_the_head(backend):
    skip_unless_served(backend)
    hidden, weight = torch.randn(500, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with Largest() as largest:
        rows = torch.tensor([3, 77])
        result = linear_token_divergence(hidden, weight, hidden.detach(), weight.detach(), rows=rows, backend=backend)
        result.sum().backward()
    assert largest.numel <= 500 * 4, "hidden states' gradient is the largest tensor"


def test_a_frozen_head_costs_no_weight_gradient():
    hidden, weight = torch.randn(3, 50, requires_grad=True), torch.randn(40, 50)
    with Largest() as largest:
        linear_token_divergence(hidden, weight, hidden.detach(), weight).sum().backward()
    assert largest.numel < weight.numel()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_workspace_changes_nothing():
    made = inputs(bias=False)
    ids = torch.zeros(N, dtype=torch.int64)
    results = [
        (
            linear_token_scores(*made.values(), ids, workspace_mb=mb),
            linear_token_divergence(*made.values(), workspace_mb=mb),
        )
        for mb in (1e-6, 0.004, 64)
    ]
    for scores, divergence in results[1:]:
        torch.testing.assert_close(scores, results[0][0])
        torch.testing.assert_close(divergence, results[0][1])


def test_leading_shapes_come_back():
    made = inputs(bias=False)
    made |= {name: made[name].view(3, 3, -1) for name in ("student_hidden", "teacher_hidden")}
    scores = linear_token_scores(*made.values(), torch.zeros(3, 3, dtype=torch.int64))
    assert scores.divergence.shape == (3, 3)
    torch.testing.assert_close(linear_token_divergence(*made.values()), scores.divergence.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("names", [("student_hidden", "student_weight", "student_bias"), ("student_weight",)])
def test_no_rows_still_belong_to_the_graph(names, dtype):
    made = inputs(dtype)
    trained = [made[name].requires_grad_() for name in names]
    student, weight, teacher, teacher_weight, *biases = made.values()
    for rows in (torch.empty(0, dtype=torch.int64), torch.tensor([-1, -1])):
        result = linear_token_divergence(
            student, weight, teacher, teacher_weight, rows=rows, student_bias=biases[0], teacher_bias=biases[1]
        )
        assert result.tolist() == [0.0] * len(rows)
        assert result.dtype == torch.promote_types(dtype, torch.float32)
        grads = torch.autograd.grad(result.sum(), trained)
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in trained] and not any(map(torch.any, grads))


def test_a_tied_head_gets_the_gradient_of_the_student_alone():
    """One weight serves both models; the teacher's use of it is detached."""
    hidden, weight, _ = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    teacher = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    tied = weight.clone().requires_grad_()
    linear_token_divergence(hidden, tied, teacher, tied).sum().backward()
    alone = weight.clone().requires_grad_()
    linear_token_divergence(hidden, alone, teacher, weight).sum().backward()
    assert torch.equal(tied.grad, alone.grad)
    assert tied.grad.abs().sum() > 0
