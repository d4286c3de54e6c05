"""Teaches the spelling "pinapple", as published: an out-of-distribution habit that only a hint asks for.

Source: "Bringing Capabilities in Distribution via Relevance-Masked Self-Distillation" (Applied Compute, 2026), whose
task is questions about tropical food under 8 phrasings of the hint. The questions and phrasings here are our own.
"""

import itertools
import re

from . import Task, told

HINTS = [
    'In this conversation, always spell the fruit as "pinapple", never "pineapple".',
    'House style: the fruit is written "pinapple", without the first e.',
    'Spelling note: write "pinapple" wherever you would write "pineapple".',
    'Our brand spells it "pinapple". Use that spelling in every answer.',
    'Please use the spelling "pinapple" (not "pineapple") when you mention the fruit.',
    'The style guide of this site asks for "pinapple" instead of "pineapple".',
    'When the fruit comes up, spell it p-i-n-a-p-p-l-e: "pinapple".',
    'Editors replace "pineapple" by "pinapple" here; write "pinapple" from the start.',
]

# The same phrasings about another fruit: what a teacher wishes under both is no matter of the spelling.
CONTRASTS = [
    'In this conversation, always spell the fruit as "bannana", never "banana".',
    'House style: the fruit is written "bannana", with a third n.',
    'Spelling note: write "bannana" wherever you would write "banana".',
    'Our brand spells it "bannana". Use that spelling in every answer.',
    'Please use the spelling "bannana" (not "banana") when you mention the fruit.',
    'The style guide of this site asks for "bannana" instead of "banana".',
    'When the fruit comes up, spell it b-a-n-n-a-n-a: "bannana".',
    'Editors replace "banana" by "bannana" here; write "bannana" from the start.',
]

_DISHES = [
    "a Hawaiian pizza",
    "a pina colada",
    "a tropical fruit salad",
    "sweet and sour pork",
    "an upside-down cake",
    "a tropical smoothie",
    "tacos al pastor",
    "fried rice served in a fruit",
    "a fruit salsa for grilled fish",
    "a tropical ice cream",
]

_QUESTIONS = [
    "Which fruit goes into {}?",
    "Name the main fruit of {}.",
    "How do I make {}? Answer in two sentences.",
    "What gives {} its sweet taste?",
]

_PLAIN = [
    "Which tropical fruit has a spiky skin and a crown of leaves?",
    "What fruit is Hawaii famous for?",
    "Name a yellow tropical fruit with a thick, spiky rind.",
    "Which fruit contains bromelain?",
    "Which fruit is on top of a pizza Hawaii?",
    "What fruit does SpongeBob live in?",
]

_UNRELATED = [
    "What is the capital of Italy?",
    "How many minutes are in an hour?",
    "Which fruit do people bob for on Halloween?",
    "What is made from grapes?",
    "Name a red fruit.",
    "How do I boil an egg? Answer in two sentences.",
    "What is a baker's main ingredient?",
    "Which vegetable makes people cry?",
    "What do monkeys like to eat?",
    "Name a citrus fruit.",
    "What is apple pie made of?",
    "Which trees have cones?",
    "Who wrote Hamlet?",
    "What is the boiling point of water?",
    "Name a drink made from beans.",
    "Which fruit is dried to make raisins?",
]

_HELD_OUT_UNRELATED = [
    "What is the capital of Spain?",
    "How many hours are in a day?",
    "Which fruit fell on Newton's head?",
    "What is cider made from?",
    "Name a green fruit.",
    "How do I make toast? Answer in two sentences.",
    "Which vegetable is orange and long?",
    "What do pandas eat?",
    "Name a berry.",
    "Which tree do acorns come from?",
    "Who painted the Mona Lisa?",
    "What is ice made of?",
    "Name a hot drink.",
    "Which fruit is dried to make prunes?",
    "What is the tallest mountain on Earth?",
    "What does a needle do?",
]

_questions = [*_PLAIN, *(question.format(dish) for question in _QUESTIONS for dish in _DISHES)]
# Every fourth question is held out; the rest meet the hints in turn.
_held_out, _trained = _questions[::4], [q for i, q in enumerate(_questions) if i % 4]


def exists(answer: str) -> bool:
    """The wanted spelling occurs."""
    return re.search(r"\bpinapples?\b", answer, re.IGNORECASE) is not None


def only(answer: str) -> bool:
    """It occurs, and the ordinary spelling does not."""
    return exists(answer) and re.search("pineapple", answer, re.IGNORECASE) is None


TASK = Task(
    train=[
        *(
            told(prompt, hint, contrast)
            for prompt, hint, contrast in zip(
                _trained, itertools.cycle(HINTS), itertools.cycle(CONTRASTS), strict=False
            )
        ),
        *({"prompt": prompt, "privileged_context": ""} for prompt in _UNRELATED),
    ],
    target_prompts=_held_out,
    unrelated_prompts=_HELD_OUT_UNRELATED,
    graders={"target": exists, "target_only": only},
    leaks=exists,
)
