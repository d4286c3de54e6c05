"""One run of a recipe, from its files to its table and page."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from ..answers.data import checked_rows, load_rows
from ..answers.environments import Environments
from ..answers.episodes import Episodes
from ..answers.prompts import Prompts, fix_template_variables
from ..models.loading import load_model, with_lora
from ..models.sharding import whole
from ..tasks import Task, load_task
from ..training.checkpoint import holds_optimizer, last_whole_checkpoint
from ..training.config import RMSDConfig
from ..training.console import show_lines
from ..training.continuation import check_metric
from ..training.forgetting import DriftLimit
from ..training.health import Collapsed
from ..training.record import RunRecord, read_lines
from ..training.trainer import RMSDTrainer
from . import human_eval
from .calling import callable_of, environments_of
from .evaluate import Evaluator
from .judges import build_judge
from .plan import Plan
from .recipe import Recipe, trainer_config
from .resuming import check_output_dir, check_resumed, save_recipe


def train(recipe: Recipe) -> str:
    """Trains, evaluates before and after, saves the model and the report; returns what to print. A dry run returns the
    plan, once all has been checked that can be without loading weights or asking a judge."""
    out = recipe.output_dir
    args = trainer_config(recipe, out)
    task = load_task(recipe.task) if recipe.task else None
    called = callable_of(recipe, task)
    if args.continuation_metric:
        calls = bool(called) and not recipe.rollouts
        check_metric(args.continuation_metric, task, recipe.evaluate.samples, calls=calls)
    if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        best = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"  # as Trainer looks it up
        check_metric(best, task, recipe.evaluate.samples, "metric_for_best_model")
    rows = task_rows(recipe, task)
    environments = environments_of(called, args)
    judge = build_judge(recipe.judge, rows, dry_run=recipe.dry_run)
    checkpoint = last_whole_checkpoint(out) if recipe.resume else None
    # Its checkpoint's step has been evaluated; a second entry, or one that is not due, would count towards a plateau.
    args.eval_on_start = args.eval_on_start and checkpoint is None
    if recipe.resume and checkpoint is None and args.should_save:
        print(f"{out} holds no checkpoint: starting from the beginning")
    if checkpoint and not holds_optimizer(checkpoint) and args.should_save:
        print(f"{checkpoint} holds no optimizer state (save_only_model): the optimizer and the schedule start anew")
    if not recipe.resume and (out / "metrics.jsonl").exists():
        raise FileExistsError(f"{out} holds a run: continue it with resume=true, or choose another output_dir")

    if checkpoint:
        check_resumed(recipe, checkpoint)

    if recipe.dry_run:
        plan = Plan.of(recipe, args, rows, judge, task, environments)
        return str(plan) if args.should_save else ""

    check_output_dir(out)
    set_seed(recipe.seed)
    model, tokenizer = load(recipe, args.device)
    with whole(model):
        evaluator = evaluator_of(recipe, args, model, tokenizer, environments) if task else None
    if recipe.lora:
        model = with_lora(model, recipe.lora)
    if args.should_save:
        save_recipe(recipe)
    callbacks: list[TrainerCallback] = [RunRecord(out, resume=checkpoint is not None)]
    if evaluator and recipe.evaluate.max_drift:
        callbacks.append(DriftLimit(recipe.evaluate.max_drift))
    trainer = RMSDTrainer(model, args, rows, tokenizer, judge=judge, evaluator=evaluator, callbacks=callbacks, **called)
    show_lines(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Collapsed:
        if args.should_save:
            _report(out)  # which shows how
        raise
    # The best weights, once they are loaded, are those that are saved; the last step's were evaluated.
    if evaluator and (args.load_best_model_at_end or not _evaluated(trainer.state)):
        trainer.evaluate()
    trainer.save_model(str(out / "model"))
    if trainer.accelerator.num_processes > 1:  # one process has no group, or it is vLLM's, which ends it itself
        trainer.accelerator.end_training()
    if not args.should_save:
        return ""

    return f"{table(out)}\n\nmodel   {out / 'model'}\nreport  {_report(out)}"


def _report(run: Path) -> Path:
    from ..report import write_report

    return write_report([run])


def evaluate(
    recipe: Recipe, model: str | None = None, benchmark: str | None = None, problems: int | None = None
) -> str:
    """Evaluates the model in a folder beside the recipe's base model, by the recipe's task or by a benchmark that has
    nothing to do with it; returns a table."""
    if benchmark not in (None, "humaneval"):
        raise ValueError(f"benchmark must be humaneval, not {benchmark!r}")
    if problems is not None and benchmark is None:
        raise ValueError("--problems are a benchmark's: name it with --benchmark, or leave them out")
    if recipe.task is None and benchmark is None:
        raise ValueError("eval needs a recipe with a task: its prompts and graders are what is evaluated")
    folder = model or str(recipe.output_dir / "model")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist: train first, or name one with --model")
    use_cpu = recipe.train.get("use_cpu") or not torch.accelerator.is_available()
    device = torch.device("cpu") if use_cpu else torch.accelerator.current_accelerator()
    asked = human_eval.problems(problems) if benchmark else []  # before a model is loaded
    base, tokenizer = load(recipe, device)
    environments = None
    if benchmark:
        evaluator = partial(human_eval.pass_at_1, tokenizer=tokenizer, asked=asked)
    else:
        args = trainer_config(recipe, recipe.output_dir)
        environments = environments_of(callable_of(recipe, load_task(recipe.task)), args)
        evaluator = evaluator_of(recipe, args, base, tokenizer, environments)
    columns = {"before": evaluator(base)}
    if environments:  # before an adapter is put on the base model
        columns["told"] = evaluator.told(base)
    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftModel

        # Without the adapter that the run began with, if it began with one: the folder's holds what that had learnt.
        trained = PeftModel.from_pretrained(base.unload() if hasattr(base, "unload") else base, folder)
    else:
        trained, _ = load_model(
            folder,
            dtype=recipe.dtype,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
        trained.to(device)
    return _evaluations_table({**columns, "after": evaluator(trained)})


def table(run: Path) -> str:
    """The run's evaluations, before and after, as text."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "eval"]
    if not lines:
        return f"{run}: trained without evaluation"
    first, last = lines[0], lines[-1]
    return _evaluations_table({f"step {first['step']}": first, f"step {last['step']}": last})


