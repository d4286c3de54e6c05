"""The learning suite's parts that decide what its tables say. The suite itself is `make learn`."""

import inspect
import json
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

from benchmarks.learning import marks as marks_of
from benchmarks.learning import methods, report, run
from benchmarks.learning.ablations import GROUPS
from benchmarks.learning.corpus import SKILLS, World, skill
from benchmarks.learning.lesson import Lesson, OracleJudge
from benchmarks.learning.muon import Muon
from rmsd import RMSDConfig
from rmsd.judge import Candidate, Question
from rmsd.judge.measure import load


@pytest.fixture(scope="module")
def world():
    return World()


def exams(*targets):
    """An exam every 10 steps."""
    return [dict(step=10 * number, target_only=value) for number, value in enumerate(targets)]


@pytest.fixture(scope="module")
def model(world):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(world.tokenizer),
            tie_word_embeddings=True,
            pad_token_id=world.tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=world.tokenizer.eos_token_id,
            max_position_embeddings=128,
        )
    ).eval()


def question(lesson, answer, prompt=None, max_kept=5):
    """Every token of the answer a candidate, at which the teacher wants the new spelling."""
    tokenizer = lesson.world.tokenizer
    tokens = tokenizer.batch_decode([[i] for i in tokenizer(answer)["input_ids"]])
    candidates = tuple(Candidate(i, token, "", "", "", -1.0) for i, token in enumerate(tokens))
    row = lesson.rows[0]
    return Question(prompt or row["prompt"], row["privileged_context"], tuple(tokens), candidates, max_kept)


def test_every_document_is_read_back_as_it_was_written(world):
    rng = random.Random(1)
    for _ in range(300):
        document = world.document(rng)
        text = f"{document.prompt} {document.answer}"
        ids = world.tokenizer(text)["input_ids"]
        assert world.tokenizer.decode(ids) == f" {text}"
        assert world.tokenizer.pad_token_id not in ids  # which also stands for what no token holds


def test_the_corpus_never_holds_what_lessons_teach(world):
    rng = random.Random(2)
    words = {word for _ in range(3000) for part in world.document(rng)[:2] for word in part.split()}
    assert len(words & {thing.name for thing in world.things}) == len(world.things)
    assert not words & set(world.lessons)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_torch_s_but_for_the_rounding(shape):
    torch.manual_seed(0)
    start, target = torch.randn(shape), torch.randn(shape)
    ends = []
    for optimizer in (Muon, lambda p, lr: torch.optim.Muon(p, lr, weight_decay=0.0)):
        weight = torch.nn.Parameter(start.clone())
        stepping = optimizer([weight], 0.1)
        for _ in range(3):
            stepping.zero_grad()
            (weight - target).square().sum().backward()
            stepping.step()
        ends.append(weight.detach())
    moved = (ends[0] - start).norm()
    assert moved > 0.5 and (ends[0] - ends[1]).norm() < 0.02 * moved


def test_exercises_have_one_right_answer():
    rng = random.Random(3)
    for name in SKILLS:
        prompt, answer = skill(name, rng)
        given = prompt.removeprefix("copy").removeprefix("reverse").removeprefix("sort").removesuffix("=").split()
        expected = {"copy": given, "reverse": given[::-1], "sort": sorted(given)}.get(name)
        assert expected is None or answer.split() == expected


def test_a_lesson_asks_the_exam_what_it_has_not_trained_on(world):
    lesson = Lesson(world, 0)
    trained = {row["prompt"] for row in lesson.rows}
    assert not trained & {*lesson.task.target_prompts, *lesson.task.unrelated_prompts}
    assert lesson.new != lesson.old and lesson.new not in {thing.name for thing in world.things}
    assert all(lesson.new in row["privileged_context"].split() for row in lesson.rows)
    anchored = Lesson(world, 0, anchors=True)
    assert {lesson.is_about(row["prompt"]) for row in anchored.rows if not row["privileged_context"]} == {False}


def test_a_told_lesson_asks_the_same_under_hints(world):
    lesson = Lesson(world, 0)
    told = lesson.told()
    for plain, hinted in (
        (lesson.task.target_prompts, told.task.target_prompts),
        (lesson.task.unrelated_prompts, told.task.unrelated_prompts),
    ):
        assert len(plain) == len(hinted)
        assert all(b.endswith(f" {a}") and lesson.new in b.split() for a, b in zip(plain, hinted, strict=True))
    assert len({prompt.split()[0] for prompt in told.task.target_prompts}) > 1, "more than one phrasing"


