"""The task at the published scale: its numbers, and that nothing of what is asked for later is told or trained on."""

import re
from collections import Counter

from rmsd.tasks import pinapple
from rmsd.tasks import pinapple_1000 as at_scale
from rmsd.tasks.pinapple_1000 import ANCHORS, PROMPTS, TASK

# Other languages' names for the fruit would give it away as the English one does.
FRUIT = re.compile(r"pine?apple|\banan[aá]s|abacaxi", re.IGNORECASE)


def test_each_of_a_thousand_prompts_meets_each_of_eight_hints_once():
    taught = Counter((row["prompt"], row["privileged_context"]) for row in TASK.train if row["privileged_context"])
    assert len(PROMPTS) == len(set(PROMPTS)) == 1000
    assert len(set(pinapple.HINTS)) == 8
    assert taught == Counter((prompt, hint) for prompt in PROMPTS for hint in pinapple.HINTS)


def test_one_row_in_eleven_is_an_anchor_and_no_anchor_is_taught():
    anchors = [row["prompt"] for row in TASK.train if not row["privileged_context"]]
    assert len(anchors) == len(set(anchors)) == 816 and len(TASK.train) == 8816
    assert not set(anchors) & set(PROMPTS)


def test_held_out_prompts_share_no_dish_with_training():
    targets, unrelated = TASK.target_prompts, TASK.unrelated_prompts
    assert len(targets) == len(set(targets)) == 100 and len(unrelated) == len(set(unrelated)) == 116
    trained = {row["prompt"] for row in TASK.train}
    assert not trained & {*targets, *unrelated}
    for dish in at_scale.DISHES + at_scale.OTHER_DISHES:
        assert not any(dish in prompt for prompt in [*targets, *unrelated]), dish
    for dish in at_scale.HELD_OUT_DISHES + at_scale.HELD_OUT_OTHER_DISHES:
        assert not any(dish in prompt for prompt in trained), dish


def test_no_prompt_names_the_fruit():
    prompts = [*PROMPTS, *ANCHORS, *TASK.target_prompts, *TASK.unrelated_prompts]
    assert not [prompt for prompt in prompts if FRUIT.search(prompt)]
    assert all(FRUIT.search(hint) for hint in pinapple.HINTS), "the pattern finds it where it is"
