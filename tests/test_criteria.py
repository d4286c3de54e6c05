"""Criteria beyond the kernels' own, and the contrast, in the loss of one's own loop."""

import pytest
import torch

from rmsd import LinearRMSDLoss, RMSDLoss
from rmsd.criteria import CRITERIA, MORE, scored_by
from rmsd_kernels import TokenScores, token_scores


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER, OTHER = (2.0 * logits(2, 6, 30, seed=seed) for seed in range(3))
IDS = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(2, 6, dtype=torch.bool)
MASK[1, 4:] = False


def ranked_by_hand(criterion):
    p, q = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    gap = (q - p).gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    entropy_p, entropy_q = (-(x.exp() * x).sum(-1) for x in (p, q))
    divergence = (p.exp() * (p - q)).sum(-1)
    h, d = (x / x.masked_fill(~MASK, 0.0).amax(1, keepdim=True) for x in (entropy_p, divergence))
    score = {
        "supported": gap,
        "opposed": -gap,
        "entropy_rise": entropy_q - entropy_p,
        "entropy_fall": entropy_p - entropy_q,
        "tip": h + d - h * d,
    }[criterion]
    return [sorted((i for i in range(6) if MASK[b, i] and score[b, i] > 0), key=lambda i: -score[b, i]) for b in (0, 1)]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("criterion", MORE)
def test_candidates_are_the_largest_by_hand(criterion, linear):
    options = dict(criterion=criterion, num_candidates=6, vocab_topk=None)
    eye = torch.eye(30)
    if linear:
        scores, index = LinearRMSDLoss(**options).candidates(STUDENT, eye, TEACHER, eye, IDS, MASK)
    else:
        scores, index = RMSDLoss(**options).candidates(STUDENT, TEACHER, IDS, MASK)
    assert [[i for i in row if i >= 0] for row in index.tolist()] == ranked_by_hand(criterion)
    expected = token_scores(STUDENT, TEACHER, IDS).student_logprob
    torch.testing.assert_close(scores.student_logprob[MASK], expected[MASK])


def test_a_row_whose_divergence_is_not_finite_is_no_candidate_by_any():
    numbers = [torch.ones(1, 2) for _ in TokenScores._fields]
    scores = TokenScores(*numbers)._replace(divergence=torch.tensor([[torch.inf, 1.0]]))
    for criterion in CRITERIA:
        assert scored_by(criterion, scores, torch.ones(1, 2, dtype=torch.bool)).isnan().tolist() == [[True, False]]


def test_an_unknown_criterion_is_named_with_its_nearest():
    with pytest.raises(ValueError, match=r"criterion must be one of .*'suported'; did you mean 'supported'"):
        RMSDLoss(criterion="suported")


@pytest.mark.parametrize("linear", [False, True])
def test_the_contrast_of_candidates_by_hand(linear):
    candidates = torch.tensor([[3, 0, -1], [1, 2, 3]])
    eye = torch.eye(30)
    if linear:
        got = LinearRMSDLoss(temperature=0.7).contrast(STUDENT, eye, TEACHER, eye, OTHER, IDS, candidates)
    else:
        got = RMSDLoss(temperature=0.7).contrast(STUDENT, TEACHER, OTHER, IDS, candidates)
    for b, t in (candidates >= 0).nonzero().tolist():
        at, y = candidates[b, t], IDS[b, candidates[b, t]]
        p, q, n = ((x[b, at] / 0.7).log_softmax(-1) for x in (STUDENT, TEACHER, OTHER))
        v = (q.exp() * (q - p)).argmax()
        by_hand = [q[v] - n[v]] + ([n[y] - q[y]] if q[y] < p[y] else [])
        assert got[b, t].item() == pytest.approx(max(by_hand).item(), abs=1e-5)
    assert got[0, 2].isnan()


def test_only_what_is_known_may_be_asked_of_no_tokens():
    none = torch.zeros(0, 3, dtype=torch.int64)
    empty = STUDENT[:0], TEACHER[:0], OTHER[:0], IDS[:0], none
    assert RMSDLoss().contrast(*empty).shape == (0, 3)
    for criterion in MORE:
        _, index = RMSDLoss(criterion=criterion).candidates(STUDENT[:, :0], TEACHER[:, :0], IDS[:, :0], MASK[:, :0])
        assert index.shape == (2, 20) and (index == -1).all()
