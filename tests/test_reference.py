"""reference.py, the truth that kernels are held to, against loops over Python floats, finite differences and fp64."""

import itertools
import math

import by_hand
import pytest
import torch
from budget import assert_within_budget

from rmsd_kernels import reference

DIVERGENCES, TAILS = reference.DIVERGENCES, (None, *reference.TAILS)
INF, NAN = math.inf, math.nan
V = 11  # small enough for loops and finite differences; not a multiple of anything

OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "two temperatures": dict(temperature=2.0, teacher_temperature=0.5),
    "vocab_size": dict(vocab_size=8),
    "softcap": dict(softcap=2.0),
    "scale": dict(logit_scale=0.3),
    "all": dict(temperature=0.7, teacher_temperature=1.6, vocab_size=9, softcap=3.0, logit_scale=1.4),
}


def rows(seed=0, count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(count, V, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def divergence_options(divergence, tail, beta=0.3):
    return dict(divergence=divergence, beta=beta, **({} if tail is None else dict(vocab_topk=4, tail=tail)))


def by_loops(student, teacher, **options):
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    return torch.tensor([by_hand.divergence(*pair, **options) for pair in pairs], dtype=torch.float64)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_by_hand(divergence, option):
    student, teacher = rows()
    student[1, 3] = teacher[1, 3] = student[2, 5] = -INF
    ids = torch.tensor([0, 7, 2, 5])
    options = dict(divergence=divergence, beta=0.3, **OPTIONS[option])
    got = torch.stack(reference.token_scores(student, teacher, ids, **options))
    triples = zip(student.tolist(), teacher.tolist(), ids.tolist(), strict=True)
    expected = torch.tensor([by_hand.scores(*triple, **options) for triple in triples], dtype=torch.float64).T
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_by_hand(divergence, tail, option):
    student, teacher = rows()
    student[1, 3] = teacher[1, 3] = student[2, 5] = -INF
    teacher[3] = student[3]  # a divergence of 0
    options = divergence_options(divergence, tail) | OPTIONS[option]
    got = reference.token_divergence(student, teacher, **options)
    torch.testing.assert_close(got, by_loops(student, teacher, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bucket_of_almost_nothing_is_summed_directly(divergence):
    """1 - P would lose it: the rest's mass is e^-40."""
    student, teacher = rows()
    student[:, 4:] -= 40
    teacher[:, 4:] -= 45
    options = divergence_options(divergence, "bucket")
    got = reference.token_divergence(student, teacher, **options)
    without = reference.token_divergence(student, teacher, **options | dict(tail="drop"))
    torch.testing.assert_close(got, by_loops(student, teacher, **options), rtol=1e-14, atol=0)
    assert ((got - without).abs() < 1e-14).all()


@pytest.mark.parametrize("beta", [0.02, 0.5, 0.97])
def test_jsd_weighs_the_teacher_by_beta(beta):
    student, teacher = rows()
    options = dict(divergence="jsd", beta=beta)
    got = reference.token_divergence(student, teacher, **options)
    torch.testing.assert_close(got, by_loops(student, teacher, **options), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        got, reference.token_divergence(teacher, student, divergence="jsd", beta=1 - beta), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, tail, option):
    student, teacher = rows(count=2)
    options = divergence_options(divergence, tail) | OPTIONS[option]
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.token_divergence(x, teacher, **options), student)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_with_banned_tokens_and_saturated_rows(divergence, tail):
    student, teacher = rows(count=2)
    # Banned by both inside the support's reach and outside it; one row all but certain.
    fixed = torch.zeros(2, V, dtype=torch.bool)
    fixed[0, [2, 9]] = True
    teacher = teacher.masked_fill(fixed, -INF)
    student[1, 6] += 25
    options = divergence_options(divergence, tail)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reference.token_divergence(x.masked_fill(fixed, -INF), teacher, **options), student
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3, 10.0], ids=["far", "near", "saturated"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_is_as_good_as_fp32_is(divergence, tail, scale):
    """A log-probability of size x carries x 2^-24 of rounding, a sum of V terms that many."""
    student, other = rows()
    teacher = student + other * scale if scale < 1 else other * scale
    student, teacher = student.float(), teacher.float()
    options = divergence_options(divergence, tail)
    got = reference.token_divergence(student, teacher, **options)
    truth = reference.token_divergence(student.double(), teacher.double(), **options)
    assert got.dtype == torch.float32
    assert ((got - truth).abs() <= 2**-24 * V * (1 + teacher.abs().amax() + student.abs().amax())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_is_fp32_whatever_the_dtype(dtype):
    student, teacher = rows(dtype=dtype)
    got = reference.token_scores(student, teacher, torch.arange(4))
    upcast = reference.token_scores(student.float(), teacher.float(), torch.arange(4))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, upcast, strict=True))
    assert reference.token_divergence(student, teacher).dtype == torch.float32


# ---- support of a top-k --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4, V, V + 1])
def test_support_is_the_k_largest_ties_to_the_lower_id(k):
    student = torch.tensor([[1.0] * V, [0.0, -0.0, 3, 3, 3, -INF, -INF, 2, 2, 0, -0.0], [-INF] * (V - 1) + [5.0]])
    got = reference.topk_support(student, k)
    for row, held in zip(student.tolist(), got, strict=True):
        assert set(held.nonzero().flatten().tolist()) == by_hand.support(row, k)


def test_support_is_of_raw_logits():
    """A softcap rounds distinct large logits to the same; the support keeps them apart."""
    student = torch.zeros(1, V)
    student[0, 4], student[0, 9] = 300.0, 301.0
    teacher = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    options = dict(softcap=2.0, tail="drop", vocab_topk=1)
    torch.testing.assert_close(
        reference.token_divergence(student, teacher, **options),
        by_loops(student, teacher, **options).float(),
    )


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "threshold"), itertools.product([1, 3, 9], [0.0, 1.0, -INF]))
def test_select_by_hand(num_tokens, threshold):
    score = torch.tensor([[3.0, NAN, 5, 5, 1, INF, -2], [-INF, 0, -0.0, 2, 2, 2, 9], [NAN] * 7])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0], [1] * 7]).bool()
    got = reference.select_tokens(score, mask, num_tokens=num_tokens, threshold=threshold)
    expected = [by_hand.select(*row, num_tokens, threshold) for row in zip(score.tolist(), mask.tolist(), strict=True)]
    assert got.tolist() == expected


