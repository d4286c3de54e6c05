"""RMSDLoss and LinearRMSDLoss against the method's definition, written out."""

import pytest
import torch

from rmsd import LinearRMSDLoss, RMSDLoss
from rmsd_kernels import token_divergence, token_scores

B, L, V, H = 3, 9, 40, 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(B, L, V, generator=generator)
    teacher = torch.randn(B, L, V, generator=generator)
    ids = torch.randint(V, (B, L), generator=generator)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, 6:] = mask[2] = False  # an answer cut short, and one of no tokens
    return student, teacher, ids, mask


def by_definition(student, teacher, ids, mask, num_kept, threshold=0.0, **options):
    """Loops over sequences and tokens."""
    scores = token_scores(student.detach(), teacher, ids, backend="torch")
    divergence = token_divergence(student, teacher, backend="torch", **options)
    means = []
    for b in range(len(ids)):
        gaps = {
            i: (scores.teacher_logprob[b, i] - scores.student_logprob[b, i]).abs().item()
            for i in range(L)
            if mask[b, i] and divergence[b, i].isfinite()
        }
        kept = [i for i in sorted(gaps, key=lambda i: (-gaps[i], i)) if gaps[i] > threshold][:num_kept]
        if kept:
            means.append(sum(divergence[b, i] for i in kept) / len(kept))
    return sum(means) / len(means)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_loss_is_the_mean_over_kept_tokens_then_sequences(batch, divergence, threshold):
    student, teacher, ids, mask = batch
    student = student.double().requires_grad_()
    loss = RMSDLoss(num_kept=2, divergence=divergence, vocab_topk=10, threshold=threshold)(
        student, teacher.double(), ids, mask
    )
    options = dict(divergence=divergence, vocab_topk=10)
    expected = by_definition(student, teacher.double(), ids, mask, 2, threshold, **options)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(grad, expected_grad)
    assert (grad.abs().sum(-1) > 0).sum() <= 4, "two kept tokens in each of two sequences, no other has gradient"


def test_keep_replaces_the_magnitude_judge_and_never_reaches_masked_tokens(batch):
    student, teacher, ids, mask = batch
    student.requires_grad_()
    keep = torch.zeros(B, L, dtype=torch.bool)
    keep[0, 1] = keep[0, 8] = keep[1, 4] = keep[2, 0] = True  # [0, 8] and [2, 0] are masked out
    loss = RMSDLoss(vocab_topk=None)(student, teacher, ids, mask, keep)
    divergence = token_divergence(student, teacher)
    torch.testing.assert_close(loss, (divergence[0, 1] + divergence[1, 4]) / 2)
    loss.backward()
    assert set(map(tuple, student.grad.abs().sum(-1).nonzero().tolist())) == {(0, 1), (1, 4)}


def test_nothing_kept_gives_zero_with_zero_gradients(batch):
    student, teacher, ids, mask = batch
    student.requires_grad_()
    for loss in (
        RMSDLoss()(student, teacher, ids, torch.zeros_like(mask)),
        RMSDLoss()(student, teacher, ids, mask, torch.zeros_like(mask)),
        RMSDLoss(threshold=1e9)(student, teacher, ids, mask),
    ):
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, student)
        assert not grad.any()


def test_row_without_finite_divergence_is_left_out_and_counted(batch):
    student, teacher, ids, mask = batch
    teacher[0, 2, 5] = -torch.inf
    student[1, 3] = torch.nan
    student.requires_grad_()
    keep = torch.zeros_like(mask)
    keep[0, 2] = keep[0, 3] = keep[1, 3] = keep[1, 4] = True
    criterion = RMSDLoss(vocab_topk=None)
    loss = criterion(student, teacher, ids, mask, keep)
    divergence = token_divergence(student, teacher)
    torch.testing.assert_close(loss, (divergence[0, 3] + divergence[1, 4]) / 2)
    assert criterion.nonfinite_rows == 2
    loss.backward()
    assert set(map(tuple, student.grad.abs().sum(-1).nonzero().tolist())) == {(0, 3), (1, 4)}
    _, candidates = criterion.candidates(student, teacher, ids, mask)
    assert 2 not in candidates[0] and 3 not in candidates[1]


