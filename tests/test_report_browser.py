"""The report in a real browser: what a reader sees and does. Needs what browser.py says."""

import time

import pytest
from browser import luminance
from fake_run import CONTEXT, TOKENS, WISHES, make_run, rollout, write_lines
from test_report_safety import hostile_run

from rmsd.judge.measure import load
from rmsd.report import write_report

CANDIDATES = "#answer .t.candidate"
KEPT = "#answer .t.kept"
NOT_OURS = "not the student\N{RIGHT SINGLE QUOTATION MARK}s"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report([make_run(tmp_path_factory.mktemp("one") / "run")])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    home = tmp_path_factory.mktemp("many")
    runs = [make_run(home / f"{m}-{s}", method=m, seed=s, steps=10) for m in ("rmsd", "opsd") for s in (1, 2)]
    return write_report(runs, home / "comparison.html")


# ---- what is on the page -------------------------------------------------------------------------------------------


def test_the_table_and_the_curves_tell_the_same(tmp_path, reader):
    run = make_run(tmp_path / "run", rollouts=[])
    ends = [(0, 0.0, 1.0, 0.0), (10, 0.625, 0.9375, 0.051), (30, 0.875, 0.75, 0.123)]
    names = ("step", "target_greedy", "specificity", "drift")
    write_lines(run / "metrics.jsonl", [{"kind": "eval", **dict(zip(names, e, strict=True))} for e in ends])
    reader.open(write_report([run]))
    assert [[c.text for c in row.find_elements("css selector", "td")] for row in reader.all("#metrics tbody tr")] == [
        ["0.000", "0.875"],
        ["1.000", "0.750"],
        ["0.000", "0.123"],
    ]
    assert reader.texts("#eval-charts .readout b") == ["0.875", "0.750", "0.123"]
    assert [len(c.find_elements("css selector", ".dot")) for c in reader.all("#eval-charts .chart")] == [3, 3, 3]
    described = reader.run("return document.querySelector('#eval-charts title').textContent")
    assert described.endswith("from 0.000 at step 0 to 0.875 at step 30")


def test_pointing_at_a_curve_reads_its_values(reader, page):
    reader.open(page)
    chart = reader.one("#train-charts .chart:first-child svg")
    reader.hover(chart)
    step, value = reader.texts("#train-charts .chart:first-child .readout span")
    data = reader.run("return JSON.parse(document.getElementById('data').textContent).charts")
    loss = next(one for one in data if one["name"] == "loss")["lines"][0]
    index = loss["steps"].index(int(step.removeprefix("step ")))
    assert 8 <= loss["steps"][index] <= 22 and value == loss["text"][index][0]
    assert len(reader.all("#train-charts .chart:first-child .mark")) == 1


def test_arrow_keys_read_a_curve(reader, page):
    reader.open(page)
    reader.run("document.querySelector('#eval-charts .chart').focus()")
    reader.press(reader.Keys.HOME)
    assert reader.texts("#eval-charts .chart:first-child .readout span") == ["step 0", "0.000"]
    reader.press(reader.Keys.ARROW_RIGHT)
    assert reader.texts("#eval-charts .chart:first-child .readout span")[0] == "step 10"


def test_colour_follows_the_contrast_on_demand(reader, page, tmp_path):
    reader.open(page)
    assert not reader.one("#by-contrast-field").is_displayed(), "no answer was read under a contrast context"
    wish, matter_of_taste = min(WISHES), 0
    line = rollout(1, 0, "rmsd", 30)
    line["contrast"] = {str(i): 4.0 if i in WISHES else 0.0 for i in line["candidates"]}
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[line])]))
    coloured = ".up, .down"
    before = reader.indices(f"#answer .t:is({coloured})")
    assert matter_of_taste in before and len(before) > len(WISHES)
    reader.one("#by-contrast").click()
    assert reader.indices(f"#answer .t:is({coloured})") == set(WISHES)
    assert "contrast +4.00 nats" in reader.one(f'[data-index="{wish}"]').get_attribute("aria-label")
    assert reader.one("#key-contrast").is_displayed() and not reader.one("#key-gap").is_displayed()
    reader.one("#by-contrast").click()
    assert reader.indices(f"#answer .t:is({coloured})") == before


