"""Supervised fine-tuning and reinforcement learning on the same questions, by transformers and TRL."""

import itertools
import random
import re
from pathlib import Path

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from rmsd.answers.prompts import encode
from rmsd.answers.rollout import eos_ids_of, generate, pad_id_of
from rmsd.models.loading import with_lora
from rmsd.run.recipe import Recipe, trainer_config
from rmsd.run.train import evaluator_of, load
from rmsd.tasks import pinapple
from rmsd.training.checkpoint import last_whole_checkpoint
from rmsd.training.record import RunRecord

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


def is_told(row: dict) -> bool:
    """Whether the question is about the fruit."""
    return bool(row["privileged_context"])


def answers_for(kind: str, model, tokenizer, seed: int, *, max_new_tokens: int) -> list[tuple[str, str]]:
    """(prompt, answer) of every training row: a template or the model's own answer with the word replaced. Questions
    about other things are answered by the model itself, so that nothing is taught there."""
    rows, eos_ids = pinapple.TASK.train, eos_ids_of(model, tokenizer)
    own = []
    for start in range(0, len(rows), 8):
        written = generate(
            model,
            [encode(tokenizer, row["prompt"]) for row in rows[start : start + 8]],
            max_new_tokens=max_new_tokens,
            pad_id=pad_id_of(tokenizer, eos_ids),
            eos_ids=eos_ids,
            seed=seed + start,
        )
        pairs = zip(written.completion_ids, written.completion_mask, strict=True)
        own += [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs]
    draw = random.Random(seed)
    return [
        (
            row["prompt"],
            (draw.choice(TEMPLATES) if kind == "sft_templates" else replaced(answer)) if is_told(row) else answer,
        )
        for row, answer in zip(rows, own, strict=True)
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


def train(kind: str, recipe: Recipe, run: Path, *, steps: int, every: int, rate: float, seed: int) -> None:
    """Leaves in the run's folder what `rmsd train` leaves: metrics.jsonl and the adapter."""
    args = trainer_config(recipe, run)
    set_seed(seed)
    base, tokenizer = load(recipe, args.device)
    evaluator = evaluator_of(recipe, args, base, tokenizer)
    shared = dict(
        output_dir=str(run),
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=8,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_steps=every,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        use_cpu=args.use_cpu,
        disable_tqdm=True,
    )
    given = dict(processing_class=tokenizer, evaluator=evaluator, callbacks=[RunRecord(run, resume=True)])
    if kind.startswith("sft"):
        pairs = answers_for(kind, base, tokenizer, seed, max_new_tokens=args.max_completion_length)
        data = [tokenized(tokenizer, *pair) for pair in pairs]
        trainer = with_evaluator(Trainer)(
            with_lora(base, recipe.lora),
            TrainingArguments(**shared, remove_unused_columns=False),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=data,
            eval_dataset=data,
            **given,
        )
    else:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        data = Dataset.from_list(questions(hint=kind == "rl_hint"))
        config = GRPOConfig(
            **shared,
            num_generations=8,
            max_completion_length=args.max_completion_length,
            beta=0.0,
            temperature=args.sampling_temperature,
            bf16=False,
        )
        trainer = with_evaluator(GRPOTrainer)(
            with_lora(base, recipe.lora),
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            eval_dataset=data,
            **given,
        )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(run) is not None)
    trainer.save_model(str(run / "model"))
