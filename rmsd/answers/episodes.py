"""Rollouts of several turns: the model writes, its calls are made, it reads what they came to and writes on."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .calls import calls_of
from .environments import Environments, Episode
from .rollout import Recorded, Rollouts
from .sampling import seed_at, seeds_of
from .tools import run_turns
from .turns import TurnSuffix

log = logging.getLogger("rmsd")

Write = Callable[..., Rollouts]  # an engine: prompt_ids, max_new_tokens=, seed= -> an answer each
Reader = tuple[Callable[[dict], list[int]], float]  # a row's prompt as somebody reads it, and its tokens at most

# (tokens, ...) each of what the engine records as it writes: hidden states, and the tensors of Recorded. None: it does
# not.
_Records = list[Tensor | None]


@dataclass
class _Tokens:
    """A rollout's tokens after its prompt, as they are put together."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)  # of each token: which of the model's turns, from 1; 0 for a tool's
    records: list[_Records] = field(default_factory=list)  # of each piece that was added

    def add(self, ids: list[int], turn: int, records: _Records) -> None:
        self.ids += ids
        self.turn += [turn] * len(ids)
        self.records.append(records)

    def read(self, ids: list[int]) -> None:
        """Adds a tool's turn, of which nothing is recorded: zeros."""
        self.add(ids, 0, [x if x is None else x.new_zeros(len(ids), *x.shape[1:]) for x in self.records[-1]])


class Episodes:
    """Plays episodes with whatever engine writes the model's turns.

    Args:
        tokenizer: its chat template says how a tool's turn is written.
        environments: what can be called.
        max_turns: of the model, a rollout; calls of the last turn are not made.

    A rollout ends when a turn has no call, is cut by `max_new_tokens`, or was the last; or when its tools' messages
    would leave the model nothing to write.
    """

    def __init__(self, tokenizer, environments: Environments, *, max_turns: int = 4):
        self.tokenizer, self.environments, self.max_turns = tokenizer, environments, max_turns
        suffixes = [TurnSuffix(tokenizer, schemas) for schemas in environments.all_schemas]
        self.suffix = suffixes[0]  # what stands between two turns is the same whatever tools a prompt shows
        if self.suffix.difference:
            log.warning(
                "the chat template %s: a server that renders the whole conversation anew reads other tokens than these",
                self.suffix.difference,
            )

    def start(self, rows: Sequence[dict], readers: Sequence[Reader]) -> tuple[list[Episode], list[list[int]]]:
        """The rows' episodes, and each one's prompt as the first of `readers` has it; beside each reader stands how
        many tokens a prompt may have. One whose environment said more in its reset has died, and its row stays as is.
        """
        episodes = self.environments.start(rows)
        for i, (row, episode) in enumerate(zip(rows, episodes, strict=True)):
            if episode.row["prompt"] == row["prompt"]:
                continue  # whose length is known
            if over := _over(episode.row, readers):
                episode.awaits.close()
                episodes[i] = Episode(dict(row), {}, died=f"reset: {over}")
        return episodes, [readers[0][0](episode.row) for episode in episodes]

    def play(
        self,
        write: Write,
        episodes: Sequence[Episode],
        prompt_ids: list[list[int]],
        *,
        max_new_tokens: int,
        pad_id: int,
        eos_ids: Sequence[int],
        seed: int | Sequence[int],
        device,
        tellers: Sequence[Reader] = (),
    ) -> Rollouts:
        """The episodes' rollouts, up to `max_new_tokens` each, what their tools said included. The episodes' own
        transcripts, counts, rewards and feedback are written into them. `tellers` are the teacher's prompts: one that
        what happened has made too long ends its episode as one whose environment died, with the context from before.

        A rollout whose environment died has no token that the model wrote: nothing of it is scored or trained on.
        """
        tokens = [_Tokens(ids) for ids in prompt_ids]
        seeds = seeds_of(seed, len(prompt_ids))
        active = [i for i, episode in enumerate(episodes) if not episode.died]
        for turn in range(1, self.max_turns + 1):
            if not active:
                break
            room = [max_new_tokens - len(tokens[i].ids) for i in active]
            written = write(
                [tokens[i].prompt + tokens[i].ids for i in active],
                max_new_tokens=max(room),
                pad_id=pad_id,
                eos_ids=list(eos_ids),
                seed=[seed_at(seeds[i], turn) for i in active],
            )
            calls = {}
            for row, (i, most) in enumerate(zip(active, room, strict=True)):
                ids = written.completion_ids[row][written.completion_mask[row]].tolist()[:most]
                tokens[i].add(ids, turn, _records(written, row, len(ids)))
                calls[i] = self._read(episodes[i], ids, turn, ended=bool(ids) and ids[-1] in eos_ids)
            active = self._answered(episodes, tokens, {i: made for i, made in calls.items() if made}, max_new_tokens)
        before = [episode.row.get("privileged_context", "") for episode in episodes]
        self.environments.finish(episodes)
        for episode, context in zip(episodes, before, strict=True):
            told_more = episode.row.get("privileged_context", "") != context
            if told_more and (over := _over(episode.row, tellers)):
                episode.died, episode.row["privileged_context"] = f"its end: {over}", context
        return _rollouts(tokens, [bool(episode.died) for episode in episodes], pad_id, device)

    def _read(self, episode: Episode, ids: list[int], turn: int, ended: bool) -> list:
        """The calls of a turn that are to be made: none ends the episode."""
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        episode.transcript.append({"role": "assistant", "content": text})
        episode.counts["turns"] += 1
        if not ended:
            episode.counts["cut"] += 1
            return []
        calls = calls_of(text, episode.tools.keys())
        if calls and turn == self.max_turns:
            episode.counts["out_of_turns"] += 1
            return []
        return calls

    def _answered(self, episodes, tokens: list[_Tokens], calls: dict[int, list], most: int) -> list[int]:
        """Makes the calls; which rollouts go on, with the tools' messages in their tokens."""
        limits = self.environments.limits
        results = run_turns([(episodes[i].tools, made) for i, made in calls.items()], limits)
        going_on = []
        for i, result in zip(calls, results, strict=True):
            episode = episodes[i]
            episode.counts.update(result.counts)
            episode.transcript += result.messages
            if result.hung and episode.environment is not None:
                episode.died = "a call that did not return"
                continue
            said = self.suffix(result.messages)
            if len(tokens[i].ids) + len(said) >= most:
                episode.counts["cut"] += 1
                continue
            tokens[i].read(said)
            going_on.append(i)
        return going_on


