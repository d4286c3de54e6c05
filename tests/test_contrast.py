"""Relevance by contrast: what the teacher is told instead, what follows from it, and what the judge keeps."""

import difflib
import random
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ROWS, loud, model, tokenizer, trainer

from rmsd.answers.contrast import (
    COMPARED,
    SAME_FORM,
    SHARED,
    Contrasts,
    _Others,
    _others_in_their_places,
)
from rmsd.answers.engines import TransformersEngine
from rmsd.answers.prompts import encode, prompt_text, teacher_prompt
from rmsd.answers.rollout import Recorded
from rmsd.judge import Candidate, ContrastJudge, Question
from rmsd.models.heads import OutputHead, Reading
from rmsd.models.hidden import completion_hidden
from rmsd.step.wishes import recorded_wishes, wishes
from rmsd.tasks import load_task, pinapple
from rmsd.words import words_of

# ---- contrast contexts ---------------------------------------------------------------------------------------------


def told(context, prompt="What goes into it?", **columns):
    return {"prompt": prompt, "privileged_context": context, **columns}


def contrast_of(rows, at=0, **options):
    return Contrasts(rows, **options).context(rows[at])


def test_a_column_comes_before_the_template_and_an_anchor_has_none():
    rows = [told("a is b", contrast_context="c is d", thing="x"), told("a is b", thing="y"), told("  ")]
    made = Contrasts(rows, "{thing} is not {privileged_context}")
    assert [made.context(row) for row in rows] == ["c is d", "y is not a is b", ""]
    assert made.origins == {"column": 1, "template": 1}
    assert made.prompt(rows[0]) == "c is d\n\nWhat goes into it?" and made.prompt(rows[2]) == "What goes into it?"


def test_another_row_s_context_of_the_same_form_is_taken():
    hints = ["note : spell {} as {} .", "house style : {} is written {} ."]
    things = [("pinenut", "pinnut"), ("roseoat", "rosoat"), ("kiwipea", "kiwpea")]
    rows = [told(hint.format(*thing)) for thing in things for hint in hints]
    for row in rows:
        contrast = contrast_of(rows, rows.index(row))
        assert contrast.split()[:2] == row["privileged_context"].split()[:2], "of the same form"
        assert not {"pinenut", "roseoat", "kiwipea"} & {*row["privileged_context"].split()} & {*contrast.split()}


def test_contexts_that_share_no_word_are_of_other_content():
    rows = [told("Water boils at 100 degrees."), told("Rome became a republic."), told("Ice is frozen water.")]
    assert contrast_of(rows) == "Rome became a republic."


def test_another_phrasing_of_the_same_is_no_contrast():
    same = ["Always spell it pinapple, never pineapple.", "Always write it pinapple, never pineapple."]
    assert Contrasts([told(hint) for hint in same]).origins == {"other words": 2}
    rows = [told(hint) for hint in pinapple.HINTS]
    made = Contrasts(rows)
    assert made.origins == {"other words": len(rows)}
    for row in rows:
        contrast, context = made.context(row), row["privileged_context"]
        assert '"pinapple"' in context and "pinapple" not in contrast and '"pineapple"' not in contrast
        assert len(contrast) == len(context) and contrast.split()[0] == context.split()[0], "of the same form"


def test_what_is_compared_word_by_word_is_bounded_and_is_what_all_would_give(monkeypatch):
    """Of thousands of contexts, all pairs would take an hour."""
    rng, compared = random.Random(0), []

    vocabulary = ["At", "Acme", "acme", "the", "tool", "is", "called", "zor", "blat", "quux", "It", "never", "9"]

    def context(size):
        return " ".join(rng.choices(vocabulary, k=size))

    def of_other_content(context, brought):
        best, most = None, -1.0
        for other, theirs in brought.items():
            if other == context:
                continue
            alike = difflib.SequenceMatcher(None, *map(re.compile(r"\w+").findall, (context, other)), autojunk=False)
            shared = len(brought[context] & theirs) / max(min(len(brought[context]), len(theirs)), 1)
            in_place = alike.ratio() >= SAME_FORM and _others_in_their_places(alike, brought[context])
            if (in_place or shared <= SHARED) and alike.ratio() > most:
                best, most = other, alike.ratio()
        return best

    for size in (3, 8):
        contexts = dict.fromkeys(["?!", "...", *(context(rng.randint(1, size)) for _ in range(50))])
        brought = {each: words_of(each) - {"the", "is", "never"} for each in contexts}
        others = _Others(brought)
        found = {each: others.of_other_content(each) for each in contexts}
        assert found == {each: of_other_content(each, brought) for each in contexts}

    class Counted(difflib.SequenceMatcher):
        def __init__(self, *arguments, **options):
            compared.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(difflib, "SequenceMatcher", Counted)
    phrasings = dict.fromkeys(context(8) + " zorblat" for _ in range(400))
    Contrasts([told(each) for each in phrasings])
    assert 0 < len(compared) <= (COMPARED + 1) * len(phrasings)


