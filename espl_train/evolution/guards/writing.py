"""One spelling for one text: other scripts' digits, look-alike letters, accents and invisible joiners are folded away.

Answers and principles are compared in this form only, so what a reader would take for the same text is the same text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

# Letters of other scripts that are drawn like a Latin one (lower case; upper case is folded to it first).
LOOKALIKES = str.maketrans(
    "авсеніјкморѕтухѵԁԛԝґһ" "αβεηικνορτυχγω" "օսոհց" "ıɑɡɩʋℓ",
    "abcehijkmopstyxvdqwrh" "abenikvoptuxyw" "ounhg" "iagivl",
)
SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
LATIN = re.compile(r"LETTER (?:SMALL CAPITAL )?([A-Z])(?: WITH .*)?$")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+|[^\w\s!-/:-@\[-`{-~–—…“”‘’]")
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|_")
MARKUP = re.compile(r"\\(?:[dt]?frac|left|right|text(?:bf|rm|it)?|math(?:rm|bf|it)|boxed|cdot|times|quad|[,;:! ])")
NAMES = {"√": " sqrt ", "π": " pi ", "∞": " infinity ", "°": " degrees "}


def plain(text: str) -> str:
    """`text` in Latin letters without accents, ASCII digits and ordinary spaces; case and punctuation are kept."""
    raised = SUPERSCRIPTS.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    return raised if raised.isascii() else "".join(map(_latin, unicodedata.normalize("NFKD", raised)))


def words(text: str) -> list[str]:
    """The words and symbols of a text, in lower case and one spelling; LaTeX commands that only arrange are none."""
    bare = MARKUP.sub(" ", CAMEL.sub(" ", plain(text)))
    for symbol, name in NAMES.items():
        bare = bare.replace(symbol, name)
    return WORD.findall(bare.casefold().translate(LOOKALIKES))


def stem(word: str) -> str:
    """A word without the endings of plural and verb, roughly: enough to find it in a list."""
    for ending, least in (("ies", 5), ("ing", 6), ("ed", 5), ("es", 5), ("s", 4)):
        if word.endswith(ending) and len(word) >= least and not word.endswith("ss"):
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word.rstrip("e") if len(word) > 3 else word


@cache
def common(word: str) -> bool:
    """Whether general advice is made of such words: then they tell nothing of a problem."""
    return word in _common() or stem(word) in _stems()


@cache
def _common() -> frozenset[str]:
    return frozenset((Path(__file__).with_name("common_words.txt")).read_text("utf-8").split())


@cache
def _stems() -> frozenset[str]:
    return frozenset(map(stem, _common()))


@cache
def _latin(character: str) -> str:
    if character.isascii() or character in NAMES:
        return character
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return ""
    if character.isspace():
        return " "
    digit = unicodedata.digit(character, None)
    if digit is not None:
        return str(digit)
    like = character.lower().translate(LOOKALIKES)
    if like != character.lower():
        return like.upper() if character.isupper() else like
    found = LATIN.search(unicodedata.name(character, ""))
    if found and not re.match("GREEK|CYRILLIC|COPTIC|ARMENIAN|HEBREW|ARABIC", unicodedata.name(character)):
        return found[1] if character.isupper() else found[1].lower()
    return character
