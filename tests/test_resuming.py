"""A resumed run heeds its recipe: rates and the rest are today's, and what cannot change is refused by name."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import yaml

from rmsd.run.recipe import load_recipe
from rmsd.run.resuming import check_output_dir, check_resumed, save_recipe
from rmsd.run.train import train


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text(json.dumps(tiny.ROWS[0]) + "\n" + json.dumps(tiny.ROWS[3]) + "\n")
    recipe = folder / "recipe.yaml"
    arguments = dict(
        max_steps=2,
        use_cpu=True,
        max_completion_length=4,
        learning_rate=1e-3,
        save_steps=1,
        self_check=False,
        lr_scheduler_type="linear",
        per_device_train_batch_size=2,
        disable_tqdm=True,
        weight_decay=0.1,
    )
    values = dict(model=str(folder / "model"), data=str(folder / "rows.jsonl"), judge={"kind": "magnitude"})
    recipe.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run"), "train": arguments}))
    train(load_recipe(recipe))
    return recipe


def test_rate_schedule_and_decay_are_the_resumed_runs(begun, monkeypatch):
    from rmsd.training.trainer import RMSDTrainer

    made = []
    load = RMSDTrainer._load_optimizer_and_scheduler
    monkeypatch.setattr(
        RMSDTrainer, "_load_optimizer_and_scheduler", lambda self, path: (load(self, path), made.append(self))[0]
    )
    changes = ["train.max_steps=4", "train.learning_rate=1e-5", "train.weight_decay=0.0", "train.adam_beta1=0.5"]
    train(load_recipe(begun, ["resume=true", "train.lr_scheduler_type=constant", *changes]))
    run = begun.parent / "run"
    rates = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rates == [1e-3, 5e-4, 1e-5, 1e-5]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["learning_rate"] == 1e-5
    groups = made[0].optimizer.param_groups
    assert all(group["weight_decay"] == 0.0 and group["betas"] == (0.5, 0.999) for group in groups)
    assert made[0].state.global_step == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optim=sgd", 'cannot change train.optim: the run was begun with "adamw_torch.*", the recipe says "sgd"'),
        ("seed=5", "cannot change seed: the run was begun with 0, the recipe says 5"),
        ("train.gradient_accumulation_steps=2", "cannot change train.gradient_accumulation_steps"),
        ("lora.r=4", "cannot change lora: the run was begun with null"),
        ("data=other.jsonl", "cannot change data"),
        ("train.teacher=live", "cannot change train.teacher"),
        ("train.max_steps=1", "is of step [24]: train.max_steps=1 leaves nothing to train"),
    ],
)
def test_what_a_checkpoint_was_made_by_cannot_change(begun, monkeypatch, override, message):
    monkeypatch.setattr("rmsd.run.train.load_model", lambda *a, **k: pytest.fail("nothing is to be loaded"))
    (begun.parent / "other.jsonl").write_text(json.dumps(tiny.ROWS[0]) + "\n")
    monkeypatch.chdir(begun.parent)
    with pytest.raises(ValueError, match=message):
        train(load_recipe(begun, ["resume=true", "train.max_steps=6", override]))


def test_a_schedule_that_has_a_state_of_its_own_cannot_change(begun):
    (checkpoint, *_) = (begun.parent / "run").glob("checkpoint-*")
    override = "train.lr_scheduler_type=reduce_lr_on_plateau"
    with pytest.raises(ValueError, match=r"cannot change train.lr_scheduler_type"):
        check_resumed(load_recipe(begun, ["train.max_steps=6", override]), checkpoint)


def test_another_optimizers_state_is_refused_without_a_recipe_too(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = tiny.trainer(tmp_path, optim="sgd", max_steps=2)
    with pytest.raises(ValueError, match="optimizer is of another kind than this run's"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_run_that_is_resumed_from_its_last_step_makes_no_other(tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=1, per_device_train_batch_size=1)
    tiny.trainer(tmp_path, **options).train()
    resumed = tiny.trainer(tmp_path, **options)  # of four rows, so within an epoch
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 1 and not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("place", ["file", "/proc/x"])
def test_a_folder_that_cannot_be_one_is_named_before_a_model_is_loaded(begun, tmp_path, monkeypatch, place):
    monkeypatch.setattr("rmsd.run.train.load_model", lambda *a, **k: pytest.fail("nothing is to be loaded"))
    (tmp_path / "file").touch()
    folder = str(tmp_path / place)
    with pytest.raises(OSError, match=f"output_dir {folder} (is a file: name a folder|cannot be written to: .*; name)"):
        train(load_recipe(begun, [f"output_dir={folder}"]))


def test_processes_that_look_at_one_folder_at_once_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as looking:
        list(looking.map(check_output_dir, [tmp_path / "run"] * 2_000))
    assert not list((tmp_path / "run").iterdir())


def test_a_disk_that_is_full_when_the_recipe_is_written_leaves_the_one_before(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(tiny.ROWS[0]))
    (tmp_path / "own.yaml").write_text(f"model: m\ndata: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/run\n")
    recipe = load_recipe(tmp_path / "own.yaml")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    save_recipe(recipe)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(OSError):
            save_recipe(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_resumed(recipe, tmp_path / "run" / "checkpoint-1")
