"""The prompt that is read is the one that was meant: nothing lost by a template, no variable misspelt, no tool lost."""

import copy
import json
import logging

import pytest
import tiny
from datasets import Dataset
from tiny import trainer

from rmsd.answers import prompts
from rmsd.answers.data import check_row
from rmsd.answers.prompts import Prompts, encode, fix_template_variables, teacher_prompt

OF_PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% endif %}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}" + tiny.CHAT
TOOL = {"type": "function", "function": {"name": "deploy", "description": "d", "parameters": {"type": "object"}}}


def tokenizer(template=tiny.CHAT):
    made = copy.deepcopy(tiny.tokenizer())
    made.chat_template = template
    return made


@pytest.mark.parametrize("prompt", ["Which tool?", [{"role": "user", "content": [{"type": "text", "text": "Acme?"}]}]])
def test_a_template_of_parts_reads_what_one_of_text_does(prompt):
    row = {"prompt": prompt, "privileged_context": "It is called zorblat."}
    parts, text = Prompts(tokenizer(OF_PARTS)), Prompts(tokenizer())
    assert (parts.student(row), parts.teacher(row)) == (text.student(row), text.teacher(row))


def test_a_template_that_raises_for_text_is_tried_with_parts():
    template = OF_PARTS.replace(
        "{% for p", "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}{% for p"
    )
    assert encode(tokenizer(template), "Hi") == encode(tokenizer(), "Hi")
    with pytest.raises(Exception, match="no system"):
        encode(tokenizer("{{ raise_exception('no system') }}"), "Hi")


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_template_that_leaves_a_message_out_is_refused_by_row(tmp_path, monkeypatch, role):
    template = "{% for m in messages %}{% if m.role != ROLE %}" + tiny.CHAT + "{% endif %}{% endfor %}x"
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", template.replace("ROLE", repr(role)))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which tool?"}]
    rows = [{"prompt": [message for message in messages if message["role"] == role], "privileged_context": "zorblat"}]
    with pytest.raises(ValueError, match=r"row 0: the chat template leaves out what a message says"):
        trainer(tmp_path, rows=rows)


def test_thinking_that_a_template_drops_from_earlier_turns_is_no_fault():
    template = tiny.CHAT.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | trim }}")
    turns = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "<think>Hm</think>Hello"}]
    text = tokenizer().decode(encode(tokenizer(template), [*turns, {"role": "user", "content": "And?"}]))
    assert text == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>And?<|end|><|assistant|>"


@pytest.mark.parametrize("row", [{"teacher_prompt": "Which tool?"}, {"teacher_prompt": " Which tool? "}])
def test_a_teacher_who_is_told_nothing_is_refused_by_row(tmp_path, monkeypatch, row):
    """Here by repeating the prompt; a template that trims makes the second the same."""
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", tiny.CHAT.replace("m['content']", "m['content'] | trim"))
    rows = [tiny.ROWS[0], {"prompt": "Which tool?", "privileged_context": "zorblat", **row}]
    with pytest.raises(ValueError, match="row 1: the teacher's prompt has the same tokens as the student's"):
        trainer(tmp_path, rows=rows)
    trainer(tmp_path, rows=[{**rows[1], "privileged_context": "", "teacher_prompt": None}])


def test_rows_tools_are_read_by_both_models(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", WITH_TOOLS)
    read = []
    monkeypatch.setattr("rmsd.answers.prompts.encode", lambda *a, **k: read.append(encode(*a, **k)) or read[-1])
    as_list, as_text = (
        {**row, "tools": tools} for row, tools in zip(tiny.ROWS, ([TOOL], json.dumps([TOOL])), strict=False)
    )
    trainer(tmp_path, rows=[as_list, {**as_text, "prompt": as_list["prompt"]}, tiny.ROWS[3]], max_steps=1).train()
    texts = [tiny.tokenizer().decode(ids) for ids in read]
    assert sum("deploy" in text for text in texts) * 3 == len(texts) * 2
    deploying = [text for text in texts if "deploy" in text]
    assert {"zorblat" in text for text in deploying} == {True, False}, "the student's and the teacher's"


def test_tools_that_the_template_or_the_row_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"leaves out the tools \('deploy'\)"):
        encode(tokenizer(), "Hi", tools=[TOOL])
    bare = tokenizer(None)
    with pytest.raises(ValueError, match="tools name 'deploy', and the run has no tools"):
        encode(tokenizer(WITH_TOOLS), "Hi", tools=["deploy"])
    with pytest.raises(ValueError, match="are for a chat template, and the tokenizer has none"):
        encode(bare, "Hi", tools=[TOOL])
    for tools in ("[", 7, [{"parameters": {}}], [7]):
        with pytest.raises(ValueError, match="row 3: tools must be a list of JSON schemas"):
            check_row({"prompt": "Hi", "privileged_context": "", "tools": tools}, "row 3")


