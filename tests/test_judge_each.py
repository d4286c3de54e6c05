"""An LLM judge that is asked about one candidate at a time, by the log-probabilities of yes and no."""

import math

import pytest
from judge_endpoint import completion

from rmsd.judge import CachedJudge, Candidate, LLMJudge, Question
from rmsd.judge.each import NEUTRAL
from rmsd.judge.measure import Labelled, measure
from rmsd.run.judging import marks_table

CONTEXT = "The tool is called zorblat."
TOKENS = ("It", " is", " Docker", ".")


def question(max_kept=5):
    wishes = {2: " zor", 0: "Our", 1: "'s"}
    candidates = tuple(Candidate(at, TOKENS[at], wish, TOKENS[at], wish, -4.0) for at, wish in wishes.items())
    return Question("Which tool?", CONTEXT, TOKENS, candidates, max_kept)


@pytest.fixture
def judge(server):
    return lambda **options: LLMJudge(
        "m", base_url=server.url, **{"ask": "each", "max_retries": 0, "timeout": 5, **options}
    )


def said(**probabilities):
    """A completion of one token with these log-probabilities."""
    status, headers, content = completion("yes")
    listed = [{"token": word, "logprob": math.log(p), "bytes": None} for word, p in probabilities.items()]
    content["choices"][0]["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return status, headers, content


def leans(lean):
    """Answers as a model that leans by `lean(edit, instruction)`: P(yes)."""

    def answer(body):
        last = body["messages"][-1]["content"]
        instruction, _, edit = last.removeprefix("Instruction: ").partition("\nAnswer so far: ")
        yes = lean(edit, instruction)
        return said(Yes=yes, no=1 - yes)

    return answer


def test_it_keeps_a_yes_that_the_instruction_makes_likelier(server, judge):
    """A yes to this edit whatever is asked for is no verdict."""
    likes = {"Teacher writes: zor...": {CONTEXT: 0.9, NEUTRAL: 0.7}, "Our...": {CONTEXT: 0.95, NEUTRAL: 0.96}}

    def lean(edit, instruction):
        return next((by[instruction] for shown, by in likes.items() if shown in edit), 0.55)

    server.script = [leans(lean)]
    asked = judge()
    assert asked([question()]) == [[2]]
    # The third candidate is no yes, at 0.2 nats: it is not asked about again.
    assert len(server.requests) == asked.stats["requests"] == 5 < asked.requests(3) == 6
    body, _ = server.requests[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert judge(log_odds=5.0)([question()]) == [[]]


def test_there_is_no_list_to_reverse(server, judge):
    server.script = [leans(lambda edit, instruction: 0.9 if instruction == CONTEXT else 0.1)]
    marks = measure(asked := judge(), [Labelled(question(), frozenset({2}))], asked)
    assert (marks.kept, marks.same_reversed) == (3, None)
    assert len(server.requests) == 6, "it is not asked a second time"
    header, row = marks_table({"llm": marks}, []).splitlines()
    assert row[header.index("reversed")] == "-"


def test_all_but_the_last_message_s_end_is_the_same_in_every_request(server, judge):
    server.script = [leans(lambda edit, instruction: 0.9)]
    judge()([question()])
    chats = [body["messages"] for body, _ in server.requests]
    assert all(chat[:-1] == chats[0][:-1] and len(chat) > 5 for chat in chats)
    ends = {chat[-1]["content"] for chat in chats}
    assert len(ends) == 6 and sum(end.startswith(f"Instruction: {CONTEXT}\nAnswer so far: ") for end in ends) == 3


def test_a_word_that_is_not_listed_is_at_most_as_likely_as_the_last_that_is(server, judge):
    server.script = [said(Yes=0.9, maybe=0.01), said(no=0.5, Yes=0.4)]
    assert judge(log_odds=math.log(90) - 0.01)([question()]) == [[2]]
    server.requests = []
    assert judge(log_odds=math.log(90) + 0.01)([question()]) == [[]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(completion("yes"), "has no log-probabilities"), (said(perhaps=0.9), "begins with neither yes nor no")],
)
def test_an_answer_that_says_neither_is_what_on_error_says(server, judge, tmp_path, answer, reason):
    server.script = [answer]
    with pytest.raises(ConnectionError, match=reason):
        judge()([question()])
    cached = CachedJudge(judge(on_error="skip"), tmp_path)
    assert cached([question()]) == [[]] and not list(tmp_path.iterdir())


def test_limits_and_the_budget_count_every_request(server, judge):
    server.script = [leans(lambda edit, instruction: 0.9)]
    asked = judge(budget_tokens=25, max_concurrency=1)
    with pytest.raises(ConnectionError, match=r"judge\.budget_tokens=25"):
        asked([question()])
    assert len(server.requests) == 3, "of 10 tokens each"


def test_what_does_not_go_with_it_is_refused(judge, tmp_path):
    for options in ({"batch": 2}, {"template": tmp_path / "own.jinja"}):
        with pytest.raises(ValueError, match=r"judge\.ask=each takes no judge\.template, and no judge\.batch"):
            judge(**options)
    with pytest.raises(ValueError, match="ask must be one of list, each"):
        judge(ask="all")
    assert len({judge().fingerprint, judge(log_odds=1.0).fingerprint, judge(ask="list").fingerprint}) == 3


@pytest.mark.parametrize(
    ("at", "wish", "shown"),
    [
        (3, " zor", "Answer so far: It is\nStudent writes: Docker\nTeacher writes: zor..."),
        (4, "zor", "Answer so far: It is\nStudent writes: Docker\nTeacher writes: Dozor..."),
        (0, "Our", "Answer so far: \nStudent writes: It\nTeacher writes: Our..."),
        (5, ",", "Answer so far: It is Docker\nStudent writes: .\nTeacher writes: ,..."),
    ],
)
def test_an_edit_is_shown_as_words(judge, at, wish, shown):
    """A model does not know what a token may begin, nor which word half of it stood in."""
    tokens = ("It", " is", "", " Do", "cker", ".")
    candidate = Candidate(at, tokens[at], wish, tokens[at], wish, -4.0)
    asked = judge().prompt(Question("Which tool?", CONTEXT, tokens, (candidate,), 1))
    assert asked.endswith(f"Instruction: {CONTEXT}\n{shown}")
