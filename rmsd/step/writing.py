"""Write: the answers of a micro-batch."""

import math
import random
from collections.abc import Sequence
from functools import partial

import torch

from ..answers.completions import rollouts_of
from ..answers.engines import Engine, TransformersEngine
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
    context: tuple[float, float] = (math.inf, math.inf),  # tokens that who writes and who reads as the teacher hold
    max_new_tokens: int,
    eos_ids: list[int],
    seed: Sequence[int],  # B, one for each answer
    **sampling,
) -> MicroBatch:
    """Fills in `rollouts`: the rows' own completions or, where they bring none, what the engine writes with `sampling`
    for options; as `episodes`, with calls between its turns, where there is something to call. A share
    `guided_rollouts` of the told rows is answered by the teacher in its place, and `guided` names them."""
    options = dict(pad_id=pad_id, max_new_tokens=max_new_tokens, eos_ids=eos_ids)

    def written_by(writer: Engine, prompt_ids: list[list[int]], rows: list[int]) -> Rollouts:
        ids, seeds = [prompt_ids[i] for i in rows], [seed[i] for i in rows]
        if episodes is None:
            return writer(ids, seed=seeds, **options, **sampling)
        played = [batch.episodes[i] for i in rows]
        with writer.turns():
            turn = partial(writer, **sampling)
            return episodes.play(turn, played, ids, seed=seeds, device=device, tellers=tellers, **options)

    if batch.rows[0].get("completion") is not None:
        batch.rollouts = rollouts_of(batch.rows, batch.prompt_ids, prompts.tokenizer, pad_id, device)
        return batch
    if episodes is not None:
        own, told = (most - max_new_tokens for most in context)
        tellers = [(prompts.teacher, told), (lambda row: prompts.contrast(row) or [], told)]
        batch.episodes, batch.prompt_ids = episodes.start(batch.rows, [(prompts.student, own), *tellers])
        batch.rows = [episode.row for episode in batch.episodes]  # an environment may have added to a row's prompt
    batch.guided = guided_rows(batch.rows, guided_rollouts, seed) if guided_rollouts else None
    guided = batch.guided or []
    own = [i for i in range(len(batch.rows)) if i not in guided]
    written = []
    if own:
        written.append((own, written_by(engine, batch.prompt_ids, own)))
    if guided:
        with teacher.active() as model:
            told = TransformersEngine(teacher.autocast)
            told.sync(model)
            written.append((guided, written_by(told, list(map(prompts.teacher, batch.rows)), guided)))
    batch.rollouts = written[0][1] if not guided else _together(written, batch.prompt_ids, pad_id)
    if episodes is not None:
        batch.tell(prompts)  # anew: what the teacher is told may have been made of what happened
    return batch


def guided_rows(rows: Sequence[dict], share: float, seeds: Sequence[int]) -> list[int]:
    """Which rows the teacher answers: each that it is told something about with probability `share`, by the answer's
    own seed, so that a resumed run and several processes choose alike."""
    chosen = [random.Random(f"guided {seed}").random() < share for seed in seeds]
    return [i for i, row in enumerate(rows) if chosen[i] and told_text(row).strip()]


def _together(written: list[tuple[list[int], Rollouts]], prompt_ids: list[list[int]], pad_id: int) -> Rollouts:
    """Answers of several writers, each with the rows that are its own, as answers to the student's prompts. Hidden
    states that were recorded as the student wrote are dropped: its forward reads all answers."""
    width = max(rollouts.completion_ids.shape[1] for _, rollouts in written)
    ids = written[0][1].completion_ids.new_full((len(prompt_ids), width), pad_id)
    mask, present = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for rows, rollouts in written:
        length = rollouts.completion_ids.shape[1]
        ids[rows, :length] = rollouts.completion_ids
        mask[rows, :length] = rollouts.completion_mask
        present[rows, :length] = rollouts.attention_mask
    return Rollouts(prompt_ids, ids, mask, attention_mask=present)