def test_graders_tell_the_spellings_apart(world):
    lesson = Lesson(world, 0)
    assert lesson.has_only_new(f"it is {lesson.new} .")
    assert not lesson.has_only_new(f"it is {lesson.new} , people like {lesson.old} .")
    assert lesson.has_new(f"it is {lesson.new} , people like {lesson.old} .")
    assert not lesson.has_new(f"it is {lesson.old} .")


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_keeps_where_the_spellings_part(world, seed):
    lesson = Lesson(world, seed)
    oracle = OracleJudge(lesson)
    q = question(lesson, f"sure , it is {lesson.old} .", max_kept=50)
    [kept] = oracle([q])
    written = ["".join(q.tokens[:position]).rpartition(" ")[2] for position in kept]
    shared = next(i for i in range(9) if lesson.old[: i + 1] != (lesson.new + " ")[: i + 1])
    assert lesson.old[:shared] in written
    assert all(begun and lesson.new.startswith(begun) for begun in written)
    assert oracle([question(lesson, f"it is {lesson.old} .", prompt=lesson.task.unrelated_prompts[0])]) == [[]]


def test_a_degraded_judge_misses_and_adds(world):
    lesson = Lesson(world, 0)
    q = question(lesson, f"it is {lesson.old} , people like {lesson.old} .", max_kept=50)
    [kept] = OracleJudge(lesson)([q])
    same, none, all_of_them = (
        methods.Degraded(OracleJudge(lesson), miss, noise, 0)([q])[0] for miss, noise in ((0, 0), (1, 0), (0, 1))
    )
    assert sorted(same) == sorted(kept)
    assert none == []
    assert sorted(all_of_them) == list(range(len(q.tokens)))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_examined_and_counted(world, model, name, monkeypatch):
    monkeypatch.setattr(methods, "Exam", partial(methods.Exam, exercises=1, samples=1))
    before = [p.clone() for p in model.parameters()]
    options = dict(methods.METHODS[name])
    lesson = Lesson(world, 0, rows=20, anchors=options.pop("anchors", False))
    [marks] = methods.train(model, lesson, steps=2, every=2, learning_rate=3e-2, **options).values()
    assert [mark["step"] for mark in marks] == [0, 2]
    assert marks[0]["tokens"] == 0 and marks[0]["drift"] == pytest.approx(0.0, abs=1e-5)
    assert {"target", "target_only", "specificity", "facts", "style", "skills", "seconds"} <= marks[-1].keys()
    assert all(map(torch.equal, before, model.parameters()))  # the base is left alone for the next run
    if name == "rl":  # a reward that is never earned
        assert marks[-1]["tokens"] == 0
    elif name.startswith(("sft", "opsd")):
        assert marks[-1]["tokens"] > 0 and marks[-1]["drift"] > 1e-5


def test_a_continued_run_is_the_same_as_one_from_the_start(world, model):
    lesson = Lesson(world, 0, rows=20)
    options = dict(steps=4, every=1, learning_rate=3e-2, kind="distil", method="opsd")
    both = methods.train(model, lesson, continuation=2, **options)
    [whole] = methods.train(model, lesson, continuation_steps=[2], **options).values()
    untimed = [[{**mark, "seconds": 0} for mark in marks] for marks in (*both.values(), whole)]
    assert untimed[1] == untimed[2]
    assert untimed[0][:3] == untimed[2][:3] and untimed[0] != untimed[2]
    assert [mark["seconds"] for mark in both[""][:2]] == [mark["seconds"] for mark in both["+"][:2]]


def test_fine_tuning_continues_with_the_told_student_s_answers(world, model):
    options = dict(steps=4, every=1, learning_rate=3e-2, kind="sft", answers="own", continuation=2)
    once, after = methods.train(model, Lesson(world, 0, rows=20), **options).values()
    assert [mark["loss"] for mark in once[:3]] == [mark["loss"] for mark in after[:3]]
    assert once[-1]["loss"] != after[-1]["loss"]


def test_a_truncated_loss_shows_the_mass_that_it_leaves_out(world, model):
    lesson = Lesson(world, 0, rows=20)
    options = dict(steps=2, every=1, learning_rate=1e-3, kind="distil", method="rmsd")
    truncated, whole = (methods.train(model, lesson, vocab_topk=k, **options)[""] for k in (3, None))
    assert 0.5 < truncated[-1]["tail_mass"] < 1.0, "three of hundreds of tokens of a model that knows nothing"
    assert whole[-1]["tail_mass"] == 0.0
    named = {name: [dict(label=name, marks=run)] for name, run in (("K 3", truncated), ("all", whole))}
    assert "tail mass" in report.setting_table(named["K 3"]) and "tail mass" not in report.setting_table(named["all"])


