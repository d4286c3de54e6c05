"""The specification against the formulas of the method, element by element in Python's own floats."""

import itertools
import math

import pytest
import torch
from budget import DIVERGENCES, TAILS

from rmsd_kernels import reference

INF = math.inf


# ---- the formulas, with nothing of torch ----------------------------------------------------------------------------


def scale(row, *, temperature=1.0, logit_scale=1.0, softcap=None, vocab_size=None):
    row = [x * logit_scale for x in row[:vocab_size]]
    if softcap:
        row = [x if x == -INF else softcap * math.tanh(x / softcap) for x in row]
    return [x / temperature for x in row]


def lse(row):
    peak = max(row)
    return -INF if peak == -INF else peak + math.log(math.fsum(math.exp(x - peak) for x in row))


def term(log_p, log_q):
    """p log(p / q)"""
    if log_p == -INF:
        return 0.0
    return INF if log_q == -INF else math.exp(log_p) * (log_p - log_q)


def log_mix(log_p, log_q, beta):
    mixed = beta * math.exp(log_q) + (1 - beta) * math.exp(log_p)
    return math.log(mixed) if mixed else -INF


def total(log_ps, log_qs, divergence, beta):
    terms = []
    for log_p, log_q in zip(log_ps, log_qs, strict=True):
        if divergence == "reverse_kl":
            terms.append(term(log_p, log_q))
        elif divergence == "forward_kl":
            terms.append(term(log_q, log_p))
        else:
            log_m = log_mix(log_p, log_q, beta)
            terms.append(beta * term(log_q, log_m) + (1 - beta) * term(log_p, log_m))
    return INF if INF in terms else math.fsum(terms)


def brute(student, teacher, *, divergence, beta=0.5, vocab_topk=None, tail="drop", temperature=1.0,
          teacher_temperature=None, **shared):  # fmt: skip
    """One row's divergence, from two lists."""
    raw = student[: shared.get("vocab_size")]
    student = scale(student, temperature=temperature, **shared)
    teacher = scale(teacher, temperature=teacher_temperature or temperature, **shared)
    log_p, log_q = [x - lse(student) for x in student], [x - lse(teacher) for x in teacher]
    if vocab_topk is None:
        return total(log_p, log_q, divergence, beta)
    inside = sorted(range(len(raw)), key=lambda j: (-raw[j], j))[:vocab_topk]
    outside = [j for j in range(len(raw)) if j not in inside]
    log_p_in, log_q_in = [log_p[j] for j in inside], [log_q[j] for j in inside]
    if tail == "bucket" and outside:
        log_p_in.append(lse([log_p[j] for j in outside]))
        log_q_in.append(lse([log_q[j] for j in outside]))
    if tail == "renorm":
        if lse(log_q_in) == -INF:
            return INF
        log_p_in = [x - lse(log_p_in) for x in log_p_in]
        log_q_in = [x - lse(log_q_in) for x in log_q_in]
    return total(log_p_in, log_q_in, divergence, beta)


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=1e-10, atol=1e-12, equal_nan=True)


def rows(seed=0, n=5, vocab=9, ties=False):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return (student.round(), teacher) if ties else (student, teacher)


