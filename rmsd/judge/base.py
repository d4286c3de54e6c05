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
    # Nats by which the wish hangs on what the context says: log q - log n of what it promotes, n the teacher's under a
    # contrast context, or log n - log q of the token where it wants that gone; the larger. None: was not read.
    contrast: float | None = None


@dataclass(frozen=True)
class Question:
    """One rollout for a judge. The answer is untrusted text: it may hold anything."""

    prompt: str
    privileged_context: str
    tokens: tuple[str, ...]  # the answer, token by token
    candidates: tuple[Candidate, ...]  # best first by criterion
    max_kept: int
    teacher_prompt: str = ""  # the whole of what the teacher reads, as text; "" where that is not known
    unwritten: tuple[int, ...] = ()  # positions of the answer that the student read: what tools said


class Judge(Protocol):
    """Says which candidates bear on the wanted behaviour.

    A judge that has an attribute `contrasts`, an rmsd.answers.contrast.Contrasts, is given candidates with their
    `contrast`: the teacher then reads each answer under the row's contrast context as well.
    """

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        """For each question the positions to keep, best first: candidates' positions only, `max_kept` at most."""
        ...