def test_a_call_of_a_tool_may_have_no_text_and_is_not_told_the_context():
    """The teacher's message would read "None"."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    asked = {"role": "user", "content": "Which?"}
    system = {"role": "system", "content": "Be brief."}
    for messages, at in (([asked, call], 0), ([system, call], 0), ([call, asked, call], 1)):
        row = {"prompt": messages, "privileged_context": "It is x."}
        check_row(row, "row 3")
        told = prompts.teacher_prompt(row)
        assert told[at]["content"] == "It is x.\n\n" + messages[at]["content"]
        assert [message for i, message in enumerate(told) if i != at] == [m for m in messages if m is not messages[at]]
    with pytest.raises(ValueError, match="row 3: prompt holds calls of tools alone"):
        check_row({"prompt": [call], "privileged_context": ""}, "row 3")
    assert prompts.prompt_text([call]) == ""


def test_a_tables_nulls_in_tools_are_refused(tmp_path, monkeypatch):
    """In a column of one type each schema is given the others' keys."""
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", WITH_TOOLS)
    tools = [[{"name": name, "parameters": {key: {"type": "string"}}}] for name, key in (("a", "x"), ("b", "y"))]
    rows = [{**row, "tools": own} for row, own in zip(tiny.ROWS, tools, strict=False)]
    trainer(tmp_path, rows=rows)
    with pytest.raises(ValueError, match="row 0: tools hold null where a table's column has other rows' keys"):
        trainer(tmp_path, rows=Dataset.from_list(rows))
    trainer(tmp_path, rows=Dataset.from_list([{**row, "tools": json.dumps(row["tools"])} for row in rows]))


def test_variables_are_the_templates_own():
    template = tiny.CHAT + "{% if enable_thinking is defined and not enable_thinking %}<|system|>{% endif %}"
    with pytest.raises(ValueError, match="no variable 'enable_thinkng'; did you mean 'enable_thinking'"):
        fix_template_variables(tokenizer(template), {"enable_thinkng": False})
    with pytest.raises(ValueError, match="no variable 'messages'"):
        fix_template_variables(tokenizer(template), {"messages": False})
    with pytest.raises(ValueError, match="no variable 'enable_thinkng'"):
        encode(tokenizer(template), "Hi", variables={"enable_thinkng": False})
    fixed = tokenizer(template)
    fix_template_variables(fixed, {"enable_thinking": False})
    expected = encode(tokenizer(template), "Hi", variables={"enable_thinking": False})
    assert encode(fixed, "Hi") == expected != encode(tokenizer(template), "Hi")
    fix_template_variables(fixed, {"enable_thinking": True})  # of a run that goes on from a saved one
    assert encode(fixed, "Hi") == encode(tokenizer(template), "Hi")


@pytest.mark.parametrize("before", ["5%", 'say "-%}" at the end', "", 5, 0.5, True])
def test_a_variable_that_a_run_before_has_set_is_set_anew_whatever_it_held(before):
    fixed = tokenizer("{{ style }}" + tiny.CHAT)
    fix_template_variables(fixed, {"style": before})
    fix_template_variables(fixed, {"style": "6%"})
    assert fixed.decode(encode(fixed, "Hi")).startswith("6%")


def test_named_templates_hold_variables_too():
    template = "{% if short %}<|system|>{% endif %}"
    named = tokenizer({"default": template + tiny.CHAT, "tool_use": template + WITH_TOOLS})
    fix_template_variables(named, {"short": True})
    for tools in (None, [TOOL]):
        text = named.decode(encode(named, "Hi", tools=tools))
        assert text.startswith("<|system|>") and ("deploy" in text) == bool(tools)


def test_transformers_own_tags_are_read():
    template = tiny.CHAT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{{ x }}{% endgeneration %}")
    template = template.replace("{% endfor %}", "{% if loop.last %}{% break %}{% endif %}{% endfor %}")
    fix_template_variables(tokenizer(template), {"x": 1})


def test_a_prompt_that_the_tokenizer_ends_is_refused():
    class Ending(type(tiny.tokenizer())):
        def __call__(self, text, **kwargs):
            made = super().__call__(text, **kwargs)
            return {"input_ids": [*made["input_ids"], self.eos_token_id]}

    ending = tokenizer(None)
    ending.__class__ = Ending
    with pytest.raises(ValueError, match="add_eos_token=False"):
        encode(ending, "Hi")


def test_a_template_that_opens_no_turn_is_said_once(caplog):
    prompts._warn_once.cache_clear()
    silent = tokenizer(tiny.CHAT.partition("{% if")[0])
    with caplog.at_level(logging.WARNING, "rmsd"):
        for _ in range(2):
            encode(silent, "Hi")
            encode(tokenizer(), "Hi")
    assert len(caplog.records) == 1 and "opens no turn" not in caplog.text and "'<|end|>'" in caplog.text


def test_half_a_character_is_refused_by_row():
    for column, value in (
        ("prompt", "hi \ud83d"),
        ("prompt", [{"role": "user", "content": "\udc00"}]),
        ("privileged_context", "\ud83d"),
        ("completion", "\ud83d"),
    ):
        with pytest.raises(ValueError, match=f"row 2: {column} holds .*half of a character"):
            check_row({"prompt": "hi", "privileged_context": "", column: value}, "row 2")
    check_row({"prompt": "hi \U0001f600", "privileged_context": ""}, "row 2")


def test_a_tokenizer_that_loses_text_is_found():
    kept = encode(tokenizer(), "Which tool?")
    assert prompts.keeps_text(tokenizer(), "Which tool?", kept) is None
    assert prompts.keeps_text(tokenizer(), "Which tool?", kept[:3]) == "Which tool?"
    assert teacher_prompt({"prompt": "Q", "privileged_context": "C"}) == "C\n\nQ"
