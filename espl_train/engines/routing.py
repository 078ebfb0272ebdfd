"""Which of several samplers gets a request: one that has the keys and values of its beginning, unless it has too much
to do already.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): whoever begins alike, which is to say with
the same system prompt, prefers the same samplers in the same order, and none gets more than SLACK times its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from espl_train.randomness import derive

BEGINNING = 64        # tokens that decide where a request would like to go
SLACK = 1.25


class Router:
    """Places for requests among `count` samplers. An episode stays where it began, until it is released."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._sessions: dict[str, int] = {}

    def choose(self, tokens: Sequence[int], session: str | None, loads: Sequence[int]) -> int:
        """The number of the sampler for a request of these tokens; `loads` are the requests that each of them has."""
        if self._count == 1:
            return 0
        if session in self._sessions:
            return self._sessions[session]
        bound = math.ceil(SLACK * (sum(loads) + 1) / self._count)
        chosen = next(number for number in self._wishes(tokens) if loads[number] < bound)
        if session is not None:
            self._sessions[session] = chosen
        return chosen

    def release(self, session: str) -> None:
        """The episode is over; unknown sessions are fine."""
        self._sessions.pop(session, None)

    def _wishes(self, tokens: Sequence[int]) -> list[int]:
        """All samplers, the one that was most likely chosen for this beginning first (rendezvous hashing)."""
        beginning = list(tokens[:BEGINNING])
        return sorted(range(self._count), key=lambda number: derive("route", number, *beginning))
