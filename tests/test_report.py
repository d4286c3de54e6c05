"""The report's page as text: its numbers, how large it gets, how it refuses."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from fake_run import CONTEXT, TOKENS, make_run, rollout, write_lines

from rmsd.report import MAX_CHARTS, write_report
from rmsd.report.charts import HEIGHT, WIDTH, chart, figure, nice_ticks
from rmsd.report.runs import group, read_run


class Page(HTMLParser):
    """Elements by name, text of the table's cells, and the inline texts of style and script."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.inline, self._open = [], {}, None
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.data = json.loads(self.inline["application/json"], parse_constant=pytest.fail)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("style", "script"):
            self._open = dict(attrs).get("type", tag)
            assert self._open not in self.inline, "a second inline element"

    def handle_data(self, text):
        if self._open:
            self.inline[self._open] = self.inline.get(self._open, "") + text

    def handle_endtag(self, tag):
        self._open = None

    def row(self, metric):
        """The figures of a row of the table, before first."""
        row = re.search(rf'<tr data-metric="{metric}">(.*?)</tr>', self.html, re.DOTALL)[1]
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
        return [re.sub(r"<[^>]+>|\s+", " ", cell).split() for cell in cells]


def page_of(*runs, **options):
    return Page(write_report(runs, **options))


def evals(*values, **more):
    return [{"kind": "eval", "step": 10 * i, "target_greedy": v, **more} for i, v in enumerate(values)]


# ---- content -------------------------------------------------------------------------------------------------------


def test_table_shows_first_and_last_evaluation(tmp_path):
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", evals(0.125, 0.5, 0.875, drift=0.0321, specificity=1.0))
    page = page_of(run)
    assert page.row("target_greedy") == [["0.125"], ["0.875"]]
    assert page.row("drift") == [["0.032"], ["0.032"]]
    assert "in nats a token" in page.html
    assert "<h1>house_tool</h1>" in page.html and "the context judge" in page.html


def test_what_episodes_come_to_is_explained_as_what_it_is(tmp_path):
    """Turns are no share of prompts, and of a tool's errors fewer are better."""
    run = make_run(tmp_path / "run")
    names = ("solved", "turns", "tokens", "tool_errors", "target")
    write_lines(run / "metrics.jsonl", evals(0.5, 0.5, **{f"{name}_greedy": 0.5 for name in names}, turns_sampled=0.5))
    page = page_of(run)
    rows = dict(re.findall(r'<tr data-metric="(\w+)">(.*?)</tr>', page.html, re.DOTALL))
    said = {name: re.search("<small>(.*?)</small>", row)[1] for name, row in rows.items()}
    assert said["turns_greedy"].startswith("the model") and said["tokens_greedy"].startswith("tokens the model wrote")
    assert said["solved_greedy"].startswith("share of held-out requests") and said["solved_greedy"].endswith(
        "higher is better"
    )
    assert said["tool_errors_greedy"].startswith("share of the tool calls") and said["tool_errors_greedy"].endswith(
        "lower is better"
    )
    assert said["turns_sampled"].startswith("sampled") and "wanted behaviour" in said["target_greedy"]
    are_shares = {name for name, row in rows.items() if "from-to" in row}
    assert are_shares == {"solved_greedy", "tool_errors_greedy", "target_greedy"}


def test_what_a_judge_costs_is_on_the_page_however_much_else_is_logged(tmp_path):
    run = make_run(tmp_path / "run")
    others = {f"seconds_of_part_{i}": 1.0 for i in range(2 * MAX_CHARTS)}
    asked = {"judge_requests": 8, "judge_tokens": 5120}
    lines = [{"kind": "train", "step": step, "loss": 0.5, **others, **asked} for step in (1, 2)]
    write_lines(run / "metrics.jsonl", lines)
    page = page_of(run)
    drawn = {chart["name"]: chart["lines"][0]["text"][0][0] for chart in page.data["charts"]}
    assert len(drawn) == MAX_CHARTS and drawn["loss"] == "0.500"
    assert (drawn["judge requests"], drawn["judge tokens"]) == ("8", "5120")
    assert "requests to the model that judges" in page.html and "tokens that the model that judges read" in page.html


