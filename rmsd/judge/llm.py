"""A judge behind any OpenAI-compatible endpoint."""

import contextlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from ..words import first_line
from .asking import Asking
from .base import Candidate, Question
from .each import EXAMPLES, NEUTRAL, SYSTEM, TOP, log_odds, messages
from .limits import Limits
from .magnitude import MagnitudeJudge
from .verdicts import PlaceWatch, answer_schema, by_answer, found_relevant, parse

log = logging.getLogger("rmsd")

ON_ERROR = ("raise", "magnitude", "skip")
ASK = ("list", "each")
ONE_TOKEN = {"logprobs": True, "top_logprobs": TOP}


class LLMJudge:
    """Asks a chat model which candidates bear on the wanted behaviour.

    Args:
        model: the model's name at the endpoint.
        base_url: None for the client's default; the key comes from the environment variable named by `api_key_env`.
        max_concurrency: requests under way at once.
        timeout, max_retries: seconds a request may take, and retries after 408, 409, 429, 5xx and broken connections;
            the client waits as long as a Retry-After asks, up to two minutes.
        max_tokens, temperature: None leaves one out of the request, which some models refuse it in. `max_tokens` is
            for each question of a request.
        on_error: what a request that fails for good means: "raise", "magnitude" (the largest gaps are kept) or "skip"
            (nothing of this rollout is).
        ask: "list" shows a rollout's candidates in one request, and reads a verdict on each. "each" asks about one
            candidate at a time for one token, yes or no, and where that is yes once more with an instruction that asks
            for nothing, which must make yes less likely. It needs a server that gives log-probabilities.
        log_odds: "each" takes an answer for yes where log P(yes) - log P(no) is larger.
        template, shuffle: as rmsd.judge.asking.Asking takes them.
        batch: questions in one request. One that the answer passes over is asked again by itself, and so is each of a
            request that is refused or whose answer cannot be read.
        requests_per_minute, tokens_per_minute: requests of this process wait for these.
        budget_tokens: read and written by the model for this judge, not counting what it was asked before a resume or
            by other processes; the request after that fails for good, whatever `on_error` says.

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
        ask: str = "list",
        log_odds: float = 0.5,
        template: str | Path | None = None,
        shuffle: bool = True,
        batch: int = 1,
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
        if ask not in ASK:
            raise ValueError(f"ask must be one of {', '.join(ASK)}, not {ask!r}")
        if ask == "each" and (template or batch > 1):
            raise ValueError("judge.ask=each takes no judge.template, and no judge.batch: it asks about one candidate")
        self.model, self.on_error, self.ask, self.log_odds = model, on_error, ask, log_odds
        self.max_tokens, self.temperature = max_tokens, temperature
        self.stats: Counter[str] = Counter()
        self._counting = threading.Lock()  # Counter.update loses what two threads add at once
        self._openai, self._api_key_env = openai, api_key_env
        self._refusals = (openai.BadRequestError, openai.UnprocessableEntityError)  # of what a request holds
        self._client = openai.OpenAI(
            # Local servers want no key, but the client wants a string.
            api_key=os.environ.get(api_key_env) or "none",
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
        )
        self._pool = ThreadPoolExecutor(max_concurrency, thread_name_prefix="judge")
        self._asking, self._batch = Asking(template, batch=batch, shuffle=shuffle and ask == "list"), batch
        self._structured = True
        self._limits = Limits(requests_per_minute, tokens_per_minute, budget_tokens)
        self._places = PlaceWatch(self._asking.shuffle)

    @property
    def fingerprint(self) -> str:
        """All that determines an answer besides the question."""
        asked = [self._asking.text, self._asking.shuffle, self._batch]
        if self._asking.backwards:
            asked.append("backwards")
        if self.ask == "each":
            asked = [SYSTEM, EXAMPLES, NEUTRAL, self.log_odds]
        # A name is a server's own: another may serve another model by it.
        return json.dumps([self.model, str(self._client.base_url), self.temperature, self.max_tokens, *asked])

    @property
    def tokens(self) -> int:
        """Read and written by the model so far, as the server counts them."""
        return self.stats["tokens_read"] + self.stats["tokens_written"]

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return self.ask_each(questions, lambda i, kept: None)

    def ask_each(self, questions: Sequence[Question], answered: Callable[[int, list[int]], None]) -> list[list[int]]:
        """As a call, and `answered(i, kept)` is told the model's own answer to question i as it arrives, by the thread
        that asked. What `on_error` puts in an answer's place is none."""
        starts = range(0, len(questions), self._batch)
        asked = [
            self._pool.submit(self._ask, questions[start : start + self._batch], partial(_told, answered, start))
            for start in starts
        ]
        done, waiting = wait(asked, return_when=FIRST_EXCEPTION)
        for future in waiting:  # one has failed: the rest, which may hang, is not waited for
            future.cancel()
        for future in done:
            future.result()
        return [kept for future in asked for kept in future.result()]

    @contextlib.contextmanager
    def lists_backwards(self) -> Iterator[None]:
        """Within it every list of candidates is shown the other way round, whatever `shuffle` says. Reversing a
        question's own candidates would not do: under `shuffle` its content alone draws the order."""
        self._asking.backwards = True
        try:
            yield
        finally:
            self._asking.backwards = False

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

    def prompt(self, *questions: Question) -> str:
        """The text of a request about these, or of the first candidate's where each is asked about by itself."""
        if self.ask == "each":
            (question,) = questions
            chat = messages(question, question.candidates[0], question.privileged_context)
            return "\n".join(message["content"] for message in chat)
        return self._asking.render(questions)

    def requests(self, num_candidates: int) -> int:
        """For one rollout at most, retries apart."""
        return 2 * num_candidates if self.ask == "each" else 1

    def _ask(self, questions: Sequence[Question], answered: Callable[[int, list[int]], None]) -> list[list[int]]:
        found: list[list[int] | None]
        try:
            if self.ask == "each":
                found = [self._leaning(questions[0])]
            else:
                found = self._found(questions, self._complete(questions))
        except (ValueError, RecursionError, *self._refusals) as error:  # the second: a body of "[[[[..." without end
            if len(questions) == 1:
                return [self._failed(questions[0], error)]
            found = [None for _ in questions]
        except self._openai.OpenAIError as error:
            return [self._failed(question, error) for question in questions]
        places = {i: numbers for i, numbers in enumerate(found) if numbers is not None}
        kept = {i: self._kept(questions[i], numbers) for i, numbers in places.items()}
        for i, answer in kept.items():
            answered(i, answer)
        for i in range(len(questions)):  # after what is there has been told: one that fails loses no other
            if i not in kept:
                (kept[i],) = self._ask(questions[i : i + 1], partial(_told, answered, i))
        return [kept[i] for i in range(len(questions))]

    def _failed(self, question: Question, error: Exception) -> list[int]:
        """What `on_error` says of a question whose request has failed for good."""
        self._count(failures=1)
        if self.on_error == "raise":
            reason = first_line(error)
            raise ConnectionError(f"judge {self.model!r} at {self._client.base_url} failed: {reason}") from error
        log.warning("judge failed (%s); on_error=%s", type(error).__name__, self.on_error)
        return MagnitudeJudge()([question])[0] if self.on_error == "magnitude" else []

    def _leaning(self, question: Question) -> list[int]:
        """Places of the list at which the model says yes, and more so than it does when nothing is asked for."""
        places = []
        for place, candidate in enumerate(question.candidates, 1):
            told = self._log_odds(question, candidate, question.privileged_context)
            if told > self.log_odds and told > self._log_odds(question, candidate, NEUTRAL):
                places.append(place)
        return places

    def _log_odds(self, question: Question, candidate: Candidate, instruction: str) -> float:
        return log_odds(self._create(messages(question, candidate, instruction), 1, **ONE_TOKEN))

    def _complete(self, questions: Sequence[Question]) -> str:
        chat = [{"role": "user", "content": self.prompt(*questions)}]
        max_tokens = self.max_tokens and self.max_tokens * len(questions)
        if self._structured:
            schema = answer_schema([len(question.candidates) for question in questions])
            verdicts = {"name": "verdicts", "schema": schema, "strict": True}
            structured = {"response_format": {"type": "json_schema", "json_schema": verdicts}}
            try:
                return self._text(self._create(chat, max_tokens, **structured))
            except self._refusals:
                pass  # for want of structured output, if it answers without
        completion = self._create(chat, max_tokens)
        self._structured = False
        return self._text(completion)

    def _create(self, chat: list[dict], max_tokens: int | None, **more):
        """A completion, once the limits allow it; counted."""
        self._limits.before()
        self._count(requests=1)
        options = {"max_tokens": max_tokens, "temperature": self.temperature}
        given = {name: value for name, value in options.items() if value is not None}
        completion = self._client.chat.completions.create(model=self.model, messages=chat, **given, **more)
        usage = getattr(completion, "usage", None)
        counted = (getattr(usage, f"{what}_tokens", None) for what in ("prompt", "completion"))
        read, written = (number if isinstance(number, int) else 0 for number in counted)  # whatever a server sends
        self._count(tokens_read=read, tokens_written=written)
        self._limits.after(read + written)
        return completion

    def _count(self, **numbers: int) -> None:
        with self._counting:
            self.stats.update(numbers)

    @staticmethod
    def _text(completion) -> str:
        try:  # a proxy's page is a str to the client, `null` is None
            text = completion.choices[0].message.content if completion.choices else None
        except (AttributeError, LookupError, TypeError):
            raise ValueError("the judge's answer is no chat completion") from None
        if not text:
            raise ValueError("the judge's answer is empty")
        if not isinstance(text, str):
            raise ValueError("the judge's answer is no text")
        return text

    def _found(self, questions: Sequence[Question], text: str) -> list[list[int] | None]:
        """By question the places of the list that are relevant; None for one of several that has no verdict. Entries
        that name no candidate are dropped and counted."""
        if len(questions) == 1:
            lists, dropped = [parse(text)], 0
        else:
            lists, dropped = by_answer(parse(text), len(questions))
        found: list[list[int] | None] = []
        for question, entries in zip(questions, lists, strict=True):
            numbers, strangers = found_relevant(entries, len(question.candidates))
            dropped += strangers
            passed_over = len(questions) > 1 and len(entries) == strangers
            found.append(None if passed_over else numbers)
        self._count(dropped=dropped)
        return found

    def _kept(self, question: Question, numbers: list[int]) -> list[int]:
        """Positions in the order of the candidates, from places of the list as it was shown."""
        if self.ask == "list":
            self._places.add(numbers, len(question.candidates))
        order = self._asking.order(question)
        chosen = sorted(order[number - 1] for number in numbers)
        return [question.candidates[i].position for i in chosen][: question.max_kept]


def _told(answered: Callable[[int, list[int]], None], start: int, i: int, kept: list[int]) -> None:
    answered(start + i, kept)


def llm_of(judge: object) -> LLMJudge | None:
    """The LLM judge that a judge is, or that has the last word behind a cache or a contrast."""
    while judge is not None and not isinstance(judge, LLMJudge):
        judge = getattr(judge, "then", None) or getattr(judge, "judge", None)
    return judge
