"""Words of a text, for what compares texts by their words; and what an error says in one line."""

import re
import unicodedata

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

# The signs of vowels and tones in Hindi, Tamil or pointed Hebrew, and accents that stand by themselves: \w is none of
# them, and would part a word at each. Signs on symbols and emoji are left out, which are no words.
_SIGNS = [chr(i) for i in (*range(0x300, 0x20D0), *range(0x2100, 0xFE00)) if unicodedata.category(chr(i))[0] == "M"]
LETTER = rf"[\w{''.join(_SIGNS)}]"
WORD = re.compile(f"{LETTER}+")


def said_by(error: BaseException) -> str:
    """An error's text; "" of one that raises when it is asked, which then says no more than its type."""
    try:
        return str(error)
    except BaseException:  # a tool's own may raise anything
        return ""


def first_line(error: BaseException) -> str:
    """Of what an error says; with its type where it says nothing, or no more than a key."""
    lines = said_by(error).strip().splitlines()
    return named_line(error) if isinstance(error, KeyError) or not lines else lines[0]


def named_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return ": ".join([type(error).__name__, *said_by(error).strip().splitlines()[:1]])


def words_of(text: str) -> set[str]:
    return {word.casefold() for word in WORD.findall(text)}
