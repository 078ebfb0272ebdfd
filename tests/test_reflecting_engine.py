"""Reflection meets the engine: whose weights answer, with which tokens, and what happens where it cannot be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from espl_envs.core.messages import Message
from espl_train.engines.base import EngineError, Request, Sample
from espl_train.reflecting.engine import EngineSource
from espl_train.reflecting.source import Said
from espl_train.settings import load

ASK = (Message("user", "What do the attempts have in common?"),)


class FakeChat:
    """As many tokens per message as it has characters."""

    stop_ids = (7, 9)

    def open(self, messages: Sequence[Message]) -> list[int]:
        return [ord(c) for message in messages for c in message.content]

    def text(self, tokens: Sequence[int]) -> str:
        return "text of " + ",".join(map(str, tokens))


class FakeEngine:
    """Answers three tokens; counts who is at the table."""

    def __init__(self, context: int = 100, error: BaseException | None = None) -> None:
        self.context_length, self.error = context, error
        self.requests: list[Request] = []
        self.table: list[int] = [0]

    def join(self, count: int) -> None:
        self.table.append(self.table[-1] + count)

    def leave(self) -> None:
        self.table.append(self.table[-1] - 1)

    async def sample(self, request: Request) -> Sample:
        assert self.table[-1] > 0, "a caller that has not joined"
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return Sample((4, 5, 7), (-1.0, -1.0, -1.0), "stop", request.policy)


def source(engine: FakeEngine, version: int = 3, **settings: Any) -> EngineSource:
    config = load(overrides={f"evolution.{name}": value for name, value in settings.items()})
    made = EngineSource(engine, FakeChat(), config, lambda: version, lambda learnt: {"learnt": learnt})  # type: ignore[arg-type]
    made.begin()
    return made


def ask(asked: EngineSource, messages: Sequence[Message] = ASK, seed: int = 11) -> Said:
    return asyncio.run(asked.answer(messages, seed))


@pytest.mark.parametrize(("reflector", "policy"), [("reference", None), ("current", 3), (None, None)])
def test_the_reference_reflects_with_the_base_weights_and_current_with_its_version(
    reflector: str | None, policy: int | None
) -> None:
    engine = FakeEngine()
    settings: dict[str, Any] = {"reflector": reflector} if reflector else {}
    ask(source(engine, **settings))
    assert [request.policy for request in engine.requests] == [policy]


def test_version_0_is_a_version() -> None:
    engine = FakeEngine()
    ask(source(engine, version=0, reflector="current"))
    assert engine.requests[0].policy == 0


def test_the_request_carries_tokens_seed_stop_ids_and_temperature() -> None:
    engine = FakeEngine()
    said = ask(source(engine, reflection_temperature=0.3, reflection_max_new_tokens=20), seed=42)
    assert (said.text, said.prompt_tokens, said.completion_tokens) == ("text of 4,5,7", len(ASK[0].content), 3)
    (request,) = engine.requests
    assert request.tokens == tuple(ord(c) for c in ASK[0].content)
    assert (request.seed, request.stop_ids, request.temperature, request.top_p) == (42, (7, 9), 0.3, 1.0)
    assert request.max_new == 20


def test_room_is_what_the_context_leaves() -> None:
    length = len(ASK[0].content)
    for context, most, expected in ((length + 5, 20, 5), (length + 50, 20, 20), (length + 1, 20, 1)):
        engine = FakeEngine(context)
        ask(source(engine, reflection_max_new_tokens=most))
        assert engine.requests[0].max_new == expected


@pytest.mark.parametrize("missing", [0, 1, 30])
def test_a_prompt_that_leaves_no_room_is_refused_before_the_engine_is_asked(missing: int) -> None:
    length = len(ASK[0].content)
    engine = FakeEngine(length - missing)
    with pytest.raises(ValueError, match=f"{length} tokens does not fit into {length - missing}"):
        ask(source(engine))
    assert engine.requests == [] and engine.table == [0]


def test_callers_join_while_they_ask_and_leave_afterwards() -> None:
    engine = FakeEngine()
    asked = source(engine)

    async def together() -> None:
        await asyncio.gather(*(asked.answer(ASK, seed) for seed in range(5)))

    asyncio.run(together())
    assert max(engine.table) == 5 and engine.table[-1] == 0 and len(engine.table) == 11
    assert sorted(request.seed for request in engine.requests) == list(range(5))


@pytest.mark.parametrize("error", [EngineError("gone"), RuntimeError("odd"), asyncio.CancelledError()])
def test_a_caller_leaves_even_where_sampling_fails(error: BaseException) -> None:
    engine = FakeEngine(error=error)
    asked = source(engine)
    with pytest.raises(type(error)):
        ask(asked)
    assert engine.table == [0, 1, 0]


def test_a_step_keeps_the_version_that_it_began_with() -> None:
    """Beside an update the policy moves on; who reflects does not."""
    engine, versions = FakeEngine(), iter((3, 4))
    config = load(overrides={"evolution.reflector": "current"})
    asked = EngineSource(engine, FakeChat(), config, lambda: next(versions), lambda _: {})  # type: ignore[arg-type]
    asked.begin()
    ask(asked)
    ask(asked)
    asked.begin()
    ask(asked)
    assert [request.policy for request in engine.requests] == [3, 3, 4]


def test_what_was_learnt_belongs_to_the_identity_of_current_alone() -> None:
    assert source(FakeEngine()).identity()["learnt"] is False
    assert source(FakeEngine(), reflector="current").identity()["learnt"] is True
