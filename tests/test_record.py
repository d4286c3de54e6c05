"""What a line of rollouts.jsonl says of each token."""

import json

import torch

from rmsd.answers.rollout import Rollouts
from rmsd.judge import Question
from rmsd.step.micro_batch import MicroBatch
from rmsd.training.record import rollout_lines

INF = float("inf")


def test_what_the_student_did_not_write_is_told_from_scores_that_are_not_finite():
    question = Question("p", "c", tokens=("a", "b", "c", "d"), candidates=(), max_kept=1, teacher_prompt="c, p")
    rows = torch.tensor([[[-1.0, -2.0, -3.0, -4.0, 0.0]], [[-1.5, -2.5, -INF, -4.5, 0.0]], [[0.1, 0.2, INF, 0.4, 0.0]]])
    mask = torch.tensor([[True, False, True, True, False]])  # the last is padding: no token of the answer
    rollouts = Rollouts([[1]], torch.zeros(1, 5, dtype=torch.int64), mask)
    batch = MicroBatch([{}], [[1]], [[1]], rollouts=rollouts)
    batch.questions, batch.kept = [question], [[0]]
    batch.host_scores = dict(zip(("student_logprob", "teacher_logprob", "divergence"), rows, strict=True))
    (line,) = rollout_lines(7, batch, 1)
    json.dumps(line, allow_nan=False)
    assert line["unwritten"] == [1] and line["teacher_prompt"] == "c, p"
    assert line["student_logprob"] == [-1.0, None, -3.0, -4.0]
    assert line["teacher_logprob"] == [-1.5, None, None, -4.5]
    assert line["divergence"] == [0.1, None, None, 0.4]
    del batch.host_scores["divergence"]
    (line,) = rollout_lines(7, batch, 1)
    assert line["teacher_logprob"] == [-1.5, None, None, -4.5] and "divergence" not in line