def test_criteria_are_as_defined():
    scores = reference.TokenScores(*torch.tensor([[-1.0, -2], [-3, -2.5], [0.7, INF], [5, 5], [6, 6], [1, 1], [4, 4]]))
    assert reference.criterion_score(scores, "logprob_gap")[0] == 2.0
    assert reference.criterion_score(scores, "divergence")[0] == pytest.approx(0.7)
    assert reference.criterion_score(scores, "entropy_gap")[0] == 3.0
    with pytest.raises(ValueError, match=r"^criterion must be one of logprob_gap, .*, not 'gap'"):
        reference.criterion_score(scores, "gap")
    assert all(reference.criterion_score(scores, name)[1].isnan() for name in reference.CRITERIA)


# ---- degenerate input ----------------------------------------------------------------------------------------------


def with_gradient(student, teacher, **options):
    student = student.clone().requires_grad_()
    result = reference.token_divergence(student, teacher, **options)
    (grad,) = torch.autograd.grad(result.sum(), student)
    return result.detach(), grad


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_banned_student_token_has_no_mass_term_or_gradient(divergence, tail):
    student, teacher = rows(count=1)
    student[0, 3] = teacher[0, 3] = -INF
    options = divergence_options(divergence, tail)
    got, grad = with_gradient(student, teacher, **options)
    kept = [i for i in range(V) if i != 3]
    without, without_grad = with_gradient(student[:, kept], teacher[:, kept], **options)
    torch.testing.assert_close(got, without, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad[:, kept], without_grad, rtol=1e-13, atol=1e-13)
    assert grad[0, 3] == 0


@pytest.mark.parametrize(
    ("divergence", "banned", "expected"),
    [
        ("reverse_kl", "teacher", INF),
        ("forward_kl", "student", INF),
        ("jsd", "teacher", None),
        ("jsd", "student", None),
    ],
)
def test_mass_where_the_other_has_none(divergence, banned, expected):
    student, teacher = rows(count=2)
    (teacher if banned == "teacher" else student)[0, 1] = -INF
    got, grad = with_gradient(student, teacher, divergence=divergence)
    assert got[1].isfinite()
    assert grad[1].abs().sum() > 0
    if expected == INF:
        assert got[0] == INF
        assert (grad[0] == 0).all()
    else:
        assert 0 < got[0] < math.log(2)
        assert grad[0].isfinite().all()


