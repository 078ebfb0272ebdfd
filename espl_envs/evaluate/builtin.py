"""Agents that come with the suite and hold every environment to its promises.

`oracle` knows everything and scores 1; `silent` says nothing and scores 0; `random` gives the answer to another task of
the same split, drawn by the evaluation's seed: what an agent gets that does not read the question.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message, ToolSpec
from espl_envs.evaluate.agents import Act, Reply, Seat, ToolSyntax
from espl_envs.evaluate.config import AgentConfig

NAMES = ("oracle", "silent", "random")


class BuiltinDoor:
    """One of NAMES."""

    tool_syntax: ToolSyntax = "text"
    concurrency = 64
    system_prompts: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.config = AgentConfig("builtin", name)

    @asynccontextmanager
    async def open(self, tools: Sequence[ToolSpec]) -> AsyncIterator[Builtin]:  # noqa: ARG002
        """Nothing has to be started."""
        yield Builtin(self.config.name)


class Builtin:
    """Plays from what the environment knows."""

    def __init__(self, name: str) -> None:
        self._name = name

    def standing(self) -> str:
        """Nothing to tell."""
        return ""

    @asynccontextmanager
    async def sit(self, seat: Seat) -> AsyncIterator[Act]:
        """One episode. Raises EsplError for an environment that is none of ours: it has no oracle and no tasks."""
        env: Any = seat.env
        if self._name != "silent" and not isinstance(env, TextEnv):
            raise EsplError(f"the agent {self._name!r} needs a TextEnv, {seat.key.env} is a {type(env).__name__}")

        async def oracle(_: Conversation) -> Reply:
            said = env.oracle()
            return Reply(said if isinstance(said, Message) else Message("assistant", said))

        async def silent(_: Conversation) -> Reply:
            return Reply(Message("assistant", ""))

        draws = np.random.Generator(np.random.Philox(key=seat.seed)) if self._name == "random" else None

        async def random(_: Conversation) -> Reply:
            assert draws is not None
            other = int(draws.integers(len(env.tasks)))
            slow = getattr(env.tasks, "slow", False)
            task = await asyncio.to_thread(env.tasks.__getitem__, other) if slow else env.tasks[other]
            return Reply(Message("assistant", env.family.protocol.compose(task.answer)))

        yield {"oracle": oracle, "silent": silent, "random": random}[self._name]
