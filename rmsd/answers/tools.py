"""Tools that a model calls: plain functions with type hints and docstrings, and the methods of an environment.

The shape is that of TRL's GRPO, so that what was written for it works here: a tool is a function that transformers'
`get_json_schema` can read, and an environment an object of which each rollout has its own, with `reset(**row)` and
public methods as tools. What it returns, raises, or fails to return within its time is what the model reads next.
"""

import asyncio
import contextlib
import inspect
import json
import threading
import time
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, create_model
from transformers.utils import get_json_schema

from ..words import first_line, said_by
from .calls import Call

# An environment's methods that are not tools: what TRL calls, and what is ours alone.
RESERVED = ("reset", "get_reward", "feedback")
ERRORS = ("malformed", "unknown", "raised", "hung")  # what becomes of calls that are not made as they were meant


@dataclass(frozen=True)
class ToolLimits:
    """Of one call."""

    seconds: float = 10.0
    start_seconds: float = 60.0  # for an environment to be made and reset
    characters: int = 2_000  # of its output; the rest is left out, and the output says so


class Loop:
    """Awaits what is to be awaited, all of it in one event loop: a client that an environment keeps between its calls
    belongs to the loop that it was made in. Not for two threads at once."""

    def __init__(self):
        self._runner = asyncio.Runner()

    def __call__(self, result: Any) -> Any:
        return self._runner.run(result) if inspect.iscoroutine(result) else result

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a call that hangs still runs in it
            self._runner.close()


class Tool:
    """A function that can be called by name.

    Args:
        awaits: what a coroutine that the function returns is awaited by. Without it each call has a loop of its own,
            as rollouts call one function at once.

    Raises:
        ValueError: it has no schema: no docstring, or an argument without a type or a description.
    """

    def __init__(self, function: Callable, awaits: Loop | None = None):
        self.function, self.name, self._awaits = function, function.__name__, awaits
        try:
            self.schema = get_json_schema(function)
        except Exception as error:  # transformers' own kinds, of which each says what is missing
            raise ValueError(f"tool {self.name!r}: {first_line(error)}") from error
        self._arguments = _arguments_model(function)

    def __call__(self, arguments: dict[str, Any], texts: Mapping[str, str] | None = None) -> Any:
        """Raises ValueError, in one line, for arguments that are missing, unknown or of another type. One that is to be
        text is taken as it stands in `texts`, where it does."""
        meant = {name: self._meant(name, value, texts or {}) for name, value in arguments.items()}
        try:
            # As JSON: a model has no other way to write a tuple, or a key that is a number, than JSON's.
            written = json.dumps(meant, ensure_ascii=False).encode("utf-8", "replace")
            checked = self._arguments.model_validate_json(written)
        except ValidationError as error:
            raise ValueError(f"{self.name}: {_problems(error)}") from None
        given = {name: getattr(checked, place) for name, place in self._places() if place in checked.model_fields_set}
        result = self.function(**given, **(checked.model_extra or {}))
        if self._awaits is not None:
            return self._awaits(result)
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    def _meant(self, name: str, value: Any, texts: Mapping[str, str]) -> Any:
        schema = self.schema["function"]["parameters"].get("properties", {}).get(name, {})
        is_none = value is None and schema.get("nullable", False)
        is_text = schema.get("type") == "string" and not isinstance(value, str) and not is_none
        return texts.get(name, value) if is_text else value

    def _places(self):
        return [(field.alias, place) for place, field in self._arguments.model_fields.items()]


def _arguments_model(function: Callable):
    """A pydantic model of a function's arguments: JSON's types as they are, so that "3" is no integer."""
    hints = typing.get_type_hints(function)
    fields, extra = {}, "forbid"
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        else:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[f"argument_{len(fields)}"] = (hints.get(name, Any), Field(default, alias=name))
    return create_model("Arguments", __config__=ConfigDict(strict=True, extra=extra), **fields)


def _problems(error: ValidationError) -> str:
    said = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            said.append(f"argument {name!r} is missing")
        elif problem["type"] == "extra_forbidden":
            said.append(f"there is no argument {name!r}")
        else:
            said.append(f"argument {name!r}: {problem['msg'].lower()}, not {str(problem['input'])[:40]!r}")
    return "; ".join(said)


