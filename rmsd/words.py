"""Words of a text, for what compares texts by their words."""

import re

# Words that any text brings and that say nothing of what it is about.
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those it its he she they them his her their we us our you your i me my is "
        "are was were be been being am do does did have has had will would can could shall should may might "
        "must of in on at to from by with for as and or but not no nor so if than then there here which who "
        "whom whose what when where why how all any each some such only own same too very just about into "
        "over under again also please always never",
    )
)

_WORD = re.compile(r"\w+")


def words_of(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}
