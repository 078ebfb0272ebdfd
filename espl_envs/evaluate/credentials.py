"""The key of an endpoint: read from an environment variable, put into one header, and hidden everywhere else."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote

from espl_envs.core.errors import EsplError

VARIABLE = "OPENAI_API_KEY"
SHORTEST = 8            # "EMPTY", "none" and the like are no secrets: hiding them would garble what models say
HIDDEN = "[key]"
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_ASCII = re.compile(r"\\u00([0-7][0-9a-fA-F])")


@dataclass(frozen=True, slots=True)
class Secret:
    """A key and the name of the variable that it came from; an empty key is none. It does not show in its repr."""

    name: str = VARIABLE
    key: str = field(default="", repr=False)
    _forms: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.key) >= SHORTEST:
            quoted = {quote(self.key, safe=""), quote(self.key)}
            quoted |= {re.sub("%..", lambda code: code[0].lower(), form) for form in quoted}
            encoded = {json.dumps(self.key)[1:-1], b64encode(self.key.encode()).decode()}
            forms = {self.key, self.key.replace("/", "\\/"), *encoded, *quoted}
            object.__setattr__(self, "_forms", tuple(sorted(forms, key=len, reverse=True)))

    @classmethod
    def from_variable(cls, name: str | None) -> Self:
        """The key in the variable `name`; without a name, in OPENAI_API_KEY if that is set. Raises EsplError."""
        if name is not None and not _NAME.fullmatch(name):
            raise EsplError("--api-key-env expects the NAME of an environment variable, in capitals, never the key")
        if name is not None and name not in os.environ:
            raise EsplError(f"--api-key-env names {name}, which is not set: export {name}=…")
        key = os.environ.get(name or VARIABLE, "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise EsplError(f"the key in {name or VARIABLE} has characters that a header cannot hold: copy it again")
        return cls(name or VARIABLE, key)

    def header(self) -> dict[str, str]:
        """The header that carries it; none where there is no key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def held(self, text: str) -> bool:
        """Whether the key stands in a text."""
        return any(form in text for form in self._forms)

    def hidden_in(self, value: Any) -> Any:
        """What JSON can hold, without the key in any of its texts."""
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, Mapping):
            return {self.hidden(str(name)): self.hidden_in(item) for name, item in value.items()}
        return [self.hidden_in(item) for item in value] if isinstance(value, list) else value

    def hidden(self, text: str) -> str:
        """`text` without the key, also where JSON, a URL or base64 writes it."""
        if not self._forms:
            return text
        for form in self._forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return self._unescaped(text) if "\\u00" in text else text

    def _unescaped(self, text: str) -> str:
        """JSON that writes ASCII as \\u00XX may spell the key so: it is written anew without, and looked through."""
        try:
            plain = json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            plain = _ASCII.sub(lambda code: chr(int(code[1], 16)), text)
        for form in self._forms:
            plain = plain.replace(form, HIDDEN)
        return plain
