"""What a judge is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Candidate:
    """A position of the answer where teacher and student differ much."""

    position: int  # into the answer's tokens
    token: str  # what the student wrote there
    promoted: str  # what the teacher most wants there: argmax q (log q - log p)
    student_preferred: str  # argmax p
    teacher_preferred: str  # argmax q
    gap: float  # log q(token) - log p(token): below 0 where the teacher wants the token gone


@dataclass(frozen=True)
class Question:
    """One rollout for a judge. The answer is untrusted text: it may hold anything."""

    prompt: str
    privileged_context: str
    tokens: tuple[str, ...]  # the answer, token by token
    candidates: tuple[Candidate, ...]  # best first by criterion
    max_kept: int


class Judge(Protocol):
    """Says which candidates bear on the wanted behaviour."""

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        """For each question the positions to keep, best first: candidates' positions only, `max_kept` at most."""
        ...