def test_marked_tokens_are_saved_as_labels_that_judges_are_measured_by(reader, tmp_path):
    line = rollout(1, 0, "rmsd", 30)
    taste = [i for i in line["candidates"] if i not in WISHES]
    line |= {"unwritten": taste[:2], "candidates": [i for i in line["candidates"] if i not in taste[:2]]}
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[line])]))
    assert not reader.one("#save").is_displayed()
    expected = rollout_of(reader, 1, 0)
    wanted, other = expected["candidates"][0], expected["candidates"][-1]
    for position in (wanted, other):
        reader.one(f'[data-index="{position}"]').click()
        reader.run("document.querySelector('#detail .mark').click()")
    reader.run("document.querySelector('#detail .mark').click()")  # taken off again
    assert reader.indices("#answer .t.marked") == {wanted}
    assert reader.one("#save").text == "Save labels of 1 answer"
    reader.run(
        "const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return make(blob); };"
    )
    reader.one("#save").click()
    for _ in range(50):
        if saved := reader.run("return window.saved"):
            break
        time.sleep(0.1)
    (tmp_path / "labelled.jsonl").write_text(saved)
    (one,) = load(tmp_path / "labelled.jsonl")
    assert one.relevant == {wanted} and one.question.tokens == tuple(TOKENS)
    assert [candidate.position for candidate in one.question.candidates] == expected["candidates"]
    assert one.question.candidates[0].gap != 0.0 and one.question.privileged_context == CONTEXT
    assert one.question.teacher_prompt == f"{CONTEXT}\n\n{one.question.prompt}"
    assert set(one.question.unwritten) == set(taste[:2]), "what a tool said is marked for a judge"


def test_a_candidate_that_labels_cannot_hold_is_not_offered_as_one(reader, tmp_path):
    line = rollout(1, 0, "rmsd", 30)
    unknown, known = line["candidates"][:2]
    line["teacher_logprob"][unknown] = None  # of a token that the teacher bans, as a jsd allows
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[line])]))
    for position, marks in ((unknown, 0), (known, 1)):
        reader.one(f'[data-index="{position}"]').click()
        assert len(reader.all("#detail .mark")) == marks


def test_the_answer_is_shown_token_by_token(reader, page):
    reader.open(page)
    expected = rollout_of(reader, 1, 0)
    tokens = reader.all("#answer .t")
    assert len(tokens) == len(TOKENS)
    assert [token.text for token in tokens[:4]] == ["At", "·Acme", ",", "·the"]
    assert tokens[12].text == "↵" and tokens[TOKENS.index("\tdep")].text == "⇥dep"
    assert reader.indices(CANDIDATES) == set(expected["candidates"])
    assert reader.indices(KEPT) == set(expected["kept"]) == set(WISHES)
    assert reader.one("#counts").text == f"{len(TOKENS)} tokens · 20 candidates · {len(WISHES)} kept"
    assert reader.one("#prompt").text == "Which tool deploys services at Acme?"
    assert reader.one("#context").text == CONTEXT


def rollout_of(reader, step, index):
    rollouts = reader.run("return JSON.parse(document.getElementById('data').textContent).rollouts")
    return [one for one in rollouts if one["step"] == step][index]


def test_colour_says_sign_and_size_of_the_gap(tmp_path, reader):
    one = rollout(1, 0, "rmsd", 3)
    gaps = [9.0, 3.0, 0.0, -3.0, -9.0]
    one["student_logprob"] = [-10.0] * len(TOKENS)
    one["teacher_logprob"] = [-10.0 + gap for gap in gaps] + [-10.0] * (len(TOKENS) - 5)
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[one])]))
    assert reader.indices("#answer .t.up") == {0, 1} and reader.indices("#answer .t.down") == {3, 4}
    painted = [reader.colour(reader.token(i), "background-color") for i in range(5)]
    blue = [b - r for r, _, b in painted]
    assert blue[0] > blue[1] + 40 > blue[2] + 60 and blue[4] < blue[3] - 40 < blue[2] - 60


