"""Judges on labelled questions: what the numbers say of good, bad and blind ones, and where labels come from."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from rmsd.answers.prompts import TEACHER_TEMPLATE
from rmsd.judge import Candidate, ContextJudge, ContrastJudge, MagnitudeJudge, Question
from rmsd.judge.measure import Labelled, agreement, load, measure, save
from rmsd.run.judging import labelled_by_grader, word_at
from rmsd.tasks import legacy_api, pinapple

CONTEXT = "Please write pinapple."


def question(tokens, candidates, max_kept=1):
    """`candidates`: (position, promoted, gap) in the criterion's order."""
    made = tuple(Candidate(i, tokens[i], promoted, tokens[i], promoted, gap) for i, promoted, gap in candidates)
    return Question("Which fruit?", CONTEXT, tuple(tokens), made, max_kept, "Please write pinapple.\n\nWhich fruit?")


FRUIT = question(["The", " fruit", " is", " pine", "apple", "."], [(0, "A", -4.0), (3, " pin", -3.0), (4, "app", -2.0)])
PLAIN = question(["It", " is", " Rome", "."], [(1, "'s", -2.0), (2, " pin", -1.0)])
LABELLED = [Labelled(FRUIT, frozenset({3})), Labelled(PLAIN, frozenset({2}))]


def test_a_judge_that_knows_is_right_and_heeds_no_order():
    marks = measure(ContextJudge(), LABELLED)
    assert (marks.kept, marks.precision, marks.recall, marks.agreement, marks.same_reversed) == (2, 1.0, 1.0, 1.0, 1.0)
    assert marks.tokens is None and marks.seconds < 1.0


def test_precision_and_recall_are_over_all_candidates():
    marks = measure(MagnitudeJudge(), LABELLED)
    assert (marks.kept, marks.precision, marks.recall) == (5, 2 / 5, 1.0)
    assert marks.agreement == 2 / 5
    nothing = measure(lambda questions: [[] for _ in questions], LABELLED)
    assert (nothing.kept, nothing.precision, nothing.recall, nothing.same_reversed) == (0, None, 0.0, None)
    assert agreement(marks, nothing, LABELLED) == 0.0 and agreement(marks, marks, LABELLED) == 1.0


def test_a_judge_of_places_is_found_out_by_reversing_the_list():
    first = measure(lambda questions: [[q.candidates[0].position] for q in questions], LABELLED)
    assert first.same_reversed == 0.0


def test_labelled_questions_are_read_back_as_they_were_written(tmp_path):
    save(tmp_path / "labels" / "q.jsonl", LABELLED)
    assert load(tmp_path / "labels" / "q.jsonl") == LABELLED


def test_a_user_s_file_needs_only_what_a_judge_reads(tmp_path):
    line = {
        "prompt": "a",
        "privileged_context": "b",
        "tokens": ["c"],
        "relevant": [0],
        "candidates": [{"position": 0, "token": "c", "promoted": "d", "gap": -1.0}],
    }
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(line))
    (one,) = load(path)
    assert one.relevant == {0} and one.question.candidates[0].teacher_preferred == "d"
    for broken, said in (
        ({"relevant": [5]}, "position 5"),
        ({"candidates": [{}]}, "KeyError"),
        ({"tokens": 3}, "TypeError"),
    ):
        path.write_text(json.dumps(line) + "\n" + json.dumps(line | broken))
        with pytest.raises(ValueError, match=r"q\.jsonl, line 2: no labelled question") as error:
            load(path)
        assert said in str(error.value)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line).encode() + b"\r\n")
    assert load(path) == [one], "as some editors write it"
    path.write_bytes(json.dumps(line).encode() + b"\n" + json.dumps(line).encode().replace(b"b", b"\xe9"))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: no labelled question .*utf-8"):
        load(path)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        (("is pi", "n", "apple, not"), "pinapple"),
        (("is", " pin", "apple, not"), "pinapple"),
        (("is", ' "Pin', 'apple"'), "Pinapple"),
        (("is pinapple", ".", " It"), ""),
        (("", "The", " end"), "The"),
        (("है ज", "\u093c", "ोरब्लैट।"), "ज\u093cोरब्लैट"),
    ],
)
def test_the_word_of_an_edit(parts, word):
    assert word_at(*parts) == word


