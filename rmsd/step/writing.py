"""Write: the answers of a micro-batch."""

import random
from collections.abc import Sequence
from functools import partial

import torch

from ..answers.completions import rollouts_of
from ..answers.engines import Engine
from ..answers.episodes import Episodes
from ..answers.prompts import Prompts
from ..answers.rollout import Rollouts
from ..answers.teacher import Teacher
from .judging import told_text
from .micro_batch import MicroBatch


def write(
    batch: MicroBatch,
    engine: Engine,
    prompts: Prompts,
    pad_id: int,
    device,
    episodes: Episodes | None = None,
    *,
    teacher: Teacher | None = None,
    guided_rollouts: float = 0.0,
    max_new_tokens: int,
    eos_ids: list[int],
    seed: Sequence[int],  # B, one for each answer
    **sampling,
) -> MicroBatch:
    """Fills in `rollouts`: the rows' own completions or, where they bring none, what the engine writes with `sampling`
    for options; as `episodes`, with calls between its turns, where there is something to call. A share
    `guided_rollouts` of the told rows is answered by the teacher in its place, and `guided` names them."""
    options = dict(pad_id=pad_id, max_new_tokens=max_new_tokens, eos_ids=eos_ids, seed=seed)
    if batch.rows[0].get("completion") is not None:
        batch.rollouts = rollouts_of(batch.rows, batch.prompt_ids, prompts.tokenizer, pad_id, device)
    elif episodes is None:
        batch.guided = guided_rows(batch.rows, guided_rollouts, seed) if guided_rollouts else None
        if batch.guided:
            _write_by_both(batch, engine, teacher, **options, **sampling)
        else:
            batch.rollouts = engine(batch.prompt_ids, **options, **sampling)
    else:
        batch.episodes = episodes.environments.start(batch.rows)
        batch.prompt_ids = [prompts.student(episode.row) for episode in batch.episodes]
        with engine.turns():
            batch.rollouts = episodes.play(
                partial(engine, **sampling), batch.episodes, batch.prompt_ids, device=device, **options
            )
        # What the teacher is told may have been made of what happened.
        batch.rows = [episode.row for episode in batch.episodes]
        batch.tell(prompts)
    return batch


def guided_rows(rows: Sequence[dict], share: float, seeds: Sequence[int]) -> list[int]:
    """Which rows the teacher answers: each that it is told something about with probability `share`, by the answer's
    own seed, so that a resumed run and several processes choose alike."""
    chosen = [random.Random(f"guided {seed}").random() < share for seed in seeds]
    return [i for i, row in enumerate(rows) if chosen[i] and told_text(row).strip()]


def _write_by_both(batch: MicroBatch, engine: Engine, teacher: Teacher, *, seed, pad_id: int, **options) -> None:
    """Hidden states that were recorded as the student wrote are dropped: its forward reads all answers."""
    guided = batch.guided
    own = [i for i in range(len(batch.rows)) if i not in guided]
    told = [batch.teacher_prompt_ids[i] for i in guided]
    written = [(guided, teacher.write(told, seed=[seed[i] for i in guided], pad_id=pad_id, **options))]
    if own:
        prompts = [batch.prompt_ids[i] for i in own]
        written.append((own, engine(prompts, seed=[seed[i] for i in own], pad_id=pad_id, **options)))
    width = max(rollouts.completion_ids.shape[1] for _, rollouts in written)
    like = written[0][1].completion_ids
    ids = like.new_full((len(batch.rows), width), pad_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for rows, rollouts in written:
        for i, answer, present in zip(rows, rollouts.completion_ids, rollouts.completion_mask, strict=True):
            ids[i, : len(answer)], mask[i, : len(answer)] = answer, present
    batch.rollouts = Rollouts(batch.prompt_ids, ids, mask)