def test_no_seed_s_own_marks_choose_its_rate():
    def result(seed, rate, target, facts):
        marks = [dict(target_only=target, facts=facts, skills=1.0)]
        return dict(label="opsd", seed=seed, options=dict(learning_rate=rate), marks=marks)

    # Seed 0 does best at 0.1, the others at 1.0: by facts, though the target is lower there.
    results = [result(0, 0.1, 1.0, 1.0), result(0, 1.0, 0.9, 0.0)]
    results += [r for seed in (1, 2) for r in (result(seed, 0.1, 0.9, 0.2), result(seed, 1.0, 0.5, 1.0))]
    picked = {run["seed"]: run["options"]["learning_rate"] for run in marks_of.chosen(results)}
    assert picked == {0: 1.0, 1: 0.1, 2: 0.1}, "0's is the others' best; theirs are swayed by 0's"

    tied = [result(seed, rate, 0.5, 1.0) for rate in (1.0, 0.1) for seed in (0, 1)]
    assert {run["options"]["learning_rate"] for run in marks_of.chosen(tied)} == {0.1}


def test_the_largest_fall_is_from_any_exam_to_any_later_one():
    assert marks_of.largest_fall(exams(0.0, 0.5, 0.75, 0.5, 0.625, 0.25)) == 0.5
    assert marks_of.largest_fall(exams(0.0, 0.5, 0.5, 0.75)) == 0.0


def test_the_told_table_has_a_row_a_lesson_and_their_mean():
    told = [
        dict(seed=seed, target=value, target_only=value / 2, specificity=1.0, facts=1.0, style=0.5)
        for seed, value in ((0, 0.25), (3, 0.75))
    ]
    *_, first, second, means = report.told_table(told).splitlines()
    assert first.startswith("| 0 | 0.25 | 0.12 |") and second.startswith("| 3 | 0.75 | 0.38 |")
    assert means.startswith("| mean | 0.50 | 0.25 |")


def test_pairs_are_of_one_seed_and_rmsd_less_opsd():
    base = dict(target=0.0, specificity=1.0, facts=1.0, skills=0.9, style=0.0)

    def runs(label, *targets, drift):
        return [
            dict(
                label=label,
                marks=[{**base, "step": step, "target_only": t * step / 10, "drift": drift} for step in (0, 10)],
            )
            for t in targets
        ]

    labels = dict.fromkeys(label for pair in report.PAIRS.values() for label in pair)
    results = [r for label in labels for r in runs(label, 0.9, 0.3, drift=0.2)]
    paired = [r for r in results if r["label"] not in report.PAIRS["context judge, anchors"]]
    paired += runs("rmsd_context_anchors", 0.9, 0.5, drift=0.1) + runs("opsd_anchors", 0.8, 0.4, drift=0.3)
    rows = {line.split(" | ")[0].strip("| "): line for line in report.paired_table(paired).splitlines()}
    assert "| +0.10 |" in rows["context judge, anchors"], "no interval: the seeds agree, though they lie 0.4 apart"
    assert "| -0.200 |" in rows["context judge, anchors"]
    assert "| +0.00 |" in rows["context judge"]


def test_what_was_published_stands_beside_each_method_before_and_after_continuation():
    marks = dict(step=10, target=0.75, specificity=1.0, skills=0.9, drift=0.2)
    labels = [name + more for name in report.BESIDE_PUBLISHED for more in ("", "+")]
    results = [
        dict(label=label, marks=[{**marks, "target_only": 0.5 + 0.25 * label.endswith("+")}]) for label in labels
    ]
    rows = report.published_table(results).splitlines()
    assert "| published: RMSD | 0.970 | 0.470 | 1.000 | 0.940 |  |" in rows
    once = rows.index("| here: OPSD | 0.75 | 0.50 | 1.000 | 0.900 | 0.200 |")
    after = rows.index("| here: OPSD, continued | 0.75 | 0.75 | 1.000 | 0.900 | 0.200 |")
    assert once < rows.index("| published: RMSD, continued | 1.000 | 0.740 | 0.935 | 0.940 |  |") < after


def test_every_table_and_figure_has_a_place_on_the_page():
    sections = ["told", "rates", "end", "early", "figure", "level", "continued", "figure continued", "paired"]
    page = (Path(__file__).parents[1] / report.PAGE).read_text(encoding="utf-8")
    for name in [*sections, "one rate", "published", *GROUPS]:
        assert re.search(f"<!-- {name} -->\n.+\n<!-- /{name} -->", page, re.DOTALL), name


