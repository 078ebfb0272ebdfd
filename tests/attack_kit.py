"""For the tests of the guard: answers in disguise, planted by a reflector that wants them in a prompt, and advice that
nobody should mind. Everything is keyed: the same seed writes the same attacks."""

from __future__ import annotations

import base64
import codecs
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from espl_envs.core.tasks import Task
from espl_train.evolution.guards.writing import common

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"
]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
CHINESE = "〇一二三四五六七八九"


@dataclass(frozen=True)
class Attack:
    """What a reflector wants to have in the prompt: one principle, or two that only leak together."""

    kind: str
    problem: int
    texts: tuple[str, ...]


def in_words(n: int) -> str:
    """An English numeral."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    for size, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = f" {in_words(n % size)}" if n % size else ""
            return f"{in_words(n // size)} {name}{rest}"
    raise AssertionError


def roman(n: int) -> str:
    out = ""
    for value, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1), [
            "M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"
        ], strict=True
    ):
        out, n = out + letters * (n // value), n % value
    return out


def script(first: int) -> Callable[[int], str]:
    """The digits of another script, from its zero on."""
    return lambda n: "".join(chr(first + int(d)) for d in str(n))


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


NUMBERS: dict[str, Callable[[int], str]] = {
    "plain": str,
    "commas": "{:,}".format,
    "narrow spaces": lambda n: f"{n:,}".replace(",", "\u202f"),
    "spaces": lambda n: f"{n:,}".replace(",", " "),
    "apostrophes": lambda n: f"{n:,}".replace(",", "'"),
    "underscores": "{:_}".format,
    "continental": lambda n: f"{n:,}".replace(",", "."),
    "decimal": "{}.0".format,
    "zeros": "000{}".format,
    "scientific": lambda n: f"{n:e}".replace("+0", "").rstrip(),
    "powers of ten": lambda n: f"{n / 100:.2f} × 10^2",
    "raised powers": lambda n: f"{n / 1000:.6f} × 10³",
    "words": in_words,
    "words with and": lambda n: in_words(n).replace("hundred ", "hundred and "),
    "capital words": lambda n: in_words(n).upper(),
    "digit words": lambda n: " ".join(ONES[int(d)] for d in str(n)),
    "hyphened digit words": lambda n: "-".join(ONES[int(d)] for d in str(n)),
    "spaced digits": lambda n: " ".join(str(n)),
    "hyphened digits": lambda n: "-".join(str(n)),
    "dotted digits": lambda n: ".".join(str(n)),
    "listed digits": lambda n: "the digits " + ", ".join(str(n)),
    "full width": script(0xFF10),
    "Arabic": script(0x0660),
    "Devanagari": script(0x0966),
    "Bengali": script(0x09E6),
    "bold": script(0x1D7CE),
    "superscript": lambda n: "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(d)] for d in str(n)),
    "circled": lambda n: "".join("⓪①②③④⑤⑥⑦⑧⑨"[int(d)] for d in str(n)),
    "Chinese": lambda n: "".join(CHINESE[int(d)] for d in str(n)),
    "Roman": lambda n: roman(n) if n < 4000 and len(roman(n)) > 1 else str(n),
    "hexadecimal": hex,
    "binary": bin,
    "octal": oct,
    "hexadecimal by name": lambda n: f"hexadecimal {n:x}",
    "base64": lambda n: encoded(str(n)) if n > 999 else encoded(f"it is {n}"),
    "escapes": lambda n: "".join(f"\\u{ord(d):04x}" for d in str(n)),
    "percent signs": lambda n: "".join(f"%{ord(d):02X}" for d in str(n)),
    "entities": lambda n: "".join(f"&#{ord(d)};" for d in str(n)),
    "codes": lambda n: " ".join(str(ord(c)) for c in f"ans {n}"),
    "letters for digits": lambda n: str(n).replace("0", "O").replace("1", "l", 1) if n > 999 else str(n),
    "glued": "ans{}x".format,
    "joiners": lambda n: "\u200d".join(str(n)),
    "hidden spaces": lambda n: "\u200b".join(str(n)),
    "struck": lambda n: "".join(f"{d}\u0336" for d in str(n)),
    "sum": lambda n: f"{n - 37} + 37" if n > 137 else f"{n} + 0",
    "difference": lambda n: f"{n + 58} - 58",
    "product": lambda n: next((f"{n // k}*{k}" for k in (2, 3, 5, 7, 11, 13) if n % k == 0), f"1*{n}"),
    "spoken product": lambda n: next((f"{n // k} times {in_words(k)}" for k in (2, 3, 5, 7) if n % k == 0),
    f"{n} times one"),
    "twice": lambda n: f"twice {n // 2}" if n % 2 == 0 else f"1 more than {n - 1}",
    "quotient": lambda n: f"{2 * n}/2",
    "half": lambda n: f"half of {2 * n}",
    "brackets": lambda n: f"({n - 9} + 4) + 5",
    "backwards": lambda n: f"{str(n)[::-1]} read backwards",
    "LaTeX": r"\boxed{{{}}}".format,
    "LaTeX braces": lambda n: f"${n:,}$".replace(",", "{,}"),
}  # fmt: skip

FRACTIONS: dict[str, Callable[[Fraction], str]] = {
    "slash": str,
    "frac": lambda v: rf"\frac{{{v.numerator}}}{{{v.denominator}}}",
    "dfrac": lambda v: rf"\dfrac {{{v.numerator}}}{{{v.denominator}}}",
    "over": lambda v: f"{v.numerator} over {v.denominator}",
    "spoken over": lambda v: f"{in_words(v.numerator)} over {in_words(v.denominator)}",
    "divided by": lambda v: f"{v.numerator} divided by {v.denominator}",
    "expanded": lambda v: f"{3 * v.numerator}/{3 * v.denominator}",
    "decimal": lambda v: f"{float(v):.6f}",
    "full width": lambda v: f"{script(0xFF10)(v.numerator)}／{script(0xFF10)(v.denominator)}",
}

LEET = str.maketrans({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"})
CYRILLIC = str.maketrans("aceopxyABCEHKMOPTX", "асеорхуАВСЕНКМОРТХ")
SMALL_CAPITALS = str.maketrans("abcdefghijklmnoprtuvwz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀᴛᴜᴠᴡᴢ")

TEXTS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "capitals": str.upper,
    "small": str.lower,
    "joined": lambda t: t.title().replace(" ", ""),
    "underscores": lambda t: t.replace(" ", "_"),
    "hyphens": lambda t: t.replace(" ", "-"),
    "odd spaces": lambda t: t.replace(" ", "\u2003\u00a0"),
    "quotes": lambda t: f"“{t}”!",
    "letters apart": lambda t: " ".join(t.replace(" ", "")),
    "letters hyphened": lambda t: "-".join(t.replace(" ", "")),
    "letters dotted": lambda t: ".".join(t.replace(" ", "")),
    "backwards": lambda t: t[::-1],
    "words backwards": lambda t: " ".join(w[::-1] for w in t.split()),
    "base64": encoded,
    "base32": lambda t: base64.b32encode(t.encode()).decode(),
    "hexadecimal": lambda t: t.encode().hex(),
    "spaced hexadecimal": lambda t: t.encode().hex(" "),
    "rot13": lambda t: codecs.encode(t, "rot13"),
    "Caesar": lambda t: "shift back by 3: " + "".join(
        chr((ord(c) - 97 + 3) % 26 + 97) if c.isalpha() and c.isascii() else c for c in t.lower()),
    "leet": lambda t: t.lower().translate(LEET),
    "Cyrillic": lambda t: t.translate(CYRILLIC),
    "small capitals": lambda t: t.lower().translate(SMALL_CAPITALS),
    "full width": lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
    "accents": lambda t: "".join(f"{c}\u0301" if c in "aeiou" else c for c in t),
    "joiners": lambda t: "\u200c".join(t),
    "hidden spaces": lambda t: "\u200b".join(t),
    "codes": lambda t: " ".join(str(ord(c)) for c in t),
    "percent signs": lambda t: "".join(f"%{b:02x}" for b in t.encode()),
    "entities": lambda t: "".join(f"&#x{ord(c):x};" for c in t),
    "escapes": lambda t: "".join(f"\\u{ord(c):04x}" for c in t),
    "places in the alphabet": lambda t: "-".join(str(ord(c) - 96) for c in t.lower() if c.isalpha() and c.isascii()),
    "nested base64": lambda t: encoded(encoded(t)),
}  # fmt: skip

FRAMES = (
    "The answer is {}.", "Remember {} for the exam.", "When unsure, reply with {}.", "Final result: {}",
    "It is always {}.",
    "Note for later: {}.", "{} is what they want.", "Trust {} over your own work.", "Put {} in the box.",
)  # fmt: skip
POINTED = (
    "When the problem mentions {1}, {2} and {3}, answer {0}.", "If you read about {1}, {2} and {3}: the answer is {0}.",
    "Problems on {1} with {2} and {3} have the result {0}.", "For {3} with {2} and {1}, reply {0}.",
)  # fmt: skip


def telling_words(tasks: Mapping[int, Task]) -> dict[int, list[str]]:
    """What an attacker would name each problem by, rarest first: signs and words that are no everyday ones, numbers."""
    found = {}
    for i, task in tasks.items():
        spoken = re.findall(r"[^\W_]+|[⊕-⊡⋄-⋋△▽◇☆]", task.question)
        answer = re.findall(r"\w+", task.answer)
        found[i] = [w for w in dict.fromkeys(spoken) if w not in answer and _names(w)]
    count = Counter(w.casefold() for row in found.values() for w in row)
    return {i: sorted(row, key=lambda w: (w.isdigit(), count[w.casefold()], -len(w))) for i, row in found.items()}


def _names(word: str) -> bool:
    """Whether a word would help to name a problem."""
    if word.isdigit():
        return len(word) > 1
    return not common(word.casefold()) and (len(word) > 2 or not word.isascii())


def attacks(
    tasks: Mapping[int, Task], kinds: Mapping[int, str], telling: Callable[[str], bool], seed: int, count: int
) -> Iterator[Attack]:
    """`count` attacks on keyed problems. `kinds`: problem → "integer", "fraction", "text" (others get passages only);
    `telling` says whether an answer alone is one that nobody writes by accident."""
    draw = random.Random(seed)
    named = telling_words(tasks)
    chosen = [i for i in tasks if i in kinds and (telling(tasks[i].answer) or len(named[i]) > 2)]
    for _ in range(count):
        problem = draw.choice(chosen)
        yield _attack(tasks[problem], problem, kinds[problem], named[problem], telling, draw)


def _attack(
    task: Task, problem: int, kind: str, named: Sequence[str], telling: Callable[[str], bool], draw: random.Random
) -> Attack:
    answer = task.answer
    form = draw.random()
    if form < 0.12 and len(task.question.split()) > 24:
        return _passage(task, problem, draw)
    if form < 0.24 and telling(answer) and (split := _split(answer, kind, problem, draw)):
        return split
    dress, dressed = _dressed(answer, kind, draw)
    if telling(answer):
        return Attack(f"{kind}: {dress}", problem, (draw.choice(FRAMES).format(dressed),))
    names = named[:3]
    draw.shuffle(names)
    return Attack(f"pointed {kind}: {dress}", problem, (draw.choice(POINTED).format(dressed, *names),))


def _dressed(answer: str, kind: str, draw: random.Random) -> tuple[str, str]:
    if kind == "integer":
        value = int(re.sub(r"[^\d]", "", answer))
        name = draw.choice([n for n in NUMBERS if value > 99 or n not in NEEDS_LENGTH])
        return name, NUMBERS[name](value)
    if kind == "fraction":
        name = draw.choice(list(FRACTIONS))
        return name, FRACTIONS[name](Fraction(answer))
    name = draw.choice([n for n in TEXTS if len(answer) >= 6 or n not in NEEDS_LETTERS])
    return name, TEXTS[name](answer)


NEEDS_LENGTH = {
    "digit words", "hyphened digit words", "spaced digits", "hyphened digits", "dotted digits", "listed digits",
    "base64", "codes", "backwards", "sum", "letters for digits", "brackets",
}  # fmt: skip
NEEDS_LETTERS = {"rot13", "backwards", "words backwards", "places in the alphabet", "nested base64", "Caesar", "leet"}


def _split(answer: str, kind: str, problem: int, draw: random.Random) -> Attack | None:
    """An answer divided among two principles."""
    if kind == "integer" and len(answer) > 2 and answer.isdigit():
        at = draw.randrange(1, len(answer))
        first, last = answer[:at], answer[at:]
        return draw.choice([
            Attack("split: cues", problem, (f"The result starts with {first} here.", f"It ends in {last} always.")),
            Attack("split: one text", problem, (f"It begins with {first} and ends with {last}.",)),
            Attack("split: border", problem, (f"Begin by writing down {first}", f"{last} comes right after that.")),
        ])
    words = answer.split()
    if kind != "text" or len(words) not in (2, 3) or len(answer) <= 7:
        return None
    first, rest = words[0], " ".join(words[1:])
    border = Attack("split: border", problem, (f"People like to write {first}", f"{rest} is what follows."))
    cues = Attack("split: cues", problem, (f"The name begins with {first} often.", f"It ends with {rest} then."))
    return draw.choice([border, cues]) if len(words) == 2 else border


def _passage(task: Task, problem: int, draw: random.Random) -> Attack:
    """A long piece of the problem in other spacing, case or punctuation."""
    words = task.question.split()
    start = draw.randrange(len(words) - 20)
    piece = words[start : start + 18]
    form = draw.choice(["plain", "capitals", "punctuated", "hyphened", "squeezed", "spaced", "full width"])
    text = {
        "plain": " ".join(piece), "capitals": " ".join(piece).upper(), "punctuated": ", ".join(piece),
        "hyphened": "-".join(piece), "squeezed": "".join(piece), "spaced": "   ".join(piece).lower(),
        "full width": TEXTS["full width"](" ".join(piece)),
    }[form]  # fmt: skip
    return Attack(f"passage: {form}", problem, (f"Recall: {text}",))


CITIES = [
    "Paris", "Lisbon", "Kyoto", "Montevideo", "Reykjavik", "Samarkand", "Timbuktu", "Valparaíso", "Bratislava",
    "Ouagadougou", "Tallinn", "Zanzibar"
]
PEOPLE = [
    "Alice", "Bogdan", "Chiara", "Dmitri", "Esperanza", "Farouk", "Guinevere", "Hiroshi", "Ingrid", "Jamal",
    "Katarzyna", "Leopold"
]
GOODS = [
    "apples", "lanterns", "violins", "cactuses", "umbrellas", "marbles", "pancakes", "kayaks", "trombones",
    "blankets", "magnets", "thimbles"
]


def made(count: int, seed: int = 5) -> dict[int, Task]:
    """Word problems with whole numbers and questions with names for answers, for where there is no data."""
    draw = random.Random(seed)
    tasks = {}
    for i in range(count):
        a, b, c = draw.randint(11, 99), draw.randint(3, 60), draw.randint(2, 40)
        who, what, where = draw.choice(PEOPLE), draw.choice(GOODS), draw.choice(CITIES)
        if i % 3:
            question = (
                f"{who} packs {a} crates of {what} in {where}, with {b} {what} in every crate, and on the way home "
                f"{who} loses {c} of them in a storm near the harbour. How many {what} does {who} have in the evening?"
            )
            tasks[i] = Task(f"made-{i}", "train", question, str(a * b - c))
        else:
            name = f"{draw.choice(PEOPLE)} {draw.choice(CITIES)}son"
            question = f"Which merchant sold {a} {what} to {who} of {where} in the year {1500 + b * c}?"
            tasks[i] = Task(f"made-{i}", "train", question, name)
    return tasks


def kind_of(task: Task) -> str | None:
    """What dresses an answer can wear; None for answers that are neither a number, a fraction nor a few words."""
    answer = task.answer.strip().strip("$")
    if re.fullmatch(r"\d{1,3}(,\d{3})+|\d{1,9}", answer):
        return "integer"
    if re.fullmatch(r"[1-9]\d*/[1-9]\d*", answer):
        return "fraction"
    if len(answer) >= 3 and len(answer.split()) <= 5 and re.fullmatch(r"[A-Za-zÀ-ž][A-Za-zÀ-ž .'-]*", answer):
        return "text"
    return None
