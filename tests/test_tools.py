"""Calls as models write them, and tools that raise, hang or return too much."""

import json
import threading
import time

import pytest

from rmsd.answers.calls import Call, calls_of
from rmsd.answers.environments import run_each
from rmsd.answers.tools import ToolLimits, methods_of, run_turns, toolbox

ADD = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
CALL = Call("add", {"a": 1, "b": 2})


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{ADD}\n</tool_call>",
        f"I will add.\n<tool_call>{ADD}</tool_call>",
        f"<tool_call>\n```json\n{ADD}\n```\n</tool_call>",
        f"<tool_call>\n{ADD}",  # never closed
        f"```json\n{ADD}\n```",
        f"```\n{ADD}\n```<|im_end|>",
        f"Sure: {ADD}",
        f"[TOOL_CALLS] [{ADD}]",
        f"[TOOL_CALLS] json {ADD}",
        '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}',
        '[TOOL_CALLS]add{"a": 1, "b": 2}</s>',
        '[TOOL_CALLS] add[CALL_ID]a1B2c3D4e[ARGS] {"a": 1, "b": 2}',
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}',
        '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}}',
        '{"arguments": {"a": 1, "b": 2}, "name": "add"}',
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>",
    ],
)
def test_a_call_is_found_in_each_of_the_forms_that_models_write(text):
    assert calls_of(text, {"add"}) == [CALL]


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 3.",
        "",
        '```json\n{"total": 3}\n```',
        "a = {1: 2}",
        '{"name": "Ann", "age": 3}',
        '```python\npeople.append({"name": name, "age": age})\n```',
        '{"name": "my-app", ...}',
        "<tools>",
    ],
)
def test_what_is_no_call_is_none(text):
    assert calls_of(text, {"add"}) == []


def test_several_calls_in_a_turn_keep_their_order():
    other = '{"name": "ping"}'
    assert calls_of(f"<tool_call>{ADD}</tool_call>\n<tool_call>{other}</tool_call>", {"add", "ping"}) == [
        CALL,
        Call("ping", {}),
    ]
    assert calls_of(f"[{ADD}, {ADD}]", {"add"}) == [CALL, CALL]
    assert calls_of(f"```json\n{ADD}\n```\nand\n```json\n{other}\n```", {"ping"}) == [CALL, Call("ping", {})]
    text = '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]ping{}[TOOL_CALLS]put{"name": "x", "arguments": {}}'
    put = Call("put", {"name": "x", "arguments": {}})
    assert calls_of(text, {"add", "ping", "put"}) == [CALL, Call("ping", {}), put]


def test_a_call_behind_code_that_is_none_is_found_and_one_form_inside_the_other_is_text():
    assert calls_of(f'a = {{"name": name}}\n{ADD}', {"add"}) == [CALL]
    held = Call("write", {"text": "<function=add><parameter=a>1</parameter></function>"})
    assert calls_of(f"<tool_call>{json.dumps(vars(held))}</tool_call>", {"add"}) == [held]
    assert calls_of(f"<function=write><parameter=text>{ADD}</parameter></function>{ADD}", {"add"})[1:] == [CALL]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>\nadd(1, 2)\n</tool_call>", "not JSON"),
        ('<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1,', "cut off"),
        ('```json\n{"name": "add", "argum', "cut off"),
        ("<tool_call>", "cut off"),
        ("<function=add><parameter=a>1", "cut off"),
        ("<function=add><parameter=a>1</parameter><parameter=b>2</function>", "not '<parameter=b>2'"),
        ('<function=add>{"a": 1, "b": 2}</function>', "not '{"),
        ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "must be an object"),
        ("<tool_call>[1]</tool_call>", "a call is an object"),
        ("<tool_call>[]</tool_call>", "a call is an object"),
        ("[TOOL_CALLS]add[ARGS][1, 2]", "must be an object"),
        ('[TOOL_CALLS]add[ARGS]{"a": 1,', "cut off"),
        ("[TOOL_CALLS]add[ARGS]", "cut off"),
        ("[TOOL_CALLS]add{a: 1}", "not JSON"),
        ('```json\n{"name": "add", oops}\n```', "not JSON"),
        ('{"name": "ad", "arguments": {a: 1}}', "not JSON"),
        pytest.param("<tool_call>" + "[" * 9_000, "not JSON", id="deep"),
        pytest.param('{"name": "add", "arguments": ' + "[" * 9_000, "not JSON", id="deep arguments"),
        pytest.param('{"name": "add", "arguments": "' + "[" * 9_000 + '"}', "must be an object", id="deep text"),
    ],
)
def test_what_was_meant_as_a_call_and_cannot_be_read_says_why(text, said):
    (call,) = calls_of(text, {"add"})
    assert said in call.problem


