"""Keyed seeds: every draw is a pure function of what it is for, so there is no random state to keep."""

from __future__ import annotations

import hashlib
import json

Part = str | int | float | bool | None


def derive(*parts: Part) -> int:
    """A seed in [0, 2⁶³) for the key `parts`: blake2b over the key as a canonical JSON list (so 1 and "1" differ)."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