def test_rollouts_reach_the_page_whole(tmp_path):
    page = page_of(make_run(tmp_path / "run", steps=4, per_step=2))
    assert len(page.data["rollouts"]) == 8
    first = page.data["rollouts"][0]
    assert first["tokens"] == TOKENS and len(first["student"]) == len(TOKENS)
    assert page.data["texts"][first["context"]] == CONTEXT
    assert page.data["texts"].count(CONTEXT) == 1
    assert first["preferred"][str(TOKENS.index(" Dep"))] == " zor"
    assert "All 8 recorded answers" in page.html


def test_later_line_of_a_repeated_step_wins(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [*evals(0.0, 0.4), *evals(0.0, 0.6)]
    lines += [{"kind": "train", "step": 3, "loss": loss} for loss in (0.5, 0.25)]
    write_lines(run / "metrics.jsonl", lines)
    # Steps 1 to 3, then a resume from step 1's checkpoint: 2 and 3 again.
    write_lines(run / "rollouts.jsonl", [rollout(step, 0, "rmsd", 9) for step in (1, 2, 2, 3, 2, 3)])
    read = read_run(run)
    assert [line["target_greedy"] for line in read.evals] == [0.0, 0.6]
    assert [line["loss"] for line in read.train] == [0.25]
    assert [line["step"] for line in read.rollouts] == [1, 2, 3]


def test_torn_last_line_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"kind": "train", "step": 4, "lo')
    page = page_of(run)
    assert "the last line of metrics.jsonl is torn" in page.html
    assert "the last line of rollouts.jsonl is torn" in page.html
    assert len(page.data["rollouts"]) == 9


def test_malformed_rollouts_are_left_out_and_said(tmp_path):
    good = rollout(1, 0, "rmsd", 3)
    wrong = ({"kept": [999]}, {"unwritten": [-1]}, {"divergence": [0.1]}, {"tokens": None}, {"teacher_prompt": 3})
    bad = [*({**good, **one} for one in wrong), {"step": 1}]
    page = page_of(make_run(tmp_path / "run", rollouts=[good, *bad]))
    assert len(page.data["rollouts"]) == 1
    assert "6 malformed lines of rollouts.jsonl left out" in page.html


def test_numbers_that_are_not_finite(tmp_path):
    one = rollout(1, 0, "rmsd", 3)
    one["teacher_logprob"][2], one["divergence"][2], one["student_logprob"][3] = float("-inf"), None, float("nan")
    run = make_run(tmp_path / "run", rollouts=[one])
    line = {"kind": "train", "step": 1, "grad_norm": 10**400, "odd": True, "text": "x"}
    write_lines(run / "metrics.jsonl", [{**line, "loss": float("nan")}, {**line, "step": 2, "loss": 0.5}])
    page = page_of(run)  # Page refuses NaN and Infinity in the JSON
    shown = page.data["rollouts"][0]
    assert (shown["teacher"][2], shown["divergence"][2], shown["student"][3]) == (None, None, None)
    assert [c["name"] for c in page.data["charts"]] == ["loss"]
    assert page.data["charts"][0]["lines"][0]["steps"] == [2]


def test_a_divergence_that_an_engine_did_not_tell_is_no_number(tmp_path):
    one = rollout(1, 0, "rmsd", 3)
    del one["divergence"]
    page = page_of(make_run(tmp_path / "run", rollouts=[one]))
    assert page.data["rollouts"][0]["divergence"] is None and "malformed" not in page.html


def test_run_without_evaluations_rollouts_or_recipe(tmp_path):
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": 0.5}])
    (run / "rollouts.jsonl").unlink()
    (run / "recipe.yaml").unlink()
    page = page_of(run)
    for text in ("no evaluations", "No answers were recorded", "recipe.yaml is missing", "rollouts.jsonl is missing"):
        assert text in page.html


def test_run_evaluated_once_has_no_after(tmp_path):
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", evals(0.25))
    assert page_of(run).row("target_greedy") == [["0.250"], ["not", "evaluated"]]


# ---- curves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[0.5], [0.0, 0.0], [3.0, 3.0, 3.0], [-2.0, 5.0], [1e-9, 2e-9], [1e20, 3e25], [7.0] * 999]
)
def test_curves_stay_in_their_frame(tmp_path, values):
    run = make_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [{"kind": "train", "step": i + 5, "loss": v} for i, v in enumerate(values)])
    one = chart(group([read_run(run)]), "train", "loss", unit_interval=False)
    points = [tuple(map(float, p.split(","))) for p in re.findall(r"[-\d.]+,[-\d.]+", one.lines[0].path)]
    assert 1 <= len(points) <= 240
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert one.lines[0].steps[0] == 5 and one.lines[0].steps[-1] == len(values) + 4
    assert 2 <= len(one.y_ticks) <= 8
    assert len({text for _, text in one.y_ticks}) == len(one.y_ticks), "two ticks read alike"


