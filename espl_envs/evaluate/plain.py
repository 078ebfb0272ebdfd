"""Model text made safe to look at: every character that would move, hide or reorder what surrounds it becomes visible.

Terminals obey control characters, browsers and terminals obey bidirectional ones. Line breaks and tabs stay.
"""

from __future__ import annotations

import re

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_HIDDEN = re.compile(
    "[\u0080-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with control characters as their pictures (␀ ␛), and what is invisible or changes the direction of text as
    its code (⟨U+202E⟩). A carriage return before a line break goes."""
    text = text.replace("\r\n", "\n").translate(_PICTURES)
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)


def one_line(text: str, most: int = 200) -> str:
    """The same on one line of at most `most` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"
