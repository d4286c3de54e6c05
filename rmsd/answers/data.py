"""Rows of `prompt` and `privileged_context`: read, checked, and held to what the model can take.

A prompt is a string (one user message) or a list of chat messages. A row may hold `tools`, JSON schemas of what the
model may call, and `chat_template_kwargs`, variables of the chat template. A row with an empty `privileged_context` and
no `teacher_prompt` is an anchor: the teacher reads the student's own prompt, so that every gap is drift from the
initial model. Rows that bring a `completion` are rollouts made elsewhere (rmsd.answers.completions). A
`contrast_context`, or beside a `teacher_prompt` a `contrast_prompt`, is what a contrast judge has the teacher told
instead (rmsd.answers.contrast).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jinja2 import TemplateError

from .completions import check_completion, completion_ids
from .prompts import Prompts, is_told, tools_of


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
                    # The first line may begin with a byte order mark, as some editors write it.
                    rows.append(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from error
                except (ValueError, RecursionError) as error:  # of numbers and lists without end no JSONDecodeError
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"{path}, line {number}: not JSON ({reason}); each line is a row") from error
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
        _check_alike(row, rows[0], number)
    columns = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return [{name: row.get(name) for name in columns} for row in rows]


def checked_dataset(dataset):
    """What a trainer is given, each row checked: a list of them, or a dataset as it is, whose rows are had by number.

    Raises:
        ValueError: naming the row and what is wrong with it; or that rows cannot be had by number, or that there are
            none.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, str | Path):
        raise ValueError(f"train_dataset must be rows, not a path: rmsd.answers.data.load_rows({str(dataset)!r})")
    if isinstance(dataset, Mapping):
        raise ValueError(f"train_dataset must be one split, not a {kind} of {', '.join(map(str, dataset)) or 'none'}")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"train_dataset must have a length and rows by number, which a {kind} has not: give a list, for instance "
            "of the first rows, list(itertools.islice(dataset, 1000))"
        )
    if not len(dataset):
        raise ValueError("train_dataset holds no rows")
    if isinstance(dataset, list | tuple):
        return checked_rows(dataset)
    first: dict = {}
    for number in range(len(dataset)):
        try:
            row = dataset[number]
        except (KeyError, TypeError) as error:
            raise ValueError(f"train_dataset[{number}] must be a row, which a {kind} has not: give a list") from error
        check_row(row, f"row {number}")
        first = row if number == 0 else first
        _check_alike(row, first, number)
        _check_no_nulls(row, f"row {number}", getattr(dataset, "features", None) is not None)
    return dataset


def _check_alike(row: dict, first: dict, number: int) -> None:
    if type(row.get("completion")) is not type(first.get("completion")):
        raise ValueError(f"row {number}: completions are all text, or all token ids, or no row has one")


def rows_of(dataset) -> Iterator[dict]:
    """The rows of a dataset, by number: many a one of torch has a length, and no end for who counts on without it."""
    return (dataset[number] for number in range(len(dataset)))


def _check_no_nulls(row: dict, where: str, of_table: bool) -> None:
    """Of a table, whose columns have one type: there a null is most often another row's key."""
    calls = row["prompt"] if isinstance(row["prompt"], list) else []
    of_calls = [message.get("tool_calls") for message in calls]
    for column, value in (("tools", row.get("tools")), ("the prompt's tool_calls", of_calls)):
        if of_table and value is not None and any(map(_holds_null, value if isinstance(value, list) else [])):
            raise ValueError(
                f"{where}: {column} hold null where a table's column has other rows' keys: give the rows as a list, "
                "or tools as JSON text (json.dumps)"
            )


def _holds_null(value) -> bool:
    """Inside a value; a value that is null itself is simply not there."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(item is None or _holds_null(item) for item in inner)


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
        elif all(message["content"] is None for message in prompt):
            raise ValueError(f"{where}: {column} holds calls of tools alone, and no message with a text")
    for column in (
        "prompt",
        "teacher_prompt",
        "privileged_context",
        "contrast_context",
        "contrast_prompt",
        "completion",
    ):
        if half := _half_character(row.get(column)):
            raise ValueError(f"{where}: {column} holds {half!r}, half of a character (a lone surrogate)")
    if row.get("completion") is not None:
        check_completion(row, where)
    _check_tools(row, where)
    if not isinstance(row.get("chat_template_kwargs") or {}, dict):
        raise ValueError(f"{where}: chat_template_kwargs must be an object of the chat template's variables")


def _check_tools(row: dict, where: str) -> None:
    wanted = f"{where}: tools must be a list of JSON schemas, each an object with a name, or of names; or its JSON text"
    try:
        tools = tools_of(row)
    except json.JSONDecodeError as error:
        raise ValueError(f"{wanted} ({error.msg})") from error
    if not (tools is None or (isinstance(tools, list) and all(map(_is_schema, tools)))):
        raise ValueError(wanted)


def _is_schema(value) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    function = value.get("function") or value
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _half_character(value) -> str | None:
    """The first surrogate without its other half, which no file and no tokenizer can hold."""
    if isinstance(value, str):
        return next((character for character in value if "\ud800" <= character <= "\udfff"), None)
    if isinstance(value, dict):
        value = list(value.values())
    return next(filter(None, map(_half_character, value)), None) if isinstance(value, list) else None


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


def context_of(config, args=None) -> float:
    """Tokens that a model of this config can train on, infinity where it does not say. An engine that reads answers
    writes one more after each."""
    context = getattr(config, "max_position_embeddings", None) or math.inf
    return (context if context > 0 else math.inf) - (args.engine_scores if args else 0)  # XLNet's is -1


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
        read = []
        for reader, role, ids_of in readers:
            try:
                read.append(ids_of(row))
            except (ValueError, TypeError, TemplateError) as error:  # a template may refuse a system message, for one
                raise ValueError(f"row {number}: {error}") from error
            if max(read[-1]) >= vocab:
                unknown = max(read[-1])
                raise ValueError(
                    f"row {number}: the {role} holds token id {unknown} ({prompts.tokenizer.decode([unknown])!r}); the "
                    f"model has {vocab}: model.resize_token_embeddings(len(tokenizer)), or leave that token out"
                )
            length = len(read[-1]) + room
            if length > context:
                raise ValueError(
                    f"row {number}: the {role} and {answer} take {length} tokens; the model's context holds {context}"
                )
            most[reader] = max(most[reader], length)
        if read[0] == read[1] and is_told(row):
            raise ValueError(
                f"row {number}: the teacher's prompt has the same tokens as the student's, so there is nothing to "
                "learn: the template drops the privileged context, or teacher_prompt repeats the prompt (for an anchor "
                "leave both empty)"
            )
    return most[0], most[1]
