"""A task's held-out requests, played as episodes: how many does a model solve, in how many turns and tokens?"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from ..answers.data import context_of
from ..answers.engines import TransformersEngine
from ..answers.episodes import Episodes
from ..answers.prompts import Prompts
from ..answers.tools import ERRORS


class Solving:
    """Plays requests, each with an environment of its own.

    Args:
        requests: rows as the environment's reset takes them.
        batch_size: episodes at once.

    Metrics, each after a name for the decoding:
        solved: share of episodes that the environment gives a reward of at least 1; one whose environment died is none.
        turns, tokens: of the model, an episode.
        tool_errors: share of calls that were malformed, of no known tool, raised, or hung.
    """

    def __init__(
        self,
        episodes: Episodes,
        requests: Sequence[dict],
        autocast: Callable,
        *,
        max_new_tokens: int,
        pad_id: int,
        eos_ids: list[int],
        batch_size: int,
        seed: int,
        prompts: Prompts,
    ):
        self.episodes, self.requests, self.batch_size, self.seed = episodes, list(requests), batch_size, seed
        self._engine = TransformersEngine(autocast)
        self._options = dict(max_new_tokens=max_new_tokens, pad_id=pad_id, eos_ids=eos_ids)
        self._prompts = prompts

    def __call__(
        self, model, name: str, temperature: float = 0.0, samples: int = 1, told: bool = False
    ) -> dict[str, float]:
        """With `told` the model reads the privileged context too: what the teacher solves."""
        requests = self.requests * samples
        self._engine.sync(model)
        solved = tokens = 0
        counts: Counter = Counter()
        for start in range(0, len(requests), self.batch_size):
            encoded = self._prompts.teacher if told else self._prompts.student
            some = requests[start : start + self.batch_size]
            most = context_of(model.config.get_text_config()) - 1
            played, prompt_ids = self.episodes.start(some, [(encoded, most)])
            with self._engine.turns():
                rollouts = self.episodes.play(
                    partial(self._engine, temperature=temperature),
                    played,
                    prompt_ids,
                    seed=self.seed + start,
                    device=model.device,
                    **self._options,
                )
            solved += sum(bool(episode.solved) for episode in played)
            tokens += int(rollouts.completion_mask.sum())
            for episode in played:
                counts.update(episode.counts)
        errors = sum(counts[error] for error in ERRORS)
        return {
            f"solved_{name}": solved / len(requests),
            f"turns_{name}": counts["turns"] / len(requests),
            f"tokens_{name}": tokens / len(requests),
            f"tool_errors_{name}": errors / max(counts["calls"], 1),
        }
