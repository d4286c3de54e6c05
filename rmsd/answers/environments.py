"""Environments: of each rollout its own, with a state that the model's calls change and its feedback is about."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import defined_in
from ..words import said_by
from .prompts import SAID, tools_of
from .tools import Loop, Tool, ToolLimits, text_of, toolbox

Factory = Callable[[], Any]
ContextAfter = Callable[[dict, list[dict[str, str]]], str]


@dataclass
class Episode:
    """One rollout: its row, its environment, and what has happened in it."""

    # `prompt` with what the environment's reset said; `privileged_context` at the end as the teacher reads it.
    row: dict
    tools: Mapping[str, Tool]
    environment: Any = None
    awaits: Loop = field(default_factory=Loop)  # what the environment's methods are awaited by
    died: str | None = None  # what the environment died of: the rollout is dropped
    transcript: list[dict[str, str]] = field(default_factory=list)  # messages: assistant, tool, assistant, ...
    counts: Counter = field(default_factory=Counter)  # turns, calls, and what became of calls (tools.Results)
    reward: float | None = None  # the environment's own
    solved: bool | None = None  # its reward is at least 1

    @property
    def numbers(self) -> dict[str, int]:
        """What is counted of an episode, by name: `counts`, and whether it was solved or dropped."""
        found = dict(self.counts)
        if self.solved is not None:
            found["solved"] = int(self.solved)
        return found | ({"dropped": 1} if self.died else {})


class Environments:
    """Makes episodes of rows.

    Args:
        tools: functions that every rollout may call.
        environment_factory: a callable that makes an environment; or several by name, of which a row's `environment`
            names one. A rollout has one of its own, made for it: nothing of another rollout is left in it.
        limits: of each call, and of making and resetting an environment.
        context_after: (row, transcript) -> the privileged context that the teacher reads, made once the rollout is
            there. Without it that is the row's own, followed by the environment's `feedback()`, if it has any to give.

    Raises:
        ValueError: a tool has no schema, or an environment no `reset`.
    """

    def __init__(
        self,
        tools: Sequence[Callable] = (),
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        limits: ToolLimits | None = None,
        context_after: ContextAfter | None = None,
    ):
        self._functions, self._factory = list(tools), environment_factory
        self.limits, self._context_after = limits or ToolLimits(), context_after
        named = self._factory if isinstance(self._factory, Mapping) else {None: self._factory}
        self._schemas = {name: self._probed(each) for name, each in named.items()}

    def _probed(self, factory: Factory | None) -> list[dict]:
        """The schemas, from an environment that is made to be looked at."""
        environment = factory() if factory else None
        if factory and not callable(getattr(environment, "reset", None)):
            raise ValueError(f"environment {type(environment).__name__} must define reset(**row)")
        tools = toolbox(self._functions, environment)
        if not tools:
            raise ValueError("neither tools nor an environment with public methods: there is nothing to call")
        return [tool.schema for tool in tools.values()]

    @property
    def names(self) -> list[str]:
        """Of all tools, each once."""
        shown = [schema["function"]["name"] for schemas in self._schemas.values() for schema in schemas]
        return list(dict.fromkeys(shown))

    @property
    def all_schemas(self) -> list[list[dict]]:
        """Of each environment, once."""
        return list(self._schemas.values())

    def schemas(self, row: dict) -> list[dict]:
        """What a row's prompt shows of tools: those that its `tools` names, or else all of its environment's.

        Raises:
            ValueError: it names an environment or a tool that is not there.
        """
        shown = {schema["function"]["name"]: schema for schema in self._schemas[self._name(row)]}
        return list(_chosen(shown, row).values())

    def _name(self, row: dict) -> str | None:
        if not isinstance(self._factory, Mapping):
            return None
        name = row.get("environment")
        if name not in self._factory:
            raise ValueError(f"a row's environment must be one of {', '.join(self._factory)}, not {name!r}")
        return name

    def start(self, rows: Sequence[dict]) -> list[Episode]:
        """An episode a row, its environment made and reset, several at once. One that raises or hangs has died."""
        if self._factory is None:
            tools = toolbox(self._functions)
            return [Episode(dict(row), _chosen(tools, row)) for row in rows]
        started = run_each([lambda row=row: self._start(row) for row in rows], self.limits.start_seconds)
        return [
            Episode(dict(row), {}, died=f"reset: {outcome}") if isinstance(outcome, BaseException) else outcome
            for row, outcome in zip(rows, started, strict=True)
        ]

    def _start(self, row: dict) -> Episode:
        name = self._name(row)
        environment = self._factory[name]() if name is not None else self._factory()
        awaits = Loop()
        given = {key: value for key, value in row.items() if name is None or key != "environment"}
        said = awaits(environment.reset(**given))
        row = dict(row)
        if said is not None:
            said = text_of(said, self.limits.characters)[: self.limits.characters]
            row |= {"prompt": _appended(row["prompt"], said), SAID: [said]}
        return Episode(row, _chosen(toolbox(self._functions, environment, awaits), row), environment, awaits)

    def finish(self, episodes: Sequence[Episode]) -> None:
        """Asks each environment that lives for its reward and its feedback, where it has them to give, and makes the
        privileged context that the teacher reads of this rollout."""
        living = [episode for episode in episodes if not episode.died]
        outcomes = run_each([lambda e=e: self._outcome(e) for e in living], self.limits.seconds)
        for episode, outcome in zip(living, outcomes, strict=True):
            episode.awaits.close()
            if isinstance(outcome, BaseException):
                episode.died = f"its end: {outcome}"
            else:
                episode.reward, episode.row["privileged_context"] = outcome
                episode.solved = None if episode.reward is None else episode.reward >= 1.0

    def _outcome(self, episode: Episode) -> tuple[float | None, str]:
        reward, context = _called(episode, "get_reward"), episode.row.get("privileged_context", "")
        if self._context_after is not None:
            context = self._context_after(episode.row, list(episode.transcript))
            if not isinstance(context, str):
                raise TypeError(f"the privileged context must be a string, not {type(context).__name__}")
            context = text_of(context, len(context))
            episode.row[SAID] = [*episode.row.get(SAID, ()), context]
        elif (feedback := _called(episode, "feedback")) is not None:
            said = text_of(feedback, self.limits.characters)[: self.limits.characters]
            episode.row[SAID] = [*episode.row.get(SAID, ()), said]
            context = "\n\n".join(text for text in (context, said) if text.strip())
        return None if reward is None else float(reward), context


def _chosen(tools: dict[str, Any], row: dict) -> dict[str, Any]:
    """Those of `tools` that the row's column `tools` lists, by name or by schema; all without one."""
    named = tools_of(row)
    if named is None:
        return tools
    listed = [tool if isinstance(tool, str) else tool.get("function", tool).get("name") for tool in named]
    missing = [name for name in listed if name not in tools]
    if missing:
        raise ValueError(f"tools names {missing[0]!r}; there are: {', '.join(tools)}")
    return {name: tools[name] for name in listed}


