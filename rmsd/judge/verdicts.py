"""What a chat model answers about a list of candidates: a verdict on each, as JSON; and whether it reads them."""

import json
import logging
import threading
from collections import Counter
from collections.abc import Sequence

log = logging.getLogger("rmsd")

YES, NO = "yes", "no"
WATCHED = 16  # answers, before it is said that a judge keeps the same places
SAME = 0.75  # of them
# Without a bound a small model goes on giving reasons until its answer is cut off. Of the keywords that would do, this
# is the one that servers of strict schemas know.
REASON = "^[A-Za-z0-9 ,.'-]{0,80}$"


def answer_schema(num_candidates: Sequence[int]) -> dict:
    """What a server with structured output is held to, for questions with so many candidates each. The bound matters: a
    small model lists candidates without end, and an answer that `max_tokens` cuts off is none. Numbers are not bounded:
    one that names no candidate is better dropped and counted than forced onto another. The reason comes before the
    verdict, which then follows from it."""
    entry = {
        "type": "object",
        "properties": {
            "candidate": {"type": "integer"},
            "reason": {"type": "string", "pattern": REASON},
            "relevant": {"type": "string", "enum": [YES, NO]},
        },
        "required": ["candidate", "reason", "relevant"],
        "additionalProperties": False,
    }
    if len(num_candidates) > 1:
        entry["properties"] = {"answer": {"type": "integer"}, **entry["properties"]}
        entry["required"] = list(entry["properties"])
    return {
        "type": "object",
        "properties": {"verdicts": {"type": "array", "items": entry, "maxItems": sum(num_candidates)}},
        "required": ["verdicts"],
        "additionalProperties": False,
    }


def parse(text: str) -> list:
    """The list under "verdicts" in the first JSON object of the text that holds one.

    Raises:
        ValueError: there is none.
    """
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            answer, _ = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):  # the latter: "[[[[..." without end
            answer = None
        if isinstance(answer, dict) and isinstance(answer.get("verdicts"), list):
            return answer["verdicts"]
        start = text.find("{", start + 1)
    raise ValueError('the judge\'s answer holds no {"verdicts": [...]}')


def by_answer(entries: list, num_answers: int) -> tuple[list[list], int]:
    """(the entries of each answer, by the number under "answer"; entries that name none)."""
    lists: list[list] = [[] for _ in range(num_answers)]
    dropped = 0
    for entry in entries:
        number = entry.get("answer") if isinstance(entry, dict) else None
        if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= num_answers:
            lists[number - 1].append(entry)
        else:
            dropped += 1
    return lists, dropped


def found_relevant(entries: list, num_candidates: int) -> tuple[list[int], int]:
    """(numbers of the candidates that are found relevant, in their order; entries that name none or give no verdict).
    A candidate's first verdict counts."""
    verdicts: dict[int, bool] = {}
    dropped = 0
    for entry in entries:
        number, verdict = (entry.get("candidate"), entry.get("relevant")) if isinstance(entry, dict) else (None, None)
        verdict = {YES: True, NO: False}.get(verdict.strip().casefold()) if isinstance(verdict, str) else verdict
        valid = isinstance(number, int) and not isinstance(number, bool) and isinstance(verdict, bool)
        if not valid or not 1 <= number <= num_candidates:
            dropped += 1
        else:
            verdicts.setdefault(number, verdict)
    return sorted(number for number, relevant in verdicts.items() if relevant), dropped


class PlaceWatch:
    """Warns once of a judge that keeps the same places of the list whatever they hold, as small models do."""

    def __init__(self):
        self._kept: Counter[tuple[int, ...]] = Counter()
        self._lock, self._warned = threading.Lock(), False

    def add(self, numbers: list[int], num_candidates: int) -> None:
        """The numbers kept of a list. Short lists and lists kept whole or not at all say nothing."""
        if self._warned or not 2 <= len(numbers) < num_candidates:
            return
        with self._lock:
            self._kept[tuple(numbers)] += 1
            (places, times), answers = self._kept.most_common(1)[0], self._kept.total()
            if answers < WATCHED or times < SAME * answers:
                return
            self._warned = True
        log.warning(
            "the judge keeps candidates %s of the list in %d of %d answers, whatever they are: it does not read them; "
            "`rmsd judge` measures it",
            ", ".join(map(str, places)),
            times,
            answers,
        )