def test_micro_batches_add_up_to_the_whole_batch(batch):
    student, teacher, ids, mask = batch
    student.requires_grad_()
    criterion = RMSDLoss(num_kept=3)
    whole = criterion(student, teacher, ids, mask)
    parts = sum(
        criterion(student[b : b + 1], teacher[b : b + 1], ids[b : b + 1], mask[b : b + 1], num_sequences=2)
        for b in range(B)
    )
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (whole, parts)))


def test_candidates_are_masked_ranked_and_padded(batch):
    student, teacher, ids, mask = batch
    scores, candidates = RMSDLoss(num_candidates=7, num_kept=2).candidates(student, teacher, ids, mask)
    assert candidates.shape == (B, 7)
    assert (candidates[0] >= 0).sum() == 6 and (candidates[2] == -1).all()
    gap = (scores.teacher_logprob - scores.student_logprob).abs()[1, candidates[1]]
    assert (gap.diff() <= 0).all()


@pytest.mark.parametrize("use_keep", [False, True])
def test_linear_loss_equals_the_loss_of_its_logits(batch, use_keep):
    _, _, ids, mask = batch
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = (torch.randn(B, L, H, generator=generator).requires_grad_() for _ in range(2))
    weight, teacher_weight = (torch.randn(V, H, generator=generator).requires_grad_() for _ in range(2))
    keep = None
    if use_keep:
        keep = torch.zeros_like(mask)
        keep[0, 2] = keep[1, 5] = keep[1, 6] = True
    options = dict(num_kept=2, vocab_topk=10, divergence="jsd")
    head = dict(logit_scale=0.5, softcap=5.0)
    linear = LinearRMSDLoss(**options)
    loss = linear(hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), ids, mask, keep, **head)

    def logits(hidden, weight):
        return 5.0 * torch.tanh(0.5 * hidden @ weight.T / 5.0)

    expected = RMSDLoss(**options)(
        logits(hidden, weight), logits(teacher_hidden, teacher_weight).detach(), ids, mask, keep
    )
    torch.testing.assert_close(loss, expected)
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad)
    candidates = linear.candidates(hidden, weight, teacher_hidden, teacher_weight, ids, mask, **head)[1]
    dense = RMSDLoss(**options).candidates(logits(hidden, weight), logits(teacher_hidden, teacher_weight), ids, mask)[1]
    assert torch.equal(candidates, dense)


def test_padding_ids_outside_the_vocabulary_are_fine_where_masked(batch):
    student, teacher, ids, mask = batch
    expected = RMSDLoss()(student, teacher, ids, mask)
    torch.testing.assert_close(RMSDLoss()(student, teacher, ids.masked_fill(~mask, -100), mask), expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(num_kept=0), "num_kept"),
        (dict(num_candidates=0), "num_candidates"),
        (dict(criterion="gap"), "criterion"),
        (dict(divergence="kl"), "divergence"),
        (dict(divergence="jsd", beta=1.0), "beta"),
        (dict(tail="cut"), "tail"),
        (dict(vocab_topk=0), "vocab_topk"),
        (dict(temperature=0.0), "temperature"),
        (dict(threshold=float("nan")), "threshold"),
    ],
)
def test_impossible_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        RMSDLoss(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(num_kept=2.5), "num_kept must be an integer, not 2.5"),
        (dict(vocab_topk=2.0), "vocab_topk must be an integer or None, not 2.0"),
        (dict(temperature="1"), "temperature must be a number, not '1'"),
        (dict(beta=None), "beta must be a number, not None"),
        (dict(threshold=None), "threshold must be a number, not None"),
    ],
)
def test_options_of_another_kind_are_refused_by_name(options, named):
    with pytest.raises(TypeError, match=named):
        RMSDLoss(**options)


