"""How good is a judge? Labelled questions, and what a judge's answers to them come to."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .base import Candidate, Judge, Question
from .llm import LLMJudge


@dataclass(frozen=True)
class Labelled:
    question: Question
    relevant: frozenset[int]  # positions of the candidates that bear on the wanted behaviour


@dataclass(frozen=True)
class Marks:
    """Shares are over the candidates of all questions together; None where there is nothing to divide by."""

    kept: int
    precision: float | None  # of what is kept, what is relevant
    recall: float | None  # of what is relevant, what is kept
    agreement: float  # candidates on which judge and labels say the same
    # Of what is kept of a list or of the list reversed, what is kept of both; None too where nothing is listed: by an
    # LLM judge that is asked about each candidate by itself.
    same_reversed: float | None
    seconds: float  # a question
    tokens: float | None  # a question, read and written
    kept_of: tuple[frozenset[int], ...]  # by question


def save(path: str | Path, labelled: Sequence[Labelled]) -> None:
    """One JSON object a line: a question's fields, and `relevant`, a list of positions."""
    lines = [json.dumps({**asdict(one.question), "relevant": sorted(one.relevant)}) + "\n" for one in labelled]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(lines), encoding="utf-8")


def load(path: str | Path) -> list[Labelled]:
    """What `save` wrote, or a user did: of a candidate only position, token, promoted and gap are needed.

    Raises:
        FileNotFoundError, ValueError: naming the file, the line and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"labelled questions {path} do not exist")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                # The first line may begin with a byte order mark, as some editors write it.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                found.append(_labelled(json.loads(text)))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: no labelled question ({type(error).__name__}: {error})"
                ) from error
    if not found:
        raise ValueError(f"{path} holds no questions")
    return found


def _labelled(line: dict) -> Labelled:
    relevant = frozenset(line.pop("relevant"))
    candidates = []
    for one in line.pop("candidates"):
        preferred = {"student_preferred": one["token"], "teacher_preferred": one["promoted"]}
        candidates.append(Candidate(**{**preferred, **one}))
    if unknown := relevant - {candidate.position for candidate in candidates}:
        raise ValueError(f"relevant names position {min(unknown)}, which is no candidate")
    tokens = tuple(line.pop("tokens"))
    known = {field.name for field in dataclasses.fields(Question)}
    rest = {name: tuple(x) if isinstance(x, list) else x for name, x in line.items() if name in known}
    return Labelled(
        Question(tokens=tokens, candidates=tuple(candidates), **{"max_kept": len(candidates), **rest}), relevant
    )


def measure(judge: Judge, labelled: Sequence[Labelled], llm: LLMJudge | None = None) -> Marks:
    """Asks twice, the second time with each list of candidates reversed: what a judge keeps should not hang on places.
    No question bounds how many may be kept, so that a short answer is no fault. `llm` is the one that `judge` is or
    asks, if any: it counts tokens, and reverses the lists as it shows them."""
    questions = [replace(one.question, max_kept=max(1, len(one.question.candidates))) for one in labelled]
    before, started = llm.tokens if llm else 0, time.monotonic()
    kept = [frozenset(answer) for answer in judge(questions)]
    seconds = (time.monotonic() - started) / len(questions)
    tokens = (llm.tokens - before) / len(questions) if llm else None
    same_reversed = None if llm and llm.ask == "each" else _shared(kept, _asked_reversed(judge, questions, llm))
    right = sum(len(answer & one.relevant) for answer, one in zip(kept, labelled, strict=True))
    candidates = sum(len(question.candidates) for question in questions)
    number, wanted = sum(map(len, kept)), sum(len(one.relevant) for one in labelled)
    return Marks(
        kept=number,
        precision=right / number if number else None,
        recall=right / wanted if wanted else None,
        agreement=(candidates - (number - right) - (wanted - right)) / max(candidates, 1),
        same_reversed=same_reversed,
        seconds=seconds,
        tokens=tokens,
        kept_of=tuple(kept),
    )


def _asked_reversed(judge: Judge, questions: list[Question], llm: LLMJudge | None) -> list[frozenset[int]]:
    if llm is None:
        questions = [replace(question, candidates=question.candidates[::-1]) for question in questions]
    with llm.lists_backwards() if llm else contextlib.nullcontext():
        return [frozenset(answer) for answer in judge(questions)]


def _shared(kept: list[frozenset[int]], again: list[frozenset[int]]) -> float | None:
    both = sum(len(a & b) for a, b in zip(kept, again, strict=True))
    either = sum(len(a | b) for a, b in zip(kept, again, strict=True))
    return both / either if either else None


def agreement(a: Marks, b: Marks, labelled: Sequence[Labelled]) -> float:
    """Candidates on which two judges say the same."""
    differ = sum(len(x ^ y) for x, y in zip(a.kept_of, b.kept_of, strict=True))
    return 1.0 - differ / max(sum(len(one.question.candidates) for one in labelled), 1)
