"""The money of an evaluation: what it has cost, and whether another episode, or another model call, fits in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.agents import Unpaid
from espl_envs.evaluate.records import TurnUsage

ROUNDED = 1 - 1e-9          # ten times 0.01 is 0.1


class Halted(EsplError):
    """The evaluation ends early, for a reason that a person has to look at. It can be resumed."""


class Purse:
    """What the evaluation has cost, and whether another episode fits in.

    An episode begins only if all that are under way, and it, could cost what they cost on average; before there is an
    average, FIRST play. Should the limit be reached all the same, requests under way are the last: what has been paid
    for is still played, and episodes that would need more are stopped, to be played again when there is money: without
    a score, and on record where they have cost something.
    """

    FIRST = 4

    def __init__(self, limit: float | None) -> None:
        self.limit, self.spent, self.under_way = limit, 0.0, 0
        self._finished, self._cost = 0, 0.0
        self._calls = self._asking = 0              # model calls that were paid, and that are under way between replies
        self._changed = asyncio.Event()

    @property
    def empty(self) -> bool:
        """Whether no request may be made any more."""
        return self.limit is not None and self.spent >= self.limit * ROUNDED

    @property
    def exhausted(self) -> str:
        """That it is, in words."""
        return f"the cost limit of {self.limit:g} is reached ({self.spent:.4g} spent)"

    async def begin(self) -> bool:
        """Wait until another episode may begin, and count it as under way; False when none ever may."""
        while not self._admits():
            if not self.under_way:
                return False
            self._changed.clear()
            await self._changed.wait()
        self.under_way += 1
        return True

    def pay(self, cost: float | None) -> None:
        """A model call. Raises Halted where there is a limit and it cannot be held."""
        if self.limit is not None and cost is None:
            raise Halted("--max-cost cannot be held: the agent does not say what its calls cost (give --price, and see "
                         "that the server reports its tokens)")
        self.spent += cost or 0.0
        self._calls += 1

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """One model call between replies. It begins if all that are under way could cost what calls cost on average
        and leave some money; before there is an average, FIRST are made. Raises Unpaid when the money is spent."""
        while not self._affords():
            if self.empty or not self._asking:
                raise Unpaid(self.exhausted)
            self._changed.clear()
            await self._changed.wait()
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._changed.set()

    def end(self, cost: float | None = None) -> None:
        """An episode is no longer under way; `cost` where it was finished and nothing went wrong."""
        self.under_way -= 1
        self._changed.set()
        if cost is not None:
            self.finished(cost)

    def finished(self, cost: float) -> None:
        """An episode counts for the average, one of an earlier session too."""
        self._finished += 1
        self._cost += cost

    def _affords(self) -> bool:
        if self.limit is None:
            return True
        if not self._calls:
            return self._asking < self.FIRST and not self.empty
        return self.spent + self._asking * self.spent / self._calls < self.limit * ROUNDED

    def _admits(self) -> bool:
        if self.limit is None:
            return True
        if not self._finished:
            return self.under_way < self.FIRST and not self.empty
        mean = self._cost / self._finished
        return max(self.spent, self._cost + self.under_way * mean) + mean <= self.limit and not self.empty


class Tab:
    """One episode's account with the purse; `paid` is told of every call."""

    def __init__(self, purse: Purse, paid: Callable[[TurnUsage], None]) -> None:
        self._purse, self._paid = purse, paid
        self._charged: dict[int, TurnUsage] = {}        # by identity: two calls may have taken the very same

    def charge(self, calls: Sequence[TurnUsage]) -> None:
        """See `agents.Tab`. Raises Halted."""
        for call in calls:
            if id(call) not in self._charged:
                self._charged[id(call)] = call
                self._paid(call)
                self._purse.pay(call.cost)

    def call(self) -> AbstractAsyncContextManager[None]:
        """See `agents.Tab`."""
        return self._purse.call()
