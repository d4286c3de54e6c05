"""The two prompts of a row, as the student and the teacher read them: through the chat template, with no text lost.

A prompt is a string (one user message) or a list of chat messages.
"""

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols

from .turns import cut_at, markers_of

Prompt = str | list[dict[str, str]]

# Of an episode's row: the texts in it that its environment made. Nothing in them becomes a token of the template's own.
SAID = "said_by_environment"
TEACHER_TEMPLATE = "{privileged_context}\n\n{prompt}"
PLACES = ("user", "system")  # the teacher's message that holds the privileged context
# What a template may write otherwise than it stands, for good reasons, is not looked for: thinking dropped from the
# model's earlier turns, a tool's JSON in another form.
_READ_AS_WRITTEN = ("user", "system", "developer")
_OWN = {"messages", "tools", "documents", "add_generation_prompt"}  # what a template is called with anyway

log = logging.getLogger("rmsd")


@dataclass(frozen=True)
class Prompts:
    """How rows become the tokens of the student's prompt and of the teacher's."""

    tokenizer: Any
    template: str = TEACHER_TEMPLATE  # as `teacher_prompt` takes it
    place: str = "user"
    tools: Callable[[dict], list[dict]] | None = None  # schemas that a row's prompt shows, in place of its own
    contrasts: Any = None  # answers.contrast.Contrasts, where the teacher reads answers under those contexts too

    def told(self, row: dict) -> Prompt:
        """The teacher's prompt as text or messages."""
        return teacher_prompt(row, self.template, self.place)

    def contrast(self, row: dict) -> list[int] | None:
        """None for an anchor, whose teacher is told nothing, and where there are no contrast contexts."""
        if self.contrasts is None or not is_told(row):
            return None
        said = row.get(SAID)
        if said and not (row.get("contrast_context") or row.get("contrast_prompt")):  # made of what was said
            row = {**row, SAID: [*said, self.contrasts.context(row)]}
        return self._encoded(row, self.contrasts.prompt(row, self.template, self.place))

    def student(self, row: dict) -> list[int]:
        return self._encoded(row, row["prompt"])

    def teacher(self, row: dict) -> list[int]:
        return self._encoded(row, self.told(row))

    def _encoded(self, row: dict, prompt: Prompt) -> list[int]:
        shown = self.tools(row) if self.tools else tools_of(row)
        return encode(self.tokenizer, prompt, shown, row.get("chat_template_kwargs"), row.get(SAID) or ())


def is_told(row: dict) -> bool:
    """Whether the row's teacher is told something; the row is an anchor otherwise."""
    return bool(row["privileged_context"].strip() or row.get("teacher_prompt"))


def teacher_prompt(row: dict, template: str = TEACHER_TEMPLATE, place: str = "user") -> Prompt:
    """The prompt that also holds the privileged context: given whole by the row's own `teacher_prompt`, or put by
    `template` around the last user message (the last with a text, where there is none) or, with place="system", around
    the system message, which is made where there is none."""
    if row.get("teacher_prompt"):
        return of_text(row["teacher_prompt"])
    prompt, context = of_text(row["prompt"]), row["privileged_context"]
    if not context.strip():
        return prompt
    if place == "system":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        has_system = messages[0]["role"] == "system"
        own = (messages[0]["content"] or "") if has_system else ""
        told = template.format(privileged_context=context, prompt=own).strip()
        return [{"role": "system", "content": told}, *messages[has_system:]]
    if isinstance(prompt, str):
        return template.format(privileged_context=context, prompt=prompt)
    texts = [i for i, message in enumerate(prompt) if message["content"] is not None]  # a call of tools may have none
    last = max((i for i in texts if prompt[i]["role"] == "user"), default=texts[-1])
    told = template.format(privileged_context=context, prompt=prompt[last]["content"])
    return [*prompt[:last], {**prompt[last], "content": told}, *prompt[last + 1 :]]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for a judge or a reader."""
    prompt = of_text(prompt)
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"] or ""
    return "\n".join(f"{message['role']}: {message['content'] or ''}" for message in prompt)


def of_text(prompt: Prompt) -> Prompt:
    """With each message's parts of text as one text: a list in a template is its Python repr."""
    if isinstance(prompt, str):
        return prompt
    return [{**message, "content": _text(message["content"])} for message in prompt]


