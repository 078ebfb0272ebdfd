"""Reflection calls: one place that renders a stage, asks a model, reads the reply, and counts what came of it.

A call that fails and a reply that cannot be used are values with a reason; only cancellation and a broken template
raise. Every seed is derived from (run seed, step, stage, index): no call depends on the order in which calls finish.
What a call is for stands in `PURPOSE` while it is made, for whoever keeps the books.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from espl_envs.core.messages import Message
from espl_train.evolution.edits import KINDS, Kind, Operation, fingerprint
from espl_train.evolution.rejections import Reason, Rejection, excerpt
from espl_train.evolution.replies import MAX_REPLY, read_operations
from espl_train.evolution.templates import Stage, TemplateSet
from espl_train.randomness import derive

T = TypeVar("T")
QUOTED_TEXT = re.compile(r'"text"\s*:\s*"((?:[^"\\]|\\.){1,800})"')
BEYOND_REPAIR = (Reason.COMPLETION_FAILED, Reason.DEADLINE, Reason.BUDGET, Reason.EMPTY_REPLY, Reason.CANARY)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a call is for: its stage, the id of the prompt that is to have a child, and the environment that this is one
    of (all "" where nobody said)."""

    stage: str = ""
    prompt: str = ""
    island: str = ""


UNSAID = Purpose()
PURPOSE: ContextVar[Purpose] = ContextVar("purpose", default=UNSAID)


@contextmanager
def purpose(**changes: str) -> Iterator[None]:
    """Calls in the block (and in tasks that it starts) are for that `stage`, `prompt`, `island`."""
    token = PURPOSE.set(replace(PURPOSE.get(), **changes))
    try:
        yield
    finally:
        PURPOSE.reset(token)


class Declined(Exception):
    """A call that was not made or was given up, for a reason that has a name of its own."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Completer(Protocol):
    """Who answers reflection prompts: `reflecting.Client.complete`, a test's function."""

    async def __call__(self, messages: Sequence[Message], seed: int, /) -> str:
        """The reply to `messages`; may raise anything, which is counted as a failed call, or Declined."""
        ...


class Reflector:
    """The calls of one step, with their ledger: `calls`, `rejections` by reason, `repaired`, `events` for the log.

    `canary` is printed into the evidence where the templates want that; who copies it copies evidence.
    """

    def __init__(self, templates: TemplateSet, complete: Completer, seed: int, step: int, canary: str = "") -> None:
        self.templates, self._canary = templates, canary
        self._counts: Counter[str] = Counter()
        self.rejections: Counter[Reason] = Counter()
        self.events: list[dict[str, Any]] = []
        self._complete, self._seed, self._step = complete, seed, step

    @property
    def calls(self) -> int:
        """Calls that were made."""
        return self._counts["calls"]

    @property
    def repaired(self) -> int:
        """Replies that could be used after a repair call."""
        return self._counts["repaired"]

    def again(self, number: int) -> Reflector:
        """The same calls with other seeds, for one more try at the same thing; the books are shared."""
        other = copy(self)
        other._seed = derive(self._seed, "again", number)
        return other

    async def text(self, stage: Stage, index: int, values: Mapping[str, Any]) -> str | Rejection:
        """A stage's reply as plain text, or why there is none (counted)."""
        reply = await self._ask(stage, index, self._messages(stage, index, values))
        if isinstance(reply, str) and not reply.strip():
            reply = Rejection(Reason.EMPTY_REPLY, "the reply is empty")
        if isinstance(reply, Rejection):
            self._count(stage, index, reply)
            return reply
        return reply.strip()

    async def plan(
        self,
        stage: Stage,
        index: int,
        values: Mapping[str, Any],
        accept: Callable[[tuple[Operation, ...]], T | Rejection],
        max_operations: int = 64,
        allowed: Collection[Kind] = KINDS,
    ) -> T | Rejection:
        """What `accept` makes of a stage's operations, after one repair call where the first reply cannot be used.

        Texts of operations that already stand in the prompt are refused: there they are examples, or somebody's attempt
        to have them copied.
        """
        quoted: set[str] = set()

        def judge(reply: str | Rejection) -> T | Rejection:
            read = reply if isinstance(reply, Rejection) else read_operations(reply, max_operations, allowed)
            if isinstance(read, Rejection):
                return read
            if any(op.text and fingerprint(op.text) in quoted for op in read):
                return Rejection(Reason.ECHO, "an operation is copied from the prompt")
            result = accept(read)
            self._log(stage, index, read, result)
            return result

        messages = self._messages(stage, index, values)
        quoted.update(_quoted(messages))
        reply = await self._ask(stage, index, messages)
        result = judge(reply)
        if not isinstance(result, Rejection):
            return result
        self._count(stage, index, result)
        if isinstance(reply, Rejection) or result.reason in BEYOND_REPAIR or not self.templates.has("repair"):
            return result
        messages = self._messages("repair", index, {"reply": reply[-MAX_REPLY:], "error": str(result)}, stage)
        quoted.update(_quoted(self._messages("repair", index, {"reply": "", "error": ""})))
        repaired = judge(await self._ask("repair", index, messages, stage))
        if isinstance(repaired, Rejection):
            self._count("repair", index, repaired)
            return result
        self._counts["repaired"] += 1
        return repaired

    def _messages(
        self, stage: Stage, index: int, values: Mapping[str, Any], repairs: str = ""
    ) -> tuple[Message, ...]:
        nonce = f"{derive(self._seed, self._step, 'nonce', stage, index, repairs):016x}"
        return self.templates.messages(stage, {**values, "nonce": nonce, "canary": self._canary})

    async def _ask(
        self, stage: Stage, index: int, messages: Sequence[Message], repairs: str = ""
    ) -> str | Rejection:
        self._counts["calls"] += 1
        try:
            with purpose(stage=stage):
                return await self._complete(messages, derive(self._seed, self._step, stage, index, repairs))
        except Declined as declined:
            self._counts["calls"] -= declined.reason is Reason.BUDGET
            return Rejection(declined.reason, str(declined))
        except Exception as error:
            return Rejection(Reason.COMPLETION_FAILED, f"{type(error).__name__}: {excerpt(str(error))}")

    def _count(self, stage: Stage, index: int, rejection: Rejection) -> None:
        self.rejections[rejection.reason] += 1
        self.events.append(
            {"event": "rejection", "stage": stage, "index": index, "reason": rejection.reason.value,
             "detail": excerpt(rejection.detail, 400)}
        )  # fmt: skip

    def _log(self, stage: Stage, index: int, operations: Sequence[Operation], result: object) -> None:
        if not isinstance(result, Rejection):
            plan = [asdict(operation) for operation in operations]
            self.events.append({"event": "plan", "stage": stage, "index": index, "operations": plan})


def _quoted(messages: Sequence[Message]) -> set[str]:
    """The texts of all operations that are written out in a prompt."""
    return {fingerprint(text) for message in messages for text in QUOTED_TEXT.findall(message.content)}
