"""Judge: from candidates to kept tokens. The judge is asked about rollouts whose teacher was told something."""

import contextlib
import operator
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..answers.prompts import prompt_text
from ..judge import Candidate, Judge, MagnitudeJudge, Question
from ..judge.pieces import Pieces
from ..models.transfer import to_host
from .micro_batch import MicroBatch
from .scoring import turns_of

_SHOWN = ("student_logprob", "teacher_logprob", "divergence")  # scores that a reader of the run is shown


def told_text(row: dict) -> str:
    """What a row's teacher knows beside the student, for a judge: the privileged context or, without one, the whole of
    the row's own teacher_prompt. Empty for an anchor, whose teacher reads the student's own prompt."""
    if row["privileged_context"].strip() or not row.get("teacher_prompt"):
        return row["privileged_context"]
    return prompt_text(row["teacher_prompt"])


def questions_of(
    batch: MicroBatch, tokenizer, max_kept: int, min_gap: float = 0.0, per_turn: bool = False
) -> list[Question]:
    """What a judge needs to know of a scored micro-batch, as text. Fills in `host_scores` on the way: everything is
    brought to the host at once, not number by number. `max_kept` is of a rollout, or of each of its turns. Of a rollout
    whose teacher was told something, candidates with a gap below `min_gap` nats are left out: a judge need not
    read what would hardly be trained on. An anchor's are drift, of which the smallest counts."""
    answered = batch.rollouts.on_host
    present, written = zip(answered.completion_ids, answered.attention_mask, strict=True), answered.completion_mask
    turns = turns_of(written).amax(1).tolist() if per_turn and written.shape[1] else [1] * len(written)
    answers = [Pieces(tokenizer, ids[mask].tolist()) for ids, mask in present]
    columns = {name: getattr(batch.scores, name) for name in _SHOWN if name in batch.scores._fields}
    wishes = [tensor for name, tensor in batch.wishes._asdict().items() if name != "tail_mass" and tensor is not None]
    told = to_host(*columns.values(), batch.candidates, *wishes)
    batch.host_scores = dict(zip(columns, told, strict=False))
    positions, promoted, student_preferred, teacher_preferred, *rest = (x.tolist() for x in told[len(columns) :])
    contrast = rest[0] if rest else None
    gap = batch.host_scores["teacher_logprob"] - batch.host_scores["student_logprob"]
    floors = [min_gap if told_text(row).strip() else 0.0 for row in batch.rows]
    return [
        Question(
            prompt=prompt_text(row["prompt"]),
            privileged_context=told_text(row),
            tokens=tuple(answers[b].texts),
            candidates=tuple(
                Candidate(
                    position=position,
                    token=answers[b].texts[position],
                    promoted=answers[b].instead(position, promoted[b][i]),
                    student_preferred=answers[b].instead(position, student_preferred[b][i]),
                    teacher_preferred=answers[b].instead(position, teacher_preferred[b][i]),
                    gap=gap[b, position].item(),
                    contrast=None if contrast is None else contrast[b][i],
                )
                for i, position in enumerate(positions[b])
                if position >= 0 and not gap[b, position].abs() < floors[b]
            ),
            max_kept=max_kept * turns[b],
            unwritten=tuple(i for i in range(len(answers[b].texts)) if not written[b, i]),
            teacher_prompt="" if batch.teacher_prompts is None else prompt_text(batch.teacher_prompts[b]),
        )
        for b, row in enumerate(batch.rows)
    ]


def judge_batch(batch: MicroBatch, judge: Judge | None, most_a_turn: int | None = None) -> None:
    """Fills in `kept`, and the seconds that it took to be told. Without a judge (OPSD) every token that the student
    wrote is kept. A judge knows how many may be kept of a rollout, and not of which turn each is: `most_a_turn` of
    each are."""
    started = time.monotonic()
    if judge is None:
        batch.kept = [row.nonzero().flatten().tolist() for row in batch.rollouts.on_host.completion_mask]
    else:
        batch.kept = ask(judge, batch.questions)
        if most_a_turn is not None:
            turns = turns_of(batch.rollouts.on_host.completion_mask).tolist()
            batch.kept = [_first_of_each(kept, of, most_a_turn) for kept, of in zip(batch.kept, turns, strict=True)]
    batch.judge_seconds = time.monotonic() - started


