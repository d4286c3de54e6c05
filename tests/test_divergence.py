"""token_divergence of every backend, forward and backward, by the error budget against fp64."""

import budget
import inputs
import numpy as np
import pytest
import torch
from conftest import device_of, skip_unless_served

import rmsd_kernels as rk

K = 40  # of about 330: several blocks hold some of the support


def options_of(divergence, tail, **options):
    return dict(divergence=divergence, **({} if tail is None else dict(vocab_topk=K, tail=tail)), **options)


def cycled(backend, *parts):
    """All dtypes, or for the interpreted backend one that depends on the other parameters, so that all pairs occur."""
    cycle = sum(values.index(value) for value, values in parts)
    return [budget.DTYPES[cycle % 3]] if backend == "triton" else budget.DTYPES


@pytest.mark.parametrize("tail", budget.TAILS)
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("regime", inputs.REGIMES)
def test_regimes(backend, device, regime, divergence, tail):
    parts = (regime, list(inputs.REGIMES)), (divergence, budget.DIVERGENCES), (tail, budget.TAILS)
    for dtype in cycled(backend, *parts):
        case = inputs.REGIMES[regime]((2, 328), dtype)
        budget.check_divergence(
            backend, *case[:2], device=device, stable=regime == "offset", **options_of(divergence, tail)
        )


@pytest.mark.parametrize("tail", budget.TAILS)
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("name", inputs.CASES)
def test_shapes_and_values(backend, device, name, divergence, tail):
    if inputs.too_slow_to_interpret(name, backend, device):
        pytest.skip("70,000 programs take the interpreter an hour")
    if name == "many_rows" and (tail is not None or divergence == "jsd"):
        pytest.skip("its two entries leave no tail, and a KL has every index a jsd has")
    parts = (name, list(inputs.CASES)), (divergence, budget.DIVERGENCES), (tail, budget.TAILS)
    if backend == "triton" and device == "cpu" and tail is not None and sum(v.index(p) for p, v in parts) % 10:
        pytest.skip("the interpreter takes one in ten of these")
    for dtype in cycled(backend, *parts):
        case = inputs.make(name, dtype, backend)
        got, _ = budget.check_divergence(
            backend, *case[:2], device=device, **options_of(divergence, tail), **case.options
        )
        assert got.shape == case.student.shape[:-1]
        assert got.device.type == device


OPTIONS = {
    "temperature": dict(temperature=0.6),
    "two temperatures": dict(temperature=1.7, teacher_temperature=0.4),
    "beta": dict(beta=0.1),
    "softcap": dict(softcap=5.0),
    "scale": dict(logit_scale=0.25),
    "all": dict(temperature=0.6, teacher_temperature=1.3, softcap=8.0, logit_scale=1.5, vocab_size=301, beta=0.8),
}


@pytest.mark.parametrize("tail", [None, "bucket"])
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backend, device, option, divergence, tail):
    parts = (option, list(OPTIONS)), (divergence, budget.DIVERGENCES), (tail, budget.TAILS)
    if backend == "triton" and device == "cpu" and tail is not None and sum(v.index(p) for p, v in parts) % 3:
        pytest.skip("the interpreter takes one in three of these")
    for dtype in cycled(backend, *parts):
        case = inputs.far_apart((2, 331), dtype)
        case.student[:, 5] = case.teacher[:, 5] = -inputs.INF  # a softcap must not give a banned token mass
        budget.check_divergence(backend, *case[:2], device=device, **options_of(divergence, tail, **OPTIONS[option]))


# ---- the support of a top-k ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["drop", "bucket", "renorm"])
@pytest.mark.parametrize("k", [1, 2, 77, 128, 330, 331, 332])
@pytest.mark.parametrize("name", ["ragged", "tied", "constant", "banned_by_both", "one_certain"])
def test_support(backend, device, name, k, tail):
    """One entry, most of them, all but one, all, more than there are, and as many as an interpreted tile holds, so that
    of constant logits the last one taken is its tile's last; among distinct logits and ties."""
    parts = (k, [1, 2, 77, 128, 330, 331, 332]), (tail, budget.TAILS)
    if (
        backend == "triton"
        and device == "cpu"
        and (name not in ("tied", "constant") or sum(v.index(p) for p, v in parts) % 3)
    ):
        pytest.skip("the interpreter takes every k and every tail once, on ties")
    for dtype in cycled(backend, *parts):
        case = inputs.make(name, dtype, backend)
        budget.check_divergence(backend, *case[:2], device=device, vocab_topk=k, tail=tail)


@pytest.mark.parametrize("tail", ["drop", "bucket", "renorm"])
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
@pytest.mark.parametrize("part", ["support", "rest"])
def test_a_teacher_without_mass_in_a_part(backend, device, part, divergence, tail):
    """renorm cannot renormalise nothing: +inf, whatever the divergence, and no gradient."""
    student, teacher, _ = inputs.far_apart((2, 331))
    order = student[0].argsort(descending=True)
    teacher[0, order[:K] if part == "support" else order[K:]] = -inputs.INF
    got, grad = budget.check_divergence(backend, student, teacher, device=device, **options_of(divergence, tail))
    if tail == "renorm" and part == "support":
        assert got[0] == inputs.INF
        assert (grad[0] == 0).all()


