"""The SVG of one answer: which answer it is, what is marked, and that a rollout's text is only text."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from rmsd.report.picture import THEMES, write_picture

SVG = "{http://www.w3.org/2000/svg}"


def rollout(step, kept, gaps, tokens=("A", "b", "\n"), context="be told"):
    return {
        "step": step,
        "prompt": "<script>ask</script>",
        "privileged_context": context,
        "tokens": list(tokens),
        "student_logprob": [-1.0] * len(tokens),
        "teacher_logprob": [-1.0 - gap for gap in gaps],
        "candidates": [0, 1],
        "kept": kept,
        "preferred": {str(p): " Z & co" for p in (0, 1)},
    }


@pytest.fixture
def run(tmp_path):
    lines = [
        rollout(1, [0], [1.0, 9.0, 0.0]),
        rollout(2, [0, 1], [0.5, 3.0, 0.0]),
        rollout(3, [1], [0.0, 8.0, 0.0], context=""),  # an anchor, whose teacher was told nothing
        rollout(4, [], [9.0, 9.0, 9.0]),
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "loss": 1.0}\n')
    return tmp_path


def drawn(path):
    return ElementTree.parse(path).getroot()


@pytest.mark.parametrize("theme", THEMES)
def test_the_answer_whose_kept_token_differs_most_is_drawn(run, tmp_path, theme):
    root = drawn(write_picture(run, tmp_path / "a.svg", theme=theme))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert root.find(f"{SVG}title").text == "An answer of step 2: 2 of 3 tokens are candidates, 2 kept"
    assert {"A", "b", "\u21b5", "<script>ask</script>", "be told"} <= set(texts)
    assert texts.count("\u2192Z & co") == 2, "what the teacher would write, below each kept token"
    outlined = [box for box in root.iter(f"{SVG}rect") if box.get("stroke") == THEMES[theme]["kept"]]
    assert len(outlined) == 3, "two kept tokens, and the legend's"
    assert root.find(f"{SVG}script") is None


def test_a_step_may_be_asked_for_and_nothing_to_draw_is_said(run, tmp_path):
    assert "step 1" in drawn(write_picture(run, tmp_path / "a.svg", step=1)).find(f"{SVG}title").text
    for step in (3, 4, 5):
        with pytest.raises(ValueError, match=f"step {step} of .* has no recorded answer with a kept token"):
            write_picture(run, tmp_path / "b.svg", step=step)
    with pytest.raises(ValueError, match="theme must be one of light, dark, not 'sepia'"):
        write_picture(run, tmp_path / "b.svg", theme="sepia")
    assert not (tmp_path / "b.svg").exists()


def test_a_long_answer_wraps_and_ends(run, tmp_path):
    with (run / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(rollout(9, [0], [9.5] * 3000, tokens=["word "] * 3000)) + "\n")
    root = drawn(write_picture(run, tmp_path / "a.svg"))
    width, height = map(float, root.get("viewBox").split()[2:])
    boxes = [(float(b.get("x")), float(b.get("y")), float(b.get("width"))) for b in root.iter(f"{SVG}rect")]
    assert all(x + w <= width and y < height for x, y, w in boxes) and height < 1000
    assert "\u2026" in [element.text for element in root.iter(f"{SVG}text")]