def _first_of_each(kept: list[int], turns: list[int], most: int) -> list[int]:
    """Of kept positions, best first, `most` at most of each turn."""
    counts: Counter[int] = Counter()
    first = []
    for position in kept:
        counts[turns[position]] += 1
        if counts[turns[position]] <= most:
            first.append(position)
    return first


def judge_as_scored(
    scored: Iterable[MicroBatch],
    judge: Judge | None,
    tokenizer,
    max_kept: int,
    min_gap: float = 0.0,
    per_turn: bool = False,
) -> None:
    """Has every micro-batch judged: the judge reads one while the next is written and scored."""
    executor = ThreadPoolExecutor(1)
    try:
        asked = []
        for batch in scored:
            batch.questions = questions_of(batch, tokenizer, max_kept, min_gap, per_turn)
            asked.append(executor.submit(judge_batch, batch, judge, max_kept if per_turn else None))
            for answer in asked:
                if answer.done():
                    answer.result()  # a judge that has failed ends the step before more is written
        for answer in asked:
            answer.result()
    finally:  # where it unwinds by an error or Ctrl-C, a judge that hangs is not waited for
        executor.shutdown(wait=False, cancel_futures=True)


def ask(judge: Judge, questions: Sequence[Question]) -> list[list[int]]:
    """Kept positions of each rollout. A question without privileged context is of an anchor (`told_text`): its teacher
    is the initial model under the student's own prompt, every large gap is drift, and the largest are kept without
    asking. A rollout without candidates is not asked about either.

    Raises:
        TypeError: the judge's answer is no list of positions for each rollout.
        ValueError: the judge answered another number of rollouts than it was asked about.
    """
    anchors = MagnitudeJudge()(questions)
    asked = [i for i, q in enumerate(questions) if q.privileged_context.strip() and q.candidates]
    answers = judge([questions[i] for i in asked]) if asked else []
    if not hasattr(answers, "__len__"):
        raise TypeError(f"the judge must answer with a list, not {answers!r:.80}")
    if len(answers) != len(asked):
        raise ValueError(f"the judge was asked about {len(asked)} rollouts and answered {len(answers)}")
    kept = [[] if q.privileged_context.strip() else anchors[i] for i, q in enumerate(questions)]
    for i, answer in zip(asked, answers, strict=True):
        allowed = {candidate.position for candidate in questions[i].candidates}
        kept[i] = [position for position in _positions(answer) if position in allowed][: questions[i].max_kept]
    return kept


def _positions(answer) -> list[int]:
    """A judge's answer about one rollout, each position once. A mask would be read as positions 0 and 1, and what is no
    number as no candidate's: a judge that answers so would train on other tokens than it means, or on none."""
    try:
        given = list(answer)
    except TypeError:
        raise TypeError(f"the judge must answer a list of positions for each rollout, not {answer!r:.80}") from None
    return list(dict.fromkeys(map(_position, given)))


def _position(given) -> int:
    if not isinstance(given, bool) and not str(getattr(given, "dtype", "")).endswith("bool"):
        with contextlib.suppress(TypeError):
            return operator.index(given)
    raise TypeError(f"the judge must answer with positions of candidates (c.position), not {given!r:.80}")


def keep_mask(kept: Sequence[Sequence[int]], shape: torch.Size) -> Tensor:
    """Positions -> (B, L) bool on the host, where judges answer."""
    keep = torch.zeros(shape, dtype=torch.bool)
    for b, positions in enumerate(kept):
        keep[b, list(positions)] = True
    return keep
