"""Characters that have no business in a principle: those that cannot be seen, and tokens of chat templates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from espl_train.evolution.rejections import Reason, Rejection, excerpt

TOKEN = re.compile(
    r"<\|[^|<>]{0,40}\|?>|<｜[^｜<>]{0,40}｜?>|\[/?INST\]|<</?SYS>>|</?(?:s|think|tool_call|tool_response|tools|system|user"
    r"|assistant|bos|eos|pad|unk|start_of_turn|end_of_turn|im_start|im_end)>",
    re.IGNORECASE,
)
JOINERS = "‌‍"    # needed inside words of several scripts
BLANKS = "\u115f\u1160\u3164\uffa0\u2800\u17b4\u17b5\u034f"      # drawn as nothing, though classed as letters and marks
MARKS = 3         # accents on one letter: beyond them a text is made to be hidden


def refused(text: str, special_tokens: Sequence[str]) -> Rejection | None:
    """Why these characters must not stand in a principle, or None."""
    if any(_unprintable(c) for c in text) or _stacked(text):
        return Rejection(Reason.CONTROL_CHARACTER, f"a character that cannot be seen: {excerpt(ascii(text))}")
    folded = unicodedata.normalize("NFKC", text)
    if any(TOKEN.search(t) or any(token in t for token in special_tokens) for t in (text, folded)):
        return Rejection(Reason.SPECIAL_TOKEN, "the text contains a token of a chat template")
    return None


def _unprintable(character: str) -> bool:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return (hidden and character not in JOINERS) or character in BLANKS


def _stacked(text: str) -> bool:
    run = 0
    for character in text:
        run = run + 1 if unicodedata.category(character) == "Mn" else 0
        if run > MARKS:
            return True
    return False