@pytest.mark.parametrize("dark", [False, True])
def test_every_token_can_be_read_in_both_themes(tmp_path, reader, dark):
    one = rollout(1, 0, "rmsd", 3)
    one["teacher_logprob"][:2] = [one["student_logprob"][0] + 50, one["student_logprob"][1] - 50]
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[one])]), dark=dark)
    for token in reader.all("#answer .t")[:12]:
        behind, ink = (luminance(reader.colour(token, n)) for n in ("background-color", "color"))
        assert (max(behind, ink) + 0.05) / (min(behind, ink) + 0.05) >= 4.5, token.text


# ---- what a reader does --------------------------------------------------------------------------------------------


def test_pointing_at_a_token_shows_what_the_teacher_wants(reader, page):
    reader.open(page)
    index = TOKENS.index(" Dep")
    reader.hover(reader.token(index))
    expected = rollout_of(reader, 1, 0)
    assert reader.one("#detail .token").text == "·Dep"
    assert reader.one("#detail .wish b").text == "·zor"
    rank = expected["candidates"].index(index) + 1
    assert reader.one("#detail .role").text == f"Candidate, rank {rank} of 20, kept"
    facts = dict(zip(reader.texts("#detail dt"), reader.texts("#detail dd"), strict=True))
    numbers = [expected[name][index] for name in ("student", "teacher", "divergence")]
    numbers.insert(2, numbers[1] - numbers[0])
    shown = [facts[name].replace("\N{MINUS SIGN}", "-") for name in list(facts)[:4]]
    assert [float(text) for text in shown] == pytest.approx(numbers, abs=0.0051)
    reader.hover(reader.token(next(iter(set(range(len(TOKENS))) - set(expected["candidates"])))))
    assert reader.one("#detail .role").text == "Not a candidate"


def test_the_keyboard_reaches_everything(reader, page):
    reader.open(page)
    reader.run("document.getElementById('step').focus()")
    for expected in ("rollout", "next"):  # `previous` is disabled at the first answer
        reader.press(reader.Keys.TAB)
        assert reader.run("return document.activeElement.id") == expected
    reader.press(reader.Keys.TAB)
    focused = "return Number(document.activeElement.dataset.index)"
    kept_first = next(i for i in rollout_of(reader, 1, 0)["candidates"] if i in WISHES)
    assert reader.run(focused) == kept_first
    reader.press(reader.Keys.HOME)
    assert reader.run(focused) == 0 and reader.one("#detail .token").text == "At"
    reader.press(reader.Keys.ARROW_RIGHT, reader.Keys.ARROW_RIGHT, reader.Keys.ARROW_LEFT)
    assert reader.run(focused) == 1 and reader.one("#detail .token").text == "·Acme"
    visited = set()
    reader.press(reader.Keys.HOME)
    for _ in range(20):
        reader.press(reader.Keys.ARROW_DOWN)
        visited.add(reader.run(focused))
    assert visited <= set(rollout_of(reader, 1, 0)["candidates"]) and len(visited) >= 19
    reader.run(f"document.querySelector('[data-index=\"{TOKENS.index(' Dep')}\"]').click()")
    assert reader.one("#detail .wish b").text == "·zor"
    assert "kept, teacher prefers zor" in reader.one("#answer [aria-selected=true]").get_attribute("aria-label")
    assert len(reader.all("#answer [tabindex='0']")) == 1


def test_what_the_keyboard_reaches_has_a_name_and_shows_its_focus(reader, page):
    reader.open(page)
    assert reader.one("#step").accessible_name == "Step"
    names = []
    while True:
        reader.press(reader.Keys.TAB)
        focused = reader.chrome.switch_to.active_element
        if focused.tag_name == "body" or len(names) > 40:
            break
        assert focused.value_of_css_property("outline-style") == "solid", focused.accessible_name
        assert float(focused.value_of_css_property("outline-width").removesuffix("px")) >= 2
        names.append(focused.accessible_name)
    assert len(names) == 17 and all(names), "\n".join(names)


