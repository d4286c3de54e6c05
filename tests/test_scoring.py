"""Candidates and wishes: from hidden states, and from what an engine recorded, without one."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny import tokenizer, trainer

from rmsd import LinearRMSDLoss
from rmsd.answers.rollout import Recorded, Rollouts
from rmsd.criteria import scored_by
from rmsd.judge import MagnitudeJudge
from rmsd.models.heads import OutputHead, Reading
from rmsd.step.judging import judge_as_scored
from rmsd.step.micro_batch import MicroBatch
from rmsd.step.scoring import scored_by_forwards, widest_gaps
from rmsd.step.wishes import recorded_wishes, wishes


def test_what_each_model_wants_at_the_candidates_and_what_the_top_k_leaves_out():
    generator = torch.Generator().manual_seed(0)
    hidden, told = torch.randn(2, 2, 3, 8, generator=generator)
    head = OutputHead(torch.randn(50, 8, generator=generator), None, 1.0, None)
    candidates = torch.tensor([[1, -1], [0, 2]])
    got = wishes(Reading(hidden, head), Reading(told, head), candidates, 0.8, vocab_topk=4)
    for b, i in ((0, 0), (1, 0), (1, 1)):
        at = candidates[b, i]
        p, q = ((head(x[b, at]) / 0.8).softmax(-1) for x in (hidden, told))
        assert got.student_preferred[b, i] == p.argmax() and got.teacher_preferred[b, i] == q.argmax()
        assert got.promoted[b, i] == (q * (q / p).log()).argmax()
        torch.testing.assert_close(got.tail_mass[b, i], p.sort().values[:-4].sum())
    assert [field[0, 1].item() for field in got[:4]] == [0, 0, 0, 0.0], "no candidate there"
    assert got.contrast is None
    assert not wishes(Reading(hidden, head), Reading(told, head), candidates).tail_mass.any(), (
        "the whole vocabulary leaves nothing out"
    )


def test_nobody_wishes_for_what_a_head_bans():
    """A vocabulary's padding may have a bias of -inf: 0 log 0 is 0, not the largest wish."""
    generator = torch.Generator().manual_seed(0)
    hidden, told = torch.randn(2, 1, 3, 8, generator=generator)
    bias = torch.zeros(50)
    bias[:4] = -torch.inf
    head = OutputHead(torch.randn(50, 8, generator=generator), bias, 1.0, None)
    got = wishes(Reading(hidden, head), Reading(told, head), torch.tensor([[0, 1, 2]]))
    p, q = head(hidden).softmax(-1), head(told).softmax(-1)
    assert torch.equal(got.promoted, (q * (q / p).log()).nan_to_num(0.0).argmax(-1)) and (got.promoted > 3).all()


def test_tail_mass_is_logged(tmp_path):
    logged = {}
    for vocab_topk in (5, None):
        made = trainer(tmp_path, max_steps=1, vocab_topk=vocab_topk)
        made.train()
        logged[vocab_topk] = made.state.log_history[0]["tail_mass"]
    # Random weights over 300 tokens are nearly uniform.
    assert logged[5] == pytest.approx(1 - 5 / 300, abs=0.01) and logged[None] == 0.0


@pytest.mark.parametrize("k", [3, 50])
def test_wishes_of_what_an_engine_recorded(k):
    """Among the teacher's k likeliest tokens; p of a token outside the student's record is that of its last. Records of
    the whole vocabulary give what hidden states give."""
    generator = torch.Generator().manual_seed(0)
    hidden, told = 0.6 * torch.randn(2, 4, 6, 8, generator=generator)
    head = OutputHead(torch.randn(50, 8, generator=generator), None, 1.0, None)
    ids = torch.randint(50, (4, 6), generator=generator)
    log_p, log_q = head(hidden).log_softmax(-1), head(told).log_softmax(-1)
    candidates = torch.tensor([[1, -1, 0, 4], [0, 2, 1, 4], [5, 3, 2, 0], [4, 1, 3, 5]])

    def recorded(logprobs):
        top = logprobs.topk(k)
        return Recorded(logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), top.indices, top.values)

    got = recorded_wishes(recorded(log_p), recorded(log_q), ids, candidates)
    exact = wishes(Reading(hidden, head), Reading(told, head), candidates)
    assert torch.equal(got.student_preferred, exact.student_preferred) and got.tail_mass is None
    assert torch.equal(got.teacher_preferred, exact.teacher_preferred)
    assert torch.equal(got.promoted, exact.promoted) == (k == 50)
    for b, i in (candidates >= 0).nonzero().tolist():
        p, q = log_p[b, candidates[b, i]], log_q[b, candidates[b, i]]
        known = {*p.topk(k).indices.tolist(), ids[b, candidates[b, i]].item()}
        bound = p.where(torch.tensor([v in known for v in range(50)]), p.topk(k).values[-1])
        wish = q.exp() * (q - bound)
        assert got.promoted[b, i] == max(q.topk(k).indices.tolist(), key=lambda v: wish[v].item())


