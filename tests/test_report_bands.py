"""Curves with seed bands in a browser: where band and line are, measured against the chart's own axes."""

import pytest
from fake_run import make_run, write_lines

from rmsd.report import write_report

# Each seed's drift by step. A seed of RMSD ended at step 20, another at 30; step 25 only seeds 1 and 3 of OPSD logged.
DRIFT = {
    ("rmsd", 1): {0: 0.0, 10: 0.2, 20: 0.5, 30: 0.6, 40: 0.7},
    ("rmsd", 2): {0: 0.0, 10: 0.3, 20: 0.9, 30: 0.8},
    ("rmsd", 3): {0: 0.0, 10: 0.7, 20: 0.1},
    ("opsd", 1): {0: 0.0, 10: 0.4, 20: 0.5, 25: 0.1, 30: 0.55, 40: 0.6},
    ("opsd", 2): {0: 0.0, 40: 0.62},
    ("opsd", 3): {25: 0.2},
}
SERIES = {"rmsd": 0, "opsd": 1}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    home, runs = tmp_path_factory.mktemp("bands"), []
    for (method, seed), values in DRIFT.items():
        runs.append(make_run(home / f"{method}-{seed}", method=method, seed=seed, steps=2))
        lines = [{"kind": "eval", "step": step, "drift": value} for step, value in values.items()]
        write_lines(runs[-1] / "metrics.jsonl", lines)
    return write_report(runs, home / "page.html")


def at(method, step):
    return [values[step] for (name, _), values in DRIFT.items() if name == method and step in values]


class Plot:
    """The page's first chart: what its paths cover at a step, in the values that its axes are labelled with."""

    def __init__(self, reader):
        self.reader = reader
        self.svg = reader.one("#eval-charts .chart > svg")
        ticks = reader.run(
            """return [...arguments[0].querySelectorAll('.tick')].map((tick) =>
              [tick.textContent, tick.getAttribute('text-anchor'), +tick.getAttribute('x')])""",
            self.svg,
        )
        rules = reader.run(
            "return [...arguments[0].querySelectorAll('.grid')].map((g) => +g.getAttribute('y1'))", self.svg
        )
        steps = [(float(text), x) for text, anchor, x in ticks if anchor == "middle"]
        values = [float(text) for text, anchor, _ in ticks if anchor == "end" and text != "step"]
        self.first, self.last = steps[0], steps[-1]
        self.bottom, self.top = (values[0], rules[0]), (values[-1], rules[-1])

    def x(self, step):
        (step0, x0), (step1, x1) = self.first, self.last
        return x0 + (step - step0) / (step1 - step0) * (x1 - x0)

    def y(self, value):
        (value0, y0), (value1, y1) = self.bottom, self.top
        return y0 + (value - value0) / (value1 - value0) * (y1 - y0)

    def band(self, method, step, aside=0.0):
        """The least and the greatest value that the band covers at a step, or `aside` units of the plot beside it."""
        return self._covered("isPointInFill", "band", method, self.x(step) + aside)

    def line(self, method, step):
        return self._covered("isPointInStroke", "line", method, self.x(step))

    def _covered(self, test, part, method, x):
        ys = self.reader.run(
            """const [svg, test, part, series, x, top, bottom] = arguments, point = svg.createSVGPoint(), ys = [];
            const drawn = svg.querySelectorAll(':scope > g')[series].querySelector('.' + part);
            drawn.style.strokeDasharray = 'none'; // measured between its dashes, too
            for (point.x = x, point.y = top - 3; point.y < bottom + 3; point.y += 0.1)
              if (drawn[test](point)) ys.push(point.y);
            return ys.length ? [ys.at(-1), ys[0]] : null;""",
            self.svg,
            test,
            part,
            SERIES[method],
            x,
            self.top[1],
            self.bottom[1],
        )
        (value0, y0), (value1, y1) = self.bottom, self.top
        return ys and tuple(value0 + (y - y0) / (y1 - y0) * (value1 - value0) for y in ys)


@pytest.fixture
def plot(reader, page):
    return Plot(reader.open(page))


NEAR = 0.01  # of the axis, which is one: a little more than a pixel


@pytest.mark.parametrize(("method", "step"), [("rmsd", 10), ("rmsd", 20), ("rmsd", 30), ("opsd", 25), ("opsd", 40)])
def test_the_band_reaches_from_the_least_to_the_greatest_seed(plot, method, step):
    assert len(at(method, step)) > 1
    covered = plot.band(method, step, aside=-0.2)  # a path's very end may or may not count as inside
    assert covered == pytest.approx((min(at(method, step)), max(at(method, step))), abs=NEAR)


