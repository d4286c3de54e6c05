"""Contrast contexts: what a row's teacher is told instead of its privileged context, of the same form and another
content. What the two readings of an answer share, a manner of speaking above all, is no matter of the content."""

import difflib
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable

from ..words import FUNCTION_WORDS, WORD, words_of
from .prompts import TEACHER_TEMPLATE, Prompt, is_told, prompt_text, teacher_prompt

_QUOTED = re.compile(r'"([^"\n]+)"|\u201c([^\u201d\n]+)\u201d|`([^`\n]+)`')
SHARED = 0.1  # of the shorter context's words; two that share more may be phrasings of one thing
SAME_FORM = 0.5  # of the words of two contexts of one form, at least, are alike and in the same places
COMPARED = 50  # contexts that one is compared with word by word, at most: the likeliest, where thousands are distinct
REPLACED = 0.4  # of the words that one brings, at least, are others in the second: "spell it x" for "write it x" is one


class Contrasts:
    """The contrast context of every row that has a privileged context.

    A row's own `contrast_context` (or `contrast_prompt`, beside a `teacher_prompt`) comes first; then `template`, a
    text in which {column} stands for a row's column. Else it is another row's context of other content, not another
    phrasing of the same: one that shares hardly a word with it or, better, differs in nothing but some words. Where no
    row's is, the words that the context brings are replaced by words that do not exist.

    Args:
        rows: all of the data's.
        template: one text for all rows without a column of their own.

    `origins` counts rows by where their contrast context comes from.

    Raises:
        ValueError: a row brings a `teacher_prompt` and no `contrast_prompt`, or the template names no column.
    """

    def __init__(self, rows: Iterable[dict], template: str | None = None):
        rows = list(rows)
        self._template = template
        self._known = known = words_of(" ".join(prompt_text(row["prompt"]) for row in rows)) | FUNCTION_WORDS
        contexts = list(dict.fromkeys(row["privileged_context"] for row in rows if row["privileged_context"].strip()))
        brought = {context: words_of(context) - known for context in contexts}
        counts = Counter(word for words in brought.values() for word in words)
        others = _Others(brought)
        self._made: dict[str, tuple[str, str]] = {}
        self.origins: Counter[str] = Counter()
        for number, row in enumerate(rows):
            if not is_told(row):
                continue
            if row.get("teacher_prompt") and not row.get("contrast_prompt"):  # whose form no context could take
                raise ValueError(
                    f"row {number}: has a teacher_prompt; judge.kind=contrast needs its contrast_prompt too, as whole"
                )
            if row.get("contrast_context") or row.get("contrast_prompt") or template:
                try:
                    self.prompt(row)
                except (LookupError, ValueError, AttributeError) as error:
                    raise ValueError(f"row {number}: judge.contrast_context {template!r}: {error}") from error
                self.origins["template" if self._of_template(row) else "column"] += 1
                continue
            context = row["privileged_context"]
            if context not in self._made:
                other = others.of_other_content(context)
                self._made[context] = (
                    (other, "another row")
                    if other
                    else (_other_words(context, brought[context], counts), "other words")
                )
            self.origins[self._made[context][1]] += 1

    def context(self, row: dict) -> str:
        """What the teacher is told in place of the row's context; "" for an anchor, which is told nothing."""
        if not is_told(row):
            return ""
        if row.get("contrast_context"):
            return row["contrast_context"]
        if row.get("contrast_prompt"):
            return prompt_text(row["contrast_prompt"])
        if self._template:
            return self._template.format(**row)
        context = row["privileged_context"]
        if context not in self._made:  # made of what happened in a rollout
            return _other_words(context, words_of(context) - self._known, Counter())
        return self._made[context][0]

    def prompt(self, row: dict, template: str = TEACHER_TEMPLATE, place: str = "user") -> Prompt:
        """The teacher's prompt with the contrast context; an anchor's is the teacher's own."""
        if row.get("contrast_prompt"):
            return teacher_prompt({"prompt": row["prompt"], "teacher_prompt": row["contrast_prompt"]}, template, place)
        if not is_told(row):
            return teacher_prompt(row, template, place)
        return teacher_prompt({"prompt": row["prompt"], "privileged_context": self.context(row)}, template, place)

    def _of_template(self, row: dict) -> bool:
        return bool(self._template) and not row.get("contrast_context") and not row.get("contrast_prompt")


