"""Tiny models of every causal architecture that the installed transformers can build from a config, and adapters of
every method of the installed PEFT: each trains two steps right, or is refused in one line. Writes a page with tables.

    python tests/sweep.py [--only NAME ...] [--resume] [--write FILE]

Each is tried in a process of its own under a time limit, so that one that hangs or dies costs itself alone.
Results are kept as they come; `--resume` goes on after them.
"""

import argparse
import copy
import json
import math
import multiprocessing
import resource
import signal
import tempfile
import time
import warnings
from pathlib import Path

import adapters
import peft
import tiny
import torch
import transformers
from shapes import config_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import PrinterCallback

from rmsd.words import first_line

SECONDS = 60  # of a processor that one architecture may take
_WAIT = 20 * SECONDS  # on a busy machine
LARGEST = 100_000_000  # parameters of what is tiny still
KEPT = Path("runs/sweep.jsonl")
RESULTS = ("trains", "refused", "broken", "not tried")
_ALONE = "per_device_train_batch_size=1"


def tried(kind: str) -> tuple[str, str]:
    """(result, what was said) of one architecture: trains, refused, broken, or not tried."""
    try:
        config = config_of(kind)
        with torch.device("meta"):
            shell = transformers.AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in shell.parameters())
        if size > LARGEST:
            return "not tried", f"its smallest config here has {size / 1e6:.0f}M parameters"
        torch.manual_seed(0)
        model = tiny.loud(transformers.AutoModelForCausalLM.from_config(config).eval())
        with torch.no_grad():
            model(input_ids=torch.arange(1, 9).unsqueeze(0), use_cache=False)
    except Exception as error:
        return "not tried", f"no tiny config: {_line(error)}"
    result, said = _trained(model)
    if result == "refused" and _ALONE in said:  # as the message has it
        result, of_one = _trained(model, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        return (result, "a row at a time: it does not heed padding") if result == "trains" else (result, of_one)
    return result, said


def _trained(model, **options) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = tiny.trainer(folder, copy.deepcopy(model), self_check=True, log_level="error", **options)
            made.remove_callback(PrinterCallback)
            before = tiny.weights(made.model)
            made.train()
        except (ValueError, TypeError) as error:
            lines = len(str(error).strip().splitlines())
            return ("refused", _line(error)) if lines == 1 else ("broken", f"in {lines} lines: {_line(error)}")
        except Exception as error:
            return "broken", f"{type(error).__name__}: {_line(error)}"
    if tiny.same(before, tiny.weights(made.model)):
        skipped = sum(entry.get("skipped_steps", 0) for entry in made.state.log_history)
        return "broken", "no weight moved" + (": the gradient is not finite" if skipped else "")
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    if len(losses) != 2 or not all(map(math.isfinite, losses)):
        return "broken", f"losses {losses}"
    return "trains", ""


TRIED = {
    "architecture": (sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), tried),
    "adapter": (adapters.NAMES, adapters.tried),
}


def tried_apart(name: str, seconds: int = SECONDS) -> tuple[str, str]:
    """The result of "architecture NAME" or "adapter NAME", tried in a forked process."""
    title, _, of = name.partition(" ")
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        result, said = TRIED[title][1](of)
        writer.send((result, said.replace("|", "/").replace("\n", " ")))

    process = context.Process(target=child)
    process.start()
    writer.close()
    done = reader.poll(_WAIT)
    if not done:
        process.kill()
    process.join()
    if not done or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "broken", f"not done after {seconds} s of a processor"
    if process.exitcode:
        return "broken", f"its process ended with exit code {process.exitcode}"
    return reader.recv()


def _line(error: Exception) -> str:
    return first_line(error).removesuffix(" (self_check=false trains all the same)")


PAGE = """# Models and adapters

Tables that `make sweep` writes, of transformers {transformers} and PEFT {peft}. Models are tiny and have random
weights: they show whether a model's parts are found and whether it heeds what it is told, not how well a real one
learns.

*trains*: the [self-check](reliability.md#the-self-check) passed, and two steps moved the weights with finite losses.
*refused*: one line said why before the first step; it stands beside it. *broken*: anything else. *not tried*: the
sweep knows no tiny model of the architecture, or cannot put the method on one.

## Architectures

Every one that transformers lists for causal language modelling, encoders that can be made decoders among them, built
from its config. "A row at a time": with `train.per_device_train_batch_size: 1`, as the refusal of more rows says.
{architectures}

## Adapters

Every method of PEFT, and variants of LoRA. Each adapter had learnt something before (its weights were moved at random),
so beside training it is asked: does the initial teacher read with what the adapter had learnt, is the student the
teacher after a continuation, and does what was saved read as what was trained?
{adapters}
"""


def table(title: str, results: dict[str, tuple[str, str]]) -> str:
    numbers = {word: sum(result == word for result, _ in results.values()) for word in RESULTS}
    counted = ", ".join(f"{number} {word}" for word, number in numbers.items())
    rows = "\n".join(f"| {name} | {result} | {said} |" for name, (result, said) in sorted(results.items()))
    return f"\n{len(results)}: {counted}.\n\n| {title} | result | |\n| --- | --- | --- |\n{rows}"


def page(results: dict[str, tuple[str, str]]) -> str:
    """Markdown, of results by "architecture NAME" and "adapter NAME"."""
    parted = {
        title: {name.removeprefix(f"{title} "): it for name, it in results.items() if name.startswith(f"{title} ")}
        for title in TRIED
    }
    return PAGE.format(
        transformers=transformers.__version__,
        peft=peft.__version__,
        architectures=table("architecture", parted["architecture"]),
        adapters=table("adapter", parted["adapter"]),
    )


def kept() -> dict[str, tuple[str, str]]:
    lines = map(json.loads, KEPT.read_text(encoding="utf-8").splitlines()) if KEPT.exists() else ()
    return {line["name"]: (line["result"], line["said"]) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these architectures or adapters, and write nothing")
    parser.add_argument("--resume", action="store_true", help=f"take what {KEPT} has")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = [f"{title} {name}" for title, (known, _) in TRIED.items() for name in known]
    if arguments.only:
        names = [name for name in names if name.partition(" ")[2] in arguments.only]
    elif not arguments.resume:
        KEPT.unlink(missing_ok=True)
    results = {} if arguments.only else kept()
    KEPT.parent.mkdir(exist_ok=True)
    for name in names:
        if name in results:
            continue
        started = time.monotonic()
        results[name] = result, said = tried_apart(name)
        print(f"{name:40} {result:10} {time.monotonic() - started:5.1f} s  {said}", flush=True)
        if not arguments.only:
            with KEPT.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(name=name, result=result, said=said)) + "\n")
    if arguments.write and not arguments.only:
        arguments.write.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
