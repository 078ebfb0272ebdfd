"""Who answers a reflection call: the seam between the engine of the run and a server somewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from espl_envs.core.messages import Message

BYTES_PER_TOKEN = 3         # where a server does not count: rather too many tokens than a budget overrun


@dataclass(frozen=True, slots=True)
class Said:
    """A reply and what it took. `seconds` are those of the answer itself, without waiting for a turn."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that brought no reply: the name of the reason (`evolution.rejections.Reason`), and what happened."""

    reason: str
    detail: str
    seconds: float


class Source(Protocol):
    """Somebody who answers. All calls come from one event loop.

    name: what people call it. paid: whether a call that was made cannot be had back: what an interrupted step has
    spent there still counts. patience_s: seconds after which a call is given up where the settings do not say.
    """

    @property
    def name(self) -> str: ...

    @property
    def paid(self) -> bool: ...

    @property
    def patience_s(self) -> float | None: ...

    def identity(self) -> Mapping[str, Any]:
        """What decides a reply besides messages and seed, as JSON: model or weights, and sampling parameters."""
        ...

    def begin(self) -> None:
        """A step begins."""
        ...

    async def open(self) -> None:
        """Be ready. Raises EsplError, in one sentence, where it cannot be reached."""
        ...

    async def answer(self, messages: Sequence[Message], seed: int) -> Said:
        """The reply to `messages`. May raise anything."""
        ...

    async def close(self) -> None:
        """Let go of connections. Again is fine."""
        ...


def estimated(text: str) -> int:
    """Tokens of a text that nobody has counted."""
    return len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN + 1