TRANSFORMS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "two temperatures": dict(temperature=1.7, teacher_temperature=0.6),
    "vocab_size": dict(vocab_size=7),
    "softcap and scale": dict(softcap=2.0, logit_scale=1.3),
    "all": dict(temperature=1.7, teacher_temperature=0.6, vocab_size=8, softcap=3.0, logit_scale=0.4),
}


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("vocab_topk", [None, 1, 4, 8, 100])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_is_its_formula(divergence, tail, vocab_topk, transform):
    for ties, beta, banned in itertools.product((False, True), (0.5, 0.1), (None, "student", "teacher", "both")):
        student, teacher = rows(ties=ties)
        if banned in ("student", "both"):
            student[:, 1] = -INF
        if banned in ("teacher", "both"):
            teacher[:, 1::3] = -INF
        options = dict(divergence=divergence, beta=beta, tail=tail, vocab_topk=vocab_topk, **TRANSFORMS[transform])
        got = reference.token_divergence(student, teacher, **options)
        close(got, [brute(s, t, **options) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_are_their_formulas(divergence, transform):
    student, teacher = rows()
    student[1, 2] = teacher[2, 4] = -INF
    options = dict(TRANSFORMS[transform])
    ids = torch.tensor([0, 2, 4, 6, 3])
    got = reference.token_scores(student, teacher, ids, divergence=divergence, beta=0.3, **options)
    temperatures = {"s": options.pop("temperature", 1.0)}
    temperatures["t"] = options.pop("teacher_temperature", temperatures["s"])
    for n, y in enumerate(ids.tolist()):
        s = scale(student[n].tolist(), temperature=temperatures["s"], **options)
        t = scale(teacher[n].tolist(), temperature=temperatures["t"], **options)
        log_p, log_q = [x - lse(s) for x in s], [x - lse(t) for x in t]
        entropies = [-sum(term(x, 0.0) for x in logs) for logs in (log_p, log_q)]
        expected = [log_p[y], log_q[y], total(log_p, log_q, divergence, 0.3), lse(s), lse(t), *entropies]
        close(torch.stack(got)[:, n], expected)


def test_bias_is_part_of_the_logits():
    """The reference takes logits; the linear form's bias, scale and cap act in that order."""
    from rmsd_kernels import linear_token_divergence

    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 4), (6, 4), (6,)))
    other = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    options = dict(divergence="forward_kl", softcap=2.0, logit_scale=0.7, temperature=1.4)
    got = linear_token_divergence(
        hidden, weight, other, weight, student_bias=bias, teacher_bias=-bias, backend="torch", **options
    )

    def logits(hidden, bias):
        dot = [[math.fsum(x * w for x, w in zip(h, row, strict=True)) for row in weight.tolist()] for h in hidden]
        return [[x + b for x, b in zip(row, bias, strict=True)] for row in dot]

    pairs = zip(logits(hidden.tolist(), bias.tolist()), logits(other.tolist(), (-bias).tolist()), strict=True)
    close(got, [brute(s, t, **options) for s, t in pairs])


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["plain", "two temperatures", "all"])
@pytest.mark.parametrize("vocab_topk", [None, 3])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_the_derivative(divergence, tail, vocab_topk, transform):
    student, teacher = rows(n=2)
    options = dict(divergence=divergence, beta=0.3, tail=tail, vocab_topk=vocab_topk, **TRANSFORMS[transform])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: reference.token_divergence(s, teacher, **options), student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_of_a_banned_entry_is_zero_and_the_rest_as_if_it_were_not_there(divergence):
    student, teacher = rows(n=2)
    student[:, 4] = teacher[:, 4] = -INF
    student.requires_grad_()
    (grad,) = torch.autograd.grad(reference.token_divergence(student, teacher, divergence=divergence).sum(), student)
    left = [j for j in range(9) if j != 4]
    short = student.detach()[:, left].requires_grad_()
    result = reference.token_divergence(short, teacher[:, left], divergence=divergence)
    (expected,) = torch.autograd.grad(result.sum(), short)
    assert (grad[:, 4] == 0).all()
    torch.testing.assert_close(grad[:, left], expected)


