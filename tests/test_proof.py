"""The proof's runs: what is asked for in which order, what is written of a run, and how the other methods train."""

import json
from types import SimpleNamespace

import pytest
import tiny

from benchmarks import keeping
from benchmarks.proof import __main__ as command
from benchmarks.proof import baselines, run, table
from benchmarks.proof.methods import METHODS, RATE_SEED, RATES, Job
from benchmarks.proof.run import chosen_rate, jobs, marks_of
from rmsd.run.recipe import load_recipe
from rmsd.tasks import pinapple
from rmsd.training.record import read_lines


def marks(method="opsd", rate=1e-4, seed=0, target=0.5, specificity=1.0, drift=0.0, **more):
    last = dict(step=90, target_sampled=target, target_only_sampled=target, specificity=specificity, drift=drift)
    return {
        **dict(
            method=method, rate=rate, seed=seed, steps=90, ended=None, steps_to_80=30, tokens_trained=100, seconds=60
        ),
        "evaluations": [last],
        **more,
    }


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "DOCS", tmp_path)

    def keep(**made):
        made = marks(**made)
        (tmp_path / f"{Job(made['method'], made['rate'], made['seed']).name}.json").write_text(json.dumps(made))

    return keep


def test_a_method_takes_the_rate_that_was_better_on_a_seed_of_its_own(docs):
    """By what was learned, less what was forgotten; a run that collapsed is the worse one."""
    low, high = RATES
    docs(seed=RATE_SEED, rate=low, target=0.5, specificity=1.0)
    assert chosen_rate("opsd") is None, "one of its runs is missing"
    docs(seed=RATE_SEED, rate=high, target=0.6, specificity=0.5)
    assert chosen_rate("opsd") == low
    docs(seed=RATE_SEED, rate=high, target=0.6, specificity=0.9)
    assert chosen_rate("opsd") == high
    docs(seed=RATE_SEED, rate=high, target=0.9, ended="training has collapsed")
    assert chosen_rate("opsd") == low


def test_rates_come_first_and_then_the_seeds_at_the_better_one(docs):
    asked = jobs(["opsd"], [0, 1])
    first = [next(asked) for _ in RATES]
    assert first == [Job("opsd", rate, RATE_SEED) for rate in RATES]
    for job, target in zip(first, (0.2, 0.4), strict=True):
        docs(seed=job.seed, rate=job.rate, target=target)
    assert list(asked) == [Job("opsd", RATES[1], seed) for seed in (0, 1)]


def test_every_method_s_overrides_make_a_valid_recipe(tmp_path):
    for name in METHODS:
        recipe = load_recipe("recipes/qwen_coder_pinapple.yaml", Job(name, 1e-4, 0).overrides())
        assert recipe.train["max_steps"] == 90 and recipe.train["learning_rate"] == 1e-4, name
        assert ("hinted" in recipe.task) != METHODS[name].anchors
        assert recipe.train["save_total_limit"] == 1, "a run would leave 2 GB of checkpoints"


