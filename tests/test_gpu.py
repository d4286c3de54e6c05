"""What only a GPU can show: programs that race, streams, graphs, rows past 2^31 logits, hosts that need not wait."""

import pytest
import torch

import rmsd_kernels as rk
from rmsd import RMSDLoss
from rmsd.models.transfer import to_device, to_host
from rmsd_kernels import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def memory():
    yield
    torch.cuda.empty_cache()  # other workers' tests share the GPU


def made(shape, dtype=torch.bfloat16, seed=0):
    """Student and teacher logits of (B, L, V), sampled ids, and a mask of all."""
    generator = torch.Generator("cuda").manual_seed(seed)
    student = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
    teacher = torch.randn(shape, generator=generator, device="cuda", dtype=dtype).add_(student)
    ids = torch.randint(shape[-1], shape[:-1], generator=generator, device="cuda")
    return student, teacher, ids, torch.ones_like(ids, dtype=torch.bool)


@pytest.mark.parametrize("shape", [(512, 3, 64), (64, 67, 256), (2, 2048, 512), (9, 33, 20_000)])
def test_the_last_program_of_a_sequence_sees_every_score(shape):
    """Thousands of programs end in any order; a score not yet visible to the one that selects would lose its place."""
    for seed in range(100):
        inputs = made(shape, seed=seed)
        scores, index = rk.scores_and_candidates(*inputs, num_candidates=20)
        gap = rk.criterion_score(scores, "logprob_gap")
        assert torch.equal(index, reference.select_tokens(gap, inputs[-1], num_tokens=20)), f"launch {seed}"


def test_rows_past_two_billion_logits_are_the_same_rows():
    vocab = 152_064
    rows = 2**31 // vocab + 9
    student, teacher, ids, _ = made((1, rows, vocab))
    scores = rk.token_scores(student, teacher, ids)
    few = slice(rows - 5, rows)
    for whole, alone in zip(scores, rk.token_scores(student[:, few], teacher[:, few], ids[:, few]), strict=True):
        assert torch.equal(whole[:, few], alone)
    for chosen in (None, torch.tensor([rows - 1, 0, -1, rows - 3], device="cuda")):
        student.requires_grad_()
        (grad,) = torch.autograd.grad(rk.token_divergence(student, teacher, rows=chosen).sum(), student)
        beside = 70 if chosen is None else 1  # so that it is split over programs where the other is
        last = student.detach()[:, -beside:].requires_grad_()
        (expected,) = torch.autograd.grad(rk.token_divergence(last, teacher[:, -beside:]).sum(), last)
        assert torch.equal(grad[:, -1:], expected[:, -1:])
        assert chosen is None or not grad[:, rows - 2].any()
        del grad


@pytest.mark.parametrize("vocab_topk", [None, 50])
def test_a_graph_replays_it_on_other_inputs(vocab_topk):
    loss = RMSDLoss(num_kept=3, vocab_topk=vocab_topk)
    student, *others = made((4, 33, 5000))
    student.requires_grad_()

    def step():
        total = loss(student, *others)
        return total, *torch.autograd.grad(total, student)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        for tensor, new in zip((student.detach(), *others), made((4, 33, 5000), seed=seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)
            assert replayed.any()


@pytest.mark.parametrize("divergence", reference.DIVERGENCES)
def test_the_last_part_of_a_split_row_sees_every_part(divergence):
    """Parts end in any order, and are merged in one order: the same bits every time, and near those of whole rows."""
    student, teacher, _, _ = made((1, 70, 151_936))
    rows = torch.arange(5, device="cuda")
    whole = rk.token_divergence(student, teacher, divergence=divergence).flatten()[:5]
    first = rk.token_divergence(student, teacher, rows=rows, divergence=divergence)
    torch.testing.assert_close(first, whole, rtol=2e-6, atol=1e-6)
    for launch in range(200):
        again = rk.token_divergence(student, teacher, rows=rows, divergence=divergence)
        assert torch.equal(again, first), f"launch {launch}"


def test_it_runs_on_the_stream_that_is_current():
    inputs = made((8, 256, 20_000))
    expected = rk.scores_and_candidates(*inputs, num_candidates=5)[1]
    side = torch.cuda.Stream()
    late = [torch.zeros_like(tensor) for tensor in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 30 ms: on any other stream the kernels would read zeros
        for tensor, value in zip(late, inputs, strict=True):
            tensor.copy_(value)
        found = rk.scores_and_candidates(*late, num_candidates=5)[1]
    side.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("vocab_topk", [None, 50])
def test_the_host_waits_for_nothing(vocab_topk):
    """From logits to gradient: a loop that launches ahead keeps the GPU busy."""
    loss = RMSDLoss(num_kept=3, vocab_topk=vocab_topk)
    student, *others = made((4, 33, 5000))
    student.requires_grad_()
    loss(student, *others)  # compiles, and brings the loss's count of bad rows to the device
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss(student, *others).backward()
        rk.scores_and_candidates(student.detach(), *others, num_candidates=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad.ne(0).any(-1).sum() == 12


@pytest.mark.parametrize("rows", [None, 5])
def test_no_tensor_of_logits_size_beside_the_gradient(rows):
    student, teacher, ids, mask = made((1, 512, 50_048))
    student.requires_grad_()
    chosen = None if rows is None else torch.arange(rows, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rk.scores_and_candidates(student.detach(), teacher, ids, mask, num_candidates=20)
    rk.token_divergence(student, teacher, rows=chosen, vocab_topk=500).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - student.nbytes
    assert extra < 0.01 * student.nbytes, f"{extra} bytes beside a gradient of {student.nbytes}"


def test_what_the_host_knows_is_queued_and_not_waited_for():
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = to_device([3, 1, 2], "cuda").sort().values
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [tensor.tolist() for tensor in to_host(on_device, on_device * 2)] == [[1, 2, 3], [2, 4, 6]]
