"""Plays many episodes at once: environments on one side, an engine on the other, exact tokens in between.

All randomness of an episode comes from the run's seed and its `RolloutKey`, so neither the order of events nor who
else plays changes it. What fails in the infrastructure is played again in a fresh environment under the next attempt's
key; what keeps failing is returned as `StopReason.FAULT`, without a reward. Limits end episodes, they do not fail them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from espl_envs.core import background
from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.messages import Conversation, Message
from espl_train.chat import Chat
from espl_train.config import RolloutConfig
from espl_train.engines.base import Engine, EngineError, Request
from espl_train.player import Player
from espl_train.randomness import derive
from espl_train.records import Rollout, RolloutKey, StopReason, Turn

Progress = Callable[[int, int], None]      # episodes done, tokens sampled so far
ENDED = (StopReason.ANSWER, StopReason.TRUNCATED)    # by the environment; whatever else ends an episode cuts it off


@dataclass(frozen=True, slots=True)
class Job:
    """One episode to play: who, on what, the text of the system prompt, and about how many tokens it will sample (0:
    unknown)."""

    key: RolloutKey
    system_prompt: str
    expected: int = 0


@dataclass(slots=True)
class _Episode:
    """What has happened so far; a limit or the deadline may end it at any time."""

    key: RolloutKey
    turns: list[Turn] = field(default_factory=list)
    messages: Conversation = ()
    reward: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def sampled(self) -> int:
        return sum(len(turn.tokens) for turn in self.turns)


@dataclass(slots=True)
class _Batch:
    """One call of `collect`: its settings, and its counts so far."""

    jobs: Sequence[Job]
    policy: int | None
    temperature: float
    top_p: float
    progress: Progress | None
    earlier: Sequence[Rollout]
    results: dict[int, Rollout] = field(default_factory=dict)
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class Collector:
    """Collects rollouts of one environment. `make_env` is called as often as there are episodes in flight; environments
    are used again until one of them fails."""

    def __init__(
        self, make_env: Callable[[], Any], chat: Chat, engine: Engine, config: RolloutConfig, seed: int
    ) -> None:
        self.chat, self.engine, self.config, self.seed = chat, engine, config, seed
        self._make_env = make_env
        self._idle: list[Player] = []
        chat.check(())

    def collect(
        self, jobs: Sequence[Job], policy: int | None, temperature: float | None = None,
        progress: Progress | None = None, top_p: float | None = None, earlier: Sequence[Rollout] = (),
    ) -> list[Rollout]:
        """Play all `jobs`, those that are expected to be long first; the rollouts come in the order of the jobs. It
        blocks; `acollect` is the asynchronous form.

        `policy` None is the base model. An interrupt ends every episode and closes its environment before it is
        raised. Raises EsplError where too many episodes fail, those of the same step that were played `earlier`
        included.
        """
        return background.run_through(self.acollect(jobs, policy, temperature, progress, top_p, earlier))

    async def acollect(
        self, jobs: Sequence[Job], policy: int | None, temperature: float | None = None,
        progress: Progress | None = None, top_p: float | None = None, earlier: Sequence[Rollout] = (),
    ) -> list[Rollout]:
        """See `collect`."""
        batch = _Batch(
            jobs, policy, self.config.temperature if temperature is None else temperature,
            self.config.top_p if top_p is None else top_p, progress, earlier,
        )
        queue = iter(sorted(enumerate(jobs), key=lambda numbered: -numbered[1].expected))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.config.concurrency, len(jobs))):
                    group.create_task(self._work(batch, queue))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [batch.results[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Close all environments. Calling it again is fine."""
        players, self._idle = self._idle, []
        if players:
            background.run_through(_close(players))

    async def _work(self, batch: _Batch, queue: Iterator[tuple[int, Job]]) -> None:
        """One place at the table: play episodes until none is left."""
        self.engine.join(1)
        try:
            for index, job in queue:
                rollout = await self._episode(batch, job)
                batch.results[index] = rollout
                batch.tokens += rollout.sampled_tokens
                self._count(batch, rollout)
                if batch.progress is not None:
                    batch.progress(len(batch.results), batch.tokens)
        finally:
            self.engine.leave()

    def _count(self, batch: _Batch, rollout: Rollout) -> None:
        if not rollout.faulted:
            return
        batch.faults[str(rollout.info.get("error", f"rollout.deadline_s = {self.config.deadline_s:g} ran out"))] += 1
        count = batch.faults.total() + sum(r.faulted for r in batch.earlier)
        total = len(batch.jobs) + len(batch.earlier)
        if count > self.config.max_fault_fraction * total:
            reason, times = batch.faults.most_common(1)[0]
            raise EsplError(
                f"{count} of {total} episodes have no reward, more than rollout."
                f"max_fault_fraction = {self.config.max_fault_fraction:g} allows. Most frequent ({times}): {reason}"
            )

    async def _episode(self, batch: _Batch, job: Job) -> Rollout:
        started, reason = time.monotonic(), ""
        for attempt in range(self.config.retries + 1):
            episode = _Episode(replace(job.key, attempt=attempt))
            player = self._idle.pop() if self._idle else Player(self._make_env())
            try:
                stop = await self._within_deadline(batch, job, episode, player)
            except (EnvironmentFault, EngineError) as fault:
                reason = f"{type(fault).__name__}: {fault}"
                await player.close()
            except BaseException:
                await player.close()
                raise
            else:
                if stop not in ENDED:
                    await player.leave()
                self._idle.append(player)
                return self._rollout(batch, episode, stop, started)
        known = {"error": reason, "task_id": episode.info.get("task_id", "")}
        lost = _Episode(episode.key, reward=math.nan, info=known)
        return self._rollout(batch, lost, StopReason.FAULT, started)

    def _rollout(self, batch: _Batch, episode: _Episode, stop: StopReason, started: float) -> Rollout:
        return Rollout(
            key=episode.key,
            task_id=str(episode.info.get("task_id", "")),
            turns=tuple(episode.turns),
            messages=episode.messages,
            reward=episode.reward,
            stop=stop,
            policy=batch.policy or 0,
            info=episode.info,
            seconds=time.monotonic() - started,
        )

    async def _within_deadline(self, batch: _Batch, job: Job, episode: _Episode, player: Player) -> StopReason:
        session = "/".join(map(str, ("base" if batch.policy is None else batch.policy, *astuple(episode.key))))
        try:
            async with asyncio.timeout(self.config.deadline_s) as deadline:
                return await self._play(batch, job, episode, player, session)
        except TimeoutError:
            if not deadline.expired():
                raise
            return StopReason.DEADLINE
        finally:
            self.engine.release(session)

    async def _play(
        self, batch: _Batch, job: Job, episode: _Episode, player: Player, session: str
    ) -> StopReason:
        """Turn by turn until the environment or a limit ends the episode."""
        key, limits = astuple(episode.key), self.config
        episode.messages, episode.info = await player.reset(
            derive(self.seed, "environment", *key), {"task": job.key.task, "system_prompt": job.system_prompt}
        )
        if player.tools:
            self.chat.check(("tool",))
        context, fork = self.chat.open(episode.messages), False
        tokens = list(context)
        while len(tokens) < self.engine.context_length:
            room = min(self.engine.context_length - len(tokens), limits.max_total_tokens - episode.sampled)
            sample = await self.engine.sample(Request(
                tokens=tuple(tokens),
                max_new=min(limits.max_new_tokens, room),
                seed=derive(self.seed, "sample", *key, len(episode.turns)),
                stop_ids=self.chat.stop_ids,
                temperature=batch.temperature,
                top_p=batch.top_p,
                policy=batch.policy,
                session=session,
                expected=max(job.expected - episode.sampled, 0),
            ))
            episode.turns.append(Turn(tuple(context), sample.tokens, sample.logprobs, fork))
            said = len(episode.messages) + 1
            ended = await self._step(episode, player, self.chat.text(sample.tokens))
            if ended is not None:
                return ended
            if len(episode.turns) >= limits.max_turns:
                return StopReason.MAX_TURNS
            if episode.sampled >= limits.max_total_tokens:
                return StopReason.MAX_TOKENS
            before, new = episode.messages[:said], episode.messages[said:]
            context, fork = self.chat.follow(before, new, sampled=sample.tokens)
            tokens = list(context) if fork else [*tokens, *sample.tokens, *context]
        return StopReason.CONTEXT

    async def _step(self, episode: _Episode, player: Player, reply: str) -> StopReason | None:
        before = episode.messages
        messages, reward, terminated, truncated, info = await player.step(reply)
        if messages[: len(before) + 1] != (*before, Message("assistant", reply)):
            raise EsplError("the environment changed its conversation: it may only append to it")
        episode.messages, episode.info = messages, info
        episode.reward += reward
        if terminated:
            return StopReason.ANSWER
        return StopReason.TRUNCATED if truncated else None


async def _close(players: Sequence[Player]) -> None:
    for player in players:
        await player.close()