def _text(content: str | list[dict] | None) -> str | None:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def tools_of(row: dict) -> list[dict] | None:
    """The JSON schemas of a row's `tools`: a list, or JSON text of one, as a table with one type a column needs it."""
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def encode(
    tokenizer,
    prompt: Prompt,
    tools: list[dict] | None = None,
    variables: dict | None = None,
    said: Sequence[str] = (),
) -> list[int]:
    """Token ids of a prompt through the tokenizer's chat template, up to where the answer begins. Without a template
    a string is taken as it stands.

    Args:
        tools: JSON schemas of what the model may call, for the template.
        variables: of the template.
        said: texts in the prompt that an environment made: what looks like a marker there is plain text.

    Raises:
        ValueError: chat messages, tools or variables but no template that takes them; a template that leaves out what
            the prompt says; a prompt of no tokens, or one that a tokenizer ends.
    """
    prompt = of_text(prompt)
    if unknown := next((tool for tool in tools or () if isinstance(tool, str)), None):
        raise ValueError(f"a row's tools name {unknown!r}, and the run has no tools: give it, or give its JSON schema")
    if tokenizer.chat_template:
        check_variables(tokenizer, variables or {})
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages, cut = _cut(tokenizer, messages, said) if said else (messages, None)
        text = _rendered(tokenizer, messages, tools, variables or {})
        pieces = text.split(cut) if cut else [text]
        ids = [id for piece in pieces for id in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        if _ends(tokenizer, ids):
            _warn_once(
                f"prompts end with {tokenizer.eos_token!r}, the end-of-sequence token: the chat template seems "
                "to open no turn of the model's (add_generation_prompt)"
            )
    elif tools or variables:
        raise ValueError("tools and chat_template_kwargs are for a chat template, and the tokenizer has none")
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if _ends(tokenizer, ids):
            raise ValueError(
                f"the tokenizer ends the prompt with {tokenizer.eos_token!r}, after which nothing is to be answered: "
                "set tokenizer.add_eos_token=False"
            )
    else:
        raise ValueError("the tokenizer has no chat template: give prompts as strings, or set tokenizer.chat_template")
    if not ids:
        raise ValueError(f"the prompt {prompt_text(prompt)!r} has no tokens")
    return ids


def _cut(tokenizer, messages: list[dict], said: Sequence[str]) -> tuple[list[dict], str]:
    """The messages with a mark in each marker of what was `said`, where the text is to be encoded apart; and the mark,
    a character of private use that they do not hold."""
    everything = "".join(message["content"] or "" for message in messages)
    cut = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in everything)
    markers = markers_of(tokenizer)
    texts = {text: cut_at(markers, text, cut) for text in sorted(map(str.strip, said), key=len, reverse=True)}
    made = []
    for message in messages:
        content = message["content"]
        for text, safe in texts.items():  # the longest first: one may hold another
            content = content.replace(text, safe) if content and safe != text else content
        made.append({**message, "content": content})
    return made, cut


def _rendered(tokenizer, messages: list[dict], tools: list[dict] | None, variables: dict) -> str:
    """What the template makes of the messages: their contents as text or, where it loses that, as lists of parts."""

    def render(messages: list[dict]) -> tuple[str, str | None]:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, tokenize=False, **variables
        )
        return text, _lost(messages, text)

    try:
        text, lost = render(messages)
        if lost is None:
            return _with_tools(text, tools)
        refusal = ValueError(f"the chat template leaves out what a message says ({_short(lost)!r})")
    except (TemplateError, TypeError) as error:
        refusal = error
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]
    try:
        text, lost = render(parts)
    except (TemplateError, TypeError):
        raise refusal from None
    if lost is not None:
        raise refusal
    return _with_tools(text, tools)


