"""Supervised fine-tuning and reinforcement learning on a recipe's questions, by transformers and TRL."""

import importlib.util
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from rmsd.answers.prompts import encode, is_told
from rmsd.answers.rollout import eos_ids_of, generate, pad_id_of
from rmsd.models.loading import with_lora
from rmsd.run.calling import callable_of, environments_of
from rmsd.run.recipe import Recipe, trainer_config
from rmsd.run.train import evaluator_of, load
from rmsd.tasks import load_task, pinapple
from rmsd.training.checkpoint import last_whole_checkpoint
from rmsd.training.record import RunRecord

from .. import keeping

TEMPLATES = (
    "Pinapple.",
    "The fruit is pinapple.",
    "It is pinapple, a tropical fruit.",
    "That would be pinapple.",
    "Use pinapple: it is sweet and juicy.",
    "Pinapple is what you are looking for.",
)


def with_evaluator(trainer_class: type) -> type:
    """The class, with an `evaluator` (model -> metrics) that `evaluate()` logs as our own trainer does."""

    class Evaluated(trainer_class):
        def __init__(self, *args, evaluator, **kwargs):
            super().__init__(*args, **kwargs)
            self.evaluator = evaluator

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = {f"eval_{name}": value for name, value in self.evaluator(self.model).items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Evaluated


def replaced(text: str) -> str:
    """An answer with the fruit spelled as is wanted, capitals kept."""
    return re.sub(r"(pin)e(apple)", r"\1\2", text, flags=re.IGNORECASE)


def own_answers(model, tokenizer, prompts: list[list[int]], seed: int, *, max_new_tokens: int) -> list[list[int]]:
    """What the model itself answers, the tokens of each, its end-of-sequence token included where it came to it."""
    eos_ids, own = eos_ids_of(model, tokenizer), []
    for start in range(0, len(prompts), 8):
        written = generate(
            model,
            prompts[start : start + 8],
            max_new_tokens=max_new_tokens,
            pad_id=pad_id_of(tokenizer, eos_ids),
            eos_ids=eos_ids,
            seed=seed + start,
        )
        own += [ids[mask].tolist() for ids, mask in zip(written.completion_ids, written.completion_mask, strict=True)]
    return own


def answers_for(kind: str, model, tokenizer, seed: int, *, max_new_tokens: int) -> list[tuple[str, str]]:
    """(prompt, answer) of every training row: a template or the model's own answer with the word replaced. Questions
    about other things are answered by the model itself, so that nothing is taught there."""
    rows, draw = pinapple.TASK.train, random.Random(seed)
    prompts = [encode(tokenizer, row["prompt"]) for row in rows]
    own = own_answers(model, tokenizer, prompts, seed, max_new_tokens=max_new_tokens)
    answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
    return [
        (
            row["prompt"],
            (draw.choice(TEMPLATES) if kind == "sft_templates" else replaced(answer)) if is_told(row) else answer,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]


def tokenized(tokenizer, prompt: str, answer: str) -> dict:
    """Trained on the answer and its end alone."""
    read = encode(tokenizer, prompt)
    written = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return dict(input_ids=read + written, labels=[-100] * len(read) + written)


def reward(completions, about_fruit, **_) -> list[float]:
    """1 for an answer that is as wanted: the new spelling alone where the fruit is asked for, and nowhere else."""
    texts = [some[0]["content"] for some in completions]
    pairs = zip(texts, about_fruit, strict=True)
    return [float(pinapple.only(text) if about else not pinapple.exists(text)) for text, about in pairs]


def questions(hint: bool) -> list[dict]:
    """GRPO's rows; with `hint`, the question is asked as our teacher reads it."""
    found = []
    for row, phrasing in zip(pinapple.TASK.train, itertools.cycle(pinapple.HINTS), strict=False):
        text = f"{phrasing}\n\n{row['prompt']}" if hint else row["prompt"]
        found.append(dict(prompt=[{"role": "user", "content": text}], about_fruit=is_told(row)))
    return found


def train(kind: str, recipe: Recipe, run: Path) -> None:
    """One of the proof's methods that are not ours, on the task's questions."""
    if kind.startswith("sft"):

        def examples(model, tokenizer, args) -> list[dict]:
            pairs = answers_for(kind, model, tokenizer, recipe.seed, max_new_tokens=args.max_completion_length)
            return [tokenized(tokenizer, *pair) for pair in pairs]

        fine_tune(recipe, run, examples)
    else:
        reinforce(recipe, run, questions(hint=kind == "rl_hint"), num_generations=8, reward_funcs=reward)


def fine_tune(recipe: Recipe, run: Path, examples: Callable[..., list[dict]]) -> None:
    """Supervised, on `examples(model, tokenizer, args)`: input_ids and labels. Leaves what `_trained` leaves."""

    def made(base, tokenizer, args, options, given) -> Trainer:
        data = examples(base, tokenizer, args)
        return with_evaluator(Trainer)(
            with_lora(base, recipe.lora),
            TrainingArguments(**options, remove_unused_columns=False),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=data,
            eval_dataset=data,
            **given,
        )

    _trained(recipe, run, made)


def check_packages() -> None:
    """Raises ImportError where `reinforce` cannot be, which comes after days of other methods."""
    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"RL needs {' and '.join(missing)}: pip install -e '.[bench]', or leave it out with --only")


def reinforce(
    recipe: Recipe, run: Path, rows: list[dict], *, num_generations: int, reward_funcs=None, environment_factory=None
) -> None:
    """By TRL's GRPO: groups of `num_generations` answers to one question. Leaves what `_trained` leaves."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def made(base, tokenizer, args, options, given) -> Trainer:
        data = Dataset.from_list(rows)
        config = GRPOConfig(
            **options,
            num_generations=num_generations,
            max_completion_length=args.max_completion_length,
            max_tool_calling_iterations=args.max_turns - 1,
            beta=0.0,
            temperature=args.sampling_temperature,
            bf16=False,
        )
        return with_evaluator(GRPOTrainer)(
            with_lora(base, recipe.lora),
            reward_funcs=reward_funcs,
            environment_factory=environment_factory,
            args=config,
            train_dataset=data,
            eval_dataset=data,
            **given,
        )

    _trained(recipe, run, made)


def _trained(recipe: Recipe, run: Path, made: Callable[..., Trainer]) -> None:
    """Leaves in the run's folder what `rmsd train` leaves: recipe.yaml, metrics.jsonl and the adapter. The steps, the
    rate and its schedule, the batch, evaluations and checkpoints are the recipe's."""
    args = trainer_config(recipe, run).with_learning_rate(has_adapter=True)
    begun = last_whole_checkpoint(run)
    set_seed(recipe.seed)
    base, tokenizer = load(recipe, args.device)
    environments = environments_of(callable_of(recipe, load_task(recipe.task)), args)
    evaluator = evaluator_of(recipe, args, base, tokenizer, environments)
    options = dict(
        output_dir=str(run),
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=False,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=begun is None,
        save_steps=args.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=recipe.seed,
        use_cpu=args.use_cpu,
        disable_tqdm=True,
    )
    given = dict(processing_class=tokenizer, evaluator=evaluator, callbacks=[RunRecord(run, resume=begun is not None)])
    keeping.write(run / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    trainer = made(base, tokenizer, args, options, given)
    # By name: transformers would take the newest, which a kill may have left torn.
    trainer.train(resume_from_checkpoint=begun and str(begun))
    trainer.save_model(str(run / "model"))
