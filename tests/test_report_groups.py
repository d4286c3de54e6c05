"""Several runs on one page: what makes a group, its mean and range, its band; as numbers, and in a browser."""

import json

import pytest
from fake_run import TOKENS, WISHES, make_run, rollout, write_lines
from test_report import evals, page_of

from rmsd.report import write_report
from rmsd.report.runs import group, read_run


def test_seeds_are_one_series_with_mean_and_range(tmp_path):
    runs = []
    for method, ends in (("rmsd", (0.8, 1.0)), ("opsd", (0.4, 0.5))):
        for seed, end in enumerate(ends):
            runs.append(make_run(tmp_path / f"{method}{seed}", method=method, seed=seed))
            write_lines(runs[-1] / "metrics.jsonl", evals(0.0, end))
    page = page_of(*runs, output=tmp_path / "all.html")
    assert page.row("target_greedy") == [
        ["0.000"],
        ["0.900", "0.800", "to", "1.000"],
        ["0.450", "0.400", "to", "0.500"],
    ]
    assert [line["means"] for line in page.data["charts"][0]["lines"]] == [[0.0, 0.9], [0.0, 0.45]]
    assert page.data["charts"][0]["lines"][0]["text"][1] == ["0.900", "0.800 to 1.000"]
    assert page.data["runs"][0] == "RMSD · context judge, seed 0"
    assert page.html.count('<path class="band"') == 2


def test_a_run_that_has_a_metric_only_at_its_end_is_shown_beside_one_that_has_it_throughout(tmp_path):
    """As one resumed with other evaluate.samples."""
    runs = [make_run(tmp_path / method, method=method) for method in ("rmsd", "opsd")]
    for run, first in zip(runs, ({"target_sampled": 0.25}, {}), strict=True):
        lines = evals(0.0, 1.0, target_sampled=0.75)
        write_lines(run / "metrics.jsonl", [{**evals(0.0)[0], **first}, lines[1]])
    page = page_of(*runs, output=tmp_path / "all.html")
    assert page.row("target_sampled") == [["0.250"], ["0.750"], ["0.750"]]


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path):
    runs = [
        read_run(make_run(tmp_path / f"{rate}-{seed}", seed=seed, recipe={"train": {"learning_rate": rate}}))
        for rate in (5e-5, 1e-4)
        for seed in (1, 2)
    ]
    series = group(runs)
    assert [len(one.runs) for one in series] == [2, 2]
    assert [one.label for one in series] == [
        "RMSD · context judge · learning_rate 5e-05",
        "RMSD · context judge · learning_rate 0.0001",
    ]


def test_where_and_what_a_run_wrote_makes_no_series_of_its_own(tmp_path):
    """As by --quiet, or by a tracker's name that holds the seed."""
    wrote = ({"disable_tqdm": True, "recorded_rollouts": 0}, {"report_to": "wandb", "run_name": "2"})
    runs = [
        read_run(make_run(tmp_path / f"{seed}", seed=seed, recipe={"train": {"max_steps": 30, **more}}))
        for seed, more in enumerate(({}, *wrote))
    ]
    assert [one.members for one in group(runs)] == ["3 seeds"]


def test_judges_make_series_of_their_own(tmp_path):
    runs = [read_run(make_run(tmp_path / judge, judge=judge)) for judge in ("context", "magnitude")]
    assert [one.label for one in group(runs)] == ["RMSD · context judge", "RMSD · magnitude judge"]


def test_only_what_tells_two_of_one_name_apart_is_in_their_names(tmp_path):
    """OPSD asks no judge, and the judge's kind is then part of the name only where it is all that differs."""
    opsd = [make_run(tmp_path / kind, method="opsd", judge=kind) for kind in ("context", "magnitude")]
    rmsd = make_run(tmp_path / "rmsd", recipe={"train": {"learning_rate": 1.0}})
    labels = [one.label for one in group(list(map(read_run, (*opsd, rmsd))))]
    assert labels == ["OPSD · judge.kind context", "OPSD · judge.kind magnitude", "RMSD · context judge"]


