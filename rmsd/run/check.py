"""`rmsd check RECIPE`: the self-check of a recipe's run, without the run."""

import tempfile

from transformers import set_seed

from ..judge import MagnitudeJudge
from ..models.loading import with_lora
from ..tasks import load_task
from ..training.self_check import self_check
from ..training.trainer import RMSDTrainer
from .calling import callable_of
from .recipe import Recipe, trainer_config
from .train import load, task_rows


def check(recipe: Recipe) -> tuple[str, bool]:
    """(what to print, whether all checks passed). Nothing is trained, asked of a judge, or written."""
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_config(recipe, folder)
        args.eval_strategy, args.eval_on_start = "no", False
        args.push_to_hub, args.report_to = False, []
        task = load_task(recipe.task) if recipe.task else None
        rows, called = task_rows(recipe, task), callable_of(recipe, task)
        set_seed(recipe.seed)
        model, tokenizer = load(recipe, args.device)
        if recipe.lora:
            model = with_lora(model, recipe.lora)
        trainer = RMSDTrainer(model, args, rows, tokenizer, judge=MagnitudeJudge(), **called)
        if args.gradient_checkpointing:
            options = args.gradient_checkpointing_kwargs
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        checks = self_check(trainer)
    text = "\n".join(map(str, checks)) if args.should_save else ""  # one process of several prints
    return text, all(check.passed is not False for check in checks)