@pytest.mark.parametrize(("method", "step"), [("rmsd", 35), ("rmsd", 40), ("opsd", 10), ("opsd", 20), ("opsd", 30)])
def test_one_seed_has_no_band(plot, method, step):
    assert len(at(method, step)) < 2
    assert plot.band(method, step) is None
    assert plot.line(method, step) is not None


def test_a_step_alone_between_single_seeds_has_a_narrow_band(plot):
    assert plot.band("opsd", 25) is not None
    assert plot.band("opsd", 25, aside=4) is plot.band("opsd", 25, aside=-4) is None


@pytest.mark.parametrize(("method", "step"), [(m, s) for m in SERIES for s in (0, 10, 20, 30, 40)] + [("opsd", 25)])
def test_the_line_passes_through_the_mean_of_the_seeds_that_have_the_step(plot, method, step):
    mean = sum(at(method, step)) / len(at(method, step))
    assert sum(plot.line(method, step)) / 2 == pytest.approx(mean, abs=NEAR)
    dots = plot.reader.run(
        "return [...arguments[0].querySelectorAll('.dot')].map((d) => [+d.getAttribute('cx'), +d.getAttribute('cy')])",
        plot.svg,
    )
    assert any((x, y) == pytest.approx((plot.x(step), plot.y(mean)), abs=0.15) for x, y in dots)


@pytest.mark.parametrize("dark", [False, True])
def test_the_band_is_seen_in_both_themes(reader, page, dark):
    plot = Plot(reader.open(page, dark=dark))
    paper, band, line = (
        plot.reader.pixel(plot.svg, plot.x(step), plot.y(v)) for step, v in ((35, 0.2), (20, 0.3), (20, 0.5))
    )
    far = [sum(abs(a - b) for a, b in zip(one, paper, strict=True)) for one in (band, line)]
    assert 30 < far[0] < far[1] / 2, "a band is fainter than its line, and no paper"


def test_the_legend_says_what_line_and_band_are_and_how_many_seeds(reader, page):
    reader.open(page)
    assert reader.texts(".series li") == [
        "RMSD · context judge, 3 seeds",
        "OPSD, 3 seeds",
        "Line: the mean over seeds. Band: from the least to the greatest, wherever two or more have a value.",
    ]
    assert len(reader.all(".series .key .band")) == 2


def test_the_values_at_a_step_say_their_range_and_how_many_seeds(reader, page):
    reader.open(page)
    reader.run("document.querySelector('#eval-charts .chart').focus()")
    read = {}
    for key in (reader.Keys.HOME, *[reader.Keys.ARROW_RIGHT] * 5):
        reader.press(key)
        step, *values = reader.texts("#eval-charts .readout span")
        read[step] = values
    assert read == {
        "step 0": ["0.000 0.000 to 0.000", "0.000 0.000 to 0.000, 2 of 3 seeds"],
        "step 10": ["0.400 0.200 to 0.700", "0.400 1 of 3 seeds"],
        "step 20": ["0.500 0.100 to 0.900", "0.500 1 of 3 seeds"],
        "step 25": ["0.150 0.100 to 0.200, 2 of 3 seeds"],
        "step 30": ["0.700 0.600 to 0.800, 2 of 3 seeds", "0.550 1 of 3 seeds"],
        "step 40": ["0.700 1 of 3 seeds", "0.610 0.600 to 0.620, 2 of 3 seeds"],
    }
    spoken = reader.run("return document.querySelector('#eval-charts title').textContent")
    assert "OPSD, mean of 3 seeds: from 0.000 at step 0 to 0.610 at step 40 (0.600 to 0.620, 2 of 3 seeds)" in spoken


def test_single_runs_have_lines_alone(tmp_path, reader):
    one, other = (make_run(tmp_path / method, method=method, steps=3) for method in ("rmsd", "opsd"))
    reader.open(write_report([one]))
    assert not reader.all(".band") and not reader.all(".series") and "seeds" not in reader.one("body").text
    reader.open(write_report([one, other]))
    assert not reader.all(".band") and reader.texts(".series li") == ["RMSD · context judge", "OPSD"]
    assert len(reader.all("#eval-charts .chart:first-child g > .line")) == 2
