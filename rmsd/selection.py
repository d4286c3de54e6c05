"""From candidates to kept tokens: the judge is asked about rollouts whose teacher was told something."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rmsd_kernels import TokenScores

from .data import prompt_text
from .judge import Candidate, Judge, MagnitudeJudge, Question
from .scoring import Logprobs, Wishes


def told_text(row: dict) -> str:
    """What a row's teacher knows beside the student, for a judge: the privileged context or, without one, the whole of
    the row's own teacher_prompt. Empty for an anchor, whose teacher reads the student's own prompt."""
    if row["privileged_context"].strip() or not row.get("teacher_prompt"):
        return row["privileged_context"]
    return prompt_text(row["teacher_prompt"])


def questions_of(
    prompts: Sequence[str],
    privileged_contexts: Sequence[str],  # as `told_text` has them
    tokens: Sequence[Sequence[str]],
    scores: TokenScores | Logprobs,  # each (B, L)
    candidates: Tensor,  # (B, T) int64, -1 for none
    wishes: Wishes,  # each (B, T)
    decode,  # list[int] -> list[str], a text for each id
    max_kept: int,
) -> list[Question]:
    """What a judge needs to know, as text. Everything is brought to the host at once, not number by number."""
    gap = (scores.teacher_logprob - scores.student_logprob).cpu()
    positions = candidates.cpu().tolist()
    promoted, student_preferred, teacher_preferred = (decode(ids.flatten().tolist()) for ids in wishes[:3])
    width = candidates.shape[1]
    return [
        Question(
            prompt=prompts[b],
            privileged_context=privileged_contexts[b],
            tokens=tuple(tokens[b]),
            candidates=tuple(
                Candidate(
                    position=position,
                    token=tokens[b][position],
                    promoted=promoted[b * width + i],
                    student_preferred=student_preferred[b * width + i],
                    teacher_preferred=teacher_preferred[b * width + i],
                    gap=gap[b, position].item(),
                )
                for i, position in enumerate(positions[b])
                if position >= 0
            ),
            max_kept=max_kept,
        )
        for b in range(len(prompts))
    ]


def ask(judge: Judge, questions: Sequence[Question]) -> list[list[int]]:
    """Kept positions of each rollout. A question without privileged context is of an anchor (`told_text`): its teacher
    is the initial model under the student's own prompt, every large gap is drift, and the largest are kept without
    asking. A rollout without candidates is not asked about either.

    Raises:
        ValueError: the judge answered another number of rollouts than it was asked about.
    """
    anchors = MagnitudeJudge()(questions)
    asked = [i for i, q in enumerate(questions) if q.privileged_context.strip() and q.candidates]
    answers = judge([questions[i] for i in asked]) if asked else []
    if len(answers) != len(asked):
        raise ValueError(f"the judge was asked about {len(asked)} rollouts and answered {len(answers)}")
    kept = [[] if q.privileged_context.strip() else anchors[i] for i, q in enumerate(questions)]
    for i, answer in zip(asked, answers, strict=True):
        allowed = {candidate.position for candidate in questions[i].candidates}
        kept[i] = [position for position in dict.fromkeys(answer) if position in allowed][: questions[i].max_kept]
    return kept


def keep_mask(kept: Sequence[Sequence[int]], shape: torch.Size) -> Tensor:
    """Positions -> (B, L) bool on the host, where judges answer."""
    keep = torch.zeros(shape, dtype=torch.bool)
    for b, positions in enumerate(kept):
        keep[b, list(positions)] = True
    return keep
