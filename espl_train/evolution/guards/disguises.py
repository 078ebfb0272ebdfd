"""A text behind which another one hides: encoded, enciphered, written backwards, in leetspeak or letter by letter.

`decoded` gives the texts that surely were encoded (they are judged like the text itself); `disguised` gives readings of
a text that only make sense where they spell an answer.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
from collections.abc import Iterator, Mapping
from functools import partial
from urllib.parse import unquote

from espl_train.evolution.guards.writing import plain

BASE64 = re.compile(r"[A-Za-z0-9+/_-]{4,}={0,2}")
BASE32 = re.compile(r"\b(?:[A-Z2-7]{8,}={0,6}|[A-Z2-7]{4,}={1,6})")
HEXADECIMAL = re.compile(r"(?:(?:\\x|0x|%|\b)?[0-9a-fA-F]{2}[\s:,-]?){3,}")
ESCAPES = re.compile(r"\\u\{?([0-9a-fA-F]{4,6})\}?|\\x([0-9a-fA-F]{2})|U\+([0-9a-fA-F]{4,6})")
CODES = re.compile(r"\b\d{1,3}(?:[\s,.;:-]+\d{1,3}){2,}\b")
BITS = re.compile(r"\b[01]{7,8}(?:\s+[01]{7,8})+\b")
CIPHER = re.compile(r"\brot|caesar|cipher|shift|decode|decrypt|encod", re.IGNORECASE)
LEET: dict[int, int | str] = {**str.maketrans("013457@$!|+€£8", "oleastasiltelb")}
LEET_TOKEN = re.compile(r"(?=[\w@$!|+€£]*[^\W\d_])(?=[\w@$!|+€£]*[\d@$!|+€£])[\w@$!|+€£]{3,}")
SPACED = re.compile(r"(?<!\w)\w(?:[\s.*_·•|/-]{1,3}\w){2,}(?!\w)")
LEAST_PRINTABLE = 3
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def decoded(text: str) -> Iterator[str]:
    """What stands encoded in a text: base64, base32, hexadecimal, escapes, character codes, bits."""
    unescaped = ESCAPES.sub(lambda m: _character(m[1] or m[2] or m[3]), html.unescape(unquote(text)))
    if unescaped != text:
        yield unescaped
    for match in BASE64.finditer(text):
        yield from _printable(_bytes64(match[0]))
    for match in BASE32.finditer(text):
        yield from _printable(_bytes32(match[0]))
    for match in HEXADECIMAL.finditer(text):
        digits = re.sub(r"\\x|0x|[^0-9a-fA-F]", "", match[0])
        yield from _printable(bytes.fromhex(digits[: len(digits) // 2 * 2]))
    for match in BITS.finditer(text):
        yield from _printable(bytes(int(b, 2) for b in match[0].split()))
    for match in CODES.finditer(text):
        codes = [int(d) for d in re.findall(r"\d+", match[0])]
        if all(32 <= c < 127 for c in codes):
            yield "".join(map(chr, codes))
        if all(1 <= c <= 26 for c in codes):
            yield "".join(ALPHABET[c - 1] for c in codes)


def disguised(text: str) -> Iterator[str]:
    """Other readings: leetspeak, letters apart, backwards as a whole and word by word, shifted through the alphabet."""
    bare = plain(text)
    for table in (LEET, {**LEET, ord("1"): "i"}):
        leet = LEET_TOKEN.sub(partial(_translated, table), bare)
        if leet != bare:
            yield leet
            yield bare.translate(table)
    joined = SPACED.sub(lambda m: re.sub(r"[\s.*_·•|/-]", "", m[0]), bare)
    if joined != bare:
        yield joined
    yield bare[::-1]
    yield " ".join(word[::-1] for word in bare.split())
    yield from {codecs.encode(text, "rot13"), codecs.encode(bare, "rot13")}
    if CIPHER.search(bare):
        yield from (_shifted(bare.casefold(), by) for by in range(1, 26))


def _translated(table: Mapping[int, int | str], match: re.Match[str]) -> str:
    return match[0].translate(table)


def _printable(raw: bytes | None) -> Iterator[str]:
    if raw is None or len(raw) < LEAST_PRINTABLE:
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    if text.isprintable():
        yield text


def _bytes64(text: str) -> bytes | None:
    text = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        return None


def _bytes32(text: str) -> bytes | None:
    text = text.rstrip("=")
    try:
        return base64.b32decode(text + "=" * (-len(text) % 8))
    except (ValueError, binascii.Error):
        return None


def _character(digits: str) -> str:
    code = int(digits, 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "?"


def _shifted(text: str, by: int) -> str:
    return text.translate(str.maketrans(ALPHABET, ALPHABET[by:] + ALPHABET[:by]))
