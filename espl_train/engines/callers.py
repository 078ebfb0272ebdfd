"""Who waits for an engine: callers on event loops, when what they ask for may be begun, and how results reach them.

Deterministic mode: work begins once every joined caller either waits for a result or has left, and once the callers'
event loops have settled (which covers those who never joined). What is begun together then depends on the requests
alone, and so does every bit of the results.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

TICKS = 32      # rounds of an event loop in which a caller that only computes has long asked again

Loop = asyncio.AbstractEventLoop
Waiter = tuple[Loop, "asyncio.Future[Any]"]
Outcome = tuple[Waiter, Any, Exception | None]


class Callers:
    """The callers of one engine, whose worker is one thread. `changed` guards what the engine shares with it."""

    def __init__(self, deterministic: bool) -> None:
        self.changed = threading.Condition()
        self.deterministic = deterministic
        self.closed = False
        self._joined = 0
        self._unsettled: dict[Loop, int] = {}

    def join(self, count: int) -> None:
        """See `Engine.join`."""
        with self.changed:
            self._joined += count

    def leave(self) -> None:
        """See `Engine.leave`."""
        with self.changed:
            self._joined -= 1
            self.changed.notify_all()

    def close(self) -> None:
        """Nothing begins any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def asked(self, loop: Loop) -> None:
        """A caller on `loop` has asked for something. Called on `loop`, under `changed`."""
        self._stir(loop)
        self.changed.notify_all()

    def wait(self, waiting: Callable[[], int], urgent: Callable[[], bool] = lambda: False) -> bool:
        """Block the worker until there is something to begin: `waiting()` counts the callers that wait for a result,
        `urgent()` is begun at once. False once the engine is closed.
        """

        def ready() -> bool:
            count = waiting()
            if self.closed or urgent() or not count or not self.deterministic:
                return self.closed or urgent() or count > 0
            return count >= self._joined and not any(loop.is_running() for loop in self._unsettled)

        with self.changed:
            while not self.changed.wait_for(ready, timeout=0.1 if self._unsettled else None):
                self._unsettled = {loop: left for loop, left in self._unsettled.items() if not loop.is_closed()}
            return not self.closed

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Hand results to their loops: one wake-up per loop, however many results."""
        for loop in {outcome[0][0] for outcome in outcomes}:
            mine = [outcome for outcome in outcomes if outcome[0][0] is loop]
            if loop.is_closed():
                continue
            if self.deterministic:
                with self.changed:
                    self._unsettled.setdefault(loop, 0)
            with suppress(RuntimeError):               # closed in this very moment: nobody waits there any more
                loop.call_soon_threadsafe(self._settle, loop, mine)

    def _settle(self, loop: Loop, outcomes: Sequence[Outcome]) -> None:
        for (_, future), result, error in outcomes:
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        with self.changed:
            self._stir(loop)

    def _stir(self, loop: Loop) -> None:
        """Callers on `loop` may be about to ask: count its rounds before anything is begun. Called on `loop`."""
        if not self.deterministic:
            return
        counting = self._unsettled.get(loop, 0) > 0
        self._unsettled[loop] = TICKS
        if not counting:
            loop.call_soon(self._tick, loop)

    def _tick(self, loop: Loop) -> None:
        with self.changed:
            self._unsettled[loop] -= 1
            if self._unsettled[loop]:
                loop.call_soon(self._tick, loop)
            else:
                del self._unsettled[loop]
                self.changed.notify_all()


def waiter() -> Waiter:
    """A future on the running event loop, and the loop."""
    loop = asyncio.get_running_loop()
    return loop, loop.create_future()
