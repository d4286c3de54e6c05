"""Rows of `prompt` and `privileged_context`, and the two prompts that the student and the teacher read.

A prompt is a string (one user message) or a list of chat messages. A row with an empty `privileged_context` and no
`teacher_prompt` is an anchor: the teacher reads the student's own prompt, so that every gap is drift from the initial
model. Rows that bring a `completion` are rollouts made elsewhere (rmsd.answers.completions). A `contrast_context`, or
beside a `teacher_prompt` a `contrast_prompt`, is what a contrast judge has the teacher told instead
(rmsd.answers.contrast).
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from .completions import check_completion, completion_ids

Prompt = str | list[dict[str, str]]

TEACHER_TEMPLATE = "{privileged_context}\n\n{prompt}"
PLACES = ("user", "system")  # the teacher's message that holds the privileged context


def load_rows(path: str | Path, completions: bool = False) -> list[dict]:
    """Reads training rows from a JSONL file; with `completions`, each must bring one.

    Raises:
        FileNotFoundError, ValueError: naming the file, the line and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line.decode("utf-8")))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
                check_row(rows[-1], f"{path}, line {number}")
                if completions and rows[-1].get("completion") is None:
                    raise ValueError(f"{path}, line {number}: has no 'completion'")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return checked_rows(rows)


def checked_rows(rows: Iterable[dict]) -> list[dict]:
    """The rows, each checked and each with every column that one has. No table: in one, messages that call other tools
    would be given each other's arguments.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    rows = list(rows)
    for number, row in enumerate(rows):
        check_row(row, f"row {number}")
        if type(row.get("completion")) is not type(rows[0].get("completion")):
            raise ValueError(f"row {number}: completions are all text, or all token ids, or no row has one")
    columns = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return [{name: row.get(name) for name in columns} for row in rows]


def checked_dataset(rows):
    """A list's `checked_rows`, or a datasets.Dataset or Dataset of torch, each of whose rows is looked at."""
    if isinstance(rows, list):
        return checked_rows(rows)
    for number, row in enumerate(rows):
        check_row(row, f"row {number}")
    return rows


