"""Wrappers for text environments: other shapes of observations, budgets, transcripts, a pool of system prompts.

    env = SystemPromptPool(gym.make("espl/GSM8K-v0"), prompts=["Be brief.", "Check twice."])

All of them are awaitable like the environments themselves (`areset`, `astep`, `aclose`), so that a collector that
drives many episodes on one loop awaits through them, and all take JSON-able arguments only: `env.spec` still travels.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker

from espl_envs.core.env import Info, TextEnv
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message, transcript
from espl_envs.core.spaces import OpenAIChatSpace, OpenAIReplySpace, UnicodeText

Options = Mapping[str, Any]
Result = tuple[Any, float, bool, bool, Info]


def awaitable(env: Any) -> Any:
    """The outermost layer that has `areset` and `astep`; None where a wrapper in between would be stepped over."""
    while not hasattr(type(env), "areset"):
        if not isinstance(env, OrderEnforcing | PassiveEnvChecker):
            return None
        env = env.env
    return env


class TextWrapper(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """The base: a subclass says what happens before and after, once for the blocking and the asynchronous form.

    `arguments` are recorded for the spec. Override `choose` (reset options), `act` (the action), `begun` (what reset
    returns) and `played` (what step returns). The `info` they get is theirs to extend.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, **arguments)
        gymnasium.Wrapper.__init__(self, env)
        self._awaited = awaitable(env)

    def choose(self, seed: int | None, options: Options) -> Options:
        """The reset options to use."""
        del seed
        return options

    def act(self, action: Any) -> Any:
        """The action to play."""
        return action

    def begun(self, observation: Any, info: Info) -> tuple[Any, Info]:
        """What reset returns."""
        return observation, info

    def played(self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Info) -> Result:
        """What step returns."""
        return observation, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: Options | None = None) -> tuple[Any, Info]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=dict(self.choose(seed, options or {})))
        return self.begun(observation, dict(info))

    def step(self, action: Any) -> Result:
        """Play one reply."""
        observation, reward, terminated, truncated, info = self.env.step(self.act(action))
        return self.played(observation, float(reward), terminated, truncated, dict(info))

    async def areset(self, *, seed: int | None = None, options: Options | None = None) -> tuple[Any, Info]:
        """The asynchronous form of `reset`."""
        chosen = dict(self.choose(seed, options or {}))
        if self._awaited is None:
            observation, info = await asyncio.to_thread(self.env.reset, seed=seed, options=chosen)
        else:
            observation, info = await self._awaited.areset(seed=seed, options=chosen)
            _note_reset(self.env, self._awaited)
        return self.begun(observation, dict(info))

    async def astep(self, action: Any) -> Result:
        """The asynchronous form of `step`."""
        action = self.act(action)
        step = asyncio.to_thread(self.env.step, action) if self._awaited is None else self._awaited.astep(action)
        observation, reward, terminated, truncated, info = await step
        return self.played(observation, float(reward), terminated, truncated, dict(info))

    async def aclose(self) -> None:
        """The asynchronous form of `close`."""
        await (asyncio.to_thread(self.env.close) if self._awaited is None else self._awaited.aclose())

    def _text_env(self) -> TextEnv:
        """The environment itself. Raises EsplError where it is none of ours."""
        inner: Any = self.unwrapped
        if not isinstance(inner, TextEnv):
            raise EsplError(f"{type(self).__name__} wraps text environments, not {type(inner).__name__}")
        return inner