def test_a_seed_is_counted_once(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    twice = page_of(run, f"{tmp_path}/./run", output=tmp_path / "page.html")
    assert len(twice.data["runs"]) == 1 and 'class="band"' not in twice.html
    again = page_of(run, make_run(tmp_path / "again", steps=2), output=tmp_path / "page.html")
    assert ", 2 runs<" in again.html and "2 seeds" not in again.html
    assert again.data["runs"] == [f"RMSD · context judge, seed 1, {path}" for path in (run, tmp_path / "again")]


def test_a_seed_without_a_metric_is_not_in_its_mean(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    for run, value in zip(runs, (0.5, 1.0, None), strict=True):
        write_lines(run / "metrics.jsonl", evals(0.0, value))
    page = page_of(*runs)
    assert page.row("target_greedy")[1] == ["0.750", "0.500", "to", "1.000,", "2", "of", "3", "seeds"]
    assert page.data["charts"][0]["lines"][0]["text"][1] == ["0.750", "0.500 to 1.000, 2 of 3 seeds"]


def test_the_table_says_when_runs_were_evaluated_last_if_that_differs(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    write_lines(runs[0] / "metrics.jsonl", evals(0.0, 0.5))
    write_lines(runs[1] / "metrics.jsonl", evals(0.0, 0.5, 0.7))
    assert "<small>mean of 2 seeds, range; after 10 to 20 steps</small>" in page_of(*runs).html
    write_lines(runs[1] / "metrics.jsonl", evals(0.0, 0.7))
    assert "<small>mean of 2 seeds, range</small>" in page_of(*runs).html


def test_where_the_page_goes(tmp_path):
    runs = [make_run(tmp_path / "runs" / str(seed), seed=seed, steps=2) for seed in (1, 2)]
    assert write_report(runs[:1]) == runs[0] / "report.html"
    assert write_report(runs) == tmp_path / "runs" / "report.html", "a run's own page is not overwritten"
    assert write_report(runs, tmp_path / "page.html") == tmp_path / "page.html"


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """OPSD learns at another rate, and RMSD's second seed recorded answers at other steps."""
    home = tmp_path_factory.mktemp("many")
    runs = [
        make_run(
            home / f"{method}-{seed}", method=method, seed=seed, steps=10, recipe={"train": {"learning_rate": rate}}
        )
        for method, rate in (("rmsd", 5e-5), ("opsd", 2e-5))
        for seed in (1, 2)
    ]
    write_lines(runs[1] / "rollouts.jsonl", [rollout(step, 0, "rmsd", 10) for step in (2, 4, 6, 8)])
    return write_report(runs, home / "comparison.html")


def test_methods_stand_side_by_side(reader, comparison):
    reader.open(comparison)
    heads = reader.texts("#metrics thead th")
    assert [head.splitlines()[:2] for head in heads[2:]] == [
        ["RMSD · context judge", "mean of 2 seeds, range"],
        ["OPSD", "mean of 2 seeds, range"],
    ]
    lines = reader.all("#eval-charts .chart:first-child g > .line")
    assert len(lines) == len(reader.all("#eval-charts .chart:first-child g > .band")) == 2
    strokes = [reader.colour(line, "stroke") for line in lines]
    assert sum(abs(a - b) for a, b in zip(*strokes, strict=True)) > 100


def test_what_else_differs_is_listed(reader, comparison):
    reader.open(comparison)
    assert reader.texts("#differences thead th") == ["Key", "RMSD · context judge", "OPSD"]
    assert reader.texts("#differences tbody th") == ["train.learning_rate"]
    assert reader.texts("#differences tbody td") == ["5e-05", "2e-05"]


def test_a_run_is_chosen_for_its_tokens(reader, comparison):
    reader.open(comparison)
    kept = "#answer .t.kept"
    assert reader.texts("#run option") == [
        "RMSD · context judge, seed 1",
        "RMSD · context judge, seed 2",
        "OPSD, seed 1",
        "OPSD, seed 2",
    ]
    assert len(reader.all(kept)) == len(WISHES)
    reader.run("document.getElementById('run').focus()")
    reader.press("O")
    assert len(reader.all(kept)) == len(TOKENS), "OPSD trains on every token"


def test_another_run_is_shown_at_the_nearest_step(reader, comparison):
    reader.open(comparison)
    reader.run("document.getElementById('step').focus()")
    reader.press(*[reader.Keys.ARROW_RIGHT] * 6)
    assert reader.one("#step-text").text == "7 of 10"
    reader.run("document.getElementById('run').focus()")
    reader.press(reader.Keys.ARROW_DOWN)
    assert reader.one("#step-text").text == "6 of 8"
    reader.press(reader.Keys.ARROW_DOWN)
    assert reader.one("#step-text").text == "6 of 10"


def test_series_are_told_apart_by_their_dashes(tmp_path, reader):
    """Where colour is not seen: in the legend, the table, the plots and the values read out; for more than six, too."""
    rates = [float(f"{i}e-5") for i in range(1, 9)]
    runs = [make_run(tmp_path / str(i), steps=3, recipe={"train": {"learning_rate": r}}) for i, r in enumerate(rates)]
    reader.open(write_report(runs))
    looks = {}
    for place in (".series li", "#metrics thead", "#eval-charts .chart:first-child g", "#eval-charts .readout"):
        lines = reader.all(f"{place} .line")[: len(rates)]
        looks[place] = [
            (line.value_of_css_property("stroke-dasharray"), line.value_of_css_property("stroke")) for line in lines
        ]
    assert len(set(map(json.dumps, looks.values()))) == 1, "a series looks the same everywhere"
    one = looks[".series li"]
    assert len({dash for dash, _ in one[:6]}) == 6 and len(set(one)) == len(rates)