@pytest.fixture(params=[RMSDLoss, LinearRMSDLoss])
def loss_of(request, batch):
    """The loss of the batch by (ids, mask, keep), from logits and from the hidden states that are the same."""
    student, teacher, *_ = batch
    heads = (student, teacher) if request.param is RMSDLoss else (student, torch.eye(V), teacher, torch.eye(V))
    return lambda *tensors, **options: request.param(vocab_topk=None)(*heads, *tensors, **options)


def test_bad_masks_are_refused_by_name(batch, loss_of):
    _, _, ids, mask = batch
    for keep in (mask.long(), [True]):
        with pytest.raises(TypeError, match="keep must be a bool tensor"):
            loss_of(ids, mask, keep)
    with pytest.raises(ValueError, match=r"keep must be \(3, 9\), not \(3, 8\)"):
        loss_of(ids, mask, mask[:, :-1])
    for keep in (None, mask, mask[:1], mask[0]):
        for bad in (mask[:1], mask[0], mask[:, :-1]):
            with pytest.raises(ValueError, match=r"completion_mask must be \(3, 9\), not"):
                loss_of(ids, bad, keep)


@pytest.mark.parametrize("kept", [False, True])
def test_ids_that_were_not_shifted_are_named_and_not_their_mask(batch, loss_of, kept):
    _, _, ids, mask = batch
    longer = torch.nn.functional.pad(ids, (1, 0))
    for beside in (mask, torch.nn.functional.pad(mask, (1, 0))):
        with pytest.raises(ValueError, match=r"sampled_ids must be \(3, 9\), one id a row, not \(3, 10\): row i is"):
            loss_of(longer, beside, mask if kept else None)


def test_an_id_where_a_kept_token_is_masked_may_be_anything(batch, loss_of):
    _, _, ids, mask = batch
    everywhere = torch.ones_like(mask)
    torch.testing.assert_close(loss_of(ids.masked_fill(~mask, -100), mask, everywhere), loss_of(ids, mask, everywhere))
    with pytest.raises(ValueError, match="sampled_ids must lie in"):
        loss_of(ids.masked_fill(mask, -100), mask, everywhere)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=repr)
def test_a_batch_in_which_nothing_is_kept_anywhere_has_no_loss(batch, loss_of, zero):
    _, _, ids, mask = batch
    assert loss_of(ids, mask, torch.zeros_like(mask), num_sequences=zero).item() == 0.0


def test_no_more_tokens_are_kept_than_are_candidates(batch):
    student, teacher, ids, mask = batch
    two, five = (RMSDLoss(num_candidates=2, num_kept=kept)(student, teacher, ids, mask) for kept in (2, 5))
    assert two == five != RMSDLoss(num_candidates=5, num_kept=5)(student, teacher, ids, mask)


def test_the_count_of_left_out_rows_follows_the_inputs(batch):
    """A loss without weights is seldom moved. "meta" stands in for a device that is not the CPU."""
    criterion = RMSDLoss()
    rows = torch.empty(4, dtype=torch.int64, device="meta")
    criterion._mean(torch.empty(4, device="meta"), rows, batch[2].shape, 1)
    assert criterion.nonfinite_rows.device.type == "meta"


def test_keep_on_the_host_is_refused_where_a_graph_is_captured(batch, monkeypatch):
    """Its rows are copied to the device from memory that a replay would find freed. No GPU here: another device stands
    for one, and a stream that says whether it is captured."""
    student, teacher, ids, mask = (tensor.to("meta") for tensor in batch)
    keep = torch.ones(ids.shape, dtype=torch.bool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    RMSDLoss(backend="torch")(student, teacher, ids, mask, keep)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"^keep must be on meta where a CUDA graph is captured, not on the CPU"):
        RMSDLoss(backend="torch")(student, teacher, ids, mask, keep)