def _evaluations_table(columns: dict[str, dict[str, float]]) -> str:
    """A row a metric; a blank where a column has none, as after a resume with other evaluate.samples."""
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    names = [name for name in names if name not in ("kind", "step", "epoch")]
    width = max(map(len, names))

    def cell(metrics: dict[str, float], name: str) -> str:
        # + 0.0: a drift of -1e-9 should not read -0.000.
        return f"{round(metrics[name], 3) + 0.0:12.3f}" if name in metrics else " " * 12

    lines = [" " * width + "".join(f"{column:>12}" for column in columns)]
    lines += [f"{name:<{width}}" + "".join(cell(metrics, name) for metrics in columns.values()) for name in names]
    return "\n".join(map(str.rstrip, lines))


def task_rows(recipe: Recipe, task: Task | None) -> list[dict]:
    """What the recipe trains on."""
    if recipe.rollouts:
        return load_rows(recipe.rollouts, completions=True)
    return checked_rows(task.train) if task else load_rows(recipe.data)


def load(recipe: Recipe, device: torch.device):
    """(model, tokenizer). The model is on its device before a trainer would move it: the evaluator has it answer, and
    keeps its head and hidden states."""
    model, tokenizer = load_model(
        recipe.model,
        dtype=recipe.dtype,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        quantization=recipe.quantization and recipe.quantization.model_dump(),
    )
    fix_template_variables(tokenizer, recipe.chat_template_kwargs)
    return model.to(device), tokenizer


def evaluator_of(
    recipe: Recipe, args: RMSDConfig, base, tokenizer, environments: Environments | None = None
) -> Evaluator:
    """Of the recipe's task; `base` is the model that drift is measured from."""
    task = load_task(recipe.task)
    options = recipe.evaluate.model_dump(exclude={"every", "max_drift"})
    if environments is not None and task.requests:
        options["episodes"] = Episodes(tokenizer, environments, max_turns=args.max_turns)
        options["prompts"] = Prompts(tokenizer, args.teacher_template, args.teacher_place, environments.schemas)
    return Evaluator(
        base,
        tokenizer,
        task,
        autocast=_autocast(recipe.train, base.device),
        **options,
    )


def _autocast(arguments: dict, device: torch.device) -> Callable:
    """The context that accelerate runs the student's forward in."""
    if not (arguments.get("bf16") or arguments.get("fp16")):
        return contextlib.nullcontext
    return partial(torch.autocast, device.type, torch.bfloat16 if arguments.get("bf16") else torch.float16)


def _evaluated(state) -> bool:
    """At the last step. The log history is alike on all ranks, and evaluating is for all of them."""
    last = [entry for entry in state.log_history if entry["step"] == state.global_step]
    return any(name.startswith("eval_") for entry in last for name in entry)
