"""Write: the answers of a micro-batch."""

from ..answers.completions import rollouts_of
from ..answers.engines import Engine
from .micro_batch import MicroBatch


def write(batch: MicroBatch, engine: Engine, tokenizer, pad_id: int, device, **sampling) -> MicroBatch:
    """Fills in `rollouts`: the rows' own completions or, where they bring none, what the engine writes with `sampling`
    for options."""
    if batch.rows[0].get("completion") is not None:
        batch.rollouts = rollouts_of(batch.rows, batch.prompt_ids, tokenizer, pad_id, device)
    else:
        batch.rollouts = engine(batch.prompt_ids, pad_id=pad_id, **sampling)
    return batch