def test_the_teacher_gets_no_gradient():
    student, teacher = (x.requires_grad_() for x in rows())
    reference.token_divergence(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


# ---- degenerate input -----------------------------------------------------------------------------------------------

BAD_ROWS = {"NaN": lambda x: [math.nan, *x[1:]], "+inf": lambda x: [INF, *x[1:]], "all -inf": lambda x: [-INF] * len(x)}


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_that_is_no_distribution(divergence, bad, who):
    pair = rows(n=3)
    pair[who][1] = torch.tensor(BAD_ROWS[bad](pair[who][1].tolist()))
    ids = torch.tensor([1, 2, 3])
    for score in reference.token_scores(*pair, ids, divergence=divergence):
        assert score.isnan().tolist() == [False, True, False]
    for tail, vocab_topk in ((None, None), *((tail, 3) for tail in TAILS)):
        student = pair[0].clone().requires_grad_()
        result = reference.token_divergence(
            student, pair[1], divergence=divergence, vocab_topk=vocab_topk, tail=tail or "drop"
        )
        assert result.isnan().tolist() == [False, True, False]
        result[result.isfinite()].sum().backward()
        assert (student.grad[1] == 0).all() and student.grad[[0, 2]].abs().sum(-1).gt(0).all()


def test_a_divergence_of_infinity_has_zero_gradient():
    student, teacher = rows(n=2)
    teacher[0, 0] = -INF
    student.requires_grad_()
    result = reference.token_divergence(student, teacher)
    assert result.isinf().tolist() == [True, False]
    result.sum().backward()
    assert (student.grad[0] == 0).all() and student.grad[1].abs().sum() > 0


def test_renorm_over_a_support_the_teacher_bans_is_infinitely_far():
    student, teacher = torch.tensor([[5.0, 4.0, 0.0]]), torch.tensor([[-INF, -INF, 1.0]])
    for divergence in DIVERGENCES:
        got = reference.token_divergence(student, teacher, divergence=divergence, vocab_topk=2, tail="renorm")
        assert got.item() == INF


def test_an_id_outside_the_vocabulary_is_nan():
    student, teacher = rows(n=3)
    for score in reference.token_scores(student, teacher, torch.tensor([-1, 8, 9])):
        assert score.isnan().tolist() == [True, False, True]


def test_ties_in_the_support_go_to_the_lower_id():
    assert reference.topk_support(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), 3).tolist() == [
        [True, True, False, True, False]
    ]
    assert reference.topk_support(torch.tensor([[0.0, -0.0, -1.0]]), 1).tolist() == [[True, False, False]]


def test_support_is_taken_before_the_temperature_can_round_two_logits_together():
    student = torch.full((1, 2), 1.9)
    student[0, 1] = student[0, 0].nextafter(torch.tensor(2.0))
    assert torch.equal(*(student / 1.3).unbind(-1)), "the premise: a tie once divided"
    got = reference.token_divergence(student, torch.tensor([[90.0, 0.0]]), vocab_topk=1, temperature=1.3)
    assert got > 10, "the support is the second entry, which this teacher bans but for e^-69"


def test_empty():
    empty = torch.zeros(0, 5, requires_grad=True)
    assert reference.token_scores(empty, empty, torch.zeros(0, dtype=torch.int64)).divergence.shape == (0,)
    reference.token_divergence(empty, empty.detach(), vocab_topk=2).sum().backward()
    assert empty.grad.shape == (0, 5)


# ---- selection ------------------------------------------------------------------------------------------------------


def test_criteria_and_their_refusal_of_rows_that_are_not_finite():
    columns = ((-1, -1), (-4, -4), (2, INF), (0, 0), (0, 0), (1, 1), (3, 3))
    scores = reference.TokenScores(*(torch.tensor(column, dtype=torch.float32) for column in columns))
    for criterion, expected in (("logprob_gap", 3.0), ("divergence", 2.0), ("entropy_gap", 2.0)):
        got = reference.criterion_score(scores, criterion)
        assert got[0] == expected and got[1].isnan()


def test_selection_is_a_sort():
    score = torch.tensor([[1.0, 3.0, math.nan, 3.0, 0.5, INF, 2.0]])
    mask = torch.tensor([[True, True, True, True, True, False, True]])
    assert reference.select_tokens(score, mask, num_tokens=5, threshold=0.5).tolist() == [[1, 3, 6, 0, -1]]
    assert reference.select_tokens(score, mask, num_tokens=9)[0, 5:].tolist() == [-1] * 4
    assert reference.select_tokens(score, mask, num_tokens=2, threshold=-INF).tolist() == [[1, 3]]
    assert reference.select_tokens(score[:, :0], mask[:, :0], num_tokens=2).tolist() == [[-1, -1]]
