"""The methods under comparison. Each takes a base model and a lesson and returns the exam's marks as training goes on,
without a continuation and, if asked, with one.

OPSD and RMSD are the project's own `RMSDTrainer`; supervised fine-tuning and the policy gradient are plain loops with
the same optimizer, batch, clipping and warm-up.
"""

import copy
import random
import tempfile
import time
from dataclasses import replace

import torch
from transformers import TrainerCallback

from rmsd import RMSDConfig, RMSDTrainer
from rmsd.answers.prompts import teacher_prompt
from rmsd.answers.rollout import generate
from rmsd.judge import ContextJudge, ContrastJudge, MagnitudeJudge
from rmsd.models.hidden import completion_hidden

from .base import answer_loss, collate
from .corpus import answer_about
from .lesson import ANSWER_TOKENS, TEMPLATE, Exam, Lesson, OracleJudge

BATCH, WARMUP = 16, 5
VOCAB_TOPK = 64  # of a vocabulary of 389: a loss over K = 500 would never be cut off, as one of 150,000 is

METHODS = {
    "sft_templates": dict(kind="sft", answers="templates"),
    "sft_own": dict(kind="sft", answers="own"),
    "rl": dict(kind="rl"),
    "opsd": dict(kind="distil", method="opsd"),
    "rmsd_magnitude": dict(kind="distil", method="rmsd", judge="magnitude"),
    "rmsd_context": dict(kind="distil", method="rmsd", judge="context"),
    "rmsd_topic": dict(kind="distil", method="rmsd", judge="topic"),
    "rmsd_oracle": dict(kind="distil", method="rmsd", judge="oracle"),
    "rmsd_contrast": dict(kind="distil", method="rmsd", judge="contrast"),
    "rmsd_contrast_topic": dict(kind="distil", method="rmsd", judge="contrast_topic"),
    "opsd_anchors": dict(kind="distil", method="opsd", anchors=True),
    "rmsd_context_anchors": dict(kind="distil", method="rmsd", judge="context", anchors=True),
    "rmsd_contrast_anchors": dict(kind="distil", method="rmsd", judge="contrast", anchors=True),
    "rmsd_oracle_anchors": dict(kind="distil", method="rmsd", judge="oracle", anchors=True),
}


def train(
    base, lesson: Lesson, *, kind: str, steps: int, every: int, learning_rate: float, **options
) -> dict[str, list[dict]]:
    """{"": marks} and, with an option `continuation`, a step, {"+": marks} of the run that the student as it is then
    becomes the teacher of. Both have the steps before in common.

    Marks at step 0, `every`, 2 `every`, ..., `steps`: the exam's metrics; counted since the start, "tokens" that bore a
    gradient, "rollout_tokens" that were sampled and "seconds" of processor time without the exams; and the mean "loss"
    since the last mark.
    """
    model = copy.deepcopy(base)
    torch.manual_seed(lesson.seed)
    exam = Exam(base, lesson)
    run = {"sft": fine_tune, "rl": policy_gradient, "distil": distil}[kind]
    return run(model, lesson, exam, steps=steps, every=every, learning_rate=learning_rate, **options)


# ---- supervised fine-tuning ----------------------------------------------------------------------------------------


def fine_tune(model, lesson, exam, *, continuation=None, **options) -> dict[str, list[dict]]:
    """On answers that the hint asks for, without the hint: from the corpus's templates, all in the new spelling, or
    sampled once from the told model (and once more from the told student at the step `continuation`)."""
    marks = {"": _fine_tune(copy.deepcopy(model), lesson, exam, again_at=None, **options)}
    if continuation:
        marks["+"] = _fine_tune(model, lesson, exam, again_at=continuation, **options)
    return marks


def _fine_tune(model, lesson, exam, *, steps, every, learning_rate, answers, again_at) -> list[dict]:
    course = Course(model, exam, every, learning_rate)
    pairs = _template_answers(lesson) if answers == "templates" else _own_answers(model, lesson, lesson.seed)
    order = _order(lesson)
    for step in range(1, steps + 1):
        batch = [pairs[next(order)] for _ in range(BATCH)]
        ids, labels = collate(lesson.world.tokenizer, batch)
        course.update(answer_loss(model, ids, labels), tokens=(labels >= 0).sum().item())
        if step == again_at:
            pairs = _own_answers(model, lesson, lesson.seed + 1)
    return course.marks


