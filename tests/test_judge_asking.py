"""What an LLM judge is shown: in which order, how many questions at once, and what stands first."""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from judge_endpoint import completion

from rmsd.judge import CachedJudge, Candidate, LLMJudge, Question
from rmsd.judge.measure import Labelled, measure

CONTEXT = "The tool is called zorblat."
EDIT = re.compile(r'^(\d+)\. "(.*)"$', re.MULTILINE)


def question(name="a", count=6, max_kept=6):
    """Edits in the criterion's order, of which the one to " zor" is relevant: it stands first."""
    tokens = tuple(f" {name}{i}" for i in range(count))
    wishes = {i: " zor" if i == 0 else f" {name}wish{i}" for i in range(count)}
    candidates = tuple(Candidate(i, tokens[i], wish, tokens[i], wish, i - 9.0) for i, wish in wishes.items())
    prompt = f"Which tool is it, {name}?"
    return Question(prompt, CONTEXT, tokens, candidates, max_kept, f"{CONTEXT}\n\n{prompt}")


@pytest.fixture
def judge(server):
    return lambda **options: LLMJudge("m", base_url=server.url, **{"max_retries": 0, "timeout": 5, **options})


def asked_of(body):
    return body["messages"][0]["content"].partition("Now the real one.")[2]


def verdict(candidate, **answer):
    return {**answer, "candidate": candidate, "reason": "", "relevant": "yes"}


def reads(body):
    """Answers as a judge would that reads: by what stands in the edit, wherever in the list."""
    text = asked_of(body)
    answers = text.split("Edits of answer ")[1:] or [text]
    verdicts = []
    for n, answer in enumerate(answers, 1):
        of = {"answer": n} if len(answers) > 1 else {}
        verdicts += [verdict(int(number), **of) for number, edit in EDIT.findall(answer) if " zor" in edit]
    return completion(json.dumps({"verdicts": verdicts}))


def first(body):
    """Answers as a judge would that keeps the first of any list."""
    return completion(json.dumps({"verdicts": [verdict(1)]}))


# ---- order -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_the_answer_names_wherever_it_was_listed(server, judge):
    server.script = [reads]
    questions = [question(name) for name in "abcdefgh"]
    assert judge(max_concurrency=1)(questions) == [[0]] * 8
    places = [number for body, _ in server.requests for number, edit in EDIT.findall(asked_of(body)) if " zor" in edit]
    assert len(set(places)) > 2, "it was not always listed at the same place"


def test_a_judge_of_places_does_not_keep_the_largest_gaps(server, judge):
    questions = [question(name) for name in "abcdefghijklmnop"]
    server.script = [first]
    kept = Counter(answer[0] for answer in judge()(questions))
    assert kept[0] < 8, "a blind judge that likes the first of a list would keep the largest gap"
    assert judge(shuffle=False)(questions) == [[0]] * 16, "as it does where lists are in the criterion's order"


def test_several_that_are_kept_come_largest_first_and_max_kept_at_most(server, judge):
    everything = [verdict(number) for number in (6, 2, 3, 1, 5, 4)]
    server.script = [completion(json.dumps({"verdicts": everything}))]
    assert judge()([question(max_kept=3)]) == [[0, 1, 2]]


def test_the_same_question_is_asked_in_the_same_words_and_another_in_its_own_order(judge):
    text = judge().prompt(question())
    assert judge().prompt(question()) == text
    asked = question()
    other_nats = [dataclasses.replace(c, gap=c.gap - 1e-6) for c in reversed(asked.candidates)]
    assert judge().prompt(dataclasses.replace(asked, candidates=tuple(other_nats))) == text, "rounding changes no order"
    orders = {tuple(edit[-2:] for _, edit in EDIT.findall(judge().prompt(question(name)))) for name in "abcde"}
    assert len(orders) > 1, "its content draws the order"
    assert judge().fingerprint != judge(shuffle=False).fingerprint, "an answer kept for one list is not of the other"
    other = LLMJudge("m", base_url="http://127.0.0.1:9/v1", max_retries=0, timeout=5)
    assert judge().fingerprint != other.fingerprint, "nor is one server's of another that has a model of that name"


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_measured_judge_reads_every_list_the_other_way_round_as_well(server, judge, tmp_path, shuffle):
    """What it is shown is reversed, not only what it is given: its own order draws lists from their content."""
    labelled = [Labelled(question(name), frozenset({0})) for name in "abcdefgh"]
    for script, same in ((first, 0.0), (reads, 1.0)):
        server.script, server.requests = [script], []
        asked = judge(shuffle=shuffle, max_concurrency=1)
        # Behind a cache, which must not take the second reading for the first.
        assert measure(CachedJudge(asked, tmp_path / script.__name__), labelled, asked).same_reversed == same
        lists = [[edit for _, edit in EDIT.findall(asked_of(body))] for body, _ in server.requests]
        assert lists[8:] == [edits[::-1] for edits in lists[:8]]
    assert asked.prompt(question()) == judge(shuffle=shuffle).prompt(question()), "only while it is measured"