@pytest.mark.parametrize("tail", ["drop", "bucket", "renorm"])
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
def test_both_models_without_mass_in_the_rest(backend, device, divergence, tail):
    """As where one grammar bans all but a few tokens for both."""
    student, teacher, _ = inputs.far_apart((1, 45))
    student[:, 30:] = teacher[:, 30:] = -inputs.INF
    budget.check_divergence(backend, student, teacher, device=device, **options_of(divergence, tail))


@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
def test_a_ban_of_the_students_beside_a_teachers_as_low_as_a_float_can_be(backend, device, divergence):
    """Which GPU kernels take for a ban as well."""
    student, teacher, _ = inputs.far_apart((2, 40))
    student[0, 5], teacher[0, 3] = -inputs.INF, torch.finfo(torch.float32).min
    student = student.to(device).requires_grad_()
    result = rk.token_divergence(student, teacher.to(device), divergence=divergence, backend=backend)
    (grad,) = torch.autograd.grad(result.sum(), student)
    assert not result.isnan().any() and not grad.isnan().any()


def test_what_was_infinitely_apart_counts_for_nothing_once_its_weight_is_gone(backend, device):
    if backend == "triton":
        pytest.skip("its kernels take finfo.min for a ban, where the student has mass: a divergence of +inf")
    student = torch.full((1, 4096), -1e4)
    student[:, 3000:] = 1.0
    teacher = torch.full((1, 4096), torch.finfo(torch.float32).min)
    teacher[:, 0], teacher[:, 3000:] = 0.0, 2.0
    result = rk.token_divergence(student.to(device), teacher.to(device), backend=backend)
    torch.testing.assert_close(result.cpu(), rk.token_divergence(student.double(), teacher.double()).float())


def gradient_support(backend, student, teacher, k):
    """Which logits have gradient under "renorm": exactly the support."""
    student = student.clone().requires_grad_()
    result = rk.token_divergence(student, teacher, vocab_topk=k, tail="renorm", backend=backend)
    return torch.autograd.grad(result.sum(), student)[0].ne(0).cpu()


@pytest.mark.parametrize("temperature", [0.6, 2.05])
def test_equal_rows_have_no_divergence_and_no_gradient_at_any_temperature(backend, device, temperature):
    """At logits of +-30 half a bit of a scaled logit is more than the budget."""
    row = (torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) - 30.0).to(device)
    row[:, 7] += 60.0
    for divergence in budget.DIVERGENCES:
        student = row.clone().requires_grad_()
        result = rk.token_divergence(student, row, divergence=divergence, temperature=temperature, backend=backend)
        (grad,) = torch.autograd.grad(result.sum(), student)
        assert max(result.abs().max(), grad.abs().max()) <= 1e-6, divergence
        if divergence == "jsd" and backend == "triton":
            assert not result.any()  # its every term is 0, and not only small