def _template_answers(lesson: Lesson) -> list[tuple[str, str]]:
    rng, pairs = random.Random(lesson.seed), []
    names = {cue: thing.name for thing in lesson.world.things for cue in thing.cues}
    for row in lesson.rows:
        name = lesson.new if lesson.is_about(row["prompt"]) else names[row["cue"]]
        pairs.append((row["prompt"], answer_about(name, name, row["cue"], rng, told=True)))
    return pairs


def _own_answers(model, lesson: Lesson, seed: int) -> list[tuple[str, str]]:
    prompts = [teacher_prompt(row, TEMPLATE) for row in lesson.task.train]
    rollouts = _sample(model, lesson, prompts, seed)
    return [
        (row["prompt"], lesson.world.tokenizer.decode(ids[mask], skip_special_tokens=True).strip())
        for row, ids, mask in zip(lesson.rows, rollouts.completion_ids, rollouts.completion_mask, strict=True)
    ]


# ---- reinforcement learning ----------------------------------------------------------------------------------------


def policy_gradient(model, lesson, exam, *, steps, every, learning_rate) -> dict[str, list[dict]]:
    """Sparse reward: 1 for an answer about the taught thing that holds the new spelling; the batch's mean is the
    baseline. Where all answers earn the same there is nothing to learn."""
    course = Course(model, exam, every, learning_rate)
    prompts = [row["prompt"] for row in lesson.rows if lesson.is_about(row["prompt"])]
    order, tokenizer = _order(lesson), lesson.world.tokenizer
    for step in range(1, steps + 1):
        asked = [prompts[next(order) % len(prompts)] for _ in range(BATCH)]
        rollouts = _sample(model, lesson, asked, lesson.seed * 10_000 + step)
        ids, mask = rollouts.completion_ids, rollouts.completion_mask
        texts = [tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)]
        reward = torch.tensor([float(lesson.has_new(text)) for text in texts])
        course.rollout_tokens += mask.sum().item()
        if reward.min() == reward.max():
            course.update(None)
            continue
        hidden = completion_hidden(model, rollouts.prompt_ids, ids, mask, tokenizer.pad_token_id)
        logprob = model.lm_head(hidden).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        advantage = (reward - reward.mean()).unsqueeze(1)
        course.update(-(advantage * logprob * mask).sum() / mask.sum(), tokens=mask.sum().item())
    return {"": course.marks}


# ---- self-distillation ---------------------------------------------------------------------------------------------


