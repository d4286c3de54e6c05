"""Which checkpoint a run can go on from."""

import contextlib
import json
import logging
import math
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR

log = logging.getLogger("rmsd")


def last_whole_checkpoint(output_dir: str | Path, before: float = math.inf) -> Path | None:
    """The newest checkpoint that was written to its end, of a step under `before`; torn ones are named in a warning
    and passed over."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=step_of, reverse=True)
    for checkpoint in found:
        if step_of(checkpoint) >= before:
            continue
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint
        log.warning("%s is passed over: %s", checkpoint, problem)
    return None


def holds_optimizer(checkpoint: Path) -> bool:
    """Not one of save_only_model: transformers would begin with a new optimizer and schedule without a word. The state
    is optimizer.pt or .bin, or in shards, FSDP's optimizer_0/ and DeepSpeed's global_step*/."""
    return any(any(checkpoint.glob(pattern)) for pattern in ("*optimizer*", "global_step*"))


def step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _problem(checkpoint: Path) -> str | None:
    """Trainer writes trainer_state.json last, so its presence says that the rest was written; a full disk or a damaged
    file shows in the formats' own ends: safetensors' header gives its length, and a zip's directory stands last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not finished"
    except ValueError:
        return "trainer_state.json is torn"
    # PEFT gives an adapter that is not named "default" a folder of its own.
    saved = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*/adapter_model.safetensors")]
    for path in saved:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged ({error})"
    of_teacher = "teacher.safetensors", "teacher/adapter_model.safetensors"
    weights = [path for path in saved if path.relative_to(checkpoint).as_posix() not in of_teacher]
    if not (weights or any(any(checkpoint.glob(pattern)) for pattern in ("pytorch_model_fsdp*", "global_step*"))):
        return "it holds no weights"
    for path in (path for ending in ("pt", "pth", "bin") for path in checkpoint.glob(f"*.{ending}")):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
    return None


@contextlib.contextmanager
def own_settings(optimizer, scheduler, checkpoint: str | Path):
    """Around the loading of a checkpoint's optimizer and schedule, whose state also brings the settings of the run that
    wrote it. Afterwards rate, decay and the rest are those that this run was given, at the checkpoint's step; the rate
    halved where that run was rolled back before.

    Raises:
        ValueError: the checkpoint's optimizer is another kind.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # without accelerate's wrapper
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    part = 0.5 ** sum("rolled_back_from" in entry for entry in history)
    rates = [rate * part for rate in getattr(scheduler, "base_lrs", [])]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        if group.keys() - {"params"} != settings.keys():
            raise ValueError("the checkpoint's optimizer is of another kind than this run's: set optim back to its")
        group.update({name: value for name, value in settings.items() if name != "lr"})
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = rates
        now = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = now
        for group, rate in zip(optimizer.param_groups, now, strict=True):
            group["lr"] = rate  # initial_lr, which a schedule made anew begins with, is the one that was asked for