def _over(row: dict, readers: Sequence[Reader]) -> str | None:
    """How a row's prompt is longer than one of its readers can read; None where it is not."""
    lengths = ((len(ids_of(row)), most) for ids_of, most in readers)
    over = next((f"{length} tokens, and {most} leave" for length, most in lengths if length > most), None)
    return over and f"what it said makes a prompt of {over} room for an answer"


def _records(written: Rollouts, row: int, length: int) -> _Records:
    every = [written.student_hidden, *(written.recorded or [None] * len(Recorded._fields))]
    return [x if x is None else x[row, :length] for x in every]


def _rollouts(tokens: list[_Tokens], dropped: list[bool], pad_id: int, device) -> Rollouts:
    width = max(1, *(len(each.ids) for each in tokens))
    ids = torch.full((len(tokens), width), pad_id, dtype=torch.int64)
    turn = torch.zeros(len(tokens), width, dtype=torch.int64)
    present = torch.zeros(len(tokens), width, dtype=torch.bool)
    for b, (each, drop) in enumerate(zip(tokens, dropped, strict=True)):
        length = len(each.ids)
        ids[b, :length] = torch.tensor(each.ids, dtype=torch.int64)
        turn[b, :length] = 0 if drop else torch.tensor(each.turn, dtype=torch.int64)
        present[b, :length] = True
    hidden, *recorded = (_together(tokens, k, width) for k in range(1 + len(Recorded._fields)))
    return Rollouts(
        [each.prompt for each in tokens],
        ids.to(device),
        (turn > 0).to(device),
        hidden,
        None if recorded[0] is None else Recorded(*recorded),
        present.to(device),
    )


def _together(tokens: list[_Tokens], k: int, width: int) -> Tensor | None:
    """(B, width, ...): the k-th of all rollouts' records, 0 where there are none."""
    like = next((each.records[0][k] for each in tokens if each.records), None)
    if like is None:
        return None
    whole = like.new_zeros(len(tokens), width, *like.shape[1:])
    for b, each in enumerate(tokens):
        if each.records:
            whole[b, : len(each.ids)] = torch.cat([records[k] for records in each.records])
    return whole
