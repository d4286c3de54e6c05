"""A judge behind any OpenAI-compatible endpoint."""

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import jinja2

from ..words import first_line
from .base import Question
from .limits import Limits
from .magnitude import MagnitudeJudge
from .verdicts import PlaceWatch, answer_schema, found_relevant, parse

log = logging.getLogger("rmsd")

TEMPLATE = Path(__file__).with_name("prompt.jinja")
ON_ERROR = ("raise", "magnitude", "skip")


class LLMJudge:
    """Asks a chat model which candidates bear on the wanted behaviour, one request a rollout.

    Args:
        model: the model's name at the endpoint.
        base_url: None for the client's default; the key comes from the environment variable named by `api_key_env`.
        max_concurrency: requests under way at once.
        timeout, max_retries: seconds a request may take, and retries after 408, 409, 429, 5xx and broken connections;
            the client waits as long as a Retry-After asks, up to two minutes.
        max_tokens, temperature: None leaves one out of the request, which some models refuse it in.
        on_error: what a request that fails for good means: "raise", "magnitude" (the largest gaps are kept) or "skip"
            (nothing of this rollout is).
        template: a jinja2 file in place of the built-in prompt.
        requests_per_minute, tokens_per_minute: requests wait for these.
        budget_tokens: read and written by the model in the whole run; the request after that fails for good, whatever
            `on_error` says.

    What it finds relevant is kept in the order of the candidates, the largest of the criterion first. `stats` counts
    requests, failures, the server's own numbers of tokens read and written, and verdicts dropped for naming no
    candidate.

    Raises:
        ConnectionError: from a call with on_error="raise", in one line.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 3,
        max_tokens: int | None = 1024,
        temperature: float | None = 0.0,
        on_error: str = "raise",
        template: str | Path | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        budget_tokens: int | None = None,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("LLMJudge needs the openai client: pip install 'rmsd-kernels[judge]'") from error
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
        self.model, self.on_error = model, on_error
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
        environment.filters["tojson"] = partial(
            json.dumps, ensure_ascii=False
        )  # jinja2's is for HTML: writes > as \u003e
        self._template_text = Path(template or TEMPLATE).read_text(encoding="utf-8")
        self._template = environment.from_string(self._template_text)
        self._structured = True
        self._limits = Limits(requests_per_minute, tokens_per_minute, budget_tokens)
        self._places = PlaceWatch()

    @property
    def fingerprint(self) -> str:
        """All that determines an answer besides the question."""
        return json.dumps([self.model, self.temperature, self.max_tokens, self._template_text])

    @property
    def tokens(self) -> int:
        """Read and written by the model so far, as the server counts them."""
        return self.stats["tokens_read"] + self.stats["tokens_written"]

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
        around = 8  # tokens on either side
        candidates = [
            {
                **vars(candidate),
                "before": "".join(question.tokens[max(0, candidate.position - around) : candidate.position]),
                "after": "".join(question.tokens[candidate.position + 1 : candidate.position + 1 + around]),
            }
            for candidate in question.candidates
        ]
        return self._template.render(
            prompt=question.prompt,
            privileged_context=question.privileged_context,
            teacher_prompt=question.teacher_prompt,
            answer=_marked(question),
            has_tools=bool(question.unwritten),
            candidates=candidates,
            max_kept=question.max_kept,
        )

    def _ask(self, question: Question, answered: Callable[[list[int]], None]) -> list[int]:
        self._limits.before()
        self.stats["requests"] += 1
        try:
            kept = self._kept(question, self._complete(self.prompt(question), len(question.candidates)))
        except (self._openai.OpenAIError, ValueError) as error:
            self.stats["failures"] += 1
            if self.on_error == "raise":
                reason = first_line(error)
                raise ConnectionError(f"judge {self.model!r} at {self._client.base_url} failed: {reason}") from error
            log.warning("judge failed (%s); on_error=%s", type(error).__name__, self.on_error)
            return MagnitudeJudge()([question])[0] if self.on_error == "magnitude" else []
        answered(kept)
        return kept

    def _complete(self, prompt: str, num_candidates: int) -> str:
        options = dict(max_tokens=self.max_tokens, temperature=self.temperature)
        request = dict(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            **{name: value for name, value in options.items() if value is not None},
        )
        if self._structured:
            schema = {"name": "verdicts", "schema": answer_schema(num_candidates), "strict": True}
            response_format = {"type": "json_schema", "json_schema": schema}
            try:
                return self._counted(self._client.chat.completions.create(**request, response_format=response_format))
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError):
                pass  # for want of structured output, if it answers without
        completion = self._client.chat.completions.create(**request)
        self._structured = False
        return self._counted(completion)

    def _counted(self, completion) -> str:
        usage = getattr(completion, "usage", None)
        read, written = (getattr(usage, f"{what}_tokens", None) or 0 for what in ("prompt", "completion"))
        self.stats.update(tokens_read=read, tokens_written=written)
        self._limits.after(read + written)
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
        numbers, dropped = found_relevant(parse(text), len(question.candidates))
        self.stats.update(dropped=dropped)
        self._places.add(numbers, len(question.candidates))
        return [question.candidates[number - 1].position for number in numbers][: question.max_kept]


def llm_of(judge: object) -> LLMJudge | None:
    """The LLM judge that a judge is, or that has the last word behind a cache or a contrast."""
    while judge is not None and not isinstance(judge, LLMJudge):
        judge = getattr(judge, "then", None) or getattr(judge, "judge", None)
    return judge


def _marked(question: Question) -> str:
    """The answer with what tools said in it between <tool> and </tool>."""
    read = set(question.unwritten)
    runs = itertools.groupby(range(len(question.tokens)), key=lambda i: i in read)
    texts = ((is_read, "".join(question.tokens[i] for i in run)) for is_read, run in runs)
    return "".join(f"<tool>{text}</tool>" if is_read else text for is_read, text in texts)
