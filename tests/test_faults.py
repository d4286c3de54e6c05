"""What goes wrong ends in one clear line or a counted skip, and nothing already written is lost."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import same, trainer, weights
from transformers import TrainerCallback

from rmsd.judge import CachedJudge, Candidate, MagnitudeJudge, Question
from rmsd.models.loading import load_model
from rmsd.training.checkpoint import last_whole_checkpoint
from rmsd.training.faults import NonfiniteGradients, saving, skipped_in_a_row
from rmsd.training.record import RunRecord, read_lines

# ---- a full disk ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """`folder` as a file system of that size."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class FillDisk(TrainerCallback):
    """After step 3 leaves `left` bytes free."""

    def __init__(self, folder, left):
        self.folder, self.left = folder, left

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            size = shutil.disk_usage(self.folder).free - self.left
            (self.folder / "filler").write_bytes(b"\0" * size)


@pytest.mark.parametrize("left", [16_384, 196_608], ids=["in the weights", "in the optimizer's state"])
def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, left):
    """The run ends in one line; the checkpoint before is whole, and the run resumes from it once there is room."""
    options = dict(max_steps=6, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    with small_disk(tmp_path / "disk", 4096) as disk:
        broken = trainer(disk, callbacks=[FillDisk(disk, left), RunRecord(disk)], **options)
        with pytest.raises(
            OSError, match=r"checkpoint-4 in .*disk could not be written .*; checkpoint-2 is whole"
        ) as e:
            broken.train()
        assert "\n" not in str(e.value) and "; 0.0 MB of disk free)" in str(e.value)
        assert [line["step"] for line in read_lines(disk / "metrics.jsonl")] == [1, 2, 3, 4]
        (disk / "filler").unlink()
        checkpoint = last_whole_checkpoint(disk)
        assert checkpoint.name == "checkpoint-2"
        resumed = trainer(disk, callbacks=[RunRecord(disk, resume=True)], **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same(weights(whole.model), weights(resumed.model))
        assert [line["step"] for line in read_lines(disk / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_an_error_while_saving_says_what_is_left(tmp_path):
    with (
        pytest.raises(
            OSError, match=r"checkpoint-7 in .* not be written \(No space left.*; \d+\.\d MB .*; there is no"
        ),
        saving(tmp_path, 7),
    ):
        raise OSError("No space left on device\nsecond line")


def test_a_full_disk_under_the_metrics_names_the_file(tmp_path):
    """/dev/full takes a file's opening and refuses every write."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    record = RunRecord(tmp_path)
    (tmp_path / "rollouts.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"rollouts.jsonl could not be written: .*No space left on device"):
        record.rollouts([{"step": 1}])


def test_records_are_rewritten_whole_or_not_at_all(tmp_path, monkeypatch):
    """A resume drops the lines of steps to come; if it dies over that, the old lines are still there."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    made = trainer(tmp_path, callbacks=[RunRecord(tmp_path, resume=True)])
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        made.train()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


# ---- damaged files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"[1, 2", b"\xff\xfe", b'{"keep": 1}', b'["a"]'])
def test_a_corrupt_cache_entry_is_counted_and_asked_again(tmp_path, damage):
    question = Question("P", "C", ("a", "b"), (Candidate(1, "b", "x", "b", "x", -2.0),), max_kept=5)
    first = CachedJudge(MagnitudeJudge(), tmp_path)
    assert first([question]) == [[1]]
    next(tmp_path.glob("*.json")).write_bytes(damage)
    again = CachedJudge(MagnitudeJudge(), tmp_path)
    assert again([question]) == [[1]]
    assert again.stats == {"hits": 0, "misses": 1, "corrupt": 1}
    assert json.loads(next(tmp_path.glob("*.json")).read_text()) == [1], "written anew"


@pytest.mark.parametrize("name", ["rng_state.pth", "scheduler.pt", "optimizer.pt", "model.safetensors"])
def test_every_file_of_a_checkpoint_may_be_the_torn_one(tmp_path, name):
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    path = tmp_path / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:-200])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


# ---- empty prompts -------------------------------------------------------------------------------------------------


def test_a_prompt_without_tokens_is_refused_by_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tiny.tokenizer(), "chat_template", "{% for m in messages %}{{ m['content'].strip() }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 1: the prompt ' ' has no tokens"):
        trainer(tmp_path, rows=[tiny.ROWS[0], {"prompt": " ", "privileged_context": "C"}])


# ---- gradients -----------------------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Puts a NaN into one gradient of the given steps (counted from 1)."""

    def __init__(self, *steps, value=float("nan")):
        self.steps, self.value = steps, value
        self.seen = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.seen:

            def poison(parameter):
                if state.global_step + 1 in self.steps:
                    parameter.grad[0, 0] = self.value

            next(model.parameters()).register_post_accumulate_grad_hook(poison)
        self.seen[state.global_step] = weights(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path, value, max_grad_norm):
    poison = Poison(2, 4, value=value)
    made = trainer(
        tmp_path, callbacks=[poison], max_steps=5, weight_decay=0.1, max_grad_norm=max_grad_norm, max_skipped_steps=1
    )
    made.train()
    seen = [*poison.seen.values(), weights(made.model)]
    changed = [not same(before, after) for before, after in itertools.pairwise(seen)]
    assert changed == [True, False, True, False, True], "not even by weight decay or momentum"
    assert all(torch.isfinite(weight).all() for weight in seen[-1].values())
    assert [entry["skipped_steps"] for entry in made.state.log_history if "loss" in entry] == [0, 1, 1, 2, 2]


def test_a_loss_that_is_no_number_skips_its_step_and_leaves_later_entries_alone(tmp_path, monkeypatch):
    made = trainer(tmp_path, tiny.loud(tiny.model()), callbacks=[poison := Poison()], max_steps=3)
    compute_loss = made.compute_loss

    def of_second_step(*args, **options):
        return compute_loss(*args, **options) * (float("nan") if made.state.global_step == 1 else 1.0)

    monkeypatch.setattr(made, "compute_loss", of_second_step)
    made.train()
    seen = [*poison.seen.values(), weights(made.model)]
    assert [not same(before, after) for before, after in itertools.pairwise(seen)] == [True, False, True]
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 1]
    assert [entry["loss"] > 0 for entry in entries] == [True, False, True] and entries[1]["loss"] == 0