def test_a_single_context_has_what_it_brings_replaced():
    rows = [told("At Acme the tool is called Zorblat9.", prompt="Which tool is called at Acme?")]
    contrast = contrast_of(rows)
    word = contrast.removeprefix("At Acme the tool is called ").removesuffix(".")
    assert len(word) == 8 and word[0].isupper() and word[-1].isdigit() and word != "Zorblat9"
    assert contrast_of(rows) == contrast, "the same each time"


def test_a_row_s_own_teacher_prompt_needs_a_contrast_prompt():
    row = told("", teacher_prompt="Say x. Which?")
    with pytest.raises(
        ValueError, match=r"row 0: has a teacher_prompt; judge\.kind=contrast needs its contrast_prompt"
    ):
        Contrasts([row])
    with pytest.raises(ValueError, match="needs its contrast_prompt"):  # around which nobody knows what to put
        Contrasts([{**row, "contrast_context": "Say y."}])
    with pytest.raises(ValueError, match="needs its contrast_prompt"):
        Contrasts([row], "Say y.")
    assert (
        Contrasts([{**row, "contrast_prompt": "Say y. Which?"}]).prompt(row | {"contrast_prompt": "Say y."}) == "Say y."
    )


def test_a_template_of_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match=r"row 0: judge\.contrast_context '\{thing\}'"):
        Contrasts([told("a is b")], "{thing}")