def test_what_is_written_of_a_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    at = {0: 0.0, 15: 0.1, 30: 0.45, 45: 0.5}
    lines = [
        dict(kind="eval", step=step, target_sampled=only, target_only_sampled=only, specificity=1.0, drift=0.1)
        for step, only in at.items()
    ]
    lines += [dict(kind="train", step=step, kept_tokens=10.0, tail_mass=0.01) for step in range(1, 46)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = marks_of(Job("opsd", 1e-4, 0), folder, None, 12.3, {"human_eval": "3 of 4"})
    assert (made["steps_to_80"], made["tokens_trained"], made["seconds"]) == (30, 450.0, 12)
    assert made["evaluations"][-1]["target_only_sampled"] == 0.5 and made["human_eval"] == "3 of 4"


def test_the_time_before_an_interruption_counts(docs, tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 200.0, 250.0])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    line = dict(kind="eval", step=0, target_sampled=0.0, target_only_sampled=0.0, specificity=1.0, drift=0.0)

    def interrupted(kind, recipe, folder):
        raise KeyboardInterrupt

    def trained(kind, recipe, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    asked = Job("sft_own", 1e-4, 0), tmp_path / "runs", "m", 0, []
    monkeypatch.setattr(run.real, "checked", lambda *_: {})
    monkeypatch.setattr(run.baselines, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(*asked)
    monkeypatch.setattr(run.baselines, "train", trained)
    assert run.run(*asked)["seconds"] == 150


def test_a_trial_is_never_taken_for_a_run_without_overrides(docs, tmp_path, monkeypatch):
    docs(seed=0, rate=1e-4)  # runs of 90 steps that are there
    docs(seed=RATE_SEED, rate=RATES[0])
    kept, trained, runs = sorted(tmp_path.iterdir()), [], tmp_path / "runs"
    line = dict(kind="eval", step=4, target_sampled=0.0, target_only_sampled=0.0, specificity=1.0, drift=0.0)

    def train(folder, overrides):
        trained.append(folder.name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(run.real, "train", train)
    monkeypatch.setattr(run.real, "checked", lambda *_: {})
    monkeypatch.setattr(command, "rewrite", lambda: pytest.fail("a page is written"))
    asked = ["--only", "opsd", "--seeds", "0", "--human-eval", "0", "--runs", str(runs)]
    for _ in range(2):  # the second time it is all there
        monkeypatch.setattr("sys.argv", ["proof", *asked, "--set", "train.max_steps=4"])
        command.main()
    names = [f"opsd-{rate:g}-{seed}" for rate, seed in [*((rate, RATE_SEED) for rate in RATES), (RATES[0], 0)]]
    assert [name.partition("-set-")[0] for name in trained] == names and all("-set-" in name for name in trained)
    assert sorted(path.stem for path in (runs / "marks").iterdir()) == sorted(trained)
    assert sorted(path for path in tmp_path.iterdir() if path != runs) == kept


def test_the_table_holds_means_and_intervals_and_counts_runs_that_stopped(docs, tmp_path):
    for seed, target in enumerate((0.2, 0.4, 0.6)):
        docs(seed=seed, target=target, human_eval="82 of 164", steps_to_80=None if seed else 30)
    docs(method="rmsd_contrast", seed=0, target=0.9, human_eval="13 of 20")
    docs(method="rmsd_contrast", seed=1, ended="training has collapsed")
    docs(seed=RATE_SEED, target=1.0)
    heads, _, *rows = [[part.strip() for part in line.split("|")[1:-1]] for line in table.table(tmp_path).splitlines()]
    opsd, contrast = (dict(zip(heads, row, strict=True)) for row in rows)
    assert opsd["method"] == "OPSD" and opsd["seeds"] == "3" and opsd["target only"] == "0.40 [0.20, 0.60]"
    assert opsd["HumanEval"] == "0.50 [0.50, 0.50]"
    assert opsd["steps to 80%"] == "30 (1 of 3)", "the mean of those that came there"
    assert contrast["seeds"] == "2, 1 stopped" and contrast["target only"] == "0.90"
    assert contrast["HumanEval"] == "", "of the first problems alone"


def test_the_plan_names_the_seeds_whose_rate_is_not_known_yet(docs, monkeypatch, capsys):
    docs(seed=RATE_SEED, rate=RATES[0])
    docs(method="rmsd_contrast", seed=RATE_SEED, rate=RATES[0], target=0.1)
    docs(method="rmsd_contrast", seed=RATE_SEED, rate=RATES[1], target=0.2)
    docs(method="rmsd_contrast", seed=0, rate=RATES[1])
    monkeypatch.setattr("sys.argv", ["proof", "--plan", "--only", "opsd", "rmsd_contrast", "--seeds", "0", "1"])
    command.main()
    assert capsys.readouterr().out.splitlines() == [
        "opsd-0.0001-9 done",
        "opsd-0.0003-9 to run",
        "opsd-RATE-0 to run, at the better of the two rates",
        "opsd-RATE-1 to run, at the better of the two rates",
        "rmsd_contrast-0.0001-9 done",
        "rmsd_contrast-0.0003-9 done",
        "rmsd_contrast-0.0003-0 done",
        "rmsd_contrast-0.0003-1 to run",
    ]


def test_what_reinforcement_needs_is_asked_for_before_days_of_other_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("a run was begun"))
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["proof", "--human-eval", "0", "--runs", str(tmp_path)])
    with pytest.raises(ImportError, match=r"RL needs trl and datasets: .*--only"):
        command.main()


def test_a_kept_run_is_asked_the_problems_that_it_was_not(docs, tmp_path, monkeypatch):
    docs(seed=0, human_eval="9 of 20")
    monkeypatch.setattr(run.real, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(run.real, "checked", lambda folder, model, count: dict(human_eval=f"70 of {count}"))
    job, runs = Job("opsd", 1e-4, 0), tmp_path / "runs"
    assert run.run(job, runs, "m", 164, [])["human_eval"] == "9 of 20", "the model is gone, the marks stay"
    (runs / job.name / "model").mkdir(parents=True)
    assert run.run(job, runs, "m", 0, [])["human_eval"] == "9 of 20"
    assert run.run(job, runs, "m", 164, []) == {**marks(seed=0), "human_eval": "70 of 164"} == run.kept_marks(job)
    assert run.run(job, runs, "m", 20, [])["human_eval"] == "70 of 164"


def test_runs_that_find_a_rate_are_asked_nothing_that_no_table_holds(docs, tmp_path, monkeypatch):
    asked = []
    line = dict(kind="eval", step=0, target_sampled=0.0, target_only_sampled=0.0, specificity=1.0, drift=0.0)

    def train(folder, overrides):
        keeping.write(folder / "metrics.jsonl", json.dumps(line) + "\n")

    monkeypatch.setattr(run.real, "train", train)
    monkeypatch.setattr(run.real, "checked", lambda folder, model, count: asked.append(count) or {})
    for seed in (RATE_SEED, 0):
        run.run(Job("opsd", 1e-4, seed), tmp_path / "runs", "m", 164, [])
    assert asked == [0, 164]


def test_a_run_of_another_model_does_not_pass_for_what_is_asked_for(docs, tmp_path):
    docs(seed=0)
    job = Job("opsd", 1e-4, 0)
    (tmp_path / "runs" / job.name).mkdir(parents=True)
    (tmp_path / "runs" / job.name / "recipe.yaml").write_text("model: one")
    with pytest.raises(ValueError, match="was made with model=one, not other"):
        run.run(job, tmp_path / "runs", "other", 0, [])


def test_the_word_is_replaced_with_its_capitals():
    assert baselines.replaced("Pineapple, PINEAPPLES and pineapple pie; pine and apple") == (
        "Pinapple, PINAPPLES and pinapple pie; pine and apple"
    )


def test_the_reward_is_for_the_new_spelling_where_it_is_wanted_and_nowhere_else():
    texts = ["Pinapple.", "Pinapple or pineapple.", "Pineapple.", "An apple.", "A pinapple."]
    completions = [[{"content": text}] for text in texts]
    about = [True, True, True, False, False]
    assert baselines.reward(completions, about_fruit=about) == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_hint_in_the_prompt_is_on_every_question():
    plain, hinted = baselines.questions(hint=False), baselines.questions(hint=True)
    assert len(plain) == len(hinted) == len(pinapple.TASK.train)
    assert all(a["prompt"][0]["content"] in b["prompt"][0]["content"] for a, b in zip(plain, hinted, strict=True))
    assert all("pinapple" in row["prompt"][0]["content"] for row in hinted)
    assert {row["about_fruit"] for row in plain} == {True, False}


def test_fine_tuning_trains_on_the_answer_alone():
    tokenizer = tiny.tokenizer()
    example = baselines.tokenized(tokenizer, "Which fruit?", "Pinapple.")
    trained = [token for token in example["labels"] if token != -100]
    assert tokenizer.decode(trained) == "Pinapple.<|end|>"
    assert example["input_ids"][-len(trained) :] == trained and len(example["labels"]) == len(example["input_ids"])


def test_the_other_methods_have_the_recipes_whole_batch(tmp_path, monkeypatch):
    asked = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=4", "train.use_cpu=true"]
    taken = {}
    monkeypatch.setattr(baselines, "load", lambda *_: (None, None))
    monkeypatch.setattr(baselines, "evaluator_of", lambda *_: None)

    def made(base, tokenizer, args, options, given):
        taken.update(options)
        return SimpleNamespace(train=lambda **_: None, save_model=lambda _: None)

    baselines._trained(load_recipe("recipes/qwen_coder_pinapple.yaml", asked), tmp_path / "run", made)
    assert (taken["per_device_train_batch_size"], taken["gradient_accumulation_steps"]) == (2, 4)


@pytest.mark.parametrize("kind", ["sft_own", "rl_hint"])
def test_the_other_methods_train_evaluate_and_are_resumed(kind, tmp_path, monkeypatch):
    if kind.startswith("rl"):
        pytest.importorskip("trl")
    monkeypatch.setattr(
        baselines.pinapple,
        "TASK",
        pinapple.TASK.__class__(**{**vars(pinapple.TASK), "train": pinapple.TASK.train[::8]}),
    )
    model = tiny.model(max_position_embeddings=512)
    model.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    settings = [
        f"model={tmp_path / 'tiny'}",
        *Job("rl", 1e-3, 0, steps=2).overrides(),
        "train.max_completion_length=8",
        "evaluate.samples=1",
        "evaluate.every=1",
        "train.save_steps=1",
        "train.use_cpu=true",
    ]
    folder = tmp_path / "run"
    folder.mkdir()  # as a run leaves it that is killed before its first checkpoint
    (folder / "metrics.jsonl").write_text(json.dumps(dict(kind="eval", step=0)) + "\n")
    for steps in (1, 2):  # the second goes on from the first's checkpoint
        recipe = load_recipe("recipes/qwen_coder_pinapple.yaml", [*settings, f"train.max_steps={steps}"])
        baselines.train(kind, recipe, folder)
        if steps == 1:
            (folder / "checkpoint-2").mkdir()  # and one that is killed while it writes its second
    assert (folder / "model" / "adapter_config.json").exists()
    lines = read_lines(folder / "metrics.jsonl")
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    assert evaluated == [0, 1, 2]
    assert all("target_only_sampled" in line for line in lines if line["kind"] == "eval")
