"""Generated code is taken out of an answer, and judged where it can do no harm."""

import pytest

from rmsd.run.human_eval import passes, program, runs

PROBLEM = dict(
    task_id="HumanEval/x",
    prompt='from typing import List\n\n\ndef last(numbers: List[int]) -> int:\n    """The last."""\n',
    entry_point="last",
    test="def check(candidate):\n    assert candidate([1, 2]) == 2\n",
)
RIGHT = "def last(numbers: List[int]) -> int:\n    return numbers[-1]\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"Here it is:\n```python\n{RIGHT}```\nIt takes the last.",
        f"```\n{RIGHT}```",
        f"```python3\n{RIGHT}```\nIt takes the last.",
        f"```py \n{RIGHT}```\nIt takes the last.",
        f"Run it:\n```bash\npython x.py\n```\nIt is:\n```python\n{RIGHT}```",
        f'```python\n{RIGHT}\nif __name__ == "__main__":\n    print(last(input()))\n```',
        f"```python\n{RIGHT}",  # the answer ran into its limit
        RIGHT,
        "    return numbers[-1]\n",
    ],
    ids=[
        "fenced",
        "no language",
        "python3",
        "py",
        "behind a shell's",
        "with a main block",
        "unfinished",
        "bare",
        "body",
    ],
)
def test_a_right_answer_passes_in_whatever_shape(answer):
    assert passes(PROBLEM, answer)
    assert not passes(PROBLEM, answer.replace("-1", "0"))


def test_only_the_first_block_is_the_answer():
    assert "print" not in program(PROBLEM, f"```python\n{RIGHT}```\nTry it:\n```python\nprint(last([1]))\n```")


def test_an_answer_may_leave_out_the_functions_that_the_problem_brings():
    helped = {**PROBLEM, "prompt": "import math\n\n\ndef least(x):\n    return math.inf\n\n\n" + PROBLEM["prompt"]}
    assert passes({**helped, "test": PROBLEM["test"] + "    assert least(0) > 0\n"}, f"```python\n{RIGHT}```")


@pytest.mark.parametrize(
    "code",
    [
        "open('x', 'w')",
        "import os; os.open('x', os.O_CREAT | os.O_WRONLY)",
        "import pathlib; pathlib.Path('x').touch()",
        "import os; os.remove('/nowhere/x')",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import ctypes",
        "import socket; socket.socket()",
        "'x' * (2 << 30)",
        "raise SystemExit(1)",
        "raise SystemExit",  # before the test that stands behind it
    ],
)
def test_what_code_may_not_do(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not runs(f"try:\n    {code}\nexcept FileNotFoundError:\n    pass\n")
    assert not list(tmp_path.iterdir())


def test_what_code_may_do():
    assert runs(
        "import collections, functools, heapq, itertools, math, random, re, string, typing\nassert math.pi > 3\n"
    )


def test_code_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr("rmsd.run.human_eval.SECONDS", 1)
    assert not runs("while True: pass")
