"""What an LLM judge is shown: one or more questions as a text, each list of candidates in an order of its own."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jinja2
import jinja2.meta

from .base import Question

TEMPLATE = Path(__file__).with_name("prompt.jinja")
AROUND = 8  # tokens shown on either side of an edit


class Asking:
    """The text of a request.

    Args:
        template: a jinja2 file in place of the built-in prompt. It is given `questions`, of which each has `prompt`,
            `privileged_context`, `teacher_prompt`, `answer`, `has_tools`, `max_kept` and `candidates`; and all that the
            first question has by itself.
        batch: questions a text holds at most.
        shuffle: lists candidates in an order drawn from the question's content, and not by the size of the gap: a judge
            that likes the first of a list would keep the largest gaps.

    `backwards` shows every list the other way round, as long as it is set.

    Raises:
        ValueError: `batch` is more than one, and the template does not show `questions`.
    """

    def __init__(self, template: str | Path | None = None, *, batch: int = 1, shuffle: bool = True):
        self.text, self.shuffle = Path(template or TEMPLATE).read_text(encoding="utf-8"), shuffle
        self.backwards = False
        # Plain text, so no escaping; undefined names in a user's template are errors.
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        # jinja2's own is for HTML, and writes > as \u003e.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        if batch > 1 and "questions" not in jinja2.meta.find_undeclared_variables(environment.parse(self.text)):
            raise ValueError(f"judge.batch={batch} needs a template that shows `questions`, and {template} does not")
        self._template = environment.from_string(self.text)

    def order(self, question: Question) -> list[int]:
        """Indices into the question's candidates, as they are listed: by a hash of what is asked about each. Nats are
        not in it, whose last bits change with how a batch was laid out, nor is the candidates' order, which hangs on
        them. So a question has the same order in every process and every run."""
        order = self._shuffled(question) if self.shuffle else list(range(len(question.candidates)))
        return order[::-1] if self.backwards else order

    def _shuffled(self, question: Question) -> list[int]:
        asked = json.dumps([question.prompt, question.privileged_context, question.tokens])

        def place(i: int) -> bytes:
            candidate = question.candidates[i]
            return hashlib.sha256(f"{asked} {candidate.position} {candidate.promoted}".encode()).digest()

        return sorted(range(len(question.candidates)), key=place)

    def render(self, questions: Sequence[Question]) -> str:
        shown = [self._shown(question) for question in questions]
        return self._template.render(questions=shown, **shown[0])

    def _shown(self, question: Question) -> dict:
        tokens, candidates = question.tokens, []
        for candidate in (question.candidates[i] for i in self.order(question)):
            at = candidate.position
            before, after = tokens[max(0, at - AROUND) : at], tokens[at + 1 : at + 1 + AROUND]
            candidates.append({**vars(candidate), "before": "".join(before), "after": "".join(after)})
        return {
            "prompt": question.prompt,
            "privileged_context": question.privileged_context,
            "teacher_prompt": question.teacher_prompt,
            "answer": _marked(question),
            "has_tools": bool(question.unwritten),
            "candidates": candidates,
            "max_kept": question.max_kept,
        }


def _marked(question: Question) -> str:
    """The answer with what tools said in it between <tool> and </tool>."""
    read = set(question.unwritten)
    runs = itertools.groupby(range(len(question.tokens)), key=lambda i: i in read)
    texts = ((is_read, "".join(question.tokens[i] for i in run)) for is_read, run in runs)
    return "".join(f"<tool>{text}</tool>" if is_read else text for is_read, text in texts)
