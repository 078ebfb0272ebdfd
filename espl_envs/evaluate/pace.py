"""How many requests are under way at once: as many as the server bears, found out while they are made.

Additive increase, multiplicative decrease, as in TCP (Jacobson 1988): the limit doubles with every window of answers
until the server first pushes back (429, 5xx, a dropped connection), then halves, and from there grows by one per
window. Besides, a window in which answers took much longer than lately, per token, takes a little away: a server that
queues is no faster for being asked more, but times out sooner. That never goes below `FLOOR`, because slow answers may
simply be what is asked for now.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

START = 32
FLOOR = 16
LEAST = 8                   # answers that say anything
WINDOWS = 20                # that "lately" means
SLOWER = 3.0                # times the best of them: congestion
TOKENS_PER_REPLY = 20       # what prompt, network and queue cost, in tokens: keeps one-word replies comparable


class Pace:
    """Admits requests. `most`: the limit's own limit; `floor`: what slowness alone does not take away. Lives on one
    event loop."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic, floor: int = FLOOR) -> None:
        self.most, self.under_way = most, 0
        self._floor = floor
        self._limit = float(min(max(START, floor), most))
        self._clock = clock
        self._starting = True                   # no push-back so far: grow with every answer
        self._cut = float("-inf")               # when the limit was last halved
        self._window: list[float] = []
        self._enough = max(LEAST, self.limit)   # answers until it is looked back on
        self._lately: deque[float] = deque(maxlen=WINDOWS)
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return int(self._limit)

    @asynccontextmanager
    async def slot(self, urgent: bool = False) -> AsyncIterator[float]:
        """Wait for a place and keep it for the length of the block; gives the time at which that begins. Urgent ones
        (episodes that have begun) go first."""
        await self._enter(urgent)
        try:
            yield self._clock()
        finally:
            self.under_way -= 1
            self._admit()

    def answered(self, began: float, tokens: int | None) -> None:
        """The server answered; `tokens` is the length of its reply, where known."""
        if self.under_way * 2 >= self._limit:               # a limit that nobody reaches proves nothing
            grown = self._limit + (1.0 if self._starting else 1.0 / self._limit)
            self._limit = min(grown, float(self.most))
        self._window.append((self._clock() - began) / ((tokens or 0) + TOKENS_PER_REPLY))
        if len(self._window) >= self._enough:
            self._look_back()
        self._admit()

    def pushed_back(self, began: float) -> None:
        """The server could not. Requests that were under way when the limit was halved do not halve it again."""
        self._starting = False
        if began > self._cut:
            self._limit = max(1.0, self._limit / 2)
            self._cut = self._clock()

    def _look_back(self) -> None:
        mean = sum(self._window) / len(self._window)
        self._window.clear()
        if self._lately and mean > SLOWER * min(self._lately) and self._limit > self._floor:
            self._limit, self._starting = max(float(self._floor), self._limit * 0.8), False
        self._lately.append(mean)
        self._enough = max(LEAST, self.limit)

    async def _enter(self, urgent: bool) -> None:
        if self.under_way < self.limit and not any(self._waiting):
            self.under_way += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting[0 if urgent else 1]
        queue.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():      # admitted and cancelled at once: pass the place on
                self.under_way -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        for queue in self._waiting:
            while queue and self.under_way < self.limit:
                place = queue.popleft()
                if not place.done():
                    self.under_way += 1
                    place.set_result(None)