def test_a_call_after_an_unreadable_one_is_still_found():
    made = calls_of(f"<tool_call>{{oops}}</tool_call><tool_call>{ADD}</tool_call>", {"add"})
    assert "not JSON" in made[0].problem and made[1:] == [CALL]


# ---- making them ----------------------------------------------------------------------------------------------------


def made(function, arguments=None, limits=None, name=None):
    """(message, counts) of one call."""
    call = Call(name or function.__name__, arguments or {})
    (result,) = run_turns([(toolbox([function]), [call])], limits or ToolLimits())
    return result.messages[0]["content"], dict(result.counts)


def test_a_schema_comes_from_hints_and_docstring_and_a_function_without_is_refused_by_name():
    schema = toolbox([add])["add"].schema["function"]
    assert schema["name"] == "add" and schema["parameters"]["properties"]["a"]["type"] == "integer"
    with pytest.raises(ValueError, match="tool 'bare'"):
        toolbox([(lambda: None, bare)[1]])
    with pytest.raises(ValueError, match="'add' is there twice"):
        toolbox([add, add])


def bare(x):
    return x


def test_arguments_are_checked_before_a_tool_sees_them():
    assert made(add, {"a": 1, "b": 2}) == ("3", {"calls": 1})
    for arguments, said in [
        ({"a": "1", "b": 2}, "argument 'a': input should be a valid integer, not '1'"),
        ({"a": 1}, "argument 'b' is missing"),
        ({"a": 1, "b": 2, "c": 3}, "there is no argument 'c'"),
    ]:
        message, counts = made(add, arguments)
        assert message == f"Error: add: {said}" and counts == {"calls": 1, "raised": 1}


def put(place: tuple[int, int], labels: dict[int, str], note: str | None = None) -> str:
    """Puts labels.

    Args:
        place: Where.
        labels: By number.
        note: What for.
    """
    return repr((place, labels, note))


def test_arguments_are_taken_as_a_model_can_write_them():
    """JSON has no tuples, and its keys are strings; Qwen3-Coder's form has no quotes."""
    assert made(put, {"place": [1, 2], "labels": {"3": "x"}})[0] == "((1, 2), {3: 'x'}, None)"
    assert "argument 'place.1'" in made(put, {"place": [1, "2"], "labels": {}})[0]
    assert made(put, {"place": [1, 2], "labels": {}, "note": "\ud83d"})[0] == "((1, 2), {}, '?')"
    form = "<parameter=place>[1, 2]</parameter><parameter=labels>{}</parameter>"
    for note, taken in [("123", "'123'"), ('{"a": 1}', "'{\"a\": 1}'"), ('"quoted"', "'quoted'"), ("null", "None")]:
        (call,) = calls_of(f"<function=put>{form}<parameter=note>\n{note}\n</parameter></function>")
        (result,) = run_turns([(toolbox([put]), [call])], ToolLimits())
        assert result.messages[0]["content"] == f"((1, 2), {{}}, {taken})"


def test_an_unknown_tool_is_answered_with_those_there_are():
    message, counts = made(add, name="subtract")
    assert message == "Error: there is no tool 'subtract'; there are: add" and counts["unknown"] == 1


@pytest.mark.parametrize("error", [RuntimeError("no such order"), SystemExit(3), KeyboardInterrupt(), RuntimeError()])
def test_a_tool_that_raises_ends_in_a_message(error):
    def fail() -> str:
        """Fails."""
        raise error

    message, counts = made(fail)
    assert message == f"Error: {str(error) or type(error).__name__}" and counts == {"calls": 1, "raised": 1}


