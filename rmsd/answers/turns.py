"""What a chat template writes between two of a model's turns: one's end, the tools' messages, the next one's start.

Token in, token out: what the model sampled is never decoded and encoded again. Only the tools' part is encoded, as the
text that the template itself would write after the model's end-of-turn token, the newline that many put there included.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

_QUESTION = {"role": "user", "content": "Question"}
_TURN = "Turn-of-the-model"  # stands for what the model wrote, and is found again in what the template makes of it
_CUT = "\ue000"  # private use: no text has it, and no template changes it


def markers_of(tokenizer) -> re.Pattern:
    """Each place where the text of an added token begins, so that overlapping ones are found too; and our own."""
    added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    marks = [_TURN, *(token for token in added if len(token) > 1)]
    return re.compile("|".join(f"(?={re.escape(mark)})" for mark in marks))


def cut_at(markers: re.Pattern, text: str, cut: str) -> str:
    """With `cut` behind the first character of each marker."""
    places = [0, *(match.start() + 1 for match in markers.finditer(text)), len(text)]
    return cut.join(text[start:end] for start, end in pairwise(places))


class TurnSuffix:
    """The tokens that stand for tools' messages, for one tokenizer and its chat template.

    Args:
        tokenizer: with a chat template.
        tools: JSON schemas; a template may write its turns differently where there are some.

    Attributes:
        difference: what the template, given the whole conversation, would write otherwise than what the model reads
            here, in words; empty for a template that only appends. Thinking that is dropped from earlier turns is one.

    Raises:
        ValueError: by name, a template that is none of a conversation with tools: it refuses their messages, leaves
            them or the model's turns out, or rewrites what stands before a tool's message, so that it has no suffix.
    """

    def __init__(self, tokenizer, tools: Sequence[dict[str, Any]] | None = None):
        self._tokenizer, self._tools = tokenizer, list(tools or []) or None
        if not tokenizer.chat_template:
            raise ValueError("tools need a chat template: the tokenizer has none")
        if tokenizer.eos_token is None:
            raise ValueError("tools need an end-of-sequence token that ends the model's turns: the tokenizer has none")
        self._markers = markers_of(tokenizer)
        probe = [{"role": "tool", "name": "probe", "content": "Result"}]
        self._ending = tokenizer.eos_token
        once = self._suffix_text(probe)
        if "Result" not in once:
            raise self._refused("leaves the messages of tools out")
        if self._suffix_text(probe, rounds=2) != once:
            raise self._refused("writes a tool's message differently after several turns (merged turns?)")
        self.difference = self._difference(probe)

    def __call__(self, messages: Sequence[dict[str, str]], ended: bool = True) -> list[int]:
        """Token ids of what follows the model's turn: the tools' messages, up to where its next turn begins.

        Args:
            messages: of role "tool".
            ended: the turn's end-of-sequence token was sampled; otherwise it is written here.

        Nothing in a message becomes a token of the template's own, whatever it says: it opens no turn. Some templates
        show the name too, which a model may have made up.
        """
        safe = [{key: text if key == "role" else self._cut(text) for key, text in each.items()} for each in messages]
        text = self._suffix_text(safe)
        pieces = (text if ended else self._ending + text).split(_CUT)
        return [id for piece in pieces for id in self._tokenizer(piece, add_special_tokens=False)["input_ids"]]

    def _cut(self, text: str) -> str:
        """With a mark behind the first character of each marker: encoded apart, its two parts are plain text."""
        return cut_at(self._markers, text.replace(_CUT, "\ufffd"), _CUT)

    def _suffix_text(self, messages: Sequence[dict[str, str]], rounds: int = 1) -> str:
        turn = {"role": "assistant", "content": _TURN}
        earlier = [turn, {"role": "tool", "name": "probe", "content": "Result"}] * (rounds - 1)
        text = self._render([_QUESTION, *earlier, turn, *messages], generate=True)
        if text.count(_TURN) != rounds:
            raise self._refused("does not write each of the model's turns once")
        after = text.rpartition(_TURN)[2]
        if not after.startswith(self._ending):
            raise self._refused(f"does not end the model's turn with {self._ending!r}")
        return after.removeprefix(self._ending)

    def _difference(self, probe: list[dict[str, str]]) -> str:
        turn = {"role": "assistant", "content": _TURN}
        read = self._render([_QUESTION], generate=True) + _TURN
        written = self._render([_QUESTION, turn, *probe], generate=True).partition(_TURN)[0] + _TURN
        said = []
        if read != written:
            count = self._length(written) - self._length(read)
            said.append(f"begins an earlier turn with {abs(count)} tokens {'more' if count > 0 else 'fewer'}")
        thought = {"role": "assistant", "content": f"<think>\nThought\n</think>\n\n{_TURN}"}
        if "Thought" not in self._render([_QUESTION, thought, *probe], generate=True):
            said.append("drops the thinking of earlier turns")
        return " and ".join(said)

    def _length(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=self._tools, add_generation_prompt=generate, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise self._refused(f"refuses the messages of tools ({error})") from error

    def _refused(self, what: str) -> ValueError:
        name = self._tokenizer.name_or_path or type(self._tokenizer).__name__
        return ValueError(f"tools: the chat template of {name} {what}; set tokenizer.chat_template to one that appends")
