"""What is taught, and the exam: one thing's name gets a spelling that the base model has never met, a thing a seed."""

import copy
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from rmsd.answers.prompts import teacher_prompt
from rmsd.judge import Question
from rmsd.run.evaluate import Evaluator
from rmsd.tasks import Task

from .corpus import HINTS, QUESTIONS, SKILLS, World, ask, skill

TRAINED_CUES, HELD_OUT_CUES = slice(0, 5), slice(5, None)
TEMPLATE = "{privileged_context} {prompt}"
ANSWER_TOKENS = 32  # a name given twice, with the longest opening and closing, takes fewer


class Lesson:
    """Rows to train on and prompts to examine with, all following from `seed`.

    Six rows in ten ask about the taught thing, the others about anything else; all of them carry the hint. With
    `anchors` the others carry none, and hold the model where it was.
    """

    def __init__(self, world: World, seed: int, *, rows: int = 200, anchors: bool = False):
        rng = random.Random(f"lesson {seed}")
        self.world, self.seed = world, seed
        self.thing = world.things[seed]
        self.old, self.new = self.thing.name, world.lessons[seed]
        others = [thing for thing in world.things if thing is not self.thing]
        self.rows = []
        for number in range(rows):
            wanted = number % 10 < 6
            prompt, cue = world.question(self.thing if wanted else rng.choice(others), rng, TRAINED_CUES)
            told, contrast = (
                HINTS[number % len(HINTS)].format(old=old, new=new)
                for old, new in ((self.old, self.new), self._other(world))
            )
            context = "" if anchors and not wanted else told
            self.rows.append(
                {"prompt": prompt, "privileged_context": context, "contrast_context": contrast, "cue": cue}
            )
        neighbours = [thing for thing in others if thing.name[:3] == self.old[:3]]
        asked = [*neighbours[:4], *rng.sample([thing for thing in others if thing not in neighbours], 16)]
        self.unrelated = [(world.question(thing, rng, HELD_OUT_CUES)[0], thing.name) for thing in asked * 2]
        self.task = Task(
            train=[{name: value for name, value in row.items() if name != "cue"} for row in self.rows],
            target_prompts=[ask(question, cue) for question in QUESTIONS for cue in self.thing.cues[HELD_OUT_CUES]],
            unrelated_prompts=[prompt for prompt, _ in self.unrelated],
            graders={"target": self.has_new, "target_only": self.has_only_new},
            leaks=self.has_new,
        )

    def _other(self, world: World) -> tuple[str, str]:
        """(name, its respelling) of another thing, of another beginning: what the contrast contexts are about."""
        rng = random.Random(f"contrast {self.seed}")
        other = rng.choice([thing for thing in world.things if thing.name[:3] != self.old[:3]])
        return other.name, world.lessons[world.things.index(other)]

    def told(self) -> "Lesson":
        """The same lesson, whose exam puts the hint before every question, its phrasings in turn: asks the teacher."""
        told = copy.copy(self)
        asked = self.task.target_prompts, self.task.unrelated_prompts
        target, unrelated = map(self._told, asked)
        told.task = replace(self.task, target_prompts=target, unrelated_prompts=unrelated)
        return told

    def _told(self, prompts: Sequence[str]) -> list[str]:
        hints = (hint.format(old=self.old, new=self.new) for hint in itertools.cycle(HINTS))
        rows = ({"prompt": prompt, "privileged_context": hint} for prompt, hint in zip(prompts, hints, strict=False))
        return [teacher_prompt(row, TEMPLATE) for row in rows]

    def has_new(self, answer: str) -> bool:
        return self.new in answer.split()

    def has_only_new(self, answer: str) -> bool:
        return self.has_new(answer) and self.old not in answer.split()

    def is_about(self, prompt: str) -> bool:
        return any(cue in prompt.split() for cue in self.thing.cues)


class Exam(Evaluator):
    """The project's evaluator with fewer, larger batches and more marks. Answers to target prompts are sampled at
    temperature 1, as in training; all others are greedy.

    target, target_only: share of answers to held-out prompts with the new spelling, and with it alone.
    specificity: share of answers to unrelated questions without the new spelling.
    facts: share of answers to unrelated questions that name the right thing, spelled as ever.
    style: share of answers to unrelated questions that speak as only a told model does.
    skills: share of exact answers to exercises, the mean of the five skills.
    drift: as Evaluator's, in nats a token.
    """

    def __init__(self, base, lesson: Lesson, *, exercises: int = 16, samples: int = 4):
        super().__init__(
            base,
            lesson.world.tokenizer,
            lesson.task,
            samples=samples,
            temperature=1.0,
            max_new_tokens=ANSWER_TOKENS,
            batch_size=256,
            seed=lesson.seed,
        )
        rng = random.Random("exam")
        self.names = [name for _, name in lesson.unrelated]
        exercises = [skill(name, rng) for name in SKILLS for _ in range(exercises)]
        self.exercise_ids = self.tokenizer([prompt for prompt, _ in exercises])["input_ids"]
        self.solutions = [answer for _, answer in exercises]

    @torch.no_grad()
    def __call__(self, model) -> dict[str, float]:
        targets = self._texts(model, self.target_ids * self.samples, self.temperature)
        others = self._texts(model, self.unrelated_ids + self.exercise_ids)
        answers, solved = others[: len(self.names)], others[len(self.names) :]
        return {
            **{name: _mean(map(grader, targets)) for name, grader in self.task.graders.items()},
            "specificity": 1.0 - _mean(map(self.task.leaks, answers)),
            "facts": _mean(name in text.split() for text, name in zip(answers, self.names, strict=True)),
            "style": _mean("noted" in text or "asked" in text for text in answers),
            "skills": _mean(a.strip() == b for a, b in zip(solved, self.solutions, strict=True)),
            "drift": self._drift(model),
        }


class OracleJudge:
    """Knows the lesson: keeps candidates inside the name, as long as what is written of it begins the new spelling."""

    def __init__(self, lesson: Lesson):
        self.lesson = lesson

    def __call__(self, questions: list[Question]) -> list[list[int]]:
        return [self._judge(question) for question in questions]

    def _judge(self, question: Question) -> list[int]:
        if not self.lesson.is_about(question.prompt):
            return []
        kept = [c.position for c in question.candidates if self._bears("".join(question.tokens[: c.position]))]
        return kept[: question.max_kept]

    def _bears(self, before: str) -> bool:
        begun = before.rpartition(" ")[2]
        return begun != "" and self.lesson.new.startswith(begun)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
