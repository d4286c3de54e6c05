"""The README's snippets, run as they stand."""

import re
from pathlib import Path

import tiny
import torch

from rmsd.run.recipe import load_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def snippet(name):
    return re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README, re.DOTALL).group(1)


def test_before_and_after_run_in_one_loop_and_after_trains_fewer_tokens():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(200, (2, 13), generator=generator)
    told = torch.randint(200, (2, 4), generator=generator)
    names = {
        "student": tiny.model(seed=0),
        "teacher": tiny.model(seed=1),
        "input_ids": input_ids,
        "teacher_input_ids": torch.cat([told, input_ids], 1),
        "sampled_ids": input_ids[:, 1:],
        "completion_mask": torch.arange(12).expand(2, 12) >= 3,
    }
    gradients = {}
    for name in ("before", "after"):
        if name == "after":
            names["student_logits"] = names["student"](input_ids).logits[:, :-1]
        exec(snippet("before").partition("loss.backward()")[0] if name == "before" else "", names)
        names["student_logits"].retain_grad()
        exec("loss.backward()" if name == "before" else snippet("after"), names)
        gradients[name] = names["student_logits"].grad
    trained = {name: (grad.abs().sum(-1) > 0).sum().item() for name, grad in gradients.items()}
    assert trained == {"before": 18, "after": 10}
    assert names["loss"].isfinite()

    def my_judge(scores, candidates):
        assert scores.divergence.shape == (2, 12) and candidates.shape == (2, 20)
        return torch.nn.functional.one_hot(candidates[:, 0], 12).bool()

    names["my_judge"] = my_judge
    exec(snippet("judge"), names)
    assert names["loss"].isfinite() and names["loss"] > 0


def test_readme_names_the_test_command_that_ci_runs():
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in README and re.search(r"^make test$", ci, re.MULTILINE)


def test_the_run_that_is_resumed_is_the_demos():
    root = Path(__file__).parents[1]
    demo = re.search(r"rmsd train (\S+) (.*)", (root / "Makefile").read_text(encoding="utf-8").replace("$(SEED)", "1"))
    resumed = re.search(r"^rmsd train (\S+) (.*?) *# after an interruption", README, re.MULTILINE)
    of_demo, of_readme = (load_recipe(root / match[1], match[2].split()) for match in (demo, resumed))
    assert of_readme == of_demo and of_demo.resume


def test_every_number_that_the_readme_claims_is_in_the_page_it_names():
    table = README.partition("## What it gives")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("|") and "](docs/" in line]
    assert len(rows) >= 5
    for measured, where in rows:
        page = (Path(__file__).parents[1] / re.search(r"\((docs/\w+\.md)\)", where).group(1)).read_text(
            encoding="utf-8"
        )
        for number in re.findall(r"\d[\d,]*\.?\d*", measured):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", page), f"{number} is not in {where}"