class Mute(Exception):
    def __str__(self):
        raise SystemExit("no words")


def test_an_error_that_cannot_be_read_is_no_call_that_hangs():
    def fail() -> str:
        """Fails."""
        raise Mute

    assert made(fail, limits=ToolLimits(seconds=0.5)) == ("Error: Mute", {"calls": 1, "raised": 1})
    (outcome,) = run_each([fail], 0.5)
    assert isinstance(outcome, RuntimeError) and str(outcome) == "Mute"


def test_tools_that_hang_are_left_behind_together_and_the_others_answers_stay():
    forever = threading.Event()

    def hang() -> str:
        """Hangs."""
        forever.wait()

    box = toolbox([hang, add])
    started = time.monotonic()
    turns = [(box, [CALL, Call("hang", {}), CALL])] * 4 + [(box, [CALL])]
    *hung, fine = run_turns(turns, ToolLimits(seconds=1.0))
    assert time.monotonic() - started < 3.5, "four that hang take one time limit, not four"
    forever.set()
    for result in hung:
        assert [m["content"] for m in result.messages] == [
            "3",
            "Error: hang did not return within 1 seconds",
            "Error: add was not called: the call before it did not return",
        ]
        assert result.hung and result.counts == {"calls": 3, "hung": 1}
    assert fine.messages[0]["content"] == "3" and not fine.hung


def test_what_was_not_called_behind_one_that_hung_is_not_called_later_either():
    forever, called = threading.Event(), threading.Event()

    def hang() -> str:
        """Hangs."""
        forever.wait()

    def note() -> str:
        """Notes."""
        called.set()

    (result,) = run_turns([(toolbox([hang, note]), [Call("hang", {}), Call("note", {})])], ToolLimits(seconds=0.1))
    assert result.messages[1]["content"].startswith("Error: note was not called")
    forever.set()
    assert not called.wait(0.3)


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ("x" * 1_000_000, "x" * 50 + " ... (the rest is left out)"),
        (b"\xff" * 1_000_000, "\ufffd" * 50 + " ... (the rest is left out)"),
        (None, "None"),
        ({"a": 1}, "{'a': 1}"),
        ([{"type": "text", "text": "a"}, {"type": "image", "image": 1}], "a[image left out]"),
        (object, "<class 'object'>"),
        ("żółw 🐢", "żółw 🐢"),
        ("\ud83d alone", "? alone"),
    ],
)
def test_any_output_becomes_text_of_bounded_length(result, content):
    def give():
        """Gives."""
        return result

    assert made(give, limits=ToolLimits(characters=50))[0] == content


def test_half_a_character_in_a_name_or_an_error_is_no_text():
    def find(item: str) -> str:
        """Finds.

        Args:
            item: What.
        """
        raise LookupError("no item \ud83d")

    calls = [Call("find", {"item": "x"}), Call("fi\ud83d", {})]
    (result,) = run_turns([(toolbox([find]), calls)], ToolLimits())
    assert [message["name"] for message in result.messages] == ["find", "fi?"]
    assert result.messages[0]["content"] == "Error: no item ?"


def test_an_environments_public_methods_are_tools_and_trls_own_are_not():
    class Shop:
        def __init__(self):
            self.stock = 3

        def reset(self, **row):
            return None

        def get_reward(self) -> float:
            return 1.0

        def feedback(self) -> str:
            return "none"

        def _private(self):
            return None

        @property
        def broken(self):
            raise AssertionError("a property is not looked at")

        async def take(self, count: int = 1) -> str:
            """Takes from the stock.

            Args:
                count: How many.
            """
            self.stock -= count
            return f"{self.stock} left"

    shop = Shop()
    assert [method.__name__ for method in methods_of(shop)] == ["take"]
    results = run_turns([(toolbox([add], shop), [Call("take", {"count": 2}), Call("take", {})])], ToolLimits())
    assert [message["content"] for message in results[0].messages] == ["1 left", "0 left"] and shop.stock == 0