def test_counts_of_the_whole_run_go_on_where_it_is_resumed(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path, callbacks=[Poison(1, 3)], **options)
    whole.loss.nonfinite_rows += 7
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for made, skipped in ((whole, [1, 1, 2, 2]), (resumed, [1, 1, 1, 1])):
        entries = [entry for entry in made.state.log_history if "loss" in entry]
        assert [entry["skipped_steps"] for entry in entries] == skipped
        assert [entry["nonfinite_rows"] for entry in entries] == [7] * 4


def test_a_step_that_was_interrupted_is_counted_once_where_the_same_trainer_goes_on(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # the step's answers are there
            if state.global_step == 1 and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt

    interrupted = []
    made = trainer(tmp_path, callbacks=[Interrupt()], save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    written = [entry["rollout_tokens"] for entry in made.state.log_history if "loss" in entry]
    assert written == [4 * 6, 4 * 6]


def test_ranks_but_the_first_count_what_is_their_own(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.state.log_history = [{"step": 3, "skipped_steps": 2, "nonfinite_rows": 7.0}, {"eval_drift": 0.0}]
    faults = NonfiniteGradients(made.metrics, made.loss, made.accelerator)
    for first, rows in ((True, 7), (False, 0)):
        monkeypatch.setattr(type(made.accelerator), "is_main_process", first)
        faults.on_train_begin(made.args, made.state, made.control)
        assert (made.metrics.skipped_steps, made.loss.nonfinite_rows.item()) == (2, rows)


def test_too_many_such_steps_in_a_row_stop_the_run_and_keep_its_checkpoints(tmp_path):
    made = trainer(
        tmp_path, callbacks=[Poison(3, 4, 5, 6)], max_steps=9, max_skipped_steps=2, save_strategy="steps", save_steps=2
    )
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 5 \(max_skipped_steps=2\)") as error:
        made.train()
    assert "\n" not in str(error.value)
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-4"


def test_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    options = dict(max_steps=9, max_skipped_steps=2, save_strategy="steps", save_steps=1)
    begun = trainer(tmp_path, callbacks=[Poison(3, 4)], **{**options, "max_steps": 4})
    begun.train()
    resumed = trainer(tmp_path, callbacks=[Poison(5)], **options)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 5 \(max_skipped_steps=2\)"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("entries", "step", "skipped"),
    [
        ([], 0, 0),
        ([(1, 1), (2, 1), (3, 2), (4, 3)], 4, 2),
        ([(1, 1), (2, 2)], 2, 2),
        ([(1, 1), (2, 1)], 2, 0),
        ([(2, 1), (4, 3)], 4, 2),  # of the first two steps either
        ([(2, 2), (4, 3)], 4, 0),  # of the last two either
        ([(2, 2)], 3, 0),
    ],
)
def test_skips_in_a_row_by_the_log(entries, step, skipped):
    history = [{"step": at, "skipped_steps": count} for at, count in entries] + [{"step": step, "eval_drift": 0.0}]
    assert skipped_in_a_row(history, step) == skipped


# ---- what a model folder may do ------------------------------------------------------------------------------------


def test_weights_are_loaded_from_safetensors_alone(tmp_path):
    """A pickle can run code when it is read."""
    tiny.tokenizer().save_pretrained(tmp_path)
    model = tiny.model()
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_model(str(tmp_path))


def test_a_models_own_code_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "it_ran"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n")
    with pytest.raises(FileNotFoundError, match="trust_remote_code"):
        load_model(str(folder))
    assert not marker.exists()
    with contextlib.suppress(Exception):
        load_model(str(folder), trust_remote_code=True)
    assert marker.exists(), "and there it does, so this test could fail"


# ---- the command line ----------------------------------------------------------------------------------------------


def test_a_run_that_fails_while_its_progress_bar_is_drawn_ends_in_a_line_of_its_own(tmp_path):
    """A judge that fails at the second step; what was trained is resumed."""
    tiny.model().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    rows = [{"prompt": "Which tool?", "privileged_context": "It is called zorblat."}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path}/tiny\ndata: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/run\n"
        f"judge: {{kind: magnitude, cache: {tmp_path}/cache, replay: true}}\n"
        "train: {max_steps: 4, save_steps: 1, use_cpu: true, max_completion_length: 4, learning_rate: 1e-2,"
        " min_gap: 0}\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "rmsd", "train", tmp_path / "recipe.yaml"], capture_output=True, text=True
    )
    said = [line for line in result.stderr.splitlines() if "rmsd: " in line]
    assert result.returncode == 1 and said[0].startswith("rmsd: judge.replay: 4 of 4 questions"), result.stderr
