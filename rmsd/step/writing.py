"""Write: the answers of a micro-batch."""

from collections.abc import Sequence
from functools import partial

from ..answers.completions import rollouts_of
from ..answers.engines import Engine
from ..answers.episodes import Episodes
from ..answers.prompts import Prompts
from .micro_batch import MicroBatch


def write(
    batch: MicroBatch,
    engine: Engine,
    prompts: Prompts,
    pad_id: int,
    device,
    episodes: Episodes | None = None,
    *,
    max_new_tokens: int,
    eos_ids: list[int],
    seed: int | Sequence[int],
    **sampling,
) -> MicroBatch:
    """Fills in `rollouts`: the rows' own completions or, where they bring none, what the engine writes with `sampling`
    for options; as `episodes`, with calls between its turns, where there is something to call."""
    options = dict(pad_id=pad_id, max_new_tokens=max_new_tokens, eos_ids=eos_ids, seed=seed)
    if batch.rows[0].get("completion") is not None:
        batch.rollouts = rollouts_of(batch.rows, batch.prompt_ids, prompts.tokenizer, pad_id, device)
    elif episodes is None:
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
