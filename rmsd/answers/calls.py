"""Calls of tools in what a model wrote: the formats that chat templates teach, and what small models make of them."""

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

_DECODER = json.JSONDecoder()
# Where a call says that it begins: Hermes' and Qwen's tag, Mistral's, Llama's. What follows is meant as a call, however
# ill-formed.
_OPENS = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>")
_CLOSES = "</tool_call>"
# Qwen3-Coder's form: <function=name> <parameter=key> value </parameter> </function>.
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# An object that begins as a call does, wherever it stands: in a code fence, or bare.
_BEGINS_AS_CALL = re.compile(r'\{\s*"(?:name|arguments|parameters|function|type)"\s*:')
_JSON = re.compile(r"[\[{]")
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Call:
    """One call. With `problem` it cannot be made, and the text says why."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None


def calls_of(text: str, names: frozenset[str] | set[str] = frozenset()) -> list[Call]:
    """The calls in a turn's text, in order; what was meant as one and cannot be read is a Call with a `problem`.

    Args:
        names: the tools there are. An object of a name alone is a call only of one of these, which takes no arguments
            then; prose about other named things is no call.
    """
    if _FUNCTION.search(text):
        return [_xml_call(*match.groups()) for match in _FUNCTION.finditer(text)]
    calls, position = [], 0
    while (found := _next_object(text, position)) is not None:
        start, marked = found
        try:
            value, position = _DECODER.raw_decode(text, start)
        except ValueError as error:
            calls.append(_unreadable(text, start, error))
            position = _after(text, start)
            continue
        made = [_call(item, names, marked) for item in (value if isinstance(value, list) else [value])]
        calls += [call for call in made if call is not None]
    return calls


def _next_object(text: str, position: int) -> tuple[int, bool] | None:
    """Where the next JSON of a call begins, and whether a tag before it says that it is one."""
    opened, bare = _OPENS.search(text, position), _BEGINS_AS_CALL.search(text, position)
    if opened is None or (bare is not None and bare.start() < opened.start()):
        return (bare.start(), False) if bare else None
    start, end = opened.end(), _next_tag(text, opened.end())
    object_at = _JSON.search(text, start, end)  # a fence or a word may stand between the tag and its object
    return (object_at.start() if object_at else start), True


def _next_tag(text: str, position: int) -> int:
    """Where the next tag stands that opens or closes a call; the text's end, if none does."""
    places = [text.find(_CLOSES, position)] + [match.start() for match in [_OPENS.search(text, position)] if match]
    return min((place for place in places if place != -1), default=len(text))


def _after(text: str, start: int) -> int:
    """The first place after an object that cannot be read where another call may begin."""
    fence = text.find("```", start)
    return max(min(_next_tag(text, start), fence if fence != -1 else len(text)), start + 1)


def _call(value: Any, names, marked: bool) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]  # as chat APIs write it
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", {}, 'a call is an object with "name" and "arguments"') if marked else None
    name = value["name"]
    key = next((key for key in _ARGUMENTS if key in value), None)
    if key is None:
        return Call(name, {}) if marked or name in names else None
    arguments = value[key]
    if isinstance(arguments, str):  # as chat APIs write them
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return Call(name, {}, f"{key} must be an object, not {json.dumps(arguments)[:80]}")
    return Call(name, arguments)


def _unreadable(text: str, start: int, error: ValueError) -> Call:
    place = getattr(error, "pos", start)
    if not text[place:].strip() or "Unterminated" in str(error):
        return Call("", {}, "the call is cut off before its end")
    return Call("", {}, f"the call is not JSON: {getattr(error, 'msg', error)} at {text[place : place + 20]!r}")


def _xml_call(name: str, body: str, end: str) -> Call:
    if not end:
        return Call(name.strip(), {}, "the call is cut off before its end")
    arguments = {}
    for key, value in _PARAMETER.findall(body):
        try:
            arguments[key.strip()] = json.loads(value)
        except ValueError:
            arguments[key.strip()] = value
    return Call(name.strip(), arguments)