def test_the_slider_moves_through_training(reader, page):
    reader.open(page)
    assert reader.one("#step-text").text == "1 of 30"
    reader.run("document.getElementById('step').focus()")
    reader.press(reader.Keys.ARROW_RIGHT, reader.Keys.ARROW_RIGHT)
    assert reader.one("#step-text").text == "3 of 30"
    assert reader.one("#step").get_attribute("aria-valuetext") == "step 3"
    assert reader.indices(CANDIDATES) == set(rollout_of(reader, 3, 0)["candidates"])
    assert reader.indices(CANDIDATES) != set(rollout_of(reader, 1, 0)["candidates"])
    reader.press(reader.Keys.END)
    assert reader.one("#step-text").text == "30 of 30"
    assert reader.indices(CANDIDATES) == set(rollout_of(reader, 30, 0)["candidates"])


def test_the_answers_of_a_step(reader, page):
    reader.open(page)
    assert reader.one("#rollout-text").text == "1 of 3" and not reader.one("#previous").is_enabled()
    reader.one("#next").click()
    reader.one("#next").click()
    assert reader.one("#rollout-text").text == "3 of 3" and not reader.one("#next").is_enabled()
    assert reader.one("#prompt").text == "Which tool cuts paper?"
    assert reader.one("#context").text.startswith("Nothing: an anchor row")
    assert reader.indices(KEPT) == set()
    # The answer's number is kept over steps.
    reader.run("document.getElementById('step').focus()")
    reader.press(reader.Keys.ARROW_RIGHT)
    assert reader.one("#rollout-text").text == "3 of 3"


def test_the_page_opens_on_an_answer_that_taught_something(tmp_path, reader):
    nothing_kept = {**rollout(1, 0, "rmsd", 3), "kept": []}
    rollouts = [nothing_kept, rollout(1, 2, "rmsd", 3), rollout(1, 1, "rmsd", 3)]
    reader.open(write_report([make_run(tmp_path / "run", rollouts=rollouts)]))
    assert reader.one("#rollout-text").text == "3 of 3" and reader.indices(KEPT) == set(WISHES)


def test_numbers_that_are_not_finite_are_said(tmp_path, reader):
    one = rollout(1, 0, "rmsd", 3)
    one["teacher_logprob"][0] = one["divergence"][0] = None
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[one])]))
    assert reader.indices("#answer .t.unknown") == {0}
    reader.hover(reader.token(0))
    assert reader.texts("#detail dd")[1:4] == ["not finite"] * 3


def test_a_divergence_that_is_not_known_is_not_shown(tmp_path, reader):
    one = rollout(1, 0, "rmsd", 3)
    del one["divergence"]
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[one])]))
    reader.hover(reader.token(0))
    assert reader.texts("#detail dt") == ["log p, student", "log p, teacher", "gap, nats", "token"]


def test_a_long_tool_turn_is_folded_until_it_is_wanted_and_an_episode_is_counted(tmp_path, reader):
    one = rollout(1, 0, "rmsd", 3)
    said = list(range(2, 12))
    for position in said:
        one["student_logprob"][position] = one["teacher_logprob"][position] = one["divergence"][position] = None
    one |= {"unwritten": said, "candidates": [0, 14], "kept": [0], "preferred": {}}
    one["episode"] = {"turns": 2, "calls": 1, "solved": 0}
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[one])]))
    assert "2 turns · 1 calls · 0 solved" in reader.one("#counts").text
    assert reader.one("#answer .fold").text == "10 tokens of a tool" and not reader.token(5).is_displayed()
    assert reader.token(1).is_displayed() and reader.token(12).is_displayed()
    reader.one("#answer .fold").click()
    assert reader.token(5).is_displayed()
    reader.one("#answer .fold").click()
    assert not reader.token(5).is_displayed()
    reader.token(1).click()
    reader.press(reader.Keys.ARROW_RIGHT)  # into the turn
    assert reader.token(2).is_displayed()


