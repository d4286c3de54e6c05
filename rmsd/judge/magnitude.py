"""Keeps the largest gaps: what is left of the method without a judgement of relevance."""

from collections.abc import Sequence

from .base import Question


class MagnitudeJudge:
    """The first `max_kept` candidates, which come ranked by the criterion."""

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return [[candidate.position for candidate in q.candidates[: q.max_kept]] for q in questions]
