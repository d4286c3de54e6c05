"""What preflight says of a recipe before it is run."""

import json
from types import SimpleNamespace

import pages
import pytest
import tiny
from test_measure import ANSWERS

from rmsd.judge import Candidate, Question
from rmsd.run import probe
from rmsd.run.check import check
from rmsd.run.judging import judge
from rmsd.run.preflight import Findings, _gap, _obedience, preflight, verdict
from rmsd.run.recipe import load_recipe
from rmsd.training.trainer import RMSDTrainer


def found(*shares, untold=0.0, **more):
    return "\n".join(verdict(Findings(told=list(shares), untold=untold, **more)))


def test_a_teacher_that_does_not_obey_cannot_teach():
    said = found(0.0, 0.12, 0.0)
    assert said.startswith("verdict: no. The told teacher obeys in 4% of answers (untold 0%): training cannot teach it")
    assert "phrasing" not in said
    said = found(0.0, 0.0, 0.0, 0.0, 0.0, 0.38)
    assert said.startswith("verdict: no. The told teacher obeys in 6%") and "It obeys phrasing 6 (38%)" in said


def test_phrasings_that_work_are_named_best_first():
    said = found(0.0, 0.25, 0.5, 0.1)
    assert said.startswith("verdict: yes, by 2 of 4 phrasings.")
    assert "obeys phrasing 3 (50%), 2 (25%)" in said and "50% is a ceiling" in said
    assert found(0.9, 0.8) == "verdict: yes. The told teacher obeys in 85% of answers (untold 0%)."
    said = found(0.15, 0.12)
    assert said.startswith("verdict: hardly. The told teacher obeys in 14%") and "phrasing" not in said


def test_what_is_done_untold_is_no_lesson():
    assert found(1.0, untold=0.95).startswith("verdict: no. The student does it untold in 95%")
    assert found(0.5, untold=0.45).startswith("verdict: no."), "hardly more than untold"


def test_a_lesson_that_spreads_wants_anchors():
    assert "No anchors: told, it does so in 40%" in found(0.9, leaks=0.4)
    assert "No anchors" not in found(0.9, leaks=0.4, anchors=5) and "No anchors" not in found(0.9, leaks=0.05)


def test_columns_of_graders_with_short_names_stand_apart():
    graders = {"a": str.isupper, "b": bool}
    task = SimpleNamespace(graders=graders, requests=[], target_prompts=["Why?"], unrelated_prompts=[])
    told = [{"prompt": "Why?", "privileged_context": "Because."}]
    probe = SimpleNamespace(task=task, told=told, told_prompt=str, answers=lambda prompts: ["No."] * len(prompts))
    _, heads, row = _obedience(probe, 1, Findings()).splitlines()[:3]
    assert heads.split() == ["a", "b"] and row.split() == ["0.00", "1.00", "untold"]
    assert [heads.index(name) for name in "ab"] == [row.index(share) + 3 for share in ("0.00", "1.00")]


