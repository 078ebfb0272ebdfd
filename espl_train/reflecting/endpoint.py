"""Reflection by an OpenAI-compatible server: `evolution.reflector = "endpoint"`.

How a server is asked (pauses, refusals, keys, its pace) is the business of `espl_envs.evaluate.endpoint`, which this
puts a door to. A seed goes with every call where the server takes seeds, which the first short request finds out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_envs.evaluate.credentials import VARIABLE, Secret
from espl_envs.evaluate.endpoint import Endpoint, EndpointDoor, Limits, Sampling
from espl_train.config import Config
from espl_train.reflecting.source import Said, estimated

NAMES = {"--base-url": "--reflection.base_url", "--api-key-env": "--reflection.api_key_env"}


class EndpointSource:
    """A model behind a URL. Raises EsplError for a URL that is none, a key that cannot be one, and settings that hold
    the key."""

    paid, patience_s = True, 600.0

    def __init__(self, config: Config) -> None:
        asked, evolution = config.reflection, config.evolution
        secret = _secret(asked.api_key_env)
        if secret.held(json.dumps([asked.base_url, asked.model, asked.extra], default=str)):
            raise EsplError(f"reflection.* holds the key of {secret.name}: settings are written into the run directory")
        deadline = asked.deadline_s or self.patience_s
        self.name = asked.model or ""
        self._sampling = Sampling(
            evolution.reflection_temperature, evolution.reflection_max_new_tokens, seeded=True, more=asked.extra
        )
        try:
            self._door = EndpointDoor(
                asked.base_url or "", self.name, secret, self._sampling, Limits(deadline, deadline, asked.concurrency)
            )
        except EsplError as problem:
            raise EsplError(_ours(str(problem))) from None
        self._stack = AsyncExitStack()
        self._endpoint: Endpoint | None = None

    def identity(self) -> Mapping[str, Any]:
        """The model goes by its name, wherever it is served."""
        sampling = self._sampling
        return {
            "model": self.name, "temperature": sampling.temperature, "max_new_tokens": sampling.max_tokens,
            "extra": dict(sampling.more),
        }  # fmt: skip

    def begin(self) -> None:
        """A server does not know of steps."""

    @property
    def seeded(self) -> bool:
        """Whether the server takes seeds, as far as is known."""
        return self._door.sampling.seeded

    async def open(self) -> None:
        """Connect and ask for a word. Raises EsplError where the server is not there, or refuses key or model."""
        try:
            try:
                self._endpoint = await self._stack.enter_async_context(self._door.open(()))
            except EsplError as problem:
                if "seed" not in str(problem).lower():
                    raise
                self._door.sampling = replace(self._sampling, seeded=False)
                self._endpoint = await self._stack.enter_async_context(self._door.open(()))
        except EsplError as problem:
            raise EsplError(f"reflection: {_ours(str(problem))}") from None

    async def answer(self, messages: Sequence[Message], seed: int) -> Said:
        """Raises EndpointFault, AgentLost, ContextExceeded or AgentFailed, none of which knows the key."""
        if self._endpoint is None:
            raise RuntimeError("the endpoint was not opened")
        reply = await self._endpoint.ask(tuple(messages), seed)
        text, (usage,) = reply.message.content, reply.calls
        prompt, sampled = usage.prompt_tokens, usage.completion_tokens
        return Said(
            text,
            sum(estimated(m.content) for m in messages) if prompt is None else prompt,
            estimated(text + usage.reasoning) if sampled is None else sampled,
            usage.seconds,
        )

    async def close(self) -> None:
        self._endpoint = None
        await self._stack.aclose()


async def check(config: Config) -> str:
    """Ask the server for a word: what it is, in words. Raises EsplError in one sentence, before anything is written."""
    source = EndpointSource(config)
    try:
        await source.open()
    finally:
        await source.close()
    unseeded = "" if source.seeded else "; it takes no seeds, so only recorded replies repeat"
    return f"{source.name} at {config.reflection.base_url}{unseeded}"


def _secret(variable: str) -> Secret:
    """The default variable may be missing: many servers want no key."""
    try:
        return Secret.from_variable(None if variable == VARIABLE else variable)
    except EsplError as problem:
        raise EsplError(_ours(str(problem))) from None


def _ours(text: str) -> str:
    """The same sentence with the names that these options have here."""
    for theirs, ours in NAMES.items():
        text = text.replace(theirs, ours)
    return text