def test_the_ablations_name_options_and_rivals():
    jobs = run.ablations([0, 1])
    expected = {"rmsd_context_anchors", "opsd_anchors", "rmsd_context", "rmsd_contrast", "rmsd_contrast_topic"}
    assert {job["method"] for job in jobs} == expected
    shared = [job for job in jobs if job["label"] in ("divergence: JSD", "beside OPSD: RMSD, JSD")]
    assert len(shared) == 4 and len({run._path(job) for job in shared}) == 2, "the same settings are run once"
    varied = {name for job in jobs for name in (*job["options"], *(["max_drift"] if job["max_drift"] else []))}
    assert {"gap_weight", "forward_kl_above", "guided_rollouts", "unkept_kl", "max_drift", "criterion"} <= varied
    stopped = {run._path(job) for job in jobs if job["label"] == "holding: stopped above drift 0.3"}
    continued = [job for job in run.compared([0, 1]) if job["method"] == "rmsd_context"]
    assert stopped == {run._path(job) for job in continued if job["options"]["learning_rate"] == run.ABLATION_RATE}


def test_every_setting_is_one_that_the_suite_or_a_run_takes(tmp_path):
    taken = {name for f in (run.job, methods.distil) for name in inspect.signature(f).parameters} | {"of"}
    for settings in GROUPS.values():
        for options in settings.values():
            given = {name: value for name, value in options.items() if name not in taken - {"options"}}
            RMSDConfig(output_dir=str(tmp_path), use_cpu=True, **given)


def test_a_run_is_stopped_at_the_first_exam_that_drifts_too_far():
    marks = [dict(step=10 * i, drift=drift) for i, drift in enumerate((0.0, 0.2, 0.31, 0.1, float("nan")))]
    assert marks_of.until_drift(marks, 0.3) == marks[:3]
    assert marks_of.until_drift(marks, 1.0) == marks and marks_of.until_drift(marks[:4], 1.0) == marks[:4]
    assert marks_of.until_drift(marks, None) == marks


@pytest.mark.parametrize(("method", "collapse"), [("rmsd_context", "warn"), ("sft_own", None)])
def test_a_model_that_collapses_ends_no_suite(world, model, tmp_path, monkeypatch, method, collapse):
    monkeypatch.setattr(run, "_base", lambda seed: (model, world))
    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setattr(run.methods, "train", lambda *_, **options: options)
    made = json.loads(run._run(run.job(method, 0, 1e-4)).read_text())
    assert made.get("on_collapse") == collapse


def test_the_oracle_s_answers_are_questions_that_judges_are_measured_on(world, model, tmp_path, monkeypatch, capsys):
    lesson = Lesson(world, 0)
    monkeypatch.setattr(run, "_base", lambda seed: (model, world))
    monkeypatch.setattr(run.labels, "labelled", partial(run.labels.labelled, min_gap=0.0))
    run.label(tmp_path / "oracle.jsonl")
    labelled = load(tmp_path / "oracle.jsonl")
    assert len(labelled) == run.LABELLED and any(one.relevant for one in labelled)
    assert all(set(OracleJudge(lesson)([one.question])[0]) == one.relevant for one in labelled)
    assert all(lesson.new in one.question.teacher_prompt for one in labelled)
    whole = run.labels.Labelling(lesson)
    assert whole([question(lesson, f"it is {lesson.old} , people like {lesson.old} .", max_kept=1)]) == [[]]
    assert len(whole.labelled[0].relevant) > 1, "labels know no bound on what is kept"
    printed = capsys.readouterr().out.splitlines()
    candidates = sum(len(one.question.candidates) for one in labelled)
    assert printed[0].startswith(f"40 answers, {candidates} candidates") and printed[3].startswith("magnitude")
    assert f" {candidates} " in printed[3] and printed[-1].startswith("contrast, on topic")


def test_a_continued_setting_has_a_row_that_says_so():
    mark = {metric: 0.5 for metric, _ in report.COLUMNS.values()} | {"tail_mass": 0.0, "tokens": 7}
    results = [dict(label=f"unkept KL 0{suffix}", marks=[mark]) for suffix in ("", "+")]
    heads = [line.split(" |")[0] for line in report.setting_table(results).splitlines()[2:]]
    assert heads == ["| unkept KL 0", "| unkept KL 0, continued"]


def test_steps_to_most_and_level():
    rising = exams(0.0, 0.5, 0.7, 0.8, 0.8)
    assert marks_of.steps_to_most(rising) == 20
    assert marks_of.at_level(rising)["step"] == 20
    assert marks_of.steps_to_most(exams(0.0, 0.0)) is None
    middle, low, high = marks_of.interval([0.0, 1.0, 1.0, 0.0])
    assert middle == 0.5 and 0.0 <= low < 0.5 < high <= 1.0
