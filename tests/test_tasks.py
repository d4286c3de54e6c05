"""Tasks with an environment: what is asked for is solved by the calls that its manual describes, and by no others."""

import datetime
import sys

import pytest

from rmsd.answers.calls import Call
from rmsd.answers.environments import Environments, load_environment
from rmsd.answers.tools import run_turns
from rmsd.run.recipe import load_recipe
from rmsd.run.train import train
from rmsd.tasks import load_task
from rmsd.tasks.house_format import parsed
from rmsd.tasks.preferences import wanted_on


def rpc(method, *args):
    return Call("rpc", {"method": method, "args": list(args)})


def document(row, **change):
    title, entries = row["title"], [entry.replace("%", " pct") for entry in row["entries"]]
    lines = [f"QUILL/2 {title}", *(f"+ {entry}" for entry in entries), f"END {len(entries)}"]
    text = "\n".join(lines)
    for old, new in change.items():
        text = text.replace(old, new)
    return Call("file_document", {"text": text})


def legacy_api(row):
    wanted = row["wanted"]
    wrong = [
        [],
        [rpc("refund", *wanted[1:])],
        [rpc(wanted[0], wanted[2], wanted[1])],
        [rpc(*wanted), rpc("falcon", 0, 1)],
    ]
    wrong += [[rpc(wanted[0], wanted[1])], [rpc(wanted[0], str(wanted[1]), wanted[2])]]
    return [rpc(*wanted)], wrong


def house_format(row):
    wrong = [[], [document(row, QUILL="Quill")], [document(row, END="end")], [document(row), document(row)]]
    return [document(row)], [*wrong, [Call("file_document", {"text": ", ".join(row["entries"])})]]


def preferences(row):
    drink, cups = wanted_on(datetime.date.fromisoformat(row["date"]))
    wrong = [("coffee", cups), (drink, 3 - cups), (drink, 3)]
    return [Call("order", {"drink": drink, "cups": cups})], [
        [],
        *([Call("order", dict(zip(("drink", "cups"), pair, strict=True)))] for pair in wrong),
    ]


def solved(environments, row, calls):
    (episode,) = environments.start([row])
    run_turns([(episode.tools, calls)], environments.limits)
    environments.finish([episode])
    assert not episode.died
    return episode.solved


@pytest.mark.parametrize("answers", [legacy_api, house_format, preferences])
def test_a_request_is_solved_by_the_calls_that_the_manual_describes(answers):
    task = load_task(answers.__name__)
    environments = Environments(environment_factory=task.environment)
    for row in [*task.requests, *task.train]:
        if row["privileged_context"]:
            right, wrongs = answers(row)
            assert solved(environments, row, right), row
            assert not any(solved(environments, row, wrong) for wrong in wrongs), row
        else:
            assert not solved(environments, row, [])
    schemas = str(environments.all_schemas)
    unguessable = ("otter", "maple", "cobalt", "falcon", "QUILL", "pct", "cocoa", "mint")
    assert not any(word in schemas or word in row["prompt"] for word in unguessable for row in task.requests)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("['Q?'], [], {}, bool", "needs graders, or requests"),
        ("[], [], {'target': bool}, bool", "needs target_prompts"),
        ("[], [], {}, bool, None, [{'prompt': 'Q?'}]", "no environment to answer them"),
    ],
    ids=["no graders", "no prompts", "no environment"],
)
def test_a_task_that_nothing_is_evaluated_by_is_refused_before_a_model_is_loaded(more, named, tmp_path):
    """It was trained on to the end, and its model lost with the evaluation that stands before it is saved."""
    rows = "[{'prompt': 'Q?', 'privileged_context': 'C'}]"
    (tmp_path / "task.py").write_text(f"from rmsd.tasks import Task\nTASK = Task({rows}, {more})\n")
    (tmp_path / "recipe.yaml").write_text(f"model: none\ntask: {tmp_path}/task.py\noutput_dir: {tmp_path}/run\n")
    with pytest.raises(ValueError, match=named):
        train(load_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("body", ["", " A", " A\n+ x\nEND 2", " A\nx\nEND 1", " A\n+ 5%\nEND 1"])
def test_what_the_house_format_is_not_does_not_parse(body):
    with pytest.raises(ValueError):
        parsed(f"QUILL/2{body}")


def test_a_document_without_entries_is_one():
    assert parsed("QUILL/2 A\nEND 0") == ("A", [])


@pytest.mark.parametrize(
    ("load", "kind", "beside"),
    [
        (load_task, "task", "from rmsd import Task\nIT = TASK = Task([], ['Why?'], [], {'a': bool}, bool)\n"),
        (lambda path: load_environment(path)["tools"], "environment", "IT = TOOLS = [print]\n"),
    ],
)
def test_a_file_of_one_s_own_finds_what_lies_beside_it_and_says_where_it_fails(
    load, kind, beside, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"beside_{kind}.py").write_text(beside)
    file = tmp_path / "mine.py"
    file.write_text(f"from beside_{kind} import *\n")
    assert load(str(file)) == sys.modules[f"beside_{kind}"].IT
    file.write_text("licence = None\nlicence.read()\n")
    with pytest.raises(ValueError, match=rf"{kind} file .*mine.py, line 2: AttributeError: 'NoneType' object has no"):
        load(str(file))
