"""Calls of tools in what a model wrote: the formats that chat templates teach, and what small models make of them."""

import contextlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

_DECODER = json.JSONDecoder()
# Where a call says that it begins: Hermes' and Qwen's tag, Mistral's, Llama's. What follows is meant as a call, however
# ill-formed.
_OPENS = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>")
_CLOSES = "</tool_call>"
# Mistral's newer form: behind the tag a name, with some an id, and the arguments alone.
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:(\[ARGS\])\s*|(?=\{))")
# Qwen3-Coder's form: <function=name> <parameter=key> value </parameter> </function>.
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# An object that begins as a call does, wherever it stands: in a code fence, or bare.
_BEGINS_AS_CALL = re.compile(r'\{\s*"(?:name|arguments|parameters|function|type)"\s*:')
_JSON = re.compile(r"[\[{]")
_ARGUMENTS = ("arguments", "parameters")
_NAMED = re.compile(r'"name"\s*:\s*"([^"]*)"')
_NOT_JSON = (ValueError, RecursionError)  # the latter: "[[[[..." without end


@dataclass(frozen=True)
class Call:
    """One call. With `problem` it cannot be made, and the text says why."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None
    # Arguments as they stand, where the form has no quotes: 123 may be meant for text.
    texts: dict[str, str] = field(default_factory=dict, compare=False)


def calls_of(text: str, names: frozenset[str] | set[str] = frozenset()) -> list[Call]:
    """The calls in a turn's text, in order; what was meant as one and cannot be read is a Call with a `problem`.

    Args:
        names: the tools there are. An object of a name alone is a call only of one of these, which takes no arguments
            then; prose about other named things is no call.
    """
    calls, position = [], 0
    while True:
        function = _FUNCTION.search(text, position)
        found = _next_object(text, position, function.start() if function else len(text))
        # One inside an object is text that the call holds.
        if function and not (found and found[0] < function.start() and _JSON.match(text, found[0])):
            calls.append(_xml_call(*function.groups()))
            position = function.end()
            continue
        if found is None:
            return calls
        start, marked, named = found
        try:
            value, position = _DECODER.raw_decode(text, start)
            if named and (named[2] or named[1] in names or not _is_whole(value)):
                value = {"name": named[1], "arguments": value}
            made = [_call(item, names, marked) for item in (value if isinstance(value, list) and value else [value])]
            calls += [call for call in made if call is not None]
        except _NOT_JSON as error:
            if marked or _is_meant(text, start, names):
                calls.append(_unreadable(text, start, error))
                position = _after(text, start)
            else:
                position = start + 1


def _next_object(text: str, position: int, before: int) -> tuple[int, bool, re.Match | None] | None:
    """Where the next JSON of a call begins, whether a tag before it says that it is one, and what names it there, as
    Mistral's does. Object or tag begin before `before`."""
    bare = _BEGINS_AS_CALL.search(text, position, before)
    opened = _OPENS.search(text, position, bare.start() if bare else before)
    if opened is None:
        return (bare.start(), False, None) if bare else None
    if named := _MISTRAL.match(text, opened.start()):
        return named.end(), True, named
    start, end = opened.end(), _next_tag(text, opened.end())
    object_at = _JSON.search(text, start, end)  # a fence or a word may stand between the tag and its object
    return (object_at.start() if object_at else start), True, None


def _next_tag(text: str, position: int) -> int:
    """Where the next tag stands that opens or closes a call; the text's end, if none does."""
    places = [text.find(_CLOSES, position)] + [match.start() for match in [_OPENS.search(text, position)] if match]
    return min((place for place in places if place != -1), default=len(text))


def _is_whole(value: Any) -> bool:
    """Whether an object names its tool itself: the word before it is then none."""
    return isinstance(value, dict) and "name" in value and any(key in value for key in _ARGUMENTS)


def _is_meant(text: str, start: int, names) -> bool:
    """Whether an object that cannot be read, and that no tag marks, is a call: code holds {"name": name} as well."""
    other = _BEGINS_AS_CALL.search(text, start + 1)
    part = text[start : other.start() if other else len(text)]
    part = part[: _after(part, 0)]
    named = _NAMED.search(part)
    return any(f'"{key}"' in part for key in _ARGUMENTS) or (named is not None and named[1] in names)


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
        with contextlib.suppress(*_NOT_JSON):
            arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return Call(name, {}, f"{key} must be an object, not {json.dumps(arguments)[:80]}")
    return Call(name, arguments)


def _unreadable(text: str, start: int, error: Exception) -> Call:
    place = getattr(error, "pos", start)
    if not text[place:].strip() or "Unterminated" in str(error):
        return Call("", {}, "the call is cut off before its end")
    return Call("", {}, f"the call is not JSON: {getattr(error, 'msg', error)} at {text[place : place + 20]!r}")


def _xml_call(name: str, body: str, end: str) -> Call:
    if not end:
        return Call(name.strip(), {}, "the call is cut off before its end")
    if unread := _PARAMETER.sub("", body).strip():
        return Call(name.strip(), {}, f"arguments are <parameter=name>value</parameter>, not {unread[:40]!r}")
    texts = {key.strip(): value for key, value in _PARAMETER.findall(body)}
    arguments: dict[str, Any] = dict(texts)
    for key, value in texts.items():
        with contextlib.suppress(*_NOT_JSON):
            arguments[key] = json.loads(value)
    return Call(name.strip(), arguments, texts=texts)
