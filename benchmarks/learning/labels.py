"""Questions as a run of the suite asks them, with the oracle's answers as labels: what any judge can be measured on."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from rmsd import RMSDConfig, RMSDTrainer
from rmsd.answers.contrast import Contrasts
from rmsd.judge import ContextJudge, ContrastJudge, MagnitudeJudge, Question
from rmsd.judge.measure import Labelled, measure
from rmsd.run.judging import marks_table

from .lesson import ANSWER_TOKENS, TEMPLATE, Lesson, OracleJudge
from .methods import VOCAB_TOPK


class Labelling:
    """A judge that keeps nothing. It notes each question that has candidates, with all that the oracle finds relevant;
    and has the candidates' contrast read, so that a contrast judge can be measured on them too."""

    def __init__(self, lesson: Lesson):
        self.oracle, self.labelled = OracleJudge(lesson), []
        self.contrasts = Contrasts(lesson.task.train)

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        whole = [replace(q, max_kept=len(q.candidates)) for q in questions if q.candidates]
        answers = self.oracle(whole)
        self.labelled += [Labelled(q, frozenset(kept)) for q, kept in zip(whole, answers, strict=True)]
        return [[] for _ in questions]


def labelled(base, lesson: Lesson, number: int, **options) -> list[Labelled]:
    """Of the answers that the base model gives to `number` of the lesson's rows. `options` go to RMSDConfig."""
    judge = Labelling(lesson)
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder,
            seed=lesson.seed,
            max_steps=1,
            per_device_train_batch_size=number,
            max_completion_length=ANSWER_TOKENS,
            teacher_template=TEMPLATE,
            vocab_topk=VOCAB_TOPK,
            recorded_rollouts=0,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        args = RMSDConfig(**settings | options)
        trainer = RMSDTrainer(copy.deepcopy(base), args, lesson.task.train, lesson.world.tokenizer, judge=judge)
        trainer.train()
    return judge.labelled


def table(lesson: Lesson, labelled: Sequence[Labelled]) -> str:
    """How many candidates there are and are relevant, and what the judges that need no model make of them."""
    prompts, rows = [row["prompt"] for row in lesson.rows], lesson.task.train
    judges = {
        "magnitude": MagnitudeJudge(),
        "context": ContextJudge(prompts),
        "context, on topic": ContextJudge(prompts, on_topic=True),
        "contrast": ContrastJudge(rows),
        "contrast, on topic": ContrastJudge(rows, on_topic=True),
    }
    candidates, relevant = sum(len(x.question.candidates) for x in labelled), sum(len(x.relevant) for x in labelled)
    head = f"{len(labelled)} answers, {candidates} candidates, {relevant} relevant by the oracle"
    return head + "\n\n" + marks_table({name: measure(judge, labelled) for name, judge in judges.items()}, labelled)