class TextObservation(TextWrapper):
    """Observations are plain text: the transcript, one `[role]` heading per message.

    Arguments
        new_only: only the messages since the last reply, the reply itself left out.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], new_only: bool = False) -> None:
        super().__init__(env, new_only=new_only)
        self.observation_space = UnicodeText()
        self._new_only = new_only
        self._seen = 0

    def begun(self, observation: Conversation, info: Info) -> tuple[str, Info]:
        """The opening as text."""
        self._seen = 0
        return self._text(observation), info

    def played(self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Info) -> Result:
        """The conversation as text."""
        return self._text(observation), reward, terminated, truncated, info

    def _text(self, messages: Conversation) -> str:
        new = messages[self._seen :]
        self._seen = len(messages) if self._new_only else 0
        return transcript(tuple(m for m in new if m.role != "assistant") if self._new_only else messages)


class OpenAIMessages(TextWrapper):
    """Observations are lists of OpenAI-shaped dicts, made anew every time; actions may be such a dict, too."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = OpenAIChatSpace()
        self.action_space = OpenAIReplySpace()

    def act(self, action: Any) -> Any:
        """A dict as the message that it describes. Raises InvalidAction for one that is no assistant message."""
        if not isinstance(action, Mapping):
            return action
        if not self.action_space.contains(action):
            raise gymnasium.error.InvalidAction("action is a dict, but not an assistant message in OpenAI's shape")
        return Message.from_openai(action)

    def begun(self, observation: Conversation, info: Info) -> tuple[list[dict[str, Any]], Info]:
        """The opening as dicts."""
        return [message.to_openai() for message in observation], info

    def played(self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Info) -> Result:
        """The conversation as dicts."""
        return [message.to_openai() for message in observation], reward, terminated, truncated, info


class MaxTurns(TextWrapper):
    """At most `turns` replies per episode; what the environment itself allows if that is less. Truncates with
    `stop_reason` max_turns."""

    def __init__(self, env: gymnasium.Env[Any, Any], turns: int) -> None:
        super().__init__(env, turns=turns)
        inner = self._text_env()
        inner.max_turns = min(inner.max_turns, _at_least("turns", turns, 1))


class ToolBudget(TextWrapper):
    """At most `calls` tool calls per episode; what the environment itself allows if that is less. The call after the
    last one is not made and truncates with `stop_reason` tool_budget."""

    def __init__(self, env: gymnasium.Env[Any, Any], calls: int) -> None:
        super().__init__(env, calls=calls)
        inner, calls = self._text_env(), _at_least("calls", calls, 0)
        inner.max_tool_calls = calls if inner.max_tool_calls is None else min(inner.max_tool_calls, calls)


