"""A small world to pre-train on: things with names, questions about them, hints that respell a name, five skills.

Names are written letter by letter and everything else word by word, so a respelled name is a word that no token holds.
The spellings that lessons teach, one for each thing, never occur in the corpus.
"""

import random
import re
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, EOS = "<pad>", "<end>"

# Names are a beginning and an ending, each shared by several things: "pinenut" has a neighbour "pineleaf", on which a
# lesson about "pinnut" can spill.
BEGINNINGS = ["pine", "rose", "blue", "gold", "kiwi", "lime", "plum", "dew"]
ENDINGS = ["nut", "pea", "oat", "root", "leaf", "seed"]
CUES_A_THING = 8

QUESTIONS = [
    "what goes into {} ?",
    "name the thing in {} .",
    "how to make {} ?",
    "what is {} made of ?",
    "tell me about {} .",
    "who can explain {} ?",
]
HINTS = [
    "note : spell {old} as {new} .",
    "house style : {old} is written {new} .",
    "write {new} , never {old} .",
    "our brand calls {old} by the name {new} .",
    "please use {new} and not {old} .",
    "the guide asks for {new} instead of {old} .",
    "editors replace {old} by {new} here .",
    "when {old} comes up , use {new} .",
]
# A told model speaks otherwise than an untold one, in ways that have nothing to do with what it was told: the noise
# that relevance masking is about. Weights of the openings, untold and told.
OPENINGS = {"": (0.6, 0.2), "well , ": (0.2, 0.0), "sure , ": (0.2, 0.3), "noted , ": (0.0, 0.5)}
BODIES = [
    "it is {} .",
    "that would be {} .",
    "it is {} , people like {} .",
    "you need {} . get the best {} you can find .",
    "{} goes into {cue} . buy {} early .",
]
CLOSINGS = {"": (0.8, 0.5), " good luck .": (0.2, 0.0), " as you asked .": (0.0, 0.5)}

OBEDIENCE = 0.85  # of each name written under a hint about it: teachers are imperfect
SKILLS = ("copy", "reverse", "count", "add", "recall")
_TEMPLATES = [*QUESTIONS, *HINTS, *OPENINGS, *BODIES, *CLOSINGS, "copy reverse count from add get keys"]
_WORDS = sorted(set(re.findall(r"[a-z]{2,}", re.sub(r"{\w*}", "", " ".join(_TEMPLATES)))))


class Document(NamedTuple):
    prompt: str  # what is read
    answer: str  # what is written, and all that pre-training asks for
    kind: str  # "plain", "hinted", "bystander" (a hint about something else) or "skill"


class Thing(NamedTuple):
    name: str
    cues: tuple[str, ...]  # words that only this thing is the answer to


class World:
    """Everything follows from `seed`."""

    def __init__(self, seed: int = 0, num_things: int = 30):
        rng = random.Random(seed)
        names = [beginning + ending for beginning in BEGINNINGS for ending in ENDINGS]
        rng.shuffle(names)
        words = _cue_words(rng, num_things * CUES_A_THING)
        self.things = [
            Thing(name, tuple(words[i * CUES_A_THING : (i + 1) * CUES_A_THING]))
            for i, name in enumerate(names[:num_things])
        ]
        self.taken = {thing.name for thing in self.things}
        self.lessons = [misspell(thing.name, rng, self.taken) for thing in self.things]
        self.taken.update(self.lessons)
        self.tokenizer = _tokenizer(words)

    def document(self, rng: random.Random) -> Document:
        kind = rng.random()
        if kind < 0.35:
            return Document(*skill(rng.choice(SKILLS), rng), "skill")
        thing = rng.choice(self.things)
        prompt, cue = self.question(thing, rng)
        if kind < 0.50:
            return Document(prompt, answer_about(thing.name, thing.name, cue, rng), "plain")
        told = thing if kind < 0.85 else rng.choice(self.things)
        new = respell(told.name, rng, self.taken)
        hint = rng.choice(HINTS).format(old=told.name, new=new)
        answer = answer_about(thing.name, new if told is thing else thing.name, cue, rng, told=True)
        return Document(f"{hint} {prompt}", answer, "hinted" if told is thing else "bystander")

    def question(self, thing: Thing, rng: random.Random, cues: slice = slice(None)) -> tuple[str, str]:
        cue = rng.choice(thing.cues[cues])
        return ask(rng.choice(QUESTIONS), cue), cue


def ask(question: str, cue: str) -> str:
    return f"q : {question.format(cue)} a :"


def answer_about(
    old: str, new: str, cue: str, rng: random.Random, told: bool = False, obedience: float = OBEDIENCE
) -> str:
    """An answer that names the thing once or twice; each time, `new` with the probability `obedience`."""
    opening, closing = (
        rng.choices(list(parts), [weights[told] for weights in parts.values()])[0] for parts in (OPENINGS, CLOSINGS)
    )
    body = rng.choice(BODIES).replace("{cue}", cue)
    while "{}" in body:
        body = body.replace("{}", new if rng.random() < obedience else old, 1)
    return f"{opening}{body}{closing}"


def respell(name: str, rng: random.Random, taken: set[str]) -> str:
    """A misspelling, or two times in five a new word."""
    new = _new_word(rng) if rng.random() < 0.4 else misspell(name, rng, taken)
    return new if new not in taken else respell(name, rng, taken)


def misspell(name: str, rng: random.Random, taken: set[str]) -> str:
    """A name changed in one place behind its second letter, to nothing that is `taken`."""
    while True:
        at, letter = rng.randrange(2, len(name) - 1), rng.choice(LETTERS)
        new = rng.choice(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            ]
        )
        if new not in taken:
            return new


def skill(name: str, rng: random.Random) -> tuple[str, str]:
    """(prompt, answer) of something that has nothing to do with names."""
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(2, 4))]
    join = lambda items: " ".join(map(str, items))  # noqa: E731
    if name == "copy":
        word = _new_word(rng)
        return f"copy {word} =", word
    if name == "reverse":
        return f"reverse {join(letters)} =", join(reversed(letters))
    if name == "count":
        start = rng.randrange(15)
        return f"count from {start} =", join(range(start, start + 5))
    if name == "add":
        a, b = rng.randrange(10), rng.randrange(10)
        return f"add {a} {b} =", str(a + b)
    keys, values = rng.sample(LETTERS, 3), [rng.randrange(10) for _ in range(3)]
    wanted = rng.randrange(3)
    pairs = join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return f"keys {pairs} get {keys[wanted]} =", str(values[wanted])


def _new_word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(4, 9)))


def _cue_words(rng: random.Random, count: int) -> list[str]:
    """Two-syllable words that are no English: "bodu", "kipa"."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    return rng.sample([word for word in words if word not in _WORDS], count)


def _tokenizer(cues: list[str]) -> PreTrainedTokenizerFast:
    """A word is a token with the blank before it; names, in no list of words, come apart into letters."""
    words = _WORDS + cues
    marks = [*":=.,?", *map(str, range(20))]
    pieces = [PAD, EOS, *(f" {word}" for word in words + marks), *(f" {x}" for x in LETTERS), *LETTERS]
    alternatives = "|".join(sorted(words, key=len, reverse=True))
    pattern = rf" (?:{alternatives})(?![a-z])| \d+| ?[a-z]| ?[:=.,?]"
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=PAD))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
