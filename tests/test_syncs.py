"""Where a step makes the host wait for the device, from the answers to the optimizer's step. Without a GPU, answers,
scores, loss and gradients are marked, and so is what is computed from them; what is asked of those is listed. Waits
that no marked tensor shows, such as those in C++, are a GPU's to tell: tests/test_gpu_models.py counts them there.
Sampling waits for every token, and a log entry for what it prints: neither is counted."""

import dataclasses
import sys
from collections import Counter

import pytest
import tiny
import torch
from tiny import trainer
from transformers import TrainerCallback

import rmsd.step.scoring
from rmsd.answers.engines import TransformersEngine
from rmsd.judge import ContrastJudge
from rmsd.training.record import RunRecord

# What needs a value, a size or a copy on the host.
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose"}
WAITS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero"}
found: Counter = Counter()


class OnDevice(torch.Tensor):
    """A tensor that would be on a GPU; what is computed from it would be, too."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, place = func.__name__, where()
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, OnDevice)]
        if place and (name in WAITS or any(mask.dtype == torch.bool for mask in masks)):
            found[place, name] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def where() -> str | None:
    """The innermost module of rmsd, or of those that run its step, that is running. None within rmsd_kernels: that
    reads ids and rows on a CPU alone, and has tests of its own."""
    frame = sys._getframe(1)
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("rmsd_kernels."):
            return None
        if module.startswith("rmsd."):
            return f"{module}.{frame.f_code.co_name}"
        if module.startswith(("transformers.masking_utils", "transformers.trainer", "accelerate.", "torch.optim")):
            return module
        frame = frame.f_back
    return None


def marked(tensor):
    return tensor.as_subclass(OnDevice) if isinstance(tensor, torch.Tensor) else tensor


def plain(*tensors):
    """As `to_host`: one wait for all of them."""
    found[where(), "to_host"] += 1
    return tuple(tensor.as_subclass(torch.Tensor) for tensor in tensors)


class Engine(TransformersEngine):
    def __call__(self, *args, **options):
        written = super().__call__(*args, **options)  # sampling waits for every token
        found.clear()
        names = ("completion_ids", "completion_mask", "attention_mask", "student_hidden")
        return dataclasses.replace(written, **{name: marked(getattr(written, name)) for name in names})


class Stepped(TrainerCallback):
    """Keeps what was found by the end of the step."""

    def on_step_end(self, args, state, control, **kwargs):
        self.found = dict(found)


@pytest.fixture
def step(tmp_path, monkeypatch):
    """The waits of one step, from the answers to the optimizer's step."""
    replaced = {"to_device": lambda values, device: marked(torch.as_tensor(values)), "to_host": plain}
    for module in [module for name, module in sys.modules.items() if name.startswith("rmsd.")]:
        for name in replaced.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, replaced[name])
    score, wishes = rmsd.step.scoring.score, rmsd.step.scoring.wishes

    def scored(*args):
        scores, candidates = score(*args)
        return type(scores)(*map(marked, scores)), marked(candidates)

    monkeypatch.setattr(rmsd.step.scoring, "score", scored)
    monkeypatch.setattr(rmsd.step.scoring, "wishes", lambda *a, **k: type(w := wishes(*a, **k))(*map(marked, w)))

    def run(**options):
        stepped = Stepped()
        options = dict(max_steps=1, logging_steps=2, **options)  # no entry is due, for which Trainer waits
        made = trainer(tmp_path, tiny.model("llama"), callbacks=[RunRecord(tmp_path), stepped], **options)
        made.engine = Engine()
        training_step = made.training_step

        def trained(model, *args):
            loss = training_step(model, *args)
            for parameter in model.parameters():
                parameter.grad = marked(parameter.grad)
            return marked(loss)

        made.training_step = trained
        made.train()
        return stepped.found

    return run


@pytest.mark.parametrize(
    "options", [{}, {"method": "opsd"}, {"judge": ContrastJudge(tiny.ROWS)}], ids=["rmsd", "opsd", "contrast"]
)
def test_a_step_waits_for_the_answers_and_for_what_the_judge_is_told_and_to_know_its_gradient_finite(step, options):
    """And up to twice a forward, the teacher's and the student's, in transformers, which looks for padding in the
    mask."""
    waits = step(**options)
    assert waits.pop(("transformers.masking_utils", "__bool__")) <= 4
    assert waits == {
        ("rmsd.answers.rollout.on_host", "to_host"): 1,
        ("rmsd.step.judging.questions_of", "to_host"): 1,
        ("rmsd.training.faults.on_pre_optimizer_step", "__bool__"): 1,
    }


def test_the_spy_sees_trainer_s_own_filter_of_losses_which_is_off(step):
    """It asks of each micro-batch's loss whether it is a NaN, and whether it is infinite."""
    assert step(logging_nan_inf_filter=True)["transformers.trainer", "__bool__"] == 2
