r"""Every number that a text may mean, however it is dressed: 1,234 · 1.234e3 · 0x4d2 · \frac{3}{7} · MCCXXXIV · 617*2 ·
"one thousand two hundred thirty-four" · "1 2 3 4".

Two kinds of readings. *Firm* ones are what the text says. *Loose* ones are what it may be made to say (1, 2, 4 as 124;
a number backwards): lists and ranges of ordinary advice read like that too, so they count where the text hints at them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from espl_envs.grading.expressions import Algebra, evaluate
from espl_train.evolution.guards.spelled import digits_for_words
from espl_train.evolution.guards.writing import plain

CHAIN = re.compile(r"\d+(?:(?:\s?[,._'’`·–:;|/~*+-]\s?|\s{1,2})\d+)*")
SEPARATOR = re.compile(r"[^\d]+")
SCIENTIFIC = re.compile(r"(\d+(?:\.\d+)?)\s*(?:e|[x×*·]\s*10\s*(?:\^|\*\*)\s*)[{(]?\s*([+-]?\d{1,3})\b")
BASED = re.compile(r"0x([0-9a-f]+)|0b([01]+)|0o([0-7]+)")
BASES = {"hex": 16, "base 16": 16, "base-16": 16, "binar": 2, "base 2": 2, "base-2": 2, "octal": 8, "base 8": 8}
HEXADECIMAL = re.compile(r"\b[0-9a-f]{1,16}\b")
ROMAN = re.compile(r"\b(?=[MDCLXVI]{2,})M{0,4}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})\b")
ROMANS = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}
HINT = re.compile(
    r"\b(?:answer|result|solution|digits?|spell\w*|concatenat\w*|glue\w*|join\w*|together|code|secret|password|"
    r"without (?:the )?(?:spaces|commas|dashes)|then)\b"
)
BACKWARDS = re.compile(r"revers|backward|mirror|right to left|from the end|flip|inverted order")
LOOKS_LIKE_DIGITS = str.maketrans("oOlI|SBZ", "00111582")
DISGUISED = re.compile(r"\b(?=[\doOlI|SBZ]*\d)[\doOlI|SBZ]{3,}\b")
FRACTION = re.compile(r"\\?[dt]?frac\s*\{?\s*(\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
MIXED = re.compile(r"\b(\d+)\s+(?:and\s+)?\(?(\d+)\s*/\s*(\d+)")
TOKEN = re.compile(r"\d+(?:\.\d+)?|[-+*/^()]")
RUN = re.compile(r"[-+*/^().\d\s{}]*\d[-+*/^().\d\s{}]*")
MODULO = re.compile(r"(\d+)\s*(?:mod(?:ulo)?|%)\s*(\d+)")
ROOT = re.compile(r"(?:sqrt|√|square root of)\s*[({]?\s*(\d+)")
FACTORIAL = re.compile(r"(\d+)\s*!")
PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:%|\\%|percent|per cent)")
REWRITES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"[×✕✖⋅·∙∗]|\\times|\\cdot|\\ast|\btimes\b|\bmultiplied (?:by|with)\b|(?<=\d)\s*x\s*(?=\d)", "*"),
        (r"÷|∕|⁄|\\div|\bdivided by\b|\bover\b", "/"),
        (r"[−–—]|\bminus\b|\breduced by\b", " - "),
        (r"\bplus\b|\badded to\b|\bincreased by\b|\bmore than\b", "+"),
        (r"\*\*|\bto the power(?: of)?\b|\braised to(?: the)?\b", "^"),
        (r"(?<=\d)\s*\bsquared\b", "^2"),
        (r"(?<=\d)\s*\bcubed\b", "^3"),
        (r"(?:\b(?:twice|double)\b)\s*(?=\d)", "2*"),
        (r"\btriple\b\s*(?=\d)", "3*"),
        (r"(?<=\d)\s*\bdoubled\b", "*2"),
        (r"(?<=\d)\s*\btripled\b", "*3"),
        (r"(?<=\d)\s*\bhalved\b", "/2"),
        (r"\bhalf(?: of)?\s*(?=\d)", "1/2*"),
        (r"\bsum of\s+(\d+)\s+and\s+(\d+)", r" \1+\2 "),
        (r"\bproduct of\s+(\d+)\s+and\s+(\d+)", r" \1*\2 "),
        (r"\bdifference (?:of|between)\s+(\d+)\s+and\s+(\d+)", r" \1 - \2 "),
        (r"\b(\d+)\s+(?:less than|subtracted from|below)\s+(\d+)", r" \2 - \1 "),
    )
)
LARGEST_RUN = 40      # tokens of one expression that are looked at
LONGEST = 12          # tokens of an expression
ALGEBRA = Algebra(Fraction, largest_power=64, check=lambda v: _bounded(v))


@dataclass(slots=True)
class Readings:
    """The absolute values that a text may mean."""

    firm: set[Fraction] = field(default_factory=set)
    loose: set[Fraction] = field(default_factory=set)


def readings(text: str) -> Readings:
    """What numbers `text` may mean. `loose` is empty where nothing in the text hints at such a reading."""
    found = Readings()
    bare = plain(text).replace("{,}", ",").replace("\\,", "")
    found.firm.update(_based(bare.casefold()))
    found.firm.update(Fraction(_roman(m[0])) for m in ROMAN.finditer(bare) if m[0])
    bare = DISGUISED.sub(lambda m: m[0] if m[0].isdigit() else m[0].translate(LOOKS_LIKE_DIGITS), bare)
    lower = bare.casefold()
    for form in dict.fromkeys((lower, digits_for_words(lower))):
        _chains(form, found)
        found.firm.update(_written_out(form))
        found.firm.update(_computed(form, found.loose))
    if BACKWARDS.search(lower):
        found.loose.update(Fraction(str(v)[::-1]) for v in {*found.firm, *found.loose} if v.denominator == 1)
        found.loose.update(Fraction(digits[::-1]) for digits in re.findall(r"\d{2,40}", lower))
    elif not HINT.search(lower):
        found.loose.clear()
    long = {str(v)[::-1] for v in found.firm if v.denominator == 1 and v >= 10**4}
    found.firm.update(map(Fraction, long))      # five digits are not their mirror image by accident
    found.loose -= found.firm
    return found


def number(text: str) -> Fraction | None:
    """The one number that the whole of `text` writes (an answer), without its sign; None where it is no number."""
    bare = re.sub(r"^\s*(?:\\\(|\$+|\\boxed\{)?\s*[-+−]?\s*|\s*(?:\\\)|\$+|\})?\s*$", "", plain(text)).casefold()
    bare = bare.replace("\\!", "").replace("{,}", ",").strip().removeprefix("$").rstrip("%").strip()
    if (fraction := FRACTION.fullmatch(bare) or re.fullmatch(r"(\d+)\s*/\s*(\d+)", bare)) and int(fraction[2]):
        return Fraction(int(fraction[1]), int(fraction[2]))
    if re.fullmatch(r"\d{1,3}(?:[,\s]\s?\d{3})+(?:\.\d+)?|\d*\.?\d+|\d+\.", bare):
        return Fraction(re.sub(r"[,\s]", "", bare).rstrip("."))
    if scientific := SCIENTIFIC.fullmatch(bare):
        return _scientific(scientific)
    return None


def _chains(text: str, found: Readings) -> None:
    """Digits in groups: as they stand, as thousands, as decimals, and run together."""
    for match in CHAIN.finditer(text):
        groups = SEPARATOR.split(match[0])[:LARGEST_RUN]
        gaps = SEPARATOR.findall(match[0])[: len(groups) - 1]
        for i, group in enumerate(groups):
            within = (i and gaps[i - 1] == ".") or (i < len(gaps) and gaps[i] == ".")
            if not within or len(groups) > 2:
                found.firm.add(Fraction(group[:40]))
        for i, gap in enumerate(gaps):
            if gap in (".", ",", "·"):
                decimal = Fraction(f"{groups[i][:40]}.{groups[i + 1][:40]}")
                (found.firm if gap == "." else found.loose).add(decimal)
        for start in range(len(groups)):
            for end in range(start + 2, min(len(groups), start + LONGEST) + 1):
                _joined(groups[start:end], gaps[start : end - 1], len(groups) == end - start, found)


def _joined(groups: list[str], gaps: list[str], whole: bool, found: Readings) -> None:
    value = Fraction("".join(groups)[:40])
    alike = len({gap.strip() or " " for gap in gaps}) == 1
    thousands = len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:]) and groups[0] != "0"
    if thousands and alike and gaps[0].strip() in ("", ",", ".", "'", "’", "_", "`", "·"):
        found.firm.add(value)
        return
    single = all(len(g) == 1 for g in groups)
    rising = all(int(a) < int(b) for a, b in pairwise(groups))
    listed = not alike or gaps[0].strip() in (",", ";", "/", ":", "+", "*")
    spelled = single and len(groups) > 2 and (not listed or (whole and alike and len(groups) > 3 and not rising))
    paired = not gaps[0].strip() and alike and all(len(g) == 2 for g in groups)
    if spelled or paired:
        found.firm.add(value)
    elif single or whole or (len(groups) <= 3 and not listed):
        found.loose.add(value)


def _written_out(text: str) -> Iterator[Fraction]:
    for match in SCIENTIFIC.finditer(text):
        yield _scientific(match)
    for match in PERCENT.finditer(text):
        yield Fraction(match[1]) / 100
    for match in FRACTION.finditer(text):
        if int(match[2]):
            yield Fraction(int(match[1]), int(match[2]))
    for match in MIXED.finditer(text):
        if int(match[3]):
            yield int(match[1]) + Fraction(int(match[2]), int(match[3]))


def _based(text: str) -> Iterator[Fraction]:
    for match in BASED.finditer(text):
        for digits, base in zip(match.groups(), (16, 2, 8), strict=True):
            if digits:
                yield Fraction(int(digits[:60], base))
    for cue, base in BASES.items():
        if cue in text:
            for match in HEXADECIMAL.finditer(text):
                try:
                    yield Fraction(int(match[0], base))
                except ValueError:
                    continue


def _computed(text: str, loose: set[Fraction]) -> Iterator[Fraction]:
    """The values of all expressions in a text. A hyphen without spaces is a range as often as a difference: loose."""
    for match in MODULO.finditer(text):
        if int(match[2]):
            yield Fraction(int(match[1]) % int(match[2]))
    for match in ROOT.finditer(text):
        if math.isqrt(int(match[1][:40])) ** 2 == int(match[1][:40]):
            yield Fraction(math.isqrt(int(match[1][:40])))
    for match in FACTORIAL.finditer(text):
        if int(match[1][:3]) <= 20:
            yield Fraction(math.factorial(int(match[1][:3])))
    spaced = re.sub(r"(?<=\d)\s+-\s+(?=\d)", " − ", text)
    loose.update(_expressions(spaced.replace("−", "-")) if re.search(r"\d-\d", spaced) else ())
    yield from _expressions(re.sub(r"(?<=\d)-(?=\d)", ",", spaced).replace("−", "-"))


def _expressions(text: str) -> Iterator[Fraction]:
    text = FRACTION.sub(r"(\1)/(\2)", text)
    for pattern, to in REWRITES:
        text = pattern.sub(to, text)
    for run in RUN.findall(text.replace("{", "(").replace("}", ")")):
        tokens = TOKEN.findall(run)[:LARGEST_RUN]
        for start, first in enumerate(tokens):
            if first not in "+-*/^)":
                yield from _from(tokens[start : start + LONGEST])


def _from(tokens: list[str]) -> Iterator[Fraction]:
    """The values of the expressions that begin with the first token and have an operator."""
    for end in range(3, len(tokens) + 1):
        last, before = tokens[end - 1], tokens[end - 2]
        if last not in ("+", "-", "*", "/", "^", "(") and not (last[0].isdigit() and before[0].isdigit()):
            try:
                yield abs(evaluate(" ".join(map(_rational, tokens[:end])), ALGEBRA))
            except ValueError:
                continue


def _rational(token: str) -> str:
    if "." not in token:
        return token
    value = Fraction(token)
    return f"({value.numerator}/{value.denominator})"


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**40:
        raise ValueError("too large to be an answer")
    return value


def _scientific(match: re.Match[str]) -> Fraction:
    return Fraction(match[1]) * Fraction(10) ** int(match[2])


def _roman(letters: str) -> int:
    values = [ROMANS[letter] for letter in letters]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))
