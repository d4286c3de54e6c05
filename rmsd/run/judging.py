"""`rmsd judge`: a recipe's judges on labelled questions."""

import re
from pathlib import Path

from ..answers.prompts import Prompts, encode, prompt_text
from ..judge.llm import llm_of
from ..judge.measure import Labelled, Marks, agreement, load, measure, save
from ..step.judging import told_text
from ..words import LETTER, WORD
from .calling import environments_of
from .probe import Probe, spread
from .recipe import Recipe

WORD_TOKENS = 8  # in which a told teacher ends the word that an edit begins


def judge(recipe: Recipe, questions: Path | None = None, prompts: int = 8) -> str:
    """Marks of the recipe's judge, and of those that need nothing, on labelled questions: those of the file, or made
    from the model's own answers by the task's first grader (and written to the file, where one is named)."""
    uncached = recipe.judge.model_copy(update={"cache": None, "replay": False})  # a cache says nothing of time
    probe = Probe(recipe.model_copy(update={"judge": uncached}))
    if questions and questions.exists():
        labelled, source = load(questions), str(questions)
    else:
        labelled, source = (
            labelled_by_grader(probe, prompts),
            f"answers of {recipe.model}, labelled by the task's grader",
        )
        if questions:
            save(questions, labelled)
            source += f", written to {questions}"
    candidates = sum(len(one.question.candidates) for one in labelled)
    relevant = sum(len(one.relevant) for one in labelled)
    marks: dict[str, Marks] = {}
    for name, one in probe.judges().items():
        reads_contrast = hasattr(one, "contrasts")
        if reads_contrast and any(c.contrast is None for x in labelled for c in x.question.candidates):
            probe.notes.append(f"{name}: the questions of the file do not hold the candidates' contrast")
            continue
        llm = llm_of(one)
        try:
            marks[name] = measure(one, labelled, llm)
        except ConnectionError as error:
            probe.notes.append(f"{name}: {error}")
        if llm and llm.on_error != "raise" and (failures := llm.stats["failures"]):
            probe.notes.append(f"{name}: {failures} times it did not answer, and judge.on_error={llm.on_error} did")
    lines = [
        f"{len(labelled)} questions, {candidates} candidates, {relevant} relevant ({source})",
        "",
        marks_table(marks, labelled),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in probe.notes)])


def labelled_by_grader(probe: Probe, prompts: int) -> list[Labelled]:
    """A candidate is relevant when the teacher's edit, with the rest of the word as the told teacher goes on, makes a
    word that passes the task's first grader, and the word that the student wrote there does not.

    Raises:
        ValueError: the recipe has no task, the task no grader of texts, or its teacher would change nothing.
    """
    if probe.task is None or not probe.task.graders:
        whose = "a recipe without a task" if probe.task is None else "a task whose environment says what is solved"
        raise ValueError(
            f"{whose} has no grader to label questions by: name a file that holds them with --questions, as a run's "
            "report saves it"
        )
    grader = next(iter(probe.task.graders.values()))
    rows = spread(probe.told, prompts)
    questions, _, _ = probe.step(rows)
    questions = [question for question in questions if question.candidates]
    if not questions:
        raise ValueError(
            f"told and untold, the model parts nowhere by train.min_gap={probe.args.min_gap:g} nats and "
            f"train.threshold={probe.args.threshold:g}: there is nothing to judge"
        )
    edits = [(question, candidate) for question in questions for candidate in question.candidates]
    # As the teacher reads it: a question holds its messages as one text.
    environments = environments_of(probe.called, probe.args)
    shown = environments.schemas if environments else None
    ids_of = Prompts(probe.tokenizer, probe.args.teacher_template, probe.args.teacher_place, shown).teacher
    told = {(prompt_text(row["prompt"]), told_text(row)): ids_of(row) for row in rows}
    prompt_ids = []
    for question, candidate in edits:
        edited = "".join(question.tokens[: candidate.position]) + candidate.promoted
        answer = probe.tokenizer(edited, add_special_tokens=False)["input_ids"]
        read = told.get((question.prompt, question.privileged_context))
        prompt_ids.append((read or encode(probe.tokenizer, question.teacher_prompt)) + answer)
    relevant: dict[int, set[int]] = {}
    for (question, candidate), text in zip(edits, probe.continued(prompt_ids, WORD_TOKENS), strict=True):
        at, tokens = candidate.position, question.tokens
        edited = word_at("".join(tokens[:at]), candidate.promoted, text)
        written = word_at("".join(tokens[:at]), tokens[at], "".join(tokens[at + 1 :]))
        if grader(edited) and not grader(written):
            relevant.setdefault(id(question), set()).add(at)
    return [Labelled(question, frozenset(relevant.get(id(question), ()))) for question in questions]


def word_at(before: str, token: str, after: str) -> str:
    """The word that `token` goes on with or begins, to its end: ("is pi", "n", "apple, not") gives "pinapple"."""
    first = re.search(LETTER, token)
    if first is None:
        return ""
    begun = re.search(f"{LETTER}*$", before).group() if first.start() == 0 else ""
    return begun + WORD.match(token[first.start() :] + after).group()


def marks_table(marks: dict[str, Marks], labelled: list[Labelled]) -> str:
    beside = [name for name in ("contrast", "context") if name in marks]
    heads = [
        "judge",
        "kept",
        "precision",
        "recall",
        "agreement",
        *(f"with {name}" for name in beside),
        "reversed",
        "s",
        "tokens",
    ]
    rows = [heads]
    for name, one in marks.items():
        numbers = [
            one.precision,
            one.recall,
            one.agreement,
            *(agreement(one, marks[other], labelled) for other in beside),
        ]
        shares = ["-" if value is None else f"{value:.2f}" for value in (*numbers, one.same_reversed)]
        tokens = "-" if one.tokens is None else f"{one.tokens:.0f}"
        rows.append([name, str(one.kept), *shares, f"{one.seconds:.2f}", tokens])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
