"""Numbers in English words (and Chinese numerals) as digits: "one thousand and thirty-eight" → 1038, "three sevenths" →
3/7, "zero point one two" → 0.12, "one zero three eight" → 1 0 3 8."""

from __future__ import annotations

import re

UNITS = {
    name: value for value, name in enumerate(
        [
            "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
            "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"
        ]
    )
} | {"oh": 0, "nought": 0, "naught": 0}  # fmt: skip
TENS = {name: 10 * value for value, name in enumerate(
    ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)} | {"fourty": 40}  # fmt: skip
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12, "k": 1000}
PARTS = {
    name: value for value, name in enumerate(
        [
            "half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
            "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth",
            "nineteenth", "twentieth"
        ], 2
    )
} | {"halve": 2, "fourth": 4, "hundredth": 100, "thousandth": 1000}  # fmt: skip
NAMED = "|".join(sorted([*UNITS, *TENS, "hundred", "thousand", "million", "billion"], key=len, reverse=True))
RUN = re.compile(rf"\b(?:an?\s+(?=hundred|thousand|million)|)(?:{NAMED})s?\b(?:(?:[\s-]+|\s+and\s+)(?:{NAMED})s?\b)*")
SCALED = re.compile(r"(\d+(?:\.\d+)?)\s*(k|hundred|thousand|million|billion|dozen)\b")
POINT = re.compile(r"(\d+)\s+(?:point|dot|comma)\s+(\d+(?:\s+\d+)*)")
RATIO = re.compile(rf"(\d+)[\s-]+({'|'.join(sorted(PARTS, key=len, reverse=True))})s?\b")
CHINESE = re.compile("[〇零一二三四五六七八九十百千万两]+")
FIGURES = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
POWERS = {"十": 10, "百": 100, "千": 1000}


def digits_for_words(text: str) -> str:
    """`text` (lower case) with spelled numbers as digits; words that do not form one number stay apart as groups."""
    text = CHINESE.sub(lambda m: f" {_chinese(m[0])} ", text)
    text = RUN.sub(lambda m: " ".join(map(str, _numbers(m[0]))), text)
    text = SCALED.sub(lambda m: _whole(float(m[1]) * SCALES[m[2]]), text)
    text = POINT.sub(lambda m: f"{m[1]}.{m[2].replace(' ', '')}", text)
    return RATIO.sub(lambda m: f" {m[1]}/{PARTS[m[2]]} ", text)


def _numbers(run: str) -> list[int]:
    """A run of number words as numbers: a new one begins where the next word cannot continue the last."""
    numbers: list[int] = []
    total = current = last = 0      # `last`: the size of what came before (a unit 1, tens 10, a scale its value)
    for word in re.findall(r"[a-z]+", run):
        word = word if word in UNITS or word in TENS or word in SCALES else word.removesuffix("s")
        if word in SCALES:
            size = SCALES[word]
            if size == 100:
                current = max(current, 1) * 100
            else:
                total, current = total + max(current, 1) * size, 0
            last = size
        elif word in UNITS or word in TENS:
            value = UNITS.get(word, TENS.get(word, 0))
            small = value < 10 and word in UNITS
            if last in (1, 11) or (last == 10 and not (small and value)):
                numbers.append(total + current)
                total = current = 0
            current += value
            last = 1 if small else 10 if word in TENS else 11
    return [*numbers, total + current]


def _chinese(run: str) -> int:
    if not any(c in POWERS or c == "万" for c in run):
        return int("".join(str(FIGURES[c]) for c in run))
    total = part = figure = 0
    for c in run:
        if c == "万":
            total, part, figure = (total + part + figure) * 10**4, 0, 0
        elif c in POWERS:
            part, figure = part + (figure or 1) * POWERS[c], 0
        else:
            figure = FIGURES[c]
    return total + part + figure


def _whole(value: float) -> str:
    return str(round(value)) if abs(value - round(value)) < 1e-6 else f"{value:.6f}"