def test_what_the_largest_gaps_hold_is_of_each_answer_s_own():
    """Not of all answers' together, of which one with many large gaps would have nearly all."""

    def answer(gap):
        return Question("", "", ("a",) * 4, tuple(Candidate(i, "a", "b", "a", "b", gap) for i in range(4)), 2)

    probe = SimpleNamespace(args=SimpleNamespace(min_gap=0.1, num_kept=2))
    said = _gap(probe, [answer(-3.0), answer(0.2)], 2, {"rollout_tokens": 8.0}, Findings())
    assert said.endswith("the largest 2 of each answer hold 50% of it")


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "base"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model: {folder}
task: house_tool
output_dir: {tmp_path / "run"}
judge: {{kind: contrast}}
evaluate: {{max_new_tokens: 3}}
train: {{use_cpu: true, max_steps: 5, per_device_train_batch_size: 4, max_completion_length: 6, min_gap: 0.0}}
"""
    )
    return path


def test_shares_are_of_all_answers_not_of_those_with_a_candidate(recipe):
    said = preflight(load_recipe(recipe, ["train.min_gap=1000"]), prompts=3)
    assert "tokens in 3 answers untold" in said and "judge magnitude: keeps 0, in 0 of 3 answers" in said


@pytest.mark.parametrize("overrides", [[], ["lora.r=2"]])
def test_a_random_model_is_told_no_and_nothing_is_written(recipe, tmp_path, overrides, capsys):
    kept = ["judge.kind=context", "judge.on_topic=true", f"judge.cache={tmp_path / 'cache'}"]
    said = preflight(load_recipe(recipe, [*overrides, *kept]), prompts=2)
    assert "verdict: no. The told teacher obeys in 0% of answers" in said
    assert "anchors: 16 of 32 rows" in said and "contrast contexts: 16 rows by column" in said
    for name in ("magnitude", "context", "contrast"):
        assert f"judge {name}: keeps" in said
    assert "minutes for the run's 20" in said and " -> " in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert not capsys.readouterr().out, "no log of a run before the page"


@pytest.mark.parametrize("look", [lambda recipe: preflight(recipe, prompts=1), check])
def test_nothing_is_pushed_to_the_hub_nor_told_to_a_tracker(recipe, monkeypatch, look):
    made, own = [], RMSDTrainer.__init__
    monkeypatch.setattr(RMSDTrainer, "init_hf_repo", lambda self: pytest.fail("a repository is made on the Hub"))
    monkeypatch.setattr(
        RMSDTrainer, "__init__", lambda self, *args, **more: (made.append(self), own(self, *args, **more))[1]
    )
    look(load_recipe(recipe, ["train.push_to_hub=true", "train.hub_model_id=me/model", "train.report_to=tensorboard"]))
    assert [trainer.args.report_to for trainer in made] == [[]]


def test_what_a_rollout_costs_is_told_with_its_sampling_and_without_the_self_check(recipe, monkeypatch):
    now, step, sampled = [0.0], RMSDTrainer.training_step, RMSDTrainer.get_batch_samples

    def passes(seconds: float) -> list:
        now[0] += seconds
        return []

    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("rmsd.training.self_check.self_check", lambda _: passes(100.0))
    monkeypatch.setattr(RMSDTrainer, "training_step", lambda *args, **more: passes(8.0) or step(*args, **more))
    monkeypatch.setattr(RMSDTrainer, "get_batch_samples", lambda *args: passes(20.0) or sampled(*args))
    asked = probe.Probe(load_recipe(recipe))
    assert asked.step(asked.told[:2])[2] == 14.0


def test_rows_whose_context_comes_after_the_rollout_are_not_called_anchors(recipe, tmp_path):
    file, rows = tmp_path / "shop.py", tmp_path / "rows.jsonl"
    file.write_text(pages.snippet("docs/extending.md", "an environment"), encoding="utf-8")
    rows.write_text(json.dumps({"prompt": "Two teas.", "privileged_context": "", "wanted": ["tea", 2]}))
    own = ["task=null", f"data={rows}"]
    with pytest.raises(ValueError, match="all rows are anchors"):
        preflight(load_recipe(recipe, own))
    with pytest.raises(ValueError, match="what an environment tells the teacher afterwards is known in a run alone"):
        preflight(load_recipe(recipe, [*own, f"environment={file}"]))


def test_judges_are_measured_on_questions_that_are_kept(recipe, tmp_path):
    questions = tmp_path / "questions.jsonl"
    said = judge(load_recipe(recipe), questions, prompts=6)
    assert said.startswith("6 questions"), "more than the run's batch of 4"
    assert "labelled by the task's grader, written to" in said
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "base"), str(tmp_path / "none")))
    again = judge(load_recipe(recipe), questions)  # which takes no model
    lines = {line.split()[0]: line for line in again.splitlines() if line.strip()}
    assert {"magnitude", "context", "contrast"} <= lines.keys()
    assert said.splitlines()[0].split(" (")[0] == again.splitlines()[0].split(" (")[0]
    bare = [json.loads(line) for line in questions.read_text().splitlines()]
    bare = [{**line, "candidates": [{**c, "contrast": None} for c in line["candidates"]]} for line in bare]
    questions.write_text("".join(json.dumps(line) + "\n" for line in bare))
    said = judge(load_recipe(recipe, ["judge.on_topic=true"]), questions)
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "\nmagnitude" in said, "the recipe's own contrast judge, as the other, is left out"


def test_marks_that_are_what_stands_in_for_a_judge_are_said_to_be(recipe):
    pytest.importorskip("openai", reason="needs the judge extra")
    asked = ["kind=llm", "model=m", "base_url=http://127.0.0.1:9/v1", "on_error=skip", "max_retries=0"]
    said = judge(load_recipe(recipe, [f"judge.{option}" for option in asked]), ANSWERS)
    assert "note: the recipe's, llm: 32 times it did not answer, and judge.on_error=skip did" in said


def test_the_recipe_s_own_contrast_judge_is_passed_over_where_a_file_says_nothing_of_contrast(recipe, tmp_path):
    candidate = {"position": 0, "token": "c", "promoted": "d", "gap": -1.0}
    line = {"prompt": "a", "privileged_context": "b", "tokens": ["c"], "relevant": [0], "candidates": [candidate]}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(line))
    said = judge(load_recipe(recipe, ["judge.on_topic=true"]), questions)
    for name in ("contrast", "the recipe's, contrast"):
        assert f"note: {name}: the questions of the file do not hold the candidates' contrast" in said


def test_a_teacher_that_would_change_nothing_leaves_nothing_to_judge(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere by train.min_gap=1000 nats"):
        judge(load_recipe(recipe, ["train.min_gap=1000"]), tmp_path / "questions.jsonl", prompts=2)
    assert not (tmp_path / "questions.jsonl").exists()