def _lost(messages: list[dict], rendered: str) -> str | None:
    """The first message's text that is not in what the template wrote; spaces apart, which many templates trim."""
    rendered = _squeezed(rendered)
    texts = (_text(message["content"]) for message in messages if message["role"] in _READ_AS_WRITTEN)
    return next((text for text in texts if text and _squeezed(text) not in rendered), None)


def _with_tools(text: str, tools: list[dict] | None) -> str:
    for tool in tools or []:
        name = (tool.get("function") or tool).get("name", "")
        if name not in text:
            raise ValueError(f"the chat template leaves out the tools ({name!r}): use a template that takes tools")
    return text


def keeps_text(tokenizer, prompt: Prompt, ids: list[int]) -> str | None:
    """The first of a prompt's texts that its ids do not hold, as far as the tokenizer can write it at all; or None."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else of_text(prompt)
    read = _squeezed(tokenizer.decode(ids))
    for message in messages:
        text = message["content"]
        if not text or message["role"] not in _READ_AS_WRITTEN or _squeezed(text) in read:
            continue
        if _squeezed(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])) not in read:
            return text
    return None


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _ends(tokenizer, ids: list[int]) -> bool:
    """Whether the last token that is no space ends a sequence."""
    end = tokenizer.eos_token_id
    if end is None:
        return False
    at = len(ids) - 1
    while at > 0 and ids[at] != end and not tokenizer.decode(ids[at : at + 1]).strip():
        at -= 1
    return at > 0 and ids[at] == end


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


# ---- variables of a template ---------------------------------------------------------------------------------------


def fix_template_variables(tokenizer, values: dict) -> None:
    """Sets variables of the tokenizer's chat template for good, wherever it is used: in training, in evaluation, and in
    the saved model. Of several named templates (default, tool_use) each.

    Raises:
        ValueError: there is no template to hold them, or it has no such variable.
    """
    if not values:
        return
    if not tokenizer.chat_template:
        raise ValueError("chat_template_kwargs: the tokenizer has no chat template")
    check_variables(tokenizer, values)
    fixed = "".join(f"{{%- set {name} = {_literal(value)} -%}}" for name, value in values.items())
    written = r'(?:"(?:[^"\\]|\\.)*"|[^%"]*)'  # as `_literal` writes one; a text may hold a % or what ends a tag
    before = re.compile("|".join(rf"\{{%- set {name} = {written} -%\}}" for name in values))  # of a run before this one

    def with_values(template: str) -> str:
        while found := before.match(template):
            template = template[found.end() :]
        return fixed + template

    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: with_values(template) for name, template in templates.items()}
    else:
        tokenizer.chat_template = with_values(templates)


def check_variables(tokenizer, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: the chat template has no variable of that name; with the nearest that it has.
    """
    for name in names:
        known = set().union(*map(_variables, _templates(tokenizer)))
        if name not in known or name in _OWN:
            near = difflib.get_close_matches(name, known - _OWN, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (it has: {', '.join(sorted(known - _OWN)) or 'none'})"
            raise ValueError(f"chat_template_kwargs: the chat template has no variable {name!r}{hint}")


def _literal(value) -> str:
    return json.dumps(value)


def _templates(tokenizer) -> list[str]:
    templates = tokenizer.chat_template
    return list(templates.values()) if isinstance(templates, dict) else [templates]


class _Generation(Extension):
    """transformers' own tag around what the model writes, for the parser alone."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _variables(template: str) -> frozenset[str]:
    """Names that a template reads from outside, or sets first of all, as `fix_template_variables` does."""
    parsed = Environment(extensions=[loopcontrols, _Generation]).parse(template)
    own = {node.target.name for node in parsed.body if isinstance(node, nodes.Assign) and hasattr(node.target, "name")}
    return frozenset(meta.find_undeclared_variables(parsed) | own)
