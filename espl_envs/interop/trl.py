"""Training on our environments with TRL's GRPOTrainer (extra `trl`).

    arena = Arena("espl/Countdown-v0", split="train")
    GRPOTrainer(model, reward_funcs=arena.reward, train_dataset=arena.dataset(), **arena.tools(), args=…)

`reward` plays the completion out in the environment and gives its reward. With tools, `tools()` hands TRL one
environment per rollout whose methods are the environment's tools, called as TRL calls them; each call is a turn of its
own there. A fault of the infrastructure gives None, which TRL leaves out. Environments with a partner (games) need more
turns than TRL asks for, and are refused.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EnvironmentFault, EsplError, MissingExtra
from espl_envs.core.messages import Message, ToolCall, ToolSpec
from espl_envs.evaluate import plan

TYPES: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
Conversation = Sequence[Mapping[str, Any]]


class Arena:
    """One environment for one trainer.

    env_id, arguments: as for `espl-eval`; split: train where it has one, else validation, else test.
    """

    def __init__(self, env_id: str, split: str | None = None, **arguments: Any) -> None:
        first = plan.arena(env_id, arguments, split)
        chosen = split or first.example.splits[0]
        self._arena = plan.arena(env_id, arguments, chosen, tool_syntax="native")
        if type(first.example).follow_up is not TextEnv.follow_up:
            raise EsplError(f"{env_id} goes on after a reply without tool calls, which TRL's trainer does not: use "
                            "espl-train, or a rollout function of your own")
        self._seat = _seat(self._arena)

    def dataset(self, limit: int | None = None) -> Any:
        """The tasks as a `datasets.Dataset`: prompt (the opening, OpenAI's shape), task (an index), task_id."""
        try:
            from datasets import Dataset
        except ImportError as missing:
            raise MissingExtra("trl", f"a data set for TRL (no module {missing.name})") from missing
        env = self._arena.example
        rows = []
        for index in range(min(self._arena.config.size, limit or self._arena.config.size)):
            opening, info = env.reset(options={"task": index})
            prompt = [message.to_openai() for message in opening]
            rows.append({"prompt": prompt, "task": index, "task_id": info["task_id"]})
        return Dataset.from_list(rows)

    def tools(self) -> dict[str, Any]:
        """The trainer's `environment_factory`; empty for an environment without tools."""
        return {"environment_factory": self._seat} if self._arena.tools else {}

    def reward(
        self, completions: Sequence[Conversation], task: Sequence[int], environments: Any = None, **_: Any
    ) -> list[float | None]:
        """TRL's reward function. `environments`: where the tools were called already."""
        seats = environments or [self._seat() for _ in completions]
        rewards = []
        for seat, completion, index in zip(seats, completions, task, strict=True):
            if environments is None:
                seat.reset(task=index)
            rewards.append(_finish(seat, completion))
        return rewards


def _finish(seat: Any, completion: Conversation) -> float | None:
    """Play the last message, unless a tool ended the episode; the reward."""
    last = completion[-1]
    try:
        if not seat._over and last["role"] == "assistant":
            seat._play(Message("assistant", str(last.get("content") or "")))
    except EnvironmentFault as fault:
        logging.getLogger(__name__).warning("a rollout has no reward: %s", fault)
        return None
    finally:
        seat._env.close()
    return None if seat._fault else float(seat._gained)


def _seat(arena: plan.Arena) -> type[Any]:
    """The class of TRL's environments: `reset`, and one method per tool. TRL takes every public method for a tool."""

    class Seat:
        """One rollout at a time."""

        def __init__(self) -> None:
            self._env: Any = arena.take()
            self._over, self._gained, self._fault = False, 0.0, False

        def reset(self, task: int, **_: Any) -> None:
            """Start the episode of a row."""
            self._env.reset(options={"task": int(task)})
            self._over, self._gained, self._fault = False, 0.0, False

        def _play(self, reply: Message) -> str:
            """One reply; what the environment says to it."""
            if self._over:
                raise EsplError("the episode is over")
            try:
                messages, reward, terminated, truncated, _ = self._env.step(reply)
            except EnvironmentFault:
                self._over = self._fault = True
                raise
            self._over, self._gained = terminated or truncated, self._gained + reward
            return messages[-1].content if messages[-1].role == "tool" else ""

    for tool in arena.tools:
        setattr(Seat, tool.name, _method(tool))
    Seat.__name__ = Seat.__qualname__ = arena.config.id.rpartition("/")[2].replace("-", "_")
    return Seat


def _method(tool: ToolSpec) -> Callable[..., str]:
    """A tool as a method with the signature, annotations and docstring that transformers makes its schema of."""
    schema = json.loads(tool.schema)
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))

    def method(self: Any, **arguments: Any) -> str:
        given = {name: value for name, value in arguments.items() if value is not None}
        said: str = self._play(Message("assistant", "", (ToolCall("", tool.name, json.dumps(given)),)))
        return said

    hints = {name: TYPES.get(rule.get("type"), Any) for name, rule in properties.items()}
    order = sorted(properties, key=lambda name: name not in required)
    method.__name__ = method.__qualname__ = tool.name
    method.__annotations__ = {**hints, "return": str}
    method.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[name],
                            default=inspect.Parameter.empty if name in required else None) for name in order),
    ])  # fmt: skip
    told = "\n".join(f"    {name}: {' '.join(properties[name].get('description', name).split())}" for name in order)
    method.__doc__ = f"{' '.join(tool.description.split())}\n\nArgs:\n{told}\n\nReturns:\n    The result."
    return method