@pytest.mark.parametrize("off_by", [2.0**-22, -(2.0**-22)])
@pytest.mark.parametrize("regime", inputs.REGIMES)
def test_an_approximate_logarithm_keeps_a_jsd_within_the_budget(regime, off_by, monkeypatch):
    """CUDA's lg2.approx may be off by 2^-22, between 1/2 and 2 absolutely and elsewhere of its value. The interpreter's
    logarithm is exact, so each entry's gets that error here, all in one direction: the worst there can be."""
    skip_unless_served("triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if device_of("triton") == "cuda":
        pytest.skip("not interpreted: the GPU's own logarithm is in every test")
    exact = interpreter.InterpreterBuilder.create_log2
    entries = []

    def approximate(builder, argument):
        result = exact(builder, argument)
        if result.data.size > 1:  # an entry's, not a row's normaliser, whose logarithm is the accurate one
            error = off_by * np.where((argument.data > 0.5) & (argument.data < 2), 1, np.abs(result.data))
            result.data = np.where(argument.data == 1, 0, result.data + error).astype(np.float32)
            entries.append(result.data.size)
        return result

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_log2", approximate)
    made = inputs.REGIMES[regime]((1, 331))
    beta = 0.5 if off_by > 0 else 0.1
    budget.check_divergence("triton", *made[:2], divergence="jsd", beta=beta, stable=regime == "offset")
    assert entries


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_ties_go_to_the_lower_id(backend, device, dtype):
    """Which of the tied logits are taken shows in the gradient: the teacher differs at every one."""
    student = torch.zeros(2, 328, dtype=dtype)
    student[1, ::2] = -0.0  # which ties with 0.0
    student[0, 200] = student[1, 10] = student[1, 300] = 3.0
    teacher = inputs.far_apart((2, 328), dtype).teacher
    got = gradient_support(backend, student.to(device), teacher.to(device), 150)
    assert got[0].nonzero().flatten().tolist() == [*range(149), 200]
    assert got[1].nonzero().flatten().tolist() == [*range(149), 300]


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [None, "drop"])
@pytest.mark.parametrize("divergence", budget.DIVERGENCES)
def test_rows_are_those_of_the_whole(backend, device, divergence, tail):
    """In any order, -1 standing for none; every other row's gradient is exactly zero, and NaN in it is never read."""
    student, teacher, _ = inputs.far_apart((2, 3, 40))
    student[0, 1] = teacher[1, 1] = inputs.NAN  # rows 1 and 4, not asked for
    rows = torch.tensor([5, -1, 0, 3])
    options = dict(options_of(divergence, tail), **({} if tail is None else dict(vocab_topk=6)))
    got, grad = budget.check_divergence(backend, student, teacher, rows=rows, device=device, **options)
    whole = rk.token_divergence(student.to(device), teacher.to(device), backend=backend, **options).flatten()
    assert torch.equal(got[[0, 2, 3]], whole[rows[[0, 2, 3]]])
    assert got[1] == 0
    assert (budget.flat(grad)[[1, 2, 4]] == 0).all()
    assert (budget.flat(grad)[[0, 3, 5]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("rows", [[], [-1, -1]], ids=str)
def test_no_row_gives_zeros_that_backward_runs_through(backend, device, rows):
    student, teacher, _ = inputs.far_apart((3, 40))
    rows = torch.tensor(rows, dtype=torch.int64)
    got, grad = budget.check_divergence(backend, student, teacher, rows=rows, device=device)
    assert (got == 0).all()
    assert (grad == 0).all()


def test_rows_of_no_sequences(backend, device):
    student, teacher, _ = inputs.far_apart((0, 4, 40))
    got, grad = budget.check_divergence(backend, student, teacher, rows=torch.tensor([-1]), device=device)
    assert got.tolist() == [0.0]
    assert grad.shape == student.shape
    assert rk.token_divergence(student.double(), teacher.double(), rows=torch.tensor([-1])).dtype == torch.float64


@pytest.mark.parametrize("upstream", [0.0, inputs.NAN])
def test_what_comes_from_above_is_multiplied_in(backend, device, upstream):
    student, teacher, _ = inputs.far_apart((2, 40))
    student = student.to(device).requires_grad_()
    result = rk.token_divergence(student, teacher.to(device), backend=backend)
    (grad,) = torch.autograd.grad(result, student, torch.tensor([upstream, 1.0], device=device))
    assert (grad[0] == 0).all() if upstream == 0 else grad[0].isnan().all()
    assert grad[1].abs().sum() > 0


def test_an_expanded_gradient_from_above(backend, device):
    """sum().backward() hands down one number with stride 0."""
    student, teacher, _ = inputs.far_apart((3, 40))
    student = student.to(device).requires_grad_()
    rk.token_divergence(student, teacher.to(device), backend=backend).sum().backward()
    _, grad = budget.check_divergence(backend, student[1:2].detach().cpu(), teacher[1:2], device=device)
    torch.testing.assert_close(student.grad[1:2], grad / 0.5, rtol=1e-6, atol=0)


def test_neither_input_is_written_to(backend, device):
    student, teacher, _ = inputs.far_apart((2, 331))
    given = student.clone(), teacher.clone()
    budget.check_divergence(backend, student, teacher, device=device, vocab_topk=K, tail="bucket")
    assert torch.equal(student, given[0])
    assert torch.equal(teacher, given[1])


def test_the_teacher_gets_no_gradient(backend, device):
    student, teacher, _ = inputs.far_apart((2, 40))
    student, teacher = student.to(device), teacher.to(device).requires_grad_()
    assert not rk.token_divergence(student, teacher, backend=backend).requires_grad
    rk.token_divergence(student.requires_grad_(), teacher, backend=backend).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_a_row_that_is_named_twice_gets_the_sum_of_both_gradients(backend, device, tail):
    """Whether rows repeat is not asked of a device: it would wait."""
    case = inputs.far_apart((5, 40))
    rows = torch.tensor([3, 0, -1, 3, 4, 3], device=device)
    upstream = torch.tensor([1.0, 2.0, 7.0, -0.5, 1.0, 0.25], device=device)

    def gradient(rows, upstream):
        leaf = case.student.to(device).requires_grad_()
        result = rk.token_divergence(
            leaf, case.teacher.to(device), rows=rows, backend=backend, **options_of("jsd", tail)
        )
        return torch.autograd.grad(result, leaf, upstream)[0]

    once = gradient(torch.tensor([3, 0, 4], device=device), torch.tensor([0.75, 2.0, 1.0], device=device))
    torch.testing.assert_close(gradient(rows, upstream), once, rtol=1e-6, atol=1e-7)


def test_many_repeats_are_summed_alike_in_every_run():
    """By several threads at once, too."""
    skip_unless_served("cpu")
    student, teacher, _ = inputs.far_apart((3, 8))
    generator = torch.Generator().manual_seed(0)
    rows, upstream = torch.randint(3, (70_000,), generator=generator), torch.rand(70_000, generator=generator)
    student.requires_grad_()
    result = rk.token_divergence(student, teacher, rows=rows, backend="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grads = [torch.autograd.grad(result, student, upstream, retain_graph=True)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
