"""The snippets of the README and of docs/usage.md, run as they stand, and what the README claims."""

import re

import pages
import pytest
import tiny
import torch

from rmsd import ContextJudge
from rmsd.run.recipe import load_recipe

README, USAGE = pages.page("README.md"), pages.page("docs/usage.md")


def snippet(name):
    return pages.snippet("docs/usage.md", name)


@pytest.mark.parametrize("name", ["after", "judge"])
def test_the_readme_s_snippets_are_those_of_the_usage_page(name):
    assert pages.snippet("README.md", name) == snippet(name)


def test_before_and_after_run_in_one_loop_and_after_trains_fewer_tokens():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(200, (2, 13), generator=generator)
    told = torch.randint(200, (2, 4), generator=generator)
    names = {
        "student": tiny.model(seed=0),
        "teacher": tiny.model(seed=1),
        "input_ids": input_ids,
        "teacher_input_ids": torch.cat([told, input_ids], 1),
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

    exec(snippet("after").partition("loss.backward()")[0], names)
    from_logits = names["loss"].item()
    names["student"].zero_grad()
    exec(snippet("linear"), names)
    assert names["loss"].item() == pytest.approx(from_logits, rel=1e-4)
    assert names["student"].lm_head.weight.grad.abs().sum() > 0


def test_the_trainer_s_snippet_trains_on_both_kinds_of_rows(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    names = {"model": tiny.model(initializer_range=0.2), "tokenizer": tiny.tokenizer()}
    exec(snippet("trainer"), names)
    logged = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(entry["candidates"] > 0 for entry in logged)
    assert isinstance(names["trainer"].judge, ContextJudge)
    assert (tmp_path / "runs" / "own" / "model.safetensors").is_file()
    assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]


def test_readme_names_the_test_command_that_ci_runs():
    assert "make test" in README and re.search(r"^make test$", pages.page(".ci/run"), re.MULTILINE)


def test_the_run_that_is_resumed_is_the_demos():
    demo = re.search(r"rmsd train (\S+) (.*)", pages.page("Makefile").replace("$(SEED)", "1"))
    resumed = re.search(r"^rmsd train (\S+) (.*?) *# after an interruption", USAGE, re.MULTILINE)
    of_demo, of_page = (load_recipe(pages.ROOT / match[1], match[2].split()) for match in (demo, resumed))
    assert of_page == of_demo and of_demo.resume


def test_every_number_that_the_readme_claims_is_in_the_page_it_names():
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if re.search(r"\| \[[\w ]+\]\(docs/", line)]
    assert len(rows) >= 3
    for what, measured, where in rows:
        page = pages.page(re.search(r"\((docs/\w+\.md)[#)]", where)[1])
        for number in re.findall(r"\d[\d,]*\.?\d*", re.sub(r"SmolLM\d", "", what) + " " + measured):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", page), f"{number} is not in {where}"


def test_the_readme_s_tree_has_a_line_for_every_room():
    tree = README.partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    for package in ("rmsd_kernels", "rmsd"):
        listed = tree.partition(f"{package}/ ")[2]
        listed = re.findall(r"^  (\w+)/ ", re.split(r"^\S", listed, maxsplit=1, flags=re.MULTILINE)[0], re.MULTILINE)
        rooms = [path.parent.name for path in (pages.ROOT / package).glob("*/__init__.py")]
        assert sorted(listed) == sorted(rooms)