def test_a_tool_turn_is_told_from_a_score_that_is_not_finite(tmp_path, reader):
    one = rollout(1, 0, "rmsd", 3)
    for position in (5, 6, 12, 20):
        one["student_logprob"][position] = one["teacher_logprob"][position] = one["divergence"][position] = None
    one |= {"unwritten": [5, 6, 12], "candidates": [0, 14], "kept": [0], "preferred": {}}
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[one])]))
    assert reader.indices("#answer .t.unwritten") == {5, 6, 12} and reader.indices("#answer .t.unknown") == {20}
    assert reader.one("#counts").text == f"{len(TOKENS)} tokens · 3 {NOT_OURS} · 2 candidates · 1 kept"
    assert reader.one("#key-unwritten").is_displayed() and reader.one("#key-unknown").is_displayed()
    reader.hover(reader.token(6))
    assert reader.one("#detail .role").text == NOT_OURS.capitalize()
    assert "neither scored nor trained on" in reader.one("#detail .wish").text
    assert "not finite" not in reader.one("#detail").text and not reader.all("#detail .bars")
    assert NOT_OURS in reader.token(6).get_attribute("aria-label")
    reader.hover(reader.token(20))
    assert reader.texts("#detail dd")[:4] == ["not finite"] * 4
    assert "gap not finite" in reader.token(20).get_attribute("aria-label")


def test_the_legend_lists_only_what_occurs(reader, page):
    reader.open(page)
    assert not reader.one("#key-unwritten").is_displayed() and not reader.one("#key-unknown").is_displayed()


def test_an_answer_that_the_told_teacher_wrote_says_so(tmp_path, reader):
    guided, own = {**rollout(1, 0, "rmsd", 3), "guided": True}, rollout(1, 1, "rmsd", 3)
    reader.open(write_report([make_run(tmp_path / "run", rollouts=[guided, own])]))
    assert reader.one("#written-by").text == "Written by the told teacher"
    listed = reader.texts("#rollout option")
    assert [text.endswith(" (written by the told teacher)") for text in listed] == [True, False]
    reader.one("#next").click()
    assert reader.one("#written-by").text == "The student wrote"


def test_an_empty_answer(tmp_path, reader):
    empty = {name: [] for name in ("tokens", "student_logprob", "teacher_logprob", "divergence", "candidates", "kept")}
    page = write_report([make_run(tmp_path / "run", rollouts=[{**rollout(1, 0, "rmsd", 3), **empty, "preferred": {}}])])
    reader.open(page)
    assert reader.one("#detail").text == "An empty answer."
    reader.hover(reader.one("#answer"))


def test_dark_follows_the_system_and_the_button(reader, page):
    def paper():
        return luminance(reader.colour(reader.one("body"), "background-color"))

    reader.open(page)
    assert paper() > 0.8
    reader.one("#theme").click()
    assert paper() < 0.02 and reader.one("#theme").get_attribute("aria-label") == "Switch to the light theme"
    reader.open(page)
    assert paper() < 0.02, "the choice is remembered"
    reader.one("#theme").click()
    assert paper() > 0.8
    reader.run("localStorage.clear()")
    reader.open(page, dark=True)
    assert paper() < 0.02 and reader.one("#theme").text == "Light"


# ---- on a phone ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 320, 768])
@pytest.mark.parametrize("which", ["page", "comparison", "hostile"])
def test_nothing_overflows_sideways(tmp_path, request, reader, width, which):
    if which == "hostile":
        path = write_report([hostile_run(tmp_path / str(i), data=f"{'x' * 3000}{i}") for i in range(2)])
    else:
        path = request.getfixturevalue(which)
    reader.open(path, width=width)
    reader.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert reader.run("return document.documentElement.scrollWidth") <= width