def check_row(row: dict, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object with prompt and privileged_context, not {type(row).__name__}")
    for column in ("prompt", "privileged_context"):
        if column not in row:
            raise ValueError(f"{where}: has no {column!r} (it has: {', '.join(map(repr, row)) or 'nothing'})")
    if not isinstance(row["privileged_context"], str):
        kind = type(row["privileged_context"]).__name__
        raise ValueError(f"{where}: privileged_context must be a string, not {kind}")
    if not isinstance(row.get("contrast_context"), str | None):
        raise ValueError(f"{where}: contrast_context must be a string, not {type(row['contrast_context']).__name__}")
    for column in ("prompt", "teacher_prompt", "contrast_prompt"):
        prompt = row.get(column)
        if prompt is None and column != "prompt":
            continue
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{where}: {column} is empty")
        elif not (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
            raise ValueError(f"{where}: {column} must be a string or a list of messages with role and content")
        elif not all(map(_is_of_text, prompt)):
            raise ValueError(f"{where}: {column} holds a message whose content is not text")
    if row.get("completion") is not None:
        check_completion(row, where)


def _is_message(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _is_of_text(message: dict) -> bool:
    """A string, or parts that are all text, as chat APIs write them; beside calls of tools there may be none."""
    content = message["content"]
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        )
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _of_text(prompt: Prompt) -> Prompt:
    """With each message's parts of text as one text: a list in a template is its Python repr."""
    if isinstance(prompt, str):
        return prompt
    return [{**message, "content": _text(message["content"])} for message in prompt]


def _text(content: str | list[dict] | None) -> str | None:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def context_of(config, args) -> float:
    """Tokens that a model of this config can train on, infinity where it does not say. An engine that reads answers
    writes one more after each."""
    return (getattr(config, "max_position_embeddings", None) or math.inf) - args.engine_scores


@dataclass(frozen=True)
class Prompts:
    """How rows become the tokens of the student's prompt and of the teacher's."""

    tokenizer: Any
    template: str = TEACHER_TEMPLATE  # as `teacher_prompt` takes it
    place: str = "user"
    tools: Callable[[dict], list[dict]] | None = None  # the JSON schemas that a row's prompt shows
    contrasts: Any = None  # answers.contrast.Contrasts, where the teacher reads answers under those contexts too

    def told(self, row: dict) -> Prompt:
        """The teacher's prompt as text or messages."""
        return teacher_prompt(row, self.template, self.place)

    def contrast(self, row: dict) -> list[int] | None:
        """None for an anchor, whose teacher is told nothing, and where there are no contrast contexts."""
        if self.contrasts is None or not is_told(row):
            return None
        return self._encoded(row, self.contrasts.prompt(row, self.template, self.place))

    def student(self, row: dict) -> list[int]:
        return self._encoded(row, row["prompt"])

    def teacher(self, row: dict) -> list[int]:
        return self._encoded(row, self.told(row))

    def _encoded(self, row: dict, prompt: Prompt) -> list[int]:
        return encode(self.tokenizer, prompt, self.tools(row) if self.tools else None)


def check_lengths(rows: Iterable[dict], prompts: Prompts, longest: int, context: int, vocab: int) -> tuple[int, int]:
    """A row that cannot be trained on is refused before anything is trained.

    Args:
        longest: tokens of an answer, at most, where the row brings none.
        context: what the model holds at most.

    Returns:
        Tokens of a prompt and its answer together, at most: as the student reads them, and as the teacher does.

    Raises:
        ValueError: naming the row.
    """
    most = [0, 0]
    for number, row in enumerate(rows):
        answer = f"an answer of max_completion_length={longest}"
        room = longest
        if row.get("completion") is not None:
            ids = completion_ids(row, prompts.tokenizer)
            answer, room = "its completion", len(ids)
            if max(ids, default=0) >= vocab:
                raise ValueError(f"row {number}: completion holds token id {max(ids)}; the model has {vocab}")
            mask = row.get("completion_mask")
            if mask is not None and len(mask) != room:
                raise ValueError(f"row {number}: completion_mask has {len(mask)} entries, the completion {room} tokens")
        readers = [(0, "prompt", prompts.student), (1, "teacher's prompt", prompts.teacher)]
        if prompts.contrasts and is_told(row):
            readers.append((1, "teacher's prompt with the contrast context", prompts.contrast))
        for reader, role, ids_of in readers:
            try:
                length = len(ids_of(row)) + room
            except (ValueError, TemplateError) as error:  # a template may refuse a system message, for one
                raise ValueError(f"row {number}: {error}") from error
            if length > context:
                raise ValueError(
                    f"row {number}: the {role} and {answer} take {length} tokens; the model's context holds {context}"
                )
            most[reader] = max(most[reader], length)
    return most[0], most[1]


def is_told(row: dict) -> bool:
    """Whether the row's teacher is told something; the row is an anchor otherwise."""
    return bool(row["privileged_context"].strip() or row.get("teacher_prompt"))


def teacher_prompt(row: dict, template: str = TEACHER_TEMPLATE, place: str = "user") -> Prompt:
    """The prompt that also holds the privileged context: given whole by the row's own `teacher_prompt`, or put by
    `template` around the last user message or, with place="system", around the system message, which is made where
    there is none."""
    if row.get("teacher_prompt"):
        return _of_text(row["teacher_prompt"])
    prompt, context = _of_text(row["prompt"]), row["privileged_context"]
    if not context.strip():
        return prompt
    if place == "system":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        has_system = messages[0]["role"] == "system"
        own = messages[0]["content"] if has_system else ""
        told = template.format(privileged_context=context, prompt=own).strip()
        return [{"role": "system", "content": told}, *messages[has_system:]]
    if isinstance(prompt, str):
        return template.format(privileged_context=context, prompt=prompt)
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    told = template.format(privileged_context=context, prompt=prompt[last]["content"])
    return [*prompt[:last], {**prompt[last], "content": told}, *prompt[last + 1 :]]


def fix_template_variables(tokenizer, values: dict) -> None:
    """Sets variables of the tokenizer's chat template for good, wherever it is used: in training, in evaluation, and in
    the saved model.

    Raises:
        ValueError: there is no template to hold them.
    """
    if not values:
        return
    if not tokenizer.chat_template:
        raise ValueError("chat_template_kwargs: the tokenizer has no chat template")
    fixed = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    tokenizer.chat_template = fixed + tokenizer.chat_template


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, for a judge or a reader."""
    prompt = _of_text(prompt)
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content'] or ''}" for message in prompt)


def encode(tokenizer, prompt: Prompt, tools: list[dict] | None = None) -> list[int]:
    """Token ids of a prompt through the tokenizer's chat template, up to where the answer begins. Without a template
    a string is taken as it stands. `tools` are JSON schemas, which the template shows in its own way.

    Raises:
        ValueError: chat messages but no template, or a prompt of no tokens.
    """
    prompt = _of_text(prompt)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(
            messages,
            tools=tools or None,  # some templates introduce an empty list
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        raise ValueError("the tokenizer has no chat template: give prompts as strings, or set tokenizer.chat_template")
    if not ids:
        raise ValueError(f"the prompt {prompt_text(prompt)!r} has no tokens")
    return ids
