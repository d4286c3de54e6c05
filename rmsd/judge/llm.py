"""A judge behind any OpenAI-compatible endpoint."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import jinja2

from .base import Question
from .magnitude import MagnitudeJudge

log = logging.getLogger("rmsd")

TEMPLATE = Path(__file__).with_name("prompt.jinja")
ON_ERROR = ("raise", "magnitude", "skip")


def answer_schema(max_kept: int) -> dict:
    """What a server with structured output is held to. The bound matters: a small model lists candidates without end,
    and an answer that `max_tokens` cuts off is none. Numbers are not bounded: one that names no candidate is better
    dropped and counted than forced onto another."""
    entry = {
        "type": "object",
        "properties": {"candidate": {"type": "integer"}, "relevance": {"type": "number"}},
        "required": ["candidate", "relevance"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"keep": {"type": "array", "items": entry, "maxItems": max_kept}},
        "required": ["keep"],
        "additionalProperties": False,
    }


class LLMJudge:
    """Asks a chat model which candidates bear on the wanted behaviour, one request a rollout.

    Args:
        model: the model's name at the endpoint.
        base_url: None for the client's default; the key comes from the environment variable named by `api_key_env`.
        min_relevance: entries that the model finds less relevant are dropped.
        max_concurrency: requests under way at once.
        timeout, max_retries: seconds a request may take, and retries after 408, 409, 429, 5xx and broken connections;
            the client waits as long as a Retry-After asks, up to two minutes.
        max_tokens, temperature: None leaves one out of the request, which some models refuse it in.
        on_error: what a request that fails for good means: "raise", "magnitude" (the largest gaps are kept) or "skip"
            (nothing of this rollout is).
        template: a jinja2 file in place of the built-in prompt.

    `stats` counts requests, failures, and entries dropped for naming no candidate.

    Raises:
        ConnectionError: from a call with on_error="raise", in one line.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        min_relevance: float = 0.0,
        max_concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 3,
        max_tokens: int | None = 512,
        temperature: float | None = 0.0,
        on_error: str = "raise",
        template: str | Path | None = None,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("LLMJudge needs the openai client: pip install 'rmsd-kernels[judge]'") from error
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
        self.model, self.min_relevance, self.on_error = model, min_relevance, on_error
        self.max_tokens, self.temperature = max_tokens, temperature
        self.stats: Counter[str] = Counter()
        self._openai, self._api_key_env = openai, api_key_env
        self._client = openai.OpenAI(
            # Local servers want no key, but the client wants a string.
            api_key=os.environ.get(api_key_env) or "none",
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
        )
        self._pool = ThreadPoolExecutor(max_concurrency, thread_name_prefix="judge")
        # Plain text, so no escaping; undefined names in a user's template are errors.
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        self._template_text = Path(template or TEMPLATE).read_text(encoding="utf-8")
        self._template = environment.from_string(self._template_text)
        self._structured = True

    @property
    def fingerprint(self) -> str:
        """All that determines an answer besides the question."""
        return json.dumps([self.model, self.temperature, self.max_tokens, self.min_relevance, self._template_text])

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return self.ask_each(questions, lambda i, kept: None)

    def ask_each(self, questions: Sequence[Question], answered: Callable[[int, list[int]], None]) -> list[list[int]]:
        """As a call, and `answered(i, kept)` is told the model's own answer to question i as it arrives, by the thread
        that asked. What `on_error` puts in an answer's place is none."""
        asked = [self._pool.submit(self._ask, question, partial(answered, i)) for i, question in enumerate(questions)]
        done, waiting = wait(asked, return_when=FIRST_EXCEPTION)
        for future in waiting:  # one has failed: the rest, which may hang, is not waited for
            future.cancel()
        for future in done:
            future.result()
        return [future.result() for future in asked]

    def check(self) -> None:
        """Raises ConnectionError, in one line, when nothing answers at the endpoint, or a web page does, or it refuses
        the key. Any other refusal will do: not every server lists its models."""
        try:
            self._client.with_options(max_retries=0).models.list()
        except self._openai.APIConnectionError as error:
            raise ConnectionError(f"no judge answers at {self._client.base_url}: set judge.base_url") from error
        except self._openai.AuthenticationError as error:
            state = "holds" if os.environ.get(self._api_key_env) else "should hold"
            message = (
                f"{self._client.base_url} refuses the key that the environment variable {self._api_key_env} {state}"
            )
            raise ConnectionError(message) from error
        except self._openai.APIStatusError:
            pass
        except Exception as error:  # the client fails in its own ways on what is no JSON, a proxy's page for one
            message = f"{self._client.base_url} answers, but is no OpenAI endpoint: does judge.base_url end in /v1?"
            raise ConnectionError(message) from error

    def prompt(self, question: Question) -> str:
        """The request's text."""
        candidates = [
            {**vars(candidate), "before": "".join(question.tokens[max(0, candidate.position - 8) : candidate.position])}
            for candidate in question.candidates
        ]
        return self._template.render(
            prompt=question.prompt,
            privileged_context=question.privileged_context,
            answer="".join(question.tokens),
            candidates=candidates,
            max_kept=question.max_kept,
        )

    def _ask(self, question: Question, answered: Callable[[list[int]], None]) -> list[int]:
        self.stats["requests"] += 1
        try:
            kept = self._kept(question, self._complete(self.prompt(question), question.max_kept))
        except (self._openai.OpenAIError, ValueError) as error:
            self.stats["failures"] += 1
            if self.on_error == "raise":
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ConnectionError(f"judge {self.model!r} at {self._client.base_url} failed: {reason}") from error
            log.warning("judge failed (%s); on_error=%s", type(error).__name__, self.on_error)
            return MagnitudeJudge()([question])[0] if self.on_error == "magnitude" else []
        answered(kept)
        return kept

    def _complete(self, prompt: str, max_kept: int) -> str:
        options = dict(max_tokens=self.max_tokens, temperature=self.temperature)
        request = dict(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            **{name: value for name, value in options.items() if value is not None},
        )
        if self._structured:
            schema = {"name": "kept", "schema": answer_schema(max_kept), "strict": True}
            response_format = {"type": "json_schema", "json_schema": schema}
            try:
                return self._text(self._client.chat.completions.create(**request, response_format=response_format))
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError):
                pass  # for want of structured output, if it answers without
        completion = self._client.chat.completions.create(**request)
        self._structured = False
        return self._text(completion)

    @staticmethod
    def _text(completion) -> str:
        try:  # a proxy's page is a str to the client, `null` is None
            text = completion.choices[0].message.content if completion.choices else None
        except (AttributeError, IndexError, TypeError):
            raise ValueError("the judge's answer is no chat completion") from None
        if not text:
            raise ValueError("the judge's answer is empty")
        if not isinstance(text, str):
            raise ValueError("the judge's answer is no text")
        return text

    def _kept(self, question: Question, text: str) -> list[int]:
        """Positions from the answer; what names no candidate is dropped and counted."""
        kept = []
        for entry in _parse(text):
            number, relevance = (
                (entry.get("candidate"), entry.get("relevance", 1.0)) if isinstance(entry, dict) else (entry, 1.0)
            )
            valid = isinstance(number, int) and not isinstance(number, bool) and isinstance(relevance, int | float)
            if not valid or not 1 <= number <= len(question.candidates):
                self.stats["dropped"] += 1
            elif relevance >= self.min_relevance:
                kept.append((-relevance, question.candidates[number - 1].position))
        return list(dict.fromkeys(position for _, position in sorted(kept, key=lambda x: x[0])))[: question.max_kept]


def _parse(text: str) -> list:
    """The list under "keep" in the first JSON object of the text that holds one.

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
        if isinstance(answer, dict) and isinstance(answer.get("keep"), list):
            return answer["keep"]
        start = text.find("{", start + 1)
    raise ValueError('the judge\'s answer holds no {"keep": [...]}')
