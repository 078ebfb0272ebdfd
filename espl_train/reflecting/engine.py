"""Reflection by the engine of the run: exact tokens, and the weights of the base model or of the one in training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espl_envs.core.messages import Message
from espl_train.chat import Chat
from espl_train.config import Config
from espl_train.engines.base import Engine, Request
from espl_train.reflecting.source import Said


class EngineSource:
    """Answers reflection prompts with the engine's model: under `evolution.reflector` "reference" the base, else the
    weights of the moment. `weights(learnt)` names them: those of the base model, or with what it has `learnt`."""

    paid, patience_s = False, None

    def __init__(
        self, engine: Engine, chat: Chat, config: Config, version: Callable[[], int],
        weights: Callable[[bool], Mapping[str, Any]],
    ) -> None:
        self._engine, self._chat, self._config = engine, chat, config.evolution
        self._version, self._weights = version, weights
        self._current = config.evolution.reflector == "current"
        self._policy: int | None = None
        self.name = f"{config.model.path} ({config.evolution.reflector})"

    def identity(self) -> Mapping[str, Any]:
        """The model goes by its weights; which engine samples is not part of it."""
        config = self._config
        return {
            **self._weights(self._current),
            "temperature": config.reflection_temperature, "max_new_tokens": config.reflection_max_new_tokens,
        }  # fmt: skip

    def begin(self) -> None:
        """From now on `current` are the weights as they are now, whatever learns meanwhile."""
        self._policy = self._version() if self._current else None

    async def open(self) -> None:
        """The loop has started the engine."""

    async def answer(self, messages: Sequence[Message], seed: int) -> Said:
        """The reply to `messages`. One that runs into the length limit is returned as it is: reading decides.

        Raises ValueError where the prompt leaves no room in the model's context.
        """
        tokens = tuple(self._chat.open(messages))
        room = self._engine.context_length - len(tokens)
        if room < 1:
            raise ValueError(f"the prompt of {len(tokens)} tokens does not fit into {self._engine.context_length}")
        request = Request(
            tokens=tokens,
            max_new=min(room, self._config.reflection_max_new_tokens),
            seed=seed,
            stop_ids=tuple(self._chat.stop_ids),
            temperature=self._config.reflection_temperature,
            policy=self._policy,
        )
        began = time.monotonic()
        self._engine.join(1)
        try:
            sample = await self._engine.sample(request)
        finally:
            self._engine.leave()
        text = self._chat.text(sample.tokens)
        return Said(text, len(tokens), len(sample.tokens), time.monotonic() - began)

    async def close(self) -> None:
        """The loop closes the engine."""