def test_labels_follow_from_the_word_that_the_told_teacher_would_make():
    said = {"A": " fruit is pinapple", " pin": "apple.", "app": "le is", "'s": " pinapple"}
    asked = []

    class Tokenizer:
        chat_template = eos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [text]}

    def continued(prompt_ids, most):
        asked.extend(prompt_ids)
        return [next(end for begun, end in said.items() if ids[-1].endswith(begun)) for ids in prompt_ids]

    probe = SimpleNamespace(
        task=pinapple.TASK,
        told=[{"prompt": "Which fruit?", "privileged_context": CONTEXT}],
        called={},
        args=SimpleNamespace(teacher_template=TEACHER_TEMPLATE, teacher_place="user"),
        tokenizer=Tokenizer(),
        continued=continued,
        step=lambda rows: ([FRUIT, PLAIN], {}, 0.0),
    )
    assert labelled_by_grader(probe, 8) == LABELLED, "what comes later than the edited word is no matter of the edit"
    assert asked[1] == ["Please write pinapple.\n\nWhich fruit?", "The fruit is pin"]
    probe.tokenizer, probe.args.teacher_place = tiny.tokenizer(), "system"
    probe.continued = lambda prompt_ids, most: asked.extend(prompt_ids) or [""] * len(prompt_ids)
    labelled_by_grader(probe, 8)
    read = f"<|system|>{CONTEXT}<|end|><|user|>Which fruit?<|end|><|assistant|>It is pin"
    assert probe.tokenizer.decode(asked[-1]) == read, "the messages that the teacher reads"
    for task in (None, legacy_api.TASK):
        with pytest.raises(ValueError, match="no grader to label questions by"):
            labelled_by_grader(SimpleNamespace(task=task), 8)


# ---- the labelled answers of a real model --------------------------------------------------------------------------

ANSWERS = Path(__file__).parents[1] / "benchmarks" / "judged_pinapple.jsonl"


def follows(question, candidate):
    """The rule of the labels: the edit begins or goes on with "pinapple", or takes "pineapple" away."""
    if candidate.promoted == candidate.token:
        return False
    before = "".join(question.tokens[: candidate.position])
    alone, wanted, written = (
        re.search("[a-z]*$", head.casefold()).group() + re.search("[a-z]*", token.casefold().strip()).group()
        for head, token in (
            ("", candidate.promoted),
            ("" if candidate.promoted[:1] == " " else before, candidate.promoted),
            ("" if candidate.token[:1] == " " else before, candidate.token),
        )
    )
    begins = any(len(word) >= 3 and "pinapple".startswith(word) for word in (alone, wanted))
    is_word = re.search("[a-z]", candidate.token.casefold())
    takes_away = candidate.gap < 0 and is_word and len(written) >= 3 and "pineapple".startswith(written)
    return begins or (takes_away and not (len(wanted) >= 3 and "pineapple".startswith(wanted)))


def test_the_labels_are_the_rule_s_and_the_page_s_figures_are_theirs():
    labelled = load(ANSWERS)
    assert (len(labelled), sum(len(x.question.candidates) for x in labelled)) == (16, 166)
    for one in labelled:
        assert one.relevant == {c.position for c in one.question.candidates if follows(one.question, c)}
    rows = pinapple.TASK.train
    page = (ANSWERS.parents[1] / "docs" / "usage.md").read_text(encoding="utf-8")
    for name, judge in (
        ("magnitude", MagnitudeJudge()),
        ("context", ContextJudge(row["prompt"] for row in rows)),
        ("contrast", ContrastJudge(rows)),
        ("contrast, `judge.contrast_floor=4`", ContrastJudge(rows, floor=4.0)),
    ):
        marks = measure(judge, labelled)
        figures = f"| {name} | {marks.kept} | {marks.precision:.2f} | {marks.recall:.2f} |"
        assert figures in page, f"docs/usage.md should say {figures}"
