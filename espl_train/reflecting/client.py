"""The one way from evolution to whoever answers: a call passes the budget, waits for its turn, is looked up or made
within its deadline, booked and kept.

What goes wrong with a call is that call's failure and a reason in the log. What goes wrong with all of them, step after
step, ends the run (`failing`); so does a call that a replay cannot answer, or that cannot be recorded (`end`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_train.config import Config
from espl_train.disk import DiskError
from espl_train.evolution.reflection import PURPOSE, Declined
from espl_train.evolution.rejections import Reason, Rejection, excerpt
from espl_train.reflecting.cache import Cache, NotRecorded, question
from espl_train.reflecting.ledger import Account, Ledger, Spent
from espl_train.reflecting.source import Failure, Said, Source

INFINITE = float("inf")
REASONS = 5                 # that are told of a run that stops
EMPTY = "the reply is empty"
LATE = "no reply in time (reflection.{})"


class Client:
    """Asks `source`. `state` and `restore` carry books and patience over a resume."""

    def __init__(self, source: Source, config: Config, ledger: Ledger, cache: Cache | None = None) -> None:
        self.source, self.ledger = source, ledger
        self._config, self._cache = config.reflection, cache
        self._slots = asyncio.Semaphore(config.reflection.concurrency)
        self._until = INFINITE
        self._identity: Mapping[str, Any] = {}
        self._fatal: EsplError | None = None           # what ends the run once the calls of the step are over
        self._failures: Counter[str] = Counter()       # of this step, by what was said
        self._silent = 0                               # steps in a row without any reply
        self._why: Counter[str] = Counter()            # over those steps
        self._told = False                             # that a budget is used up

    @property
    def replays_only(self) -> bool:
        """Whether nobody is ever asked."""
        return self._config.cache == "replay_only"

    def open(self) -> None:
        """Connect. Raises EsplError in one sentence."""
        if not self.replays_only:
            background.run_through(self.source.open())

    def begin(self, step: int) -> None:
        """A step of breeding begins: a new page in the books, and the time that it has."""
        self.ledger.turn(step)
        self.source.begin()
        self._failures.clear()
        self._identity = self.source.identity() if self._cache else {}
        limit = self._config.step_deadline_s
        self._until = time.monotonic() + limit if limit else INFINITE

    async def complete(self, messages: Sequence[Message], seed: int) -> str:
        """The reply to `messages`. Raises Declined where there is none, NotRecorded where only a replay could tell."""
        if self._fatal is not None:
            raise self._fatal
        purpose = PURPOSE.get()
        account = Account(purpose.island, purpose.stage, purpose.prompt)
        async with self._slots:
            if closed := self.closed():
                raise Declined(closed.reason, closed.detail)
            with self.ledger.call():
                said, replayed = await self._said(messages, seed)
        if isinstance(said, Failure):
            self._failures[said.detail] += 1
            self.ledger.book(account, Spent(1, 1, int(replayed), seconds=said.seconds))
            raise Declined(Reason(said.reason), said.detail)
        empty = not said.text.strip()
        self._failures[EMPTY] += empty
        tokens = said.prompt_tokens, said.completion_tokens
        self.ledger.book(account, Spent(1, int(empty), int(replayed), *tokens, said.seconds))
        return said.text

    def closed(self) -> Rejection | None:
        """Why no call will be made now: the budget of the run is used up."""
        exhausted = self.ledger.exhausted()
        return Rejection(Reason.BUDGET, exhausted) if exhausted else None

    def end(self) -> None:
        """The calls of the step are over. Raises EsplError where one of them could not be replayed, or recorded."""
        if self._fatal is not None:
            raise self._fatal
        spent = self.spent
        if spent.calls > spent.failed:
            self._silent = 0
            self._why.clear()
        elif spent.calls:
            self._silent += 1
            self._why += self._failures

    @property
    def spent(self) -> Spent:
        """In this step."""
        return sum(self.ledger.page.values(), Spent())

    def failing(self) -> str:
        """Why the run should stop here, in a sentence and a list of reasons; "" while there is no reason to."""
        most = self._config.max_failures
        if not most or self._silent < most:
            return ""
        reasons = "\n".join(f"  {count:>5,} × {why}" for why, count in self._why.most_common(REASONS))
        return (
            f"reflection by {self.source.name} has brought no reply for {self._silent} iteration"
            f"{'s' * (self._silent > 1)} in a row "
            f"(reflection.max_failures):\n{reasons}\nContinue when it answers again, or with another one "
            "(--evolution.reflector, --reflection.base_url, --reflection.model)."
        )

    def notes(self) -> list[str]:
        """What a person should hear about the step; that a budget is used up, once."""
        closed = self.closed()
        if closed is None or self._told:
            return []
        self._told = True
        return [f"{closed.detail}: from here on nothing is bred"]

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "ledger": self.ledger.to_json(), "silent": self._silent, "why": dict(self._why), "told": self._told
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down; a run that was stopped for silence begins to count anew."""
        self.ledger.restore(state["ledger"])
        self._silent, self._why = state["silent"], Counter(state["why"])
        self._told = state["told"] and self.closed() is not None
        if self.failing():
            self._silent, self._why = 0, Counter()

    def close(self) -> None:
        """Let go of everything. Again is fine."""
        self.ledger.close()
        background.run_through(self.source.close())

    async def _said(self, messages: Sequence[Message], seed: int) -> tuple[Said | Failure, bool]:
        """What was recorded, else what the source says now; whether it was recorded."""
        if self._cache is None:
            return await self._asked(messages, seed), False
        key, asked = question(self._identity, messages, seed)
        try:
            found = self._cache.find(key) if self._config.cache != "record" else None
        except NotRecorded as missing:
            self._fatal = missing
            raise
        if found is not None:
            return found, True
        said = await self._asked(messages, seed)
        try:
            await asyncio.to_thread(self._cache.keep, key, asked, said)
        except DiskError as problem:    # the reply is there and has to be booked; its record will always be missing
            self._fatal = EsplError(f"a reply cannot be recorded (reflection.cache): {problem}")
        return said, False

    async def _asked(self, messages: Sequence[Message], seed: int) -> Said | Failure:
        """What the source says within its time. What it raises is a value from here on, to be booked and recorded."""
        began = time.monotonic()
        own, left = self._config.deadline_s or self.source.patience_s or INFINITE, self._until - began
        if left <= 0:
            return Failure(Reason.DEADLINE, LATE.format("step_deadline_s"), 0.0)
        try:
            async with asyncio.timeout(limit if (limit := min(own, left)) < INFINITE else None) as clock:
                return await self.source.answer(messages, seed)
        except Exception as error:
            seconds = time.monotonic() - began
            if isinstance(error, TimeoutError) and clock.expired():
                which = "step_deadline_s" if left < own else "deadline_s"
                return Failure(Reason.DEADLINE, LATE.format(which), seconds)
            return Failure(Reason.COMPLETION_FAILED, f"{type(error).__name__}: {excerpt(str(error))}", seconds)
