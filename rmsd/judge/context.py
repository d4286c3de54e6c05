"""Relevance without a model: is the word in question one that the privileged context brings?"""

import re
from collections.abc import Iterable, Sequence

from .base import Candidate, Question

# Words that any context brings and that say nothing of what it is about.
FUNCTION_WORDS = (
    "a an the this that these those it its he she they them his her their we us our you your i me my is "
    "are was were be been being am do does did have has had will would can could shall should may might "
    "must of in on at to from by with for as and or but not no nor so if than then there here which who "
    "whom whose what when where why how all any each some such only own same too very just about into "
    "over under again also please always never"
)

_WORD = re.compile(r"\w+")
_TRAILING_WORD = re.compile(r"\w*$")


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
    """

    def __init__(self, known: Iterable[str] = ()):
        self.known = _words(FUNCTION_WORDS).union(*map(_words, known))

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return [self._judge(question) for question in questions]

    def _judge(self, question: Question) -> list[int]:
        brought = _words(question.privileged_context) - _words(question.prompt) - self.known
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


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}


def _word_with(begun: str, token: str) -> str:
    """The word that `token` goes on with or begins: "z" + "or" is "zor", "z" + " or" is "or", "z" + "." is ""."""
    match = _WORD.search(token)
    if match is None:
        return ""
    return (begun if match.start() == 0 else "") + match.group().casefold()
