"""The public API as a type checker sees it: `make lint` checks this file, and here it runs."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import pytest
import torch
from torch import Tensor

import rmsd
import rmsd_kernels
from rmsd import ContextJudge, Judge, LinearRMSDLoss, MagnitudeJudge, RMSDLoss
from rmsd.judge import Question
from rmsd_kernels import (
    TokenScores,
    linear_token_divergence,
    linear_token_scores,
    scores_and_candidates,
    select_tokens,
    token_divergence,
    token_scores,
)


class OwnJudge:
    """A judge is whatever takes questions and answers positions: a class that inherits nothing."""

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return [[candidate.position for candidate in question.candidates[:1]] for question in questions]


def test_what_is_returned_is_what_is_declared() -> None:
    logits, ids, mask = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    scores = assert_type(token_scores(logits, logits, ids, divergence="jsd", beta=0.3), TokenScores)
    assert_type(scores.student_logprob, Tensor)
    found = assert_type(scores_and_candidates(logits, logits, ids, mask, num_candidates=2), tuple[TokenScores, Tensor])
    assert isinstance(found[0], TokenScores) and isinstance(found[1], Tensor)
    assert isinstance(assert_type(select_tokens(scores.divergence, mask, num_tokens=2), Tensor), Tensor)
    assert isinstance(assert_type(token_divergence(logits, logits, vocab_topk=5), Tensor), Tensor)
    hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    assert isinstance(assert_type(linear_token_scores(hidden, weight, hidden, weight, ids), TokenScores), TokenScores)
    assert isinstance(assert_type(linear_token_divergence(hidden, weight, hidden, weight), Tensor), Tensor)
    loss = RMSDLoss(num_kept=2, vocab_topk=None)
    assert isinstance(assert_type(loss.forward(logits, logits, ids, mask, mask.clone()), Tensor), Tensor)
    assert isinstance(assert_type(loss.candidates(logits, logits, ids, mask), tuple[TokenScores, Tensor])[1], Tensor)
    linear = LinearRMSDLoss(vocab_topk=None)
    assert isinstance(assert_type(linear.forward(hidden, weight, hidden, weight, ids, mask), Tensor), Tensor)
    judges: list[Judge] = [OwnJudge(), MagnitudeJudge(), ContextJudge(["a prompt"])]
    assert all(assert_type(judge([]), list[list[int]]) == [] for judge in judges)


def exported() -> list:
    """Every public function and method; of Trainer's hooks, whose signatures are Trainer's, none."""
    found = [getattr(package, name) for package in (rmsd_kernels, rmsd) for name in package.__all__]
    functions = [*filter(inspect.isfunction, found)]
    for cls in filter(inspect.isclass, found):
        for name, method in vars(cls).items():
            public = name in ("__init__", "__call__") or not name.startswith("_")
            hook = name != "__init__" and any(hasattr(base, name) for base in cls.__bases__)
            own = inspect.isfunction(method) and method.__module__.startswith("rmsd")
            if own and public and not hook:
                functions.append(method)
    return functions


@pytest.mark.parametrize("function", exported(), ids=lambda function: function.__qualname__)
def test_every_parameter_and_result_of_the_public_api_is_annotated(function) -> None:
    """Without an annotation a checker takes anything, and says nothing."""
    signature = inspect.signature(function)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "_cls")]
    assert not bare
    assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty


@pytest.mark.parametrize("package", [rmsd, rmsd_kernels])
def test_checkers_are_told_that_the_packages_have_types(package) -> None:
    assert Path(package.__file__).with_name("py.typed").is_file()
