"""Our environments as a verifiers taskset (extra `verifiers`): its harnesses and traces, our episodes and rewards.

    vf-eval espl-verifiers --env.taskset.env espl/GSM8K-v0 --env.taskset.split test

The environment plays the run's user: it steps in this process, beside its sandboxes and graders, and what it says comes
back as user turns, results of tools too (they are called by `<tool_call>`, as the system message explains). The reward
of the episode, and nothing else, is the trace's reward `espl`; an episode that verifiers' own limits end has what the
environment gave until then, which is 0. A fault of the infrastructure is an error of the episode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from espl_envs.core.errors import MissingExtra

try:
    import verifiers.v1 as vf
except ImportError as missing:
    raise MissingExtra("verifiers", f"a verifiers taskset (no module {missing.name})") from missing

from pydantic import Field

from espl_envs.core import background
from espl_envs.core.messages import Conversation, Message
from espl_envs.evaluate import plan
from espl_envs.evaluate.wire import to_wire

__all__ = ["EsplEnv", "EsplTaskset"]


class EsplTasksetConfig(vf.TasksetConfig):
    """Which environment, as for `espl-eval`."""

    env: str = ""
    """Its id, as in espl/GSM8K-v0."""
    split: str | None = None
    """test where it has one, else validation, else train."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the environment."""
    limit: int | None = None
    """The first so many tasks only."""


class EsplData(vf.TaskData):
    """A task by its place; the reference answer stays with the environment."""

    env: str
    split: str
    arguments: dict[str, Any]
    task: int
    task_hash: str


class EsplTask(vf.Task[EsplData]):
    """One task. Its key is the hash of its content."""

    @property
    def key(self) -> str:
        return f"{self.data.name}:{self.data.task_hash}"


class EsplTaskset(vf.Taskset[EsplTask, EsplTasksetConfig]):
    """The tasks of one split."""

    def load(self) -> Iterator[EsplTask]:
        """Each task with its opening, in order."""
        config = self.config
        arena = plan.arena(config.env, config.arguments, config.split, config.limit)
        env = arena.example
        try:
            for index in range(arena.config.tasks):
                opening, info = env.reset(options={"task": index})
                system, question = _opening(opening)
                yield EsplTask(
                    EsplData(
                        name=info["task_id"], prompt=question, system_prompt=system, env=config.env,
                        split=arena.config.split, arguments=dict(arena.config.kwargs), task=index,
                        task_hash=info["task_hash"],
                    ),
                    config.task,
                )  # fmt: skip
        finally:
            env.close()


class EsplEnvConfig(vf.EnvConfig):
    """One seat: who plays."""

    player: vf.AgentConfig = vf.AgentConfig.model_validate(
        {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    )


class EsplEnv(vf.Env[EsplEnvConfig]):
    """The environment as the user of one run."""

    async def run(self, task: EsplTask, agents: vf.Agents) -> None:
        """Play one episode and record its reward."""
        data = task.data
        env = await asyncio.to_thread(_made, data.env, data.split, data.arguments)
        try:
            seen, info = await _here(env.areset(options=_options(data)))
            over, reward = False, 0.0
            async with agents.player.interaction(task) as interaction:
                segment = await interaction.turn()
                while not segment.terminated:
                    conversation, reward, terminated, truncated, info = await _here(env.astep(segment.last_reply))
                    over = terminated or truncated
                    if over:
                        break
                    segment = await interaction.turn(_said(conversation[len(seen) :]))
                    seen = conversation
            interaction.trace.record_reward("espl", reward)
            interaction.trace.info["espl"] = info
        finally:
            await _here(env.aclose())


def _options(data: EsplData) -> Mapping[str, Any]:
    return {"task": data.task}


def _opening(messages: Conversation) -> tuple[str | None, str]:
    if messages[0].role == "system":
        return messages[0].content, messages[1].content
    return None, messages[0].content


def _said(new: tuple[Message, ...]) -> str:
    """What came after the reply, as one user turn."""
    return "\n\n".join(raw["content"] for raw in to_wire(tuple(m for m in new if m.role != "assistant")))


def _made(env_id: str, split: str, arguments: Mapping[str, Any]) -> Any:
    return plan.arena(env_id, arguments, split).take()


async def _here(work: Any) -> Any:
    """Await on this loop what belongs on the environments' own."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, background.loop()))
