"""Relevance by contrast: would the teacher wish the same if the context said something else?"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..answers.contrast import Contrasts
from .base import Candidate, Judge, Question
from .context import is_on_topic


class ContrastJudge:
    """Keeps a candidate when the teacher's wish there depends on what its context says, and not only on there being
    one: when it weakens, by more than `floor` nats, under a contrast context of the same form and another content.

    With q under the context, n under the contrast context, v the token that the teacher most wants to promote and y the
    one written: log q(v) - log n(v) or, where the teacher wants y gone, log n(y) - log q(y), whichever is larger. A
    manner of speaking, a greeting, a way of cutting words into tokens are alike under both, and cancel.

    Args:
        rows: all of the data's, for their contrast contexts.
        floor: nats.
        contrast_context: one text for all rows that have no `contrast_context` of their own; {column} stands for a
            row's column.
        on_topic: keep nothing of a rollout in which neither prompt nor answer has a word of the context (ContextJudge).
        then: a judge that is asked about what is left, and has the last word: it reads fewer candidates.

    Related: RLCSD (arXiv 2606.11709) and CREDIT (arXiv 2605.11613) contrast contexts as well, without selecting tokens.
    """

    def __init__(
        self,
        rows: Iterable[dict],
        *,
        floor: float = 0.5,
        contrast_context: str | None = None,
        on_topic: bool = False,
        then: Judge | None = None,
    ):
        if not floor >= 0.0:
            raise ValueError(f"floor must be at least 0, not {floor}")
        self.contrasts = Contrasts(rows, contrast_context)
        self.floor, self.on_topic, self.then = floor, on_topic, then

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        proposed = [self._proposed(question) for question in questions]
        if self.then is None:
            return [[c.position for c in some[: q.max_kept]] for q, some in zip(questions, proposed, strict=True)]
        asked = [i for i, some in enumerate(proposed) if some]
        # Without the numbers: what another judge answers, and is cached by, does not hang on their last digits.
        narrowed = [
            replace(questions[i], candidates=tuple(replace(candidate, contrast=None) for candidate in proposed[i]))
            for i in asked
        ]
        kept = [[] for _ in questions]
        for i, answer in zip(asked, self.then(narrowed) if asked else [], strict=True):
            kept[i] = answer
        return kept

    def _proposed(self, question: Question) -> list[Candidate]:
        if any(candidate.contrast is None for candidate in question.candidates):
            raise ValueError("the contrast judge was asked about candidates without a contrast")
        if self.on_topic and not is_on_topic(question):
            return []
        return [c for c in question.candidates if c.contrast > self.floor]
