"""A recipe's model, asked before it is trained: its answers to any prompts, and what a step would make of some rows."""

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property

from transformers import PrinterCallback, TrainerCallback

from ..answers.contrast import Contrasts, is_told
from ..answers.episodes import Episodes
from ..answers.prompts import Prompt, Prompts, encode, prompt_text, teacher_prompt
from ..answers.rollout import eos_ids_of, generate, pad_id_of
from ..judge import ContextJudge, ContrastJudge, Judge, MagnitudeJudge, Question
from ..models.loading import with_lora
from ..tasks import load_task
from ..training.trainer import RMSDTrainer
from .calling import callable_of, environments_of
from .judges import build_judge, contrast_options
from .recipe import Recipe, trainer_config
from .solving import Solving
from .train import load, task_rows


class Probe:
    """The recipe's model and rows. `notes` says what could not be done."""

    def __init__(self, recipe: Recipe, batch_size: int = 16):
        self.recipe, self.batch_size = recipe, batch_size
        self.args = trainer_config(recipe, recipe.output_dir)
        self.task = load_task(recipe.task) if recipe.task else None
        self.called = callable_of(recipe, self.task)
        self.rows = task_rows(recipe, self.task)
        self.told = [row for row in self.rows if is_told(row)]
        if not self.told and self.called:
            raise ValueError(
                "no row has a privileged_context, and what an environment tells the teacher afterwards is known in a "
                "run alone: give rows one, or start the run"
            )
        if not self.told:
            raise ValueError("all rows are anchors: no row has a privileged context")
        self.notes: list[str] = []

    @cached_property
    def _loaded(self):
        return load(self.recipe, self.args.device)

    @cached_property
    def model(self):
        """Loaded when it is first asked: labelled questions of a file need none."""
        return self._loaded[0]

    @cached_property
    def tokenizer(self):
        return self._loaded[1]

    @cached_property
    def eos_ids(self):
        return eos_ids_of(self.model, self.tokenizer)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy, of `evaluate.max_new_tokens` at most."""
        return self.continued(
            [encode(self.tokenizer, prompt) for prompt in prompts], self.recipe.evaluate.max_new_tokens
        )

    def continued(self, prompt_ids: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        texts = []
        for start in range(0, len(prompt_ids), self.batch_size):
            written = generate(
                self.model,
                prompt_ids[start : start + self.batch_size],
                max_new_tokens=max_new_tokens,
                pad_id=pad_id_of(self.tokenizer, self.eos_ids),
                eos_ids=self.eos_ids,
                temperature=0.0,
            )
            pairs = zip(written.completion_ids, written.completion_mask, strict=True)
            texts += [self.tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs]
        return texts

    def told_prompt(self, row: dict) -> Prompt:
        return teacher_prompt(row, self.args.teacher_template, self.args.teacher_place)

    def solving(self, requests: Sequence[dict]) -> Solving:
        """Of a task with an environment: plays requests, untold or told."""
        environments = environments_of(self.called, self.args)
        return Solving(
            Episodes(self.tokenizer, environments, max_turns=self.args.max_turns),
            requests,
            contextlib.nullcontext,
            max_new_tokens=self.recipe.evaluate.max_new_tokens,
            pad_id=pad_id_of(self.tokenizer, self.eos_ids),
            eos_ids=self.eos_ids,
            batch_size=self.batch_size,
            seed=0,
            prompts=Prompts(self.tokenizer, self.args.teacher_template, self.args.teacher_place, environments.schemas),
        )

    @cached_property
    def contrasts(self) -> Contrasts | None:
        """None where rows have no contrast context."""
        try:
            return Contrasts(self.rows, self.recipe.judge.contrast_context)
        except ValueError as error:
            self.notes.append(f"contrast judge: {error}")
            return None

    def step(self, rows: list[dict]) -> tuple[list[Question], dict, float]:
        """A single step on these rows as the run would make it, but at a learning rate of 0: its questions for a judge,
        its log entry, and seconds a rollout."""
        heard, clock, recipe = _Heard(self.contrasts), _Clock(), self.recipe
        if recipe.lora and not hasattr(self.model, "peft_config"):
            self.model = with_lora(self.model, recipe.lora)
        with tempfile.TemporaryDirectory() as folder:
            args = trainer_config(recipe, recipe.output_dir)
            size = min(args.per_device_train_batch_size, len(rows))
            once = dict(
                output_dir=folder,
                method="rmsd",
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=math.ceil(len(rows) / size),
                save_strategy="no",
                eval_strategy="no",
                eval_on_start=False,
                load_best_model_at_end=False,
                disable_tqdm=True,
                logging_steps=1,
                learning_rate=0.0,
                continuation_steps=[],
                continuation_metric=None,
                recorded_rollouts=0,
                push_to_hub=False,
                report_to=[],
            )
            for name, value in once.items():
                setattr(args, name, value)
            trainer = RMSDTrainer(self.model, args, rows, self.tokenizer, judge=heard, **self.called)
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)  # no run's log: what it holds is told in words
            trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        return heard.questions, logged, clock.seconds / len(rows)

    def judges(self) -> dict[str, Judge]:
        """Those that need nothing, and the recipe's own where it is another."""
        section = self.recipe.judge
        judges = {
            "magnitude": MagnitudeJudge(),
            "context": ContextJudge(prompt_text(row["prompt"]) for row in self.rows),
        }
        if self.contrasts:
            judges["contrast"] = ContrastJudge(self.rows, **contrast_options(section))
        asks = section.kind == "llm" or (section.kind == "contrast" and section.model)
        if asks or (section.on_topic and section.kind in ("context", "contrast")):
            try:
                judges[f"the recipe's, {section.kind}"] = build_judge(section, self.rows)
            except (ConnectionError, ImportError) as error:
                self.notes.append(f"the recipe's judge: {error}")
        return judges


class _Clock(TrainerCallback):
    """Seconds of the one step: train_runtime counts what a run begins with, as its self-check, too. To Trainer a step
    begins when its rollouts are there already, so the clock starts with the epoch."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.began


class _Heard:
    """A judge that keeps the largest gaps and remembers what it was asked."""

    def __init__(self, contrasts: Contrasts | None):
        self.contrasts, self.questions = contrasts, []

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        self.questions += questions
        return MagnitudeJudge()(questions)


def spread(items: Sequence, count: int) -> list:
    """`count` of them, evenly spaced."""
    items = list(items)
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def edit(question: Question, position: int, around: int = 6) -> str:
    """The teacher's wish at a candidate, shown in the answer: `it is made with [ pine -> pin]apple`."""
    candidate = next(candidate for candidate in question.candidates if candidate.position == position)
    before = "".join(question.tokens[max(0, position - around) : position])
    after = "".join(question.tokens[position + 1 : position + 1 + around])
    contrast = "" if candidate.contrast is None else f", contrast {candidate.contrast:.2f}"
    text = f"{before}[{candidate.token} -> {candidate.promoted}]{after}".replace("\n", "\\n")
    return f"{text}   (gap {candidate.gap:.2f}{contrast})"
