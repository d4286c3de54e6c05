"""The task `pinapple` at the published scale: 1000 prompts, each of which meets each of the 8 hints.

Source: "Bringing Capabilities in Distribution via Relevance-Masked Self-Distillation" (Applied Compute, 2026), which
gives these numbers; the prompts are our own. They are 50 dishes and drinks made with the fruit, none of which names it,
in 20 phrasings. To the 8000 rows come 816 anchors, one row in eleven, which are our own addition: 50 dishes made with
other fruits in the 16 phrasings that fit them, and those of `pinapple`.

Held-out prompts share no dish with training, and half of their phrasings neither.
"""

from . import Task, pinapple, told

PHRASINGS = [
    "Which fruit goes into {}?",
    "Name the main fruit of {}.",
    "How do I make {}? Answer in two sentences.",
    "What gives {} its sweetness?",
    "List the ingredients of {}.",
    "I am making {} tonight. Which fruit should I buy?",
    "What fruit is traditionally used for {}?",
    "Describe {} in one sentence, and name its fruit.",
    "Write a short shopping list for {}.",
    "My guests have never had {}. What fruit will they taste in it?",
    "Give me a short recipe for {}.",
    "Write one line for a menu that describes {} and names its fruit.",
    "Explain to a child which fruit is in {}.",
    "How ripe should the fruit for {} be, and which fruit is it?",
    "What is the star ingredient of {}?",
    "Can I use canned fruit for {}, and which?",
]

TROPICAL_PHRASINGS = [
    "Which tropical fruit do I need for {}?",
    "What makes {} taste tropical?",
    "A friend asked which tropical fruit belongs in {}. What do I say?",
    "Which tropical fruit, fresh or as juice, is in {}?",
]

DISHES = [
    "a Hawaiian pizza",
    "a pina colada",
    "a non-alcoholic colada",
    "an upside-down cake",
    "sweet and sour pork",
    "sweet and sour chicken",
    "a taco al pastor",
    "a Hawaiian teriyaki burger",
    "a Hawaiian poke bowl",
    "a tropical fruit salad",
    "a tropical smoothie",
    "a tropical sorbet with a spiky-skinned fruit",
    "a tropical cheesecake",
    "a tropical trifle",
    "a tropical popsicle",
    "a yellow tropical jam",
    "a Thai fried rice served in a fruit shell",
    "a baked ham with fruit rings",
    "a hummingbird cake",
    "a Dole Whip",
    "a Jungle Bird cocktail",
    "a Bahama Mama cocktail",
    "a Painkiller cocktail",
    "a Singapore Sling",
    "a tiki punch",
    "a luau punch",
    "a glass of tepache",
    "a Taiwanese fengli su",
    "an Indonesian nastar cookie",
    "a Malaysian rojak",
    "a Hawaiian haystack",
    "a Hawaiian chicken skewer",
    "a Hawaiian pulled pork sandwich",
    "a plate of Polynesian meatballs",
    "a plate of huli-huli chicken",
    "a Caribbean salsa for jerk chicken",
    "a fruit salsa for grilled fish",
    "a German Toast Hawaii",
    "a British cheese and fruit hedgehog",
    "an ambrosia salad",
    "a Watergate salad",
    "a five-cup fruit salad",
    "a plate of Filipino pork hamonado",
    "a bowl of Vietnamese canh chua",
    "a Kerala-style sweet pachadi",
    "a Sri Lankan sweet fruit curry",
    "a Costa Rican fruit batido",
    "a Mexican fruit cup with chili",
    "a carrot cake with canned tropical fruit",
    "a grilled tropical fruit skewer",
]

HELD_OUT_DISHES = [
    "a Hawaiian ham and cheese slider",
    "a tropical ice cream",
    "a Caribbean rum and fruit cake",
    "a Mai Tai with fruit juice",
    "a Filipino fruit salad with condensed milk",
    "a Cambodian sour soup with fish and fruit",
    "a Brazilian mint and fruit juice",
    "a Hawaiian breakfast bowl",
    "a teriyaki stir-fry with fruit chunks",
    "a Maui fruit tart",
]

HELD_OUT_PHRASINGS = [
    "What should I chop to make {}?",
    "I am missing one fruit for {}. Which one could it be?",
    "In one sentence, what is inside {}?",
    "Which fruit would you see on a picture of {}?",
    "Finish the label: 'This is {}, made with'",
]

OTHER_DISHES = [
    "an apple pie",
    "an apple strudel",
    "a Waldorf salad",
    "a tarte tatin",
    "a glass of cider",
    "a banana bread",
    "a banoffee pie",
    "a cherry clafoutis",
    "a Black Forest cake",
    "a strawberry shortcake",
    "an Eton mess",
    "a blueberry muffin",
    "a blueberry pancake",
    "a lemon tart",
    "a lemonade",
    "a lemon meringue pie",
    "a Key lime pie",
    "a margarita",
    "a mojito",
    "a duck a l'orange",
    "an orange marmalade",
    "a mimosa",
    "a peach cobbler",
    "a Bellini",
    "a peach Melba",
    "a poached pear",
    "a pear and walnut salad",
    "a plum cake",
    "a prune tart",
    "an apricot dumpling",
    "a Sachertorte",
    "a fig roll",
    "a rhubarb crumble",
    "a gooseberry fool",
    "a raspberry ripple ice cream",
    "a Linzer torte",
    "a blackberry crumble",
    "a summer pudding",
    "a cranberry sauce",
    "a bowl of red fruit jelly",
    "a bunch of frosted grapes",
    "a glass of sangria",
    "a raisin scone",
    "a rum and raisin ice cream",
    "a date pudding",
    "a bowl of guacamole",
    "a melon and ham starter",
    "a watermelon and feta salad",
    "a pomegranate salad",
    "a quince paste",
]

HELD_OUT_OTHER_DISHES = [
    "an apple crumble",
    "a cherry pie",
    "a strawberry milkshake",
    "a lemon sorbet",
    "an orange cake",
    "a peach iced tea",
    "a pear tart",
    "a blackcurrant cordial",
    "a raspberry jam",
    "a banana pancake",
]


def _asked(phrasings: list[str], dishes: list[str]) -> list[str]:
    return [phrasing.format(dish) for dish in dishes for phrasing in phrasings]


PROMPTS = _asked(PHRASINGS + TROPICAL_PHRASINGS, DISHES)
ANCHORS = _asked(PHRASINGS, OTHER_DISHES)

TASK = Task(
    train=[
        *(
            told(prompt, hint, contrast)
            for prompt in PROMPTS
            for hint, contrast in zip(pinapple.HINTS, pinapple.CONTRASTS, strict=True)
        ),
        *({"prompt": prompt, "privileged_context": ""} for prompt in ANCHORS),
        *(row for row in pinapple.TASK.train if not row["privileged_context"]),
    ],
    target_prompts=_asked(PHRASINGS[:5] + HELD_OUT_PHRASINGS, HELD_OUT_DISHES),
    unrelated_prompts=[
        *_asked(PHRASINGS[:5] + HELD_OUT_PHRASINGS, HELD_OUT_OTHER_DISHES),
        *pinapple.TASK.unrelated_prompts,
    ],
    graders=pinapple.TASK.graders,
    leaks=pinapple.TASK.leaks,
)
