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
LONG = 4  # candidates, from which on a list says something though one is kept, or all
NEARLY_ALL = 0.75  # of the candidates of long lists
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
    """Warns once of a judge that keeps the same places of the list whatever they hold, or nearly all of long lists, as
    small models do.

    Args:
        shuffled: lists are in an order of their own, so that one place is as good as another. In the criterion's the
            first may well be right again and again.
    """

    def __init__(self, shuffled: bool = True):
        self._shuffled = shuffled
        self._places: Counter[tuple[int, ...]] = Counter()
        self._lists = self._listed = self._kept = 0  # long lists, their candidates, and what is kept of these
        self._lock, self._warned = threading.Lock(), False

    def add(self, numbers: list[int], num_candidates: int) -> None:
        """The numbers kept of a list. Of short lists to keep one or all says nothing."""
        is_long = num_candidates >= LONG
        with self._lock:
            if self._warned:
                return
            if is_long:
                self._lists += 1
                self._listed += num_candidates
                self._kept += len(numbers)
            fewest = 1 if is_long and self._shuffled else 2
            if fewest <= len(numbers) < num_candidates:
                self._places[tuple(numbers)] += 1
            said = self._same_places() or self._nearly_all()
            self._warned = bool(said)
        if said:
            log.warning("the judge keeps %s; `rmsd judge` measures it", said)

    def _same_places(self) -> str:
        if (answers := self._places.total()) < WATCHED:
            return ""
        places, times = self._places.most_common(1)[0]
        if times < SAME * answers:
            return ""
        named = f"candidate{'s' * (len(places) > 1)} {', '.join(map(str, places))}"
        return f"{named} of the list in {times} of {answers} answers, whatever is there: it does not read the edits"

    def _nearly_all(self) -> str:
        if self._lists < WATCHED or self._kept < NEARLY_ALL * self._listed:
            return ""
        return f"{self._kept} of {self._listed} candidates of long lists: it hardly tells one edit from another"
