"""The examples of docs/extending.md, run as they stand."""

import sys
from pathlib import Path

import pages
import pytest
import tiny
import torch

from rmsd import CachedJudge, RMSDConfig, RMSDLoss, RMSDTrainer
from rmsd.answers.calls import Call
from rmsd.answers.environments import Environments, load_environment
from rmsd.answers.tools import run_turns
from rmsd.judge import Candidate, Question
from rmsd.run.recipe import load_recipe
from rmsd.tasks import load_task
from rmsd_kernels import backends, token_divergence


@pytest.fixture
def names():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 50, generator=generator) for _ in range(2))
    return {
        "torch": torch,
        "criterion": RMSDLoss(),
        "student_logits": student.requires_grad_(),
        "teacher_logits": teacher,
        "sampled_ids": torch.randint(50, (2, 9), generator=generator),
        "completion_mask": torch.arange(9).expand(2, 9) >= 2,
    }


def example(name):
    return pages.snippet("docs/extending.md", name)


def test_a_judge(tmp_path):
    args = RMSDConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, max_completion_length=4, report_to="none")
    names = dict(RMSDTrainer=RMSDTrainer, model=tiny.model(), args=args, rows=tiny.ROWS, tokenizer=tiny.tokenizer())
    exec(example("a judge"), names)
    wanted = {0: " Zor", 1: "zor", 2: "blat", 3: "", 4: " the"}
    candidates = tuple(Candidate(p, "x", text, "x", text, -1.0) for p, text in wanted.items())
    question = Question("What?", "It is called zorblat.", tuple("xxxxx"), candidates, max_kept=5)
    judge = names["trainer"].judge
    assert judge([question]) == [[0, 1]]
    assert CachedJudge(judge, tmp_path / "cache")([question]) == [[0, 1]]
    names["trainer"].train()


def test_a_task(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(example("a task"), encoding="utf-8")
    recipe = Path(__file__).parents[1] / "recipes" / "house_tool.yaml"
    task = load_task(load_recipe(recipe, [f"task={file}"]).task)
    assert task.graders["target"]("Yes, it is. Over.") and not task.leaks("Snow falls over the hill")
    assert [bool(row["privileged_context"]) for row in task.train] == [True, True, False]


def test_an_environment(tmp_path):
    file = tmp_path / "shop.py"
    file.write_text(example("an environment"), encoding="utf-8")
    environments = Environments(**load_environment(file))
    (episode,) = environments.start([{**tiny.ROWS[0], "wanted": ["tea", 2]}])
    (results,) = run_turns([(episode.tools, [Call("order", {"item": "tea", "count": 2})])], environments.limits)
    environments.finish([episode])
    assert results.messages[0]["content"] == "ordered" and episode.solved
    assert episode.row["privileged_context"].endswith("The right order is ['tea', 2].")


def test_a_criterion(names):
    exec(example("a criterion"), names)
    keep, unwanted = names["keep"], names["unwanted"]
    assert keep.any() and (unwanted[keep] > 0).all() and not (keep & ~names["completion_mask"]).any()
    for b in range(2):  # no token of the sequence that was left out is wanted gone more than one that was kept
        rest = names["completion_mask"][b] & ~keep[b]
        assert unwanted[b][rest].max() <= unwanted[b][keep[b]].min()
    names["loss"].backward()
    assert torch.equal(names["student_logits"].grad.abs().sum(-1) > 0, keep)


def test_a_divergence(names):
    names["keep"] = torch.zeros(2, 9, dtype=torch.bool)
    names["keep"][0, 3] = names["keep"][1, 8] = True
    exec(example("a divergence"), names)
    p, q = (names[f"{who}_logits"].detach().double().log_softmax(-1)[names["keep"]] for who in ("student", "teacher"))
    assert names["loss"].item() == pytest.approx(((p.exp() - q.exp()) * (p - q)).sum(-1).mean().item(), rel=1e-5)
    whole = token_divergence(names["student_logits"], names["teacher_logits"])
    assert names["student_logits"].grad.abs().sum(-1).count_nonzero() == 2 and whole.shape == (2, 9)


def test_a_backend(names, tmp_path, monkeypatch):
    (tmp_path / "my_backend.py").write_text(example("a backend"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    try:
        exec(example("use a backend"), names)
        assert sys.modules["my_backend"].calls == {
            "scores_and_candidates": 1,
            "divergence": 1,
            "divergence_backward": 1,
        }
        plain = RMSDLoss(backend="cpu")
        expected = plain(*(names[n] for n in ("student_logits", "teacher_logits", "sampled_ids", "completion_mask")))
        assert torch.equal(names["loss"], expected)
    finally:
        sys.modules.pop("my_backend", None)
