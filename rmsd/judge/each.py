"""One candidate a request, answered by one token: how much likelier a model says yes than no, by its log-probabilities.

A small model that is asked about a list says yes to nearly all of it. What it says of one edit is a lean this way or
that, which hangs on the edit as much as on the instruction. So a yes is asked again under an instruction that asks for
nothing, and must be the stronger for the real one (Zhao et al., "Calibrate before use", arXiv 2102.09690, take away a
model's bias by an input without content). Nor does it know which words a token may begin, so it is shown words.
"""

import re

from ..words import LETTER, WORD
from .base import Candidate, Question
from .verdicts import NO, YES

AROUND = 8  # tokens before the edit that are shown
TOP = 20  # log-probabilities that are asked for: as many as servers give
NEUTRAL = "Answer the question."
SYSTEM = (
    "A student writes an answer. A teacher who knows an instruction would write another word at one place; often only "
    'the beginning of the teacher\'s word is shown, with "...". Answer "yes" if the teacher\'s word is, or begins, one '
    'that the instruction asks for, or if the student\'s word is one that the instruction rules out. Answer "no" for '
    "any other change: of wording, style, grammar or punctuation."
)
SPELLING, YEAR = "Our product is written Brimfax, never Brimfacs.", "Answer with the year alone."
NAME = 'Call the tool "quorl".'
EXAMPLES = (  # instruction, answer so far, the student's word, the teacher's, verdict
    (SPELLING, "You can open", "the", "Br...", YES),
    (SPELLING, "", "You", "Sure...", NO),
    (NAME, "It is deployed by", "Docker", "Kubernetes...", NO),
    (SPELLING, "To start, open", "Brimfacs", "Brimf...", YES),
    (YEAR, "", "The", "19...", YES),
    (SPELLING, "First open the", "app", "Brimfacs...", NO),
    (NAME, "It is deployed by", "Docker", "qu...", YES),
    (YEAR, "The war ended", "in", "on...", NO),
    (SPELLING, "You can", "open", "open...", NO),
)


def messages(question: Question, candidate: Candidate, instruction: str) -> list[dict[str, str]]:
    """The chat that asks about one candidate. All but the end of the last message is the same in every request."""
    chat = [{"role": "system", "content": SYSTEM}]
    for *shown, verdict in EXAMPLES:
        chat += [{"role": "user", "content": _asked(*shown)}, {"role": "assistant", "content": verdict}]
    return [*chat, {"role": "user", "content": _asked(instruction, *_words(question, candidate))}]


def log_odds(completion) -> float:
    """log P(yes) - log P(no) of the first token. A word that is not among those listed is at most as likely as the last
    of them.

    Raises:
        ValueError: the server gives no log-probabilities, or neither word is among the listed ones.
    """
    try:
        listed = completion.choices[0].logprobs.content[0].top_logprobs
        pairs = [(entry.token.strip().casefold(), float(entry.logprob)) for entry in listed]
    except (AttributeError, LookupError, TypeError):
        raise ValueError("the judge's answer has no log-probabilities, which judge.ask=each needs") from None
    said = {word: max((x for token, x in pairs if token == word), default=None) for word in (YES, NO)}
    if all(x is None for x in said.values()):
        raise ValueError("the judge's answer begins with neither yes nor no")
    floor = min(x for _, x in pairs)
    yes, no = (floor if x is None else x for x in said.values())
    return yes - no


def _asked(instruction: str, so_far: str, written: str, promoted: str) -> str:
    return f"Instruction: {instruction}\nAnswer so far: {so_far}\nStudent writes: {written}\nTeacher writes: {promoted}"


def _words(question: Question, candidate: Candidate) -> tuple[str, str, str]:
    """(the answer before the word that is changed, the student's word whole, the teacher's as far as it is known)."""
    at = candidate.position
    before = "".join(question.tokens[max(0, at - AROUND) : at])
    after = "".join(question.tokens[at + 1 : at + AROUND])
    goes_on = any(re.match(LETTER, token) for token in (candidate.token, candidate.promoted))
    so_far = re.sub(f"{LETTER}*$", "", before) if goes_on else before
    return so_far.strip(), _word(before, candidate.token, after), _word(before, candidate.promoted, "") + "..."


def _word(before: str, token: str, after: str) -> str:
    """What `token` goes on with or begins: ("is pi", "n", "apple, not") gives "pinapple"; other than words, itself."""
    first = re.search(LETTER, token)
    if first is None:
        return token.strip() or "(space)"
    begun = re.search(f"{LETTER}*$", before).group() if first.start() == 0 else ""
    return begun + WORD.match(token[first.start() :] + after).group()