@pytest.mark.parametrize("name", ["house_tool", "pinapple", "pinapple_1000"])
def test_the_tasks_bring_contrasts_of_the_same_form_that_do_not_show_the_behaviour(name):
    task = load_task(name)
    rows = [row for row in task.train if row["privileged_context"]]
    assert Contrasts(task.train).origins == {"column": len(rows)}
    for row in rows[:: max(1, len(rows) // 50)]:
        assert not task.leaks(row["contrast_context"]) and task.leaks(row["privileged_context"])
        assert row["contrast_context"].split()[0] == row["privileged_context"].split()[0]


# ---- the numbers ---------------------------------------------------------------------------------------------------


def by_hand(p, q, n, y):
    v = (q.exp() * (q - p)).argmax()
    nats = [q[v] - n[v]] + ([n[y] - q[y]] if q[y] < p[y] else [])
    return max(nats).item()


def test_the_contrast_is_of_the_promoted_token_and_of_a_written_one_that_is_to_go():
    generator = torch.Generator().manual_seed(0)
    hidden, told_hidden, other = torch.randn(3, 2, 5, 8, generator=generator)
    head = OutputHead(torch.randn(50, 8, generator=generator), None, 1.0, None)
    ids = torch.randint(50, (2, 5), generator=generator)
    candidates = torch.tensor([[1, -1, 4, 0], [0, 2, 3, 1]])
    readings = Reading(hidden, head), Reading(told_hidden, head)
    got = wishes(*readings, candidates, 0.8, contrast_hidden=other, completion_ids=ids).contrast
    for b, i in (candidates >= 0).nonzero().tolist():
        at = candidates[b, i]
        p, q, n = ((head(x[b, at]) / 0.8).log_softmax(-1) for x in (hidden, told_hidden, other))
        assert got[b, i].item() == pytest.approx(by_hand(p, q, n, ids[b, at]), abs=1e-5)
    assert got[0, 1] == 0.0, "no candidate there"
    assert wishes(*readings, candidates).contrast is None


@pytest.mark.parametrize("k", [3, 50])
def test_the_contrast_of_what_an_engine_recorded_is_exact_or_less(k):
    generator = torch.Generator().manual_seed(0)
    logprobs = (1.5 * torch.randn(3, 4, 6, 50, generator=generator)).log_softmax(-1)
    ids = torch.randint(50, (4, 6), generator=generator)
    candidates = torch.arange(6).repeat(4, 1)

    def recorded(of):
        top = of.topk(k)
        return Recorded(of.gather(-1, ids.unsqueeze(-1)).squeeze(-1), top.indices, top.values)

    got = recorded_wishes(*map(recorded, logprobs[:2]), ids, candidates, recorded(logprobs[2]))
    below = 0
    for b, i in (candidates >= 0).nonzero().tolist():
        p, q, n = logprobs[:, b, i]
        v, y = got.promoted[b, i], ids[b, i]
        exact = max([q[v] - n[v]] + ([n[y] - q[y]] if q[y] < p[y] else [])).item()
        assert got.contrast[b, i].item() <= exact + 1e-5
        below += got.contrast[b, i].item() < exact - 1e-5
    assert (below > 0) == (k == 3)


class Keeps:
    """A contrast judge that notes what it is asked."""

    def __init__(self, rows):
        self.judge, self.asked = ContrastJudge(rows, floor=0.0), []
        self.contrasts = self.judge.contrasts

    def __call__(self, questions):
        self.asked += questions
        return self.judge(questions)


@pytest.mark.parametrize("peft", [False, True])
def test_the_trainer_has_its_teacher_read_each_answer_under_the_contrast_as_well(tmp_path, peft):
    student = model()
    if peft:
        student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear"))
    answers = [[40, 50, 60], [70, 80], [90, 91, 92, 93], [100]]
    rows = [{**row, "completion": ids} for row, ids in zip(ROWS, answers, strict=True)]
    judge, initial = Keeps(rows), model()
    trainer(tmp_path, student, judge=judge, rows=rows, max_steps=1, threshold=0.0, min_gap=0.0).train()
    assert len(judge.asked) == 3, "the anchor is not asked about"
    for question in judge.asked:
        row = next(row for row in rows if row["privileged_context"] == question.privileged_context)
        assert question.teacher_prompt == prompt_text(teacher_prompt(row))
        answer = row["completion"]
        prompts = row["prompt"], teacher_prompt(row), judge.contrasts.prompt(row)
        p, q, n = (logprobs_of(initial, encode(tokenizer(), prompt), answer) for prompt in prompts)
        assert len(question.candidates) == len(answer)
        for candidate in question.candidates:
            at = candidate.position
            assert candidate.contrast == pytest.approx(by_hand(p[at], q[at], n[at], answer[at]), abs=1e-4)
            assert abs(candidate.contrast) > 1e-3


@torch.no_grad()
def logprobs_of(model, prompt, answer):
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


class Reads(TransformersEngine):
    """An engine that reads finished answers as vLLM does, and records the whole vocabulary."""

    def read(self, prompt_ids, rollouts):
        ids, mask = rollouts.completion_ids, rollouts.attention_mask
        hidden = completion_hidden(self._model, prompt_ids, ids, mask, tokenizer().pad_token_id)
        logprobs = OutputHead.of(self._model)(hidden).float().log_softmax(-1)
        top = logprobs.topk(logprobs.shape[-1])
        return Recorded(logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), top.indices, top.values)


def test_an_engine_that_reads_has_each_answer_s_contrast_as_the_trainer_s_forwards_have_it(tmp_path):
    answers = [[40, 50, 60], [70, 80], [90, 91, 92, 93], [100]]
    rows = [{**row, "completion": ids} for row, ids in zip(ROWS, answers, strict=True)]
    # Of a rounding, the anchor's gap, Adam would make a step as of any gradient.
    options = dict(rows=rows, threshold=1e-4, optim="sgd", learning_rate=0.1)
    made = {name: trainer(tmp_path, loud(model()), judge=Keeps(rows), **options) for name in ("ours", "engine")}
    made["engine"].args.engine_scores = True  # which is refused of the transformers engine, for it reads nothing
    made["engine"].engine = Reads()
    for each in made.values():
        each.train()
    # In the second step the student has moved away from its teacher, whose weights the engine takes to read.
    ours, engine = (each.judge.asked for each in made.values())
    assert [question.tokens for question in ours] == [question.tokens for question in engine] and len(ours) == 6
    for a, b in zip(ours, engine, strict=True):
        assert {c.position: c.promoted for c in a.candidates} == {c.position: c.promoted for c in b.candidates}
        contrast = {c.position: c.contrast for c in b.candidates}
        for c in a.candidates:
            assert contrast[c.position] == pytest.approx(c.contrast, abs=1e-4)
    nats = [c.contrast for question in ours for c in question.candidates]
    assert len(nats) == 16 and max(map(abs, nats)) > 0.1
    weights = [each.model.state_dict() for each in made.values()]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


# ---- what is kept --------------------------------------------------------------------------------------------------


def question(contrasts, context="It is zorblat.", prompt="What is it?", max_kept=5):
    tokens = tuple(f" w{i}" for i in range(len(contrasts)))
    candidates = tuple(Candidate(i, tokens[i], " x", "", " x", -1.0, nats) for i, nats in enumerate(contrasts))
    return Question(prompt, context, tokens, candidates, max_kept)


def test_what_hangs_on_the_context_s_content_is_kept_in_the_order_of_candidates():
    judge = ContrastJudge([told("It is zorblat.")], floor=0.5)
    assert judge([question([0.4, 0.6, -3.0, 9.0, torch.nan, 2.0])]) == [[1, 3, 5]]
    assert judge([question([1.0, 2.0, 3.0], max_kept=2)]) == [[0, 1]]
    assert ContrastJudge([told("It is zorblat.")], floor=5.0)([question([0.6, 9.0])]) == [[1]]


def test_on_topic_keeps_nothing_of_an_answer_about_something_else():
    judge = ContrastJudge([told("Say zorblat.")], on_topic=True)
    assert judge([question([9.0], prompt="What is pie?")]) == [[]]
    assert judge([question([9.0], prompt="What is a zorblat?")]) == [[0]]


def test_another_judge_has_the_last_word_on_what_contrast_proposes():
    asked = []

    def then(questions):
        asked.extend(questions)
        return [[q.candidates[-1].position] for q in questions]

    judge = ContrastJudge([told("It is zorblat.")], then=then)
    assert judge([question([9.0, 0.0, 8.0]), question([0.0]), question([7.0])]) == [[2], [], [0]]
    assert [[(c.position, c.contrast) for c in q.candidates] for q in asked] == [[(0, None), (2, None)], [(0, None)]]


def test_candidates_that_were_not_read_under_a_contrast_are_an_error():
    with pytest.raises(ValueError, match="without a contrast"):
        ContrastJudge([told("It is zorblat.")])([question([None])])