def test_a_token_that_the_student_s_record_lacks_is_wished_for_no_more_than_is_sure():
    """The teacher likes token 5. The student's record of 8 and 9 says that it is no likelier than 9; the sampled
    token, 7, is known exactly."""

    def recorded(own, ids, probabilities):
        one = torch.tensor([[[own]]]).log()[..., 0]
        return Recorded(one, torch.tensor([[ids]]), torch.tensor([[probabilities]]).log())

    student = recorded(1e-4, [8, 9], [0.5, 0.1])
    at, own = torch.tensor([[0]]), torch.tensor([[7]])
    for q, promoted in ((0.15, 8), (0.28, 5)):  # wishes: 0.7 log 1.4 = 0.24 of 8; 0.06 and 0.29 of 5
        assert recorded_wishes(student, recorded(0.01, [8, 5], [0.7, q]), own, at).promoted.item() == promoted
    assert recorded_wishes(student, recorded(0.05, [8, 7], [0.7, 0.05]), own, at).promoted.item() == 7


def test_a_gap_that_is_not_finite_is_no_candidate():
    student, inf = torch.tensor([[-1.0, -2.0, -1.0, -1.0, -1.0]]), torch.inf
    teacher = torch.tensor([[-1.5, -inf, -inf, torch.nan, -9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    for threshold, first in ((0.25, 0), (0.5, -1)):
        loss = LinearRMSDLoss(num_candidates=3, threshold=threshold)
        assert widest_gaps(loss, student, teacher, mask).tolist() == [[first, -1, -1]]


def of_two_turns(criterion, num_candidates, told):
    """A scored micro-batch of one answer, whose turns are its tokens 0 to 5 and 8 to 11."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 12, 8, generator=generator)
    written = torch.tensor([[True] * 6 + [False] * 2 + [True] * 4])
    ids = torch.randint(50, (1, 12), generator=generator)
    rollouts = Rollouts([[1]], ids, written, hidden, attention_mask=torch.ones_like(written))
    head = OutputHead(torch.randn(50, 8, generator=generator), None, 1.0, None)
    teacher = SimpleNamespace(hidden=lambda *args: told(hidden), head=head)
    row = {"prompt": "Which?", "privileged_context": "The tool is called zorblat."}
    batch = MicroBatch([row], [[1]], [[1]], rollouts=rollouts)
    loss = LinearRMSDLoss(num_candidates=num_candidates, criterion=criterion)
    (batch,) = scored_by_forwards([batch], None, head, teacher, loss, 0, per_turn=True)
    return batch


@pytest.mark.parametrize("criterion", ["divergence", "tip"])
def test_of_each_turn_the_best_by_any_criterion(criterion):
    batch = of_two_turns(criterion, 2, lambda hidden: hidden + 0.1 * hidden.flip(-1))
    score = scored_by(criterion, batch.scores, batch.rollouts.completion_mask)[0]
    first, second = score[:6].topk(2).indices.tolist(), (8 + score[8:].topk(2).indices).tolist()
    assert batch.candidates.tolist() == [[first[0], second[0], first[1], second[1]]]


def test_as_many_are_kept_of_each_turn():
    """The first turn's gaps are all larger than the second's, and a judge may keep three of each."""
    scale = torch.tensor([0.5] * 8 + [0.01] * 4).view(1, 12, 1)
    batch = of_two_turns("logprob_gap", 6, lambda hidden: hidden + scale * hidden.flip(-1))
    judge_as_scored([batch], MagnitudeJudge(), tokenizer(), max_kept=3, per_turn=True)
    (kept,) = batch.kept
    assert [sum(position < 6 for position in kept), sum(position >= 8 for position in kept)] == [3, 3]

    def most_of_the_first(questions):
        return [[*range(5), 8] for _ in questions]

    judge_as_scored([batch], most_of_the_first, tokenizer(), max_kept=3, per_turn=True)
    assert batch.kept == [[0, 1, 2, 8]]
    judge_as_scored([batch], None, tokenizer(), max_kept=3, per_turn=True)
    assert batch.kept == [[*range(6), *range(8, 12)]], "without a judge every written token is"


def test_an_error_does_not_wait_for_a_judge_that_hangs():
    batch = of_two_turns("logprob_gap", 6, lambda hidden: hidden + hidden.flip(-1))
    asked, released, seen = threading.Event(), threading.Event(), []

    def hanging(questions):
        asked.set()
        seen.append(released.wait(20))
        return [[] for _ in questions]

    def interrupted():
        yield batch
        asked.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_as_scored(interrupted(), hanging, tokenizer(), max_kept=3)
    assert not seen, "it hangs still"
    released.set()
