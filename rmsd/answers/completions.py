"""Rollouts made elsewhere: rows that bring their `completion`, with tool and environment turns marked."""

import torch

from ..models.transfer import to_device
from .rollout import Rollouts


def check_completion(row: dict, where: str) -> None:
    """A row's `completion` is text or token ids; `completion_mask`, where given, has a true or false a token.

    Raises:
        ValueError: naming `where` and what is wrong.
    """
    completion, mask = row["completion"], row.get("completion_mask")
    if not isinstance(completion, str) and not (isinstance(completion, list) and all(map(_is_id, completion))):
        raise ValueError(f"{where}: completion must be a string or a list of token ids")
    if mask is None:
        return
    if not (isinstance(mask, list) and all(value in (0, 1) for value in mask)):
        raise ValueError(f"{where}: completion_mask must be a list of true and false (tool turns: false)")
    if isinstance(completion, list) and len(mask) != len(completion):
        raise ValueError(f"{where}: completion_mask has {len(mask)} entries, the completion {len(completion)} tokens")


def completion_ids(row: dict, tokenizer) -> list[int]:
    """Text is taken as it stands: no end-of-sequence token is added."""
    completion = row["completion"]
    return tokenizer(completion, add_special_tokens=False)["input_ids"] if isinstance(completion, str) else completion


def rollouts_of(rows: list[dict], prompt_ids: list[list[int]], tokenizer, pad_id: int, device) -> Rollouts:
    """The rows' completions as the student's rollouts; a mask's false tokens are read by both models and never
    scored, selected or trained on. An empty completion is a rollout without tokens, of which nothing is kept."""
    completions = [completion_ids(row, tokenizer) for row in rows]
    width = max(1, *map(len, completions))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    written = torch.zeros(len(rows), width, dtype=torch.bool)
    present = torch.zeros_like(written)
    for b, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        length = len(completion)
        ids[b, :length] = torch.tensor(completion, dtype=torch.int64)
        present[b, :length] = True
        mask = row.get("completion_mask")
        written[b, :length] = True if mask is None else torch.tensor(mask, dtype=torch.bool)
    ids, written, present = (to_device(tensor, device) for tensor in (ids, written, present))
    return Rollouts(prompt_ids, ids, written, attention_mask=present)


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