def test_a_teacher_without_mass_in_the_support():
    student, teacher = rows(count=1)
    teacher[0, list(by_hand.support(student[0].tolist(), 4))] = -INF
    for divergence, tail in itertools.product(DIVERGENCES, TAILS):
        options = divergence_options(divergence, tail)
        got, grad = with_gradient(student, teacher, **options)
        torch.testing.assert_close(got, by_loops(student, teacher, **options))
        assert grad.isfinite().all()
        assert got.isfinite() or (grad == 0).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "bad, softcap", [(NAN, None), (INF, None), ("all banned", None), (NAN, 2.0), ("all banned", 2.0)]
)
def test_a_row_that_is_no_distribution_is_nan_and_has_no_gradient(bad, softcap, divergence, tail):
    """Under a softcap too, whose own derivative is NaN there. (It makes a +inf finite.)"""
    student, teacher = rows(count=5)
    for row, logits in ((0, student), (1, teacher)):
        logits[row, 5 if bad != "all banned" else slice(None)] = bad if bad != "all banned" else -INF
    options = dict(divergence_options(divergence, tail), softcap=softcap)
    got, grad = with_gradient(student, teacher, **options)
    alone, alone_grad = with_gradient(student[2:], teacher[2:], **options)
    assert got[:2].isnan().all()
    assert (grad[:2] == 0).all()
    torch.testing.assert_close(got[2:], alone, rtol=1e-14, atol=0)  # tanh's vectors depend on where a row begins
    torch.testing.assert_close(grad[2:], alone_grad, rtol=1e-14, atol=1e-16)
    scores = reference.token_scores(student, teacher, torch.arange(5), divergence=divergence, softcap=softcap)
    scores = torch.stack(scores)
    assert scores[:, :2].isnan().all()
    assert scores[:, 2:].isfinite().all()


def test_an_id_outside_the_vocabulary_gives_nan():
    student, teacher = rows()
    scores = torch.stack(reference.token_scores(student, teacher, torch.tensor([-1, 0, 8, V + 5]), vocab_size=8))
    assert scores.isnan().all(0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_and_one_entry(divergence, tail):
    options = divergence_options(divergence, tail)
    nothing, grad = with_gradient(torch.zeros(0, V), torch.zeros(0, V), **options)
    assert nothing.shape == (0,)
    assert grad.shape == (0, V)
    one, grad = with_gradient(torch.tensor([[7.0]]).double(), torch.tensor([[-2.0]]).double(), **options)
    assert abs(one.item()) < 1e-15
    assert abs(grad.item()) < 1e-15


def test_the_teacher_gets_no_gradient():
    student, teacher = rows()
    teacher.requires_grad_()
    assert not reference.token_divergence(student, teacher).requires_grad


# ---- rows with an offset -------------------------------------------------------------------------------------------


def by_log_softmax(student, teacher, divergence, tail):
    """As anyone would write it: torch.log_softmax over the vocabulary, and what the tail asks for."""
    support = reference.topk_support(student.detach(), 4)
    if tail == "renorm":
        student, teacher = (logits[support].view(len(logits), 4) for logits in (student, teacher))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if tail in ("drop", "bucket"):
        (inner_p, rest_p), (inner_q, rest_q) = (
            (row[support].view(len(row), 4), row[~support].view(len(row), -1).logsumexp(-1, keepdim=True))
            for row in (log_p, log_q)
        )
        log_p, log_q = inner_p, inner_q
        if tail == "bucket":
            log_p, log_q = torch.cat([inner_p, rest_p], -1), torch.cat([inner_q, rest_q], -1)
    return reference.divergence_terms(log_p, log_q, divergence).sum(-1)


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e4])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_offset_costs_no_digits(divergence, tail, offset):
    """The `torch` backend is held to what torch.log_softmax gives in the same dtype, not to itself."""
    student, teacher = (logits + offset for logits in rows(dtype=torch.float32, count=40))

    def derived(function, dtype):
        leaf = student.to(dtype).requires_grad_()
        result = function(leaf, teacher.to(dtype))
        return result, torch.autograd.grad(result.sum(), leaf)[0]

    def ours(student, teacher):
        return reference.token_divergence(student, teacher, **{**divergence_options(divergence, tail), "beta": 0.5})

    def plain(student, teacher):
        return by_log_softmax(student, teacher, divergence, tail)

    results = derived(ours, torch.float32), derived(plain, torch.float32), derived(plain, torch.float64)
    for what, *values in zip(("divergence", "gradient"), *results, strict=True):
        assert_within_budget(*values, what)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_offset_costs_scores_no_digits(divergence):
    student, teacher = (logits + 1e4 for logits in rows(dtype=torch.float32, count=40))
    ids = torch.arange(40) % V
    got = reference.token_scores(student, teacher, ids, divergence=divergence)
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (student, teacher))
    plain_p, plain_q = (logits.log_softmax(-1) for logits in (student, teacher))
    column = ids.unsqueeze(-1)
    assert_within_budget(got.student_logprob, plain_p.gather(1, column)[:, 0], log_p.gather(1, column)[:, 0], "log p")
    assert_within_budget(got.teacher_logprob, plain_q.gather(1, column)[:, 0], log_q.gather(1, column)[:, 0], "log q")
    terms, truth = (
        reference.divergence_terms(*pair, divergence).sum(-1) for pair in ((plain_p, plain_q), (log_p, log_q))
    )
    assert_within_budget(got.divergence, terms, truth, "divergence")
    entropy, truth = (-(row.exp() * row).sum(-1) for row in (plain_p, log_p))
    assert_within_budget(got.student_entropy, entropy, truth, "entropy")