# ---- several in one request ------------------------------------------------------------------------------------------


def test_a_batch_is_one_request_and_verdicts_are_by_answer(server, judge):
    server.script = [reads]
    nothing = replace(question("n"), candidates=question("n").candidates[1:])
    asked = judge(batch=3, max_tokens=100)
    assert asked([question("a"), nothing, question("b"), question("c")]) == [[0], [], [0], [0]]
    assert [len(body["messages"]) for body, _ in server.requests] == [1] * len(server.requests)
    sizes = sorted(asked_of(body).count("<answer>") for body, _ in server.requests)
    # Nothing of `nothing` was found relevant, and this judge gives no verdict but yes: it is asked again alone.
    assert sizes == [1, 1, 3]
    three = next(body for body, _ in server.requests if asked_of(body).count("<answer>") == 3)
    verdicts = three["response_format"]["json_schema"]["schema"]["properties"]["verdicts"]
    assert verdicts["maxItems"] == 17 and verdicts["items"]["required"][0] == "answer"
    assert three["max_tokens"] == 300


def test_an_answer_that_the_reply_passes_over_is_asked_about_again_alone(server, judge, tmp_path):
    def forgets(body):
        if "Edits of answer" not in asked_of(body):
            return reads(body)
        content = json.loads(reads(body)[2]["choices"][0]["message"]["content"])
        left = [entry for entry in content["verdicts"] if entry["answer"] != 2] + [verdict(1, answer=9), verdict(1)]
        return completion(json.dumps({"verdicts": left}))

    server.script = [forgets]
    asked = judge(batch=3)
    cached = CachedJudge(asked, tmp_path)
    questions = [question(name) for name in "abc"]
    assert cached(questions) == [[0], [0], [0]]
    assert [asked_of(body).count("<answer>") for body, _ in server.requests] == [3, 1]
    assert "Which tool is it, b?" in asked_of(server.requests[1][0])
    assert asked.stats["requests"] == 2 and asked.stats["dropped"] == 2 and asked.stats["failures"] == 0
    assert cached(questions) == [[0], [0], [0]] and len(server.requests) == 2, "each is kept by itself"


def test_the_one_that_fails_alone_too_costs_no_other(server, judge):
    def one_is_too_much(body):
        if "Edits of answer" in asked_of(body):
            return completion('{"verdicts": [{"answer": 1, "cand')
        return (500, {}, {"error": {"message": "no"}}) if "Which tool is it, b?" in asked_of(body) else reads(body)

    server.script = [one_is_too_much]
    asked = judge(batch=3, on_error="skip")
    assert asked([question(name) for name in "abc"]) == [[0], [], [0]]
    assert asked.stats["failures"] == 1 and asked.stats["requests"] == 4


def test_a_batch_that_is_too_long_for_the_model_is_asked_one_by_one(server, judge):
    def short(body):
        if "Edits of answer" in asked_of(body):
            return 400, {}, {"error": {"message": "maximum context length"}}
        return reads(body)

    server.script = [short]
    asked = judge(batch=2)
    assert asked([question("a"), question("b")]) == [[0], [0]]
    assert asked.stats["failures"] == 0


def test_a_template_of_one_question_is_not_asked_about_several(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ prompt }} {{ candidates | length }}")
    assert LLMJudge("m", template=template).prompt(question()) == "Which tool is it, a? 6"
    with pytest.raises(ValueError, match=r"judge\.batch=2 needs a template that shows `questions`"):
        LLMJudge("m", template=template, batch=2)


# ---- what stands first -----------------------------------------------------------------------------------------------


def shared_by(a, b):
    return a[: next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)]


def test_what_requests_share_stands_first(judge):
    """So that a server that keeps what it has read of a prefix reads the instructions and examples once in a run, and
    what rows of one context share once for them."""
    asked = judge()
    manual = "Services are deployed by zorblat. " * 50
    texts = [
        asked.prompt(replace(question(n), privileged_context=manual, teacher_prompt=f"{manual}\n\nWhich, {n}?"))
        for n in "ab"
    ]
    shared = shared_by(*texts)
    assert shared.count(manual) == 2, "the instruction, and the teacher's prompt up to where its own question begins"
    other = asked.prompt(question("c"))
    fixed = shared_by(other, texts[0])
    assert "Two examples." in fixed and fixed.rstrip().endswith("<instruction>")
    assert len(fixed) > 0.5 * len(other)
