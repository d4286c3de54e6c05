"""Relevance without a model: is the word in question one that the privileged context brings?"""

import difflib
import json
import logging
import re
from collections.abc import Iterable, Sequence

from ..words import FUNCTION_WORDS, LETTER, WORD, words_of
from .base import Candidate, Question

log = logging.getLogger(__name__)

# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_TRAILING_WORD = re.compile(f"{LETTER}*$")


class ContextJudge:
    """Keeps a candidate when the word being written there, with the token that the teacher most wants to promote,
    begins a word that the privileged context brings; or when, with the token that the student wrote and the teacher
    wants gone, it does, or runs past the end of one.

    A context brings the words that it holds and neither the student's prompt nor `known` does. The comparison reads
    text, not token ids, and ignores case: " zorblat" and "Zorblat" share no token, and a judge of ids never keeps the
    decisive first one.

    Args:
        known: texts whose words are no news, best all of the data's prompts: "service" is not what a context brings
            when other prompts speak of services. The default holds function words.
        on_topic: keep nothing of a rollout in which neither the prompt nor the answer has a word of the context, or
            one nearly like it. For contexts that speak of one thing and stand before prompts about others too ("write
            pinapple, never pineapple", before a question about cherries). Not for rules that hold everywhere ("end
            with a proverb"): no prompt speaks of those.
    """

    def __init__(self, known: Iterable[str] = (), *, on_topic: bool = False):
        self.known = FUNCTION_WORDS.union(*map(words_of, known))
        self.on_topic = on_topic
        self._warned = False

    @property
    def fingerprint(self) -> str:
        """All that determines an answer besides the question."""
        return json.dumps([type(self).__qualname__, self.on_topic, *sorted(self.known)])

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return [self._judge(question) for question in questions]

    def _judge(self, question: Question) -> list[int]:
        context, prompt = words_of(question.privileged_context), words_of(question.prompt)
        if not self._warned and _WITHOUT_SPACES.search(question.privileged_context):
            self._warned = True
            log.warning(
                "the context judge tells words by their spaces, and keeps little of %.40r: use kind llm",
                question.privileged_context,
            )
        if self.on_topic and not is_on_topic(question):
            return []
        brought = context - prompt - self.known
        kept = [c.position for c in question.candidates if self._bears(c, question.tokens, brought)]
        return kept[: question.max_kept]

    @staticmethod
    def _bears(candidate: Candidate, tokens: Sequence[str], brought: set[str]) -> bool:
        # A word is seldom longer than 32 tokens; the whole answer would make this quadratic.
        before = "".join(tokens[max(0, candidate.position - 32) : candidate.position])
        begun = _TRAILING_WORD.search(before).group().casefold()
        promoted, written = (_word_with(begun, token) for token in (candidate.promoted, candidate.token))
        if promoted and promoted != begun and any(word.startswith(promoted) for word in brought):
            return True
        if candidate.gap >= 0 or not written:
            return False
        begins = written != begun and any(word.startswith(written) for word in brought)
        runs_past = begun in brought and written != begun
        return begins or runs_past


def is_on_topic(question: Question) -> bool:
    """Whether some word of prompt or answer, function words apart, is of the context. Nearly will do: of a student that
    is on its way from "limeroot" to "limerokot", and writes "limerok", nothing would be kept until it is there."""
    context = words_of(question.privileged_context) - FUNCTION_WORDS
    words = (words_of(question.prompt) | words_of("".join(question.tokens))) - FUNCTION_WORDS
    return not context.isdisjoint(words) or any(difflib.get_close_matches(word, context, 1, 0.8) for word in words)


def _word_with(begun: str, token: str) -> str:
    """The word that `token` goes on with or begins: "z" + "or" is "zor", "z" + " or" is "or", "z" + "." is ""."""
    match = WORD.search(token)
    if match is None:
        return ""
    return (begun if match.start() == 0 else "") + match.group().casefold()
