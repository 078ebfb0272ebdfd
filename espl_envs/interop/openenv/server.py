"""A text environment as OpenEnv's `Environment`: one instance per session, scores untouched.

An action is a reply (`content`, and `tool_calls` in OpenAI's shape), an observation is what the agent has not seen yet:
the opening after reset, then tool results and what the partner says. `metadata` is our flat `info`. Broken
infrastructure is an error of the request, never a reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from openenv.core.env_server import Action, Environment, Observation, State
from openenv.core.env_server.types import EnvironmentMetadata
from pydantic import Field

from espl_envs import registry
from espl_envs.core.env import TextEnv
from espl_envs.core.messages import Conversation, Message
from espl_envs.core.tasks import Task


class Reply(Action):
    """What the agent says."""

    content: str = Field(default="", description="The assistant's text, verbatim")
    tool_calls: list[dict[str, Any]] = Field(default_factory=list, description="Tool calls in OpenAI's shape")


class View(Observation):
    """What the agent has not seen yet."""

    messages: list[dict[str, Any]] = Field(default_factory=list, description="New messages in OpenAI's shape")
    tools: list[dict[str, Any]] = Field(default_factory=list, description="The tools, in OpenAI's shape; after reset")
    truncated: bool = Field(default=False, description="The episode is done because a budget ran out")


class Standing(State):
    """Which episode it is."""

    env: str = ""
    split: str = ""
    task_id: str = ""


def public_name(env_id: str) -> str:
    """The id as a part of an address."""
    return env_id.rpartition(":")[2].rpartition("/")[2]


class Served(Environment):
    """`env_id` with these arguments. `reset` takes `seed`, or `index` or `task_id`; and `split`, `system_prompt`."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, env_id: str, split: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self._id, self._default, self._split, self._kwargs = env_id, split, split, dict(kwargs)
        self._envs: dict[str, TextEnv] = {}
        self._episode = ""
        self._steps = 0
        self._seen = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **wanted: Any) -> View:
        """Start an episode."""
        split = wanted.pop("split", None) or self._default
        if "index" in wanted:
            wanted["task"] = wanted.pop("index")
        env = self._env(split)
        self._split, self._episode, self._steps, self._seen = split, episode_id or "", 0, 0
        messages, info = env.reset(seed=seed, options=wanted)
        return View(messages=self._new(messages), tools=[tool.to_openai() for tool in env.tools], metadata=info)

    def step(self, action: Reply, timeout_s: float | None = None, **_: Any) -> View:
        """Play one reply. `timeout_s` is the environment's affair (its argument `deadline`)."""
        del timeout_s
        reply = Message.from_openai({"role": "assistant", **action.model_dump(exclude={"metadata"})})
        messages, reward, terminated, truncated, info = self._env(self._split).step(reply)
        self._steps += 1
        over = terminated or truncated
        return View(messages=self._new(messages), reward=reward, done=over, truncated=truncated, metadata=info)

    @property
    def state(self) -> Standing:
        """Which episode it is, and how far."""
        task = self._envs[self._split].task if self._split in self._envs else None
        return Standing(
            episode_id=self._episode or None, step_count=self._steps, env=self._id, split=self._split,
            task_id=task.id if task else "",
        )  # fmt: skip

    def get_metadata(self) -> EnvironmentMetadata:
        """The environment's documentation page."""
        page = registry.describe(self._id)
        summary = (type(self._env(self._split)).__doc__ or "").strip().partition("\n")[0]
        return EnvironmentMetadata(name=self._id, description=summary, readme_content=page, version=version("espl"))

    def close(self) -> None:
        """Close what is open."""
        while self._envs:
            self._envs.popitem()[1].close()

    def list_splits(self) -> list[str]:
        """The splits that the family has."""
        return list(self._env(self._split).splits)

    def num_tasks(self, split: str) -> int:
        """How many tasks a split has."""
        return len(self._env(split).tasks)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """One task without its answer. Raises IndexError outside the split."""
        return _shown(self._env(split).tasks[index], index)

    def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[dict[str, Any]]:
        """Tasks as a slice takes them."""
        tasks = self._env(split).tasks
        return [_shown(tasks[index], index) for index in range(len(tasks))[start:stop]]

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """All tasks of a split."""
        return self.get_task_range(split)

    def _env(self, split: str) -> TextEnv:
        if split not in self._envs:
            env: Any = registry.make(self._id, split=split, **self._kwargs).unwrapped
            self._envs[split] = env
        return self._envs[split]

    def _new(self, messages: Conversation) -> list[dict[str, Any]]:
        new: Sequence[Message] = messages[self._seen :]
        self._seen = len(messages)
        return [message.to_openai() for message in new if message.role != "assistant"]


def _shown(task: Task, index: int) -> dict[str, Any]:
    return {"id": task.id, "index": index, "split": task.split, "hash": task.hash, "question": task.question}