class TokenBudget(TextWrapper):
    """At most `tokens` tokens of conversation; an episode that goes on beyond them is truncated with `stop_reason`
    token_budget. The reply that passes the limit is still played, and counts if it ends the episode.

    `info["tokens"]` says how many there are.

    Arguments
        tokens: the budget, of all messages together.
        count: "package.module:function" that counts the tokens of a text; by default four bytes are one token. Text
            environments hold no tokenizer, so bring the one of your model.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], tokens: int, count: str = "espl_envs.core.wrappers:rough_tokens"
    ) -> None:
        super().__init__(env, tokens=tokens, count=count)
        self._limit = _at_least("tokens", tokens, 1)
        self._inner = self._text_env()
        self._count = _function("count", count)
        self._counted: Conversation = ()
        self._total = 0

    def begun(self, observation: Any, info: Info) -> tuple[Any, Info]:
        """The opening, and its tokens."""
        self._counted, self._total = (), 0
        return observation, {**info, "tokens": self._tokens()}

    def played(self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Info) -> Result:
        """The step, truncated if the budget is used up."""
        info["tokens"] = self._tokens()
        if info["tokens"] >= self._limit and not (terminated or truncated):
            self._inner.cut("token_budget")
            truncated, info["stop_reason"] = True, "token_budget"
        return observation, reward, terminated, truncated, info

    def _tokens(self) -> float:
        """Only messages that are new are counted, so that an episode costs what its text costs."""
        messages = self._inner.messages
        for message in messages[len(self._counted) :]:
            self._total += self._count(message.content) + sum(self._count(c.arguments) for c in message.tool_calls)
        self._counted = messages
        return float(self._total)


class TranscriptRecorder(TextWrapper):
    """Appends every episode to a file, one line of JSON each: messages in OpenAI's shape, rewards, the last info.

    An episode that is left before its end is written at the next reset or close, with `over` false.

    Arguments
        path: the file; folders are made. Several environments and processes may share it.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], path: str) -> None:
        super().__init__(env, path=str(path))
        self._inner = self._text_env()
        self._path = Path(path)
        self._episode: dict[str, Any] | None = None

    def choose(self, seed: int | None, options: Options) -> Options:
        """Writes down what was left unfinished."""
        self._write(over=False)
        return super().choose(seed, options)

    def begun(self, observation: Any, info: Info) -> tuple[Any, Info]:
        """Begins a record."""
        self._episode = {"rewards": [], "info": info, "messages": self._inner.messages}
        return observation, info

    def played(self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Info) -> Result:
        """Adds to the record; writes it down at the end."""
        if self._episode is not None:
            self._episode.update(info=info, messages=self._inner.messages)
            self._episode["rewards"].append(reward)
            if terminated or truncated:
                self._write(over=True)
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Close the environment; an unfinished episode is written down."""
        self._write(over=False)
        super().close()

    async def aclose(self) -> None:
        """The asynchronous form of `close`."""
        self._write(over=False)
        await super().aclose()

    def _write(self, over: bool) -> None:
        record, self._episode = self._episode, None
        if record is None:
            return
        messages = [message.to_openai() for message in record["messages"]]
        row = {**record, "messages": messages, "return": sum(record["rewards"]), "over": over}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


class SystemPromptPool(TextWrapper):
    """Every episode gets one of several system prompts, unless reset is told which (`options["system_prompt"]`).

    `info["prompt_index"]` says which one it was, -1.0 for one from outside.

    Arguments
        prompts: the system prompts.
        order: "draw" (each time at random, decided by the last seed) or "cycle" (one after the other; a seed begins
            anew).
    """

    def __init__(self, env: gymnasium.Env[Any, Any], prompts: Sequence[str], order: str = "draw") -> None:
        super().__init__(env, prompts=list(prompts), order=order)
        self._text_env()
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise EsplError("prompts is expected to be a list of one or more texts")
        if order not in ("draw", "cycle"):
            raise EsplError(f"order is {order!r}, expected 'draw' or 'cycle'")
        self._prompts = tuple(prompts)
        self._order = order
        self._random = np.random.default_rng()
        self._next = 0
        self._index = -1

    def choose(self, seed: int | None, options: Options) -> Options:
        """Adds the system prompt."""
        if seed is not None:
            self._random, self._next = np.random.default_rng([0x50524F, seed]), 0
        if "system_prompt" in options:
            self._index = -1
            return options
        if self._order == "draw":
            self._index = int(self._random.integers(len(self._prompts)))
        else:
            self._index, self._next = self._next % len(self._prompts), self._next + 1
        return {**options, "system_prompt": self._prompts[self._index]}

    def begun(self, observation: Any, info: Info) -> tuple[Any, Info]:
        """Says which prompt it is."""
        return observation, {**info, "prompt_index": float(self._index)}

    def played(self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Info) -> Result:
        """Says which prompt it is."""
        return observation, reward, terminated, truncated, {**info, "prompt_index": float(self._index)}


def rough_tokens(text: str) -> int:
    """Tokens of a text at four bytes each, rounded up: an estimate for budgets, not for bills."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


def _note_reset(env: Any, awaited: Any) -> None:
    """Tell the layers that were stepped over: they refuse to render before a reset."""
    while env is not awaited:
        if isinstance(env, OrderEnforcing):
            env._has_reset = True
        env = env.env


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise EsplError(f"{name} is {value}, expected at least {least}")
    return value


def _function(name: str, path: str) -> Callable[[str], int]:
    module, _, attribute = path.partition(":")
    try:
        found: Callable[[str], int] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as problem:
        raise EsplError(f"{name} is {path!r}, expected 'package.module:function': {problem}") from problem
    return found