@pytest.mark.parametrize(("least", "greatest"), [(0, 1), (0.03, 0.92), (-7.3, 2.2), (12, 13), (0, 1e-7)])
def test_ticks_enclose_the_values(least, greatest):
    ticks = nice_ticks(least, greatest, 4)
    assert ticks[0] <= least + 1e-12 and ticks[-1] >= greatest - 1e-12 and len(ticks) <= 8


def test_figures_read_well():
    shown = [figure(v) for v in (0.0, 0.74, -0.5, 5e-5, 123.456, None)]
    assert shown == ["0.000", "0.740", "−0.500", "5.00e−5", "123.5", "–"]  # noqa: RUF001
    assert [figure(v, whole=True) for v in (31, 176.5)] == ["31", "176.5"]
    assert [figure(v, peak=0.1) for v in (5e-8, -5e-8, 0.1)] == ["0.000", "0.000", "0.100"]


# ---- size ----------------------------------------------------------------------------------------------------------


def test_many_rollouts_are_sampled_evenly(tmp_path):
    many = [rollout(step, i, "rmsd", 400) for step in range(1, 401) for i in range(8)]
    run = make_run(tmp_path / "run", steps=400, rollouts=many)
    page = page_of(run)
    assert len(page.html.encode()) < 3_000_000
    shown = [one["step"] for one in page.data["rollouts"]]
    assert f"{len(shown)} of 3200 recorded answers" in page.html
    assert 500 < len(shown) < 3200 and shown[0] == 1 and shown[-1] == 400
    quarters = [sum(100 * q < step <= 100 * (q + 1) for step in shown) for q in range(4)]
    assert max(quarters) - min(quarters) <= 2


def test_long_answers_prompts_and_contexts_are_cut(tmp_path):
    n = 5000
    long = {
        **rollout(1, 0, "rmsd", 3),
        "prompt": "p" * 100_000,
        "tokens": ["<" * 300] * n,
        **{name: [-1.0] * n for name in ("student_logprob", "teacher_logprob", "divergence")},
        "candidates": [4999, 3],
        "kept": [4999],
    }
    page = page_of(make_run(tmp_path / "run", rollouts=[long, rollout(2, 0, "rmsd", 3)]))
    assert len(page.html.encode()) < 3_000_000
    assert any(len(text) < 21_000 and "80,000 more characters" in text for text in page.data["texts"])
    assert page.data["rollouts"], "one long answer must not push out every other"


# ---- refusals ------------------------------------------------------------------------------------------------------


def _write(run, name, text):
    run.mkdir(exist_ok=True)
    (run / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda run: None, FileNotFoundError, "does not exist"),
        (lambda run: run.mkdir(), FileNotFoundError, "holds no run: it has no metrics.jsonl"),
        (lambda run: _write(run, "metrics.jsonl", ""), ValueError, "no readable line"),
        (lambda run: _write(run, "metrics.jsonl", '{"kind": "tr'), ValueError, "no readable line"),
        (lambda run: _write(make_run(run), "recipe.yaml", "- a\n- b"), ValueError, "must be a mapping"),
        (lambda run: _write(make_run(run), "recipe.yaml", "a: [\n\n"), ValueError, "is not YAML"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, prepare, error, message):
    prepare(tmp_path / "run")
    with pytest.raises(error, match=message) as caught:
        write_report([tmp_path / "run"])
    assert "\n" not in str(caught.value) and "run" in str(caught.value)


def test_no_runs_or_nowhere_to_write(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])
    run = make_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report([run], tmp_path / "no" / "page.html")


def test_import_is_light():
    code = "import rmsd.report, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