def run_each(functions: Sequence[Callable[[], Any]], seconds: float) -> list[Any]:
    """What each function returned or raised, each in a thread; a TimeoutError for one that has not returned."""
    outcomes: list[Any] = [TimeoutError(f"no answer within {seconds:g} seconds")] * len(functions)
    done = [threading.Event() for _ in functions]

    def run(i: int) -> None:
        try:
            outcome = functions[i]()
        except BaseException as error:  # SystemExit too: an environment ends no run
            outcome = error if said_by(error) else RuntimeError(type(error).__name__)
        outcomes[i] = outcome
        done[i].set()

    for i in range(len(functions)):
        threading.Thread(target=run, args=(i,), daemon=True).start()
    deadline = time.monotonic() + seconds
    for event in done:
        event.wait(max(0.0, deadline - time.monotonic()))
    return list(outcomes)  # one that is late writes to the other list


def _called(episode: Episode, name: str) -> Any:
    method = getattr(episode.environment, name, None)
    return episode.awaits(method()) if callable(method) else None


def _appended(prompt, said: str):
    """Behind the last message, which is the user's, as TRL has it."""
    if isinstance(prompt, str):
        return prompt + said
    *others, last = prompt
    content = last["content"]
    content = [*content, {"type": "text", "text": said}] if isinstance(content, list) else f"{content or ''}{said}"
    return [*others, {**last, "content": content}]


def load_environment(path: str | Path) -> dict[str, Any]:
    """What `Environments` and RMSDTrainer take of a Python file: its ENVIRONMENT, a class or factory or several by
    name, and its TOOLS, a list of functions, of which it may have only one; and `context_after`, if it defines it.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it fails, or it defines neither.
    """
    defined = defined_in(path, "environment")
    tools, factory = defined.get("TOOLS", []), defined.get("ENVIRONMENT")
    if not tools and factory is None:
        raise ValueError(
            f"environment file {path} must define ENVIRONMENT, a class with reset(**row), or TOOLS, a list"
        )
    return dict(tools=list(tools), environment_factory=factory, context_after=defined.get("context_after"))