class _Others:
    """The data's contexts, each with the words that it brings, and which hold a word."""

    def __init__(self, brought: dict[str, set[str]]):
        self._brought, self._contexts = brought, list(brought)
        self._words = [WORD.findall(context) or [""] for context in brought]
        self._holding: dict[str, list[tuple[int, int]]] = {}  # word -> (which context, how often)
        for i, words in enumerate(self._words):
            for word, count in Counter(words).items():
                self._holding.setdefault(word, []).append((i, count))

    def of_other_content(self, context: str) -> str | None:
        """The context most like `context` in form among those that are of other content."""
        words, mine = WORD.findall(context) or [""], self._brought[context]
        common = [0] * len(self._contexts)
        for word, count in Counter(words).items():
            for i, times in self._holding[word]:
                common[i] += min(count, times)
        # No two sequences are more alike than the words that they have in common, in whatever order, would make them.
        most = [2.0 * number / (len(words) + len(theirs)) for number, theirs in zip(common, self._words, strict=True)]
        best, form, compared = -1, -1.0, 0
        for i in sorted(range(len(most)), key=lambda i: -most[i]):
            if best >= 0 and (most[i] < form or compared >= COMPARED):
                break
            if most[i] == form and i > best:
                continue
            other, theirs = self._contexts[i], self._brought[self._contexts[i]]
            is_other = len(mine & theirs) / max(min(len(mine), len(theirs)), 1) <= SHARED
            if other == context or not (is_other or (most[i] >= SAME_FORM and compared < COMPARED)):
                continue
            compared += 1
            alike = difflib.SequenceMatcher(None, words, self._words[i], autojunk=False)
            found = alike.ratio()
            qualifies = is_other or (found >= SAME_FORM and _others_in_their_places(alike, mine))
            if qualifies and (found > form or (found == form and i < best)):
                best, form = i, found
        return self._contexts[best] if best >= 0 else None


def _others_in_their_places(alike: difflib.SequenceMatcher, brought: set[str]) -> bool:
    """Runs of words by runs as long, and enough of the words that the first brings."""
    found = [(i, j, k, n) for tag, i, j, k, n in alike.get_opcodes() if tag != "equal"]
    replaced = brought & {word.casefold() for i, j, _, _ in found for word in alike.a[i:j]}
    return len(replaced) >= REPLACED * max(len(brought), 1) and all(j - i == n - k for i, j, k, n in found)


def _other_words(context: str, brought: set[str], counts: Counter[str]) -> str:
    """`context` with what it brings replaced: what stands in quotes or, without any, the words that the most contexts
    bring; and its digits by others."""
    quoted = words_of(" ".join("".join(found) for found in _QUOTED.findall(context))) & brought
    most = max((counts[word] for word in brought), default=0)
    replaced = quoted or {word for word in brought if counts[word] == most} or words_of(context) - FUNCTION_WORDS
    return WORD.sub(lambda found: _other_word(found[0]) if found[0].casefold() in replaced else found[0], context)


def _other_word(word: str) -> str:
    """A pronounceable word that does not exist, as long and written as `word`; the same for the same word."""
    rng = random.Random(hashlib.sha256(word.casefold().encode()).digest())
    made, vowel = "", rng.random() < 0.3
    for letter in word:
        if letter.isdigit():
            made += rng.choice([digit for digit in "0123456789" if digit != letter])
            continue
        new = rng.choice([x for x in ("aeiou" if vowel else "bdfgklmnprstv") if x != letter.casefold()])
        made, vowel = made + (new.upper() if letter.isupper() else new), not vowel
    return made