def distil(
    model,
    lesson,
    exam,
    *,
    steps,
    every,
    learning_rate,
    method,
    judge="magnitude",
    continuation=None,
    degrade=None,
    floor=0.5,
    **options,
) -> dict[str, list[dict]]:
    """OPSD or RMSD. `options` go to RMSDConfig, in place of what is set here; `degrade` is Degraded's (miss, noise),
    `floor` a contrast judge's."""
    prompts = [row["prompt"] for row in lesson.rows]
    judges = dict(
        magnitude=MagnitudeJudge(),
        context=ContextJudge(prompts),
        topic=ContextJudge(prompts, on_topic=True),
        promotions=promotions_only(ContextJudge(prompts)),
        oracle=OracleJudge(lesson),
        contrast=ContrastJudge(lesson.task.train, floor=floor),
        contrast_topic=ContrastJudge(lesson.task.train, floor=floor, on_topic=True),
    )
    asked = Degraded(judges[judge], *degrade, lesson.seed) if degrade else judges[judge]
    base = copy.deepcopy(model)  # which the continued run starts from as well: it is the teacher up to there
    marks = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(model, clock, checkpoint=None, **more) -> list[dict]:
            settings = dict(
                output_dir=folder,
                method=method,
                seed=lesson.seed,
                max_steps=steps,
                learning_rate=learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=WARMUP,
                weight_decay=0.0,
                max_grad_norm=1.0,
                per_device_train_batch_size=BATCH,
                max_completion_length=ANSWER_TOKENS,
                teacher_template=TEMPLATE,
                vocab_topk=VOCAB_TOPK,
                recorded_rollouts=0,
                use_cpu=True,
                eval_strategy="steps",
                eval_steps=every,
                disable_tqdm=True,
            )
            args = RMSDConfig(**{**settings, **options, **more})
            trainer = RMSDTrainer(
                model,
                args,
                lesson.task.train,
                lesson.world.tokenizer,
                judge=asked,
                evaluator=exam,
                callbacks=[clock],
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            return _marks_of(trainer.state.log_history, clock.seconds)

        clock = Clock()
        if not continuation:
            return {"": run(model, clock, save_strategy="no", eval_on_start=True)}
        last = continuation - 1  # whose weights are not yet the teacher's
        marks[""] = run(model, clock, save_strategy="steps", save_steps=last, eval_on_start=True)
        checkpoint = f"{folder}/checkpoint-{last}"
        marks["+"] = run(base, clock.until(last), checkpoint, save_strategy="no", continuation_steps=[continuation])
    return marks


def promotions_only(judge):
    """A judge that is not told which written tokens the teacher wants gone."""

    def judged(questions):
        blind = [
            replace(question, candidates=tuple(replace(candidate, gap=0.0) for candidate in question.candidates))
            for question in questions
        ]
        return judge(blind)

    return judged


class Degraded:
    """A judge made worse on purpose: of what it keeps, a share `miss` is dropped; of the candidates that it does not
    keep, a share `noise` is kept besides."""

    def __init__(self, judge, miss: float, noise: float, seed: int):
        self.judge, self.miss, self.noise, self.rng = judge, miss, noise, random.Random(seed)

    def __call__(self, questions):
        return [self._spoil(q, kept) for q, kept in zip(questions, self.judge(questions), strict=True)]

    def _spoil(self, question, kept):
        wrong = [c.position for c in question.candidates if c.position not in kept and self.rng.random() < self.noise]
        mixed = [position for position in kept if self.rng.random() >= self.miss] + wrong
        self.rng.shuffle(mixed)
        return mixed[: question.max_kept]


class Clock(TrainerCallback):
    """Processor time of steps: from the end of a step or of an exam to the end of the next step."""

    def __init__(self):
        self.seconds, self.total = {0: 0.0}, 0.0

    def until(self, step: int) -> "Clock":
        """A clock of another run that goes on from there."""
        clock = Clock()
        clock.seconds, clock.total = dict(self.seconds), self.seconds[step]
        return clock

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self.total += now - self.since
        self.since, self.seconds[state.global_step] = now, self.total

    def on_evaluate(self, args, state, control, **kwargs):
        self.since = time.process_time()


def _marks_of(history: list[dict], seconds: dict[int, float]) -> list[dict]:
    """Trainer's log to marks. Counts are summed over entries, for an entry may speak of more than one step."""
    marks = []
    for entry in history:
        if "eval_target" not in entry:
            continue
        logged = [e for e in history if "kept_tokens" in e and e["step"] <= entry["step"]]
        since = marks[-1]["step"] if marks else -1
        mark = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        mark |= dict(
            step=entry["step"],
            tokens=sum(e["kept_tokens"] for e in logged),
            rollout_tokens=sum(e["rollout_tokens"] for e in logged),
            seconds=seconds[entry["step"]],
            loss=_mean(e["loss"] for e in logged if e["step"] > since),
            tail_mass=_mean(e["tail_mass"] for e in logged),
        )
        marks.append(mark)
    return marks


# ---- what the plain loops share ------------------------------------------------------------------------------------


class Course:
    """Optimizer, counts and exams of a plain loop."""

    def __init__(self, model, exam: Exam, every: int, learning_rate: float):
        self.model, self.exam, self.every = model, exam, every
        self.optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
        self.learning_rate = learning_rate
        self.step = self.tokens = self.rollout_tokens = 0
        self.seconds, self.marks, self.losses = 0.0, [], []
        self._examine()
        self.since = time.process_time()

    def update(self, loss, tokens: int = 0) -> None:
        """One step on `loss`; None for a step that has nothing to learn."""
        if loss is not None:
            self.losses.append(loss.item())
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(self.step / WARMUP, 1.0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.seconds += time.process_time() - self.since
        if self.step % self.every == 0:
            self._examine()
        self.since = time.process_time()

    def _examine(self) -> None:
        counts = dict(step=self.step, tokens=self.tokens, rollout_tokens=self.rollout_tokens, seconds=self.seconds)
        self.marks.append({**self.exam(self.model), **counts, "loss": _mean(self.losses)})
        self.losses = []


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _order(lesson: Lesson):
    """Rows in a new random order each time round."""
    rng, numbers = random.Random(lesson.seed), list(range(len(lesson.rows)))
    while True:
        rng.shuffle(numbers)
        yield from numbers


def _sample(model, lesson: Lesson, prompts: list[str], seed: int):
    tokenizer = lesson.world.tokenizer
    return generate(
        model,
        tokenizer(prompts)["input_ids"],
        max_new_tokens=ANSWER_TOKENS,
        pad_id=tokenizer.pad_token_id,
        eos_ids=[tokenizer.eos_token_id],
        seed=seed,
    )