def methods_of(environment: Any) -> list[Callable]:
    """The public methods of an environment's class that are tools, as TRL finds them; a property is not looked at."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return [getattr(environment, name) for name in names if name not in RESERVED and not name.startswith("_")]


def toolbox(functions: Sequence[Callable], environment: Any = None, awaits: Loop | None = None) -> dict[str, Tool]:
    """Tools by name: the functions, and an environment's methods, which are awaited by `awaits`.

    Raises:
        ValueError: as `Tool`, or two have the same name.
    """
    tools: dict[str, Tool] = {}
    methods = methods_of(environment) if environment is not None else []
    for tool in [*map(Tool, functions), *(Tool(method, awaits) for method in methods)]:
        if tool.name in tools:
            raise ValueError(f"tool {tool.name!r} is there twice")
        tools[tool.name] = tool
    return tools


@dataclass
class Results:
    """What the calls of one turn came to."""

    messages: list[dict[str, str]]  # of role "tool", one a call, as the chat template takes them
    counts: Counter = field(
        default_factory=Counter
    )  # calls; and of these those in ERRORS, and whose output was shortened
    hung: bool = False  # a call is still running: the environment is not to be relied on any more


def run_turns(turns: Sequence[tuple[Mapping[str, Tool], Sequence[Call]]], limits: ToolLimits) -> list[Results]:
    """Makes the calls of several rollouts' turns, each rollout in a thread of its own and its calls in order.

    Nothing that a tool does is raised here. A thread cannot be ended from outside: one that hangs is left behind, as a
    daemon, and what it does afterwards is not looked at.
    """
    running = [_Turn(tools, calls, limits) for tools, calls in turns]
    return [turn.results() for turn in running]


class _Turn(threading.Thread):
    def __init__(self, tools: Mapping[str, Tool], calls: Sequence[Call], limits: ToolLimits):
        super().__init__(daemon=True)
        self._tools, self._calls, self._limits = tools, calls, limits
        self._messages: list[dict[str, str]] = []
        self._counts: Counter = Counter()
        self._moved = threading.Condition()
        self._since = time.monotonic()  # when the call under way began
        self._left_behind = False
        self.start()

    def run(self) -> None:
        for call in self._calls:
            if self._left_behind:  # it has been said that the rest is not called
                return
            content, happened = _answer(self._tools, call, self._limits)
            with self._moved:
                self._messages.append(_message(call, content))
                self._counts.update(["calls", *happened])
                self._since = time.monotonic()
                self._moved.notify()

    def results(self) -> Results:
        with self._moved:
            done = 0
            while done < len(self._calls):
                while len(self._messages) == done:
                    left = self._since + self._limits.seconds - time.monotonic()
                    if left <= 0 or not self._moved.wait(left):
                        break
                if len(self._messages) == done:
                    return self._without_the_rest(done)
                done = len(self._messages)
            return Results(list(self._messages), Counter(self._counts))

    def _without_the_rest(self, done: int) -> Results:
        """A copy: the thread that hangs may yet go on."""
        self._left_behind = True
        hung, *others = self._calls[done:]
        said = [(hung, f"Error: {hung.name} did not return within {self._limits.seconds:g} seconds")]
        said += [(call, f"Error: {call.name} was not called: the call before it did not return") for call in others]
        late = [_message(call, text) for call, text in said]
        counts = Counter(self._counts)
        counts.update(calls=1 + len(others), hung=1)
        return Results(list(self._messages) + late, counts, hung=True)


def _message(call: Call, content: str) -> dict[str, str]:
    """As text that a tokenizer takes: a lone surrogate, half a character, is none, and a model may write one."""
    message = {"role": "tool", "name": call.name or "unknown", "content": content}
    return {key: text.encode("utf-8", "replace").decode() for key, text in message.items()}


def _answer(tools: Mapping[str, Tool], call: Call, limits: ToolLimits) -> tuple[str, list[str]]:
    """A tool's message, and what happened on the way."""
    if call.problem:
        return f"Error: {call.problem}", ["malformed"]
    if call.name not in tools:
        return f"Error: there is no tool {call.name[:100]!r}; there are: {', '.join(tools)}", ["unknown"]
    try:
        content, happened = text_of(tools[call.name](call.arguments, call.texts), limits.characters), []
    except BaseException as error:  # SystemExit too: a tool ends no run
        content, happened = f"Error: {said_by(error)[: limits.characters] or type(error).__name__}", ["raised"]
    if len(content) > limits.characters:
        return f"{content[: limits.characters]} ... (the rest is left out)", [*happened, "shortened"]
    return content, happened


def text_of(result: Any, characters: int) -> str:
    """What a tool returned as text that a tokenizer takes; little more than `characters` of it."""
    if isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result):
        # Parts as chat APIs write them; a model of text is told of the others.
        parts = [part.get("text") if part["type"] == "text" else f"[{part['type']} left out]" for part in result]
        result = "".join(map(str, parts))
    elif isinstance(result, bytes | bytearray | memoryview):
        result = bytes(result[: characters + 1]).decode("utf-8", "replace")
    text = (result if isinstance(result, str) else str(result))[: characters + 1]
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
