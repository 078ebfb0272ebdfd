"""Plays the episodes of an evaluation, hundreds at once on one event loop, and writes each down as it ends.

Everything random is keyed by the evaluation's seed and the episode's key, so neither the order of events nor a resume
changes what is played. Episodes are begun sample by sample: a run that ends early has been through every task. What the
environment's infrastructure does wrong is played again in a fresh environment and then noted as a fault, without a
score. A fault of the agent's own infrastructure has been tried again where it happened.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.messages import Conversation
from espl_envs.core.randomness import derive
from espl_envs.evaluate.agents import Agent, AgentFailed, AgentFault, ContextExceeded, Reply, Seat, Unpaid, sentence
from espl_envs.evaluate.config import EvalConfig
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.plan import Arena
from espl_envs.evaluate.purse import Halted, Purse, Tab
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome, TurnUsage
from espl_envs.evaluate.scribe import Scribe

T = TypeVar("T")

STEP_S = 900.0              # longer than any tool, test or lease may take: an environment that hangs is a fault
MOST_FAULTS_IN_A_ROW = 25


class Watcher(Protocol):
    """Whoever shows how it goes."""

    def paid(self, usage: TurnUsage) -> None:
        """A model call was made, in whatever episode."""
        ...

    def finished(self, episode: Episode) -> None:
        """An episode was written down."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Episodes at once; attempts after the first where an environment fails; money for the whole run directory."""

    concurrency: int
    retries: int = 2
    max_cost: float | None = None


@dataclass(slots=True)
class _Play:
    """One attempt at an episode, as far as it has come."""

    messages: Conversation = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    reward: float = 0.0
    turns: list[TurnUsage] = field(default_factory=list)
    over: bool = False
    terminated: bool = False
    reference: str | None = None
    cut_off: bool = False               # the last reply ended because it was too long

    def said(self, reply: Reply, seconds: float) -> None:
        """The agent's next reply, not yet played."""
        calls = reply.calls or (TurnUsage(None, None, 0, seconds, None),)
        self.turns += calls
        self.cut_off = calls[-1].finish_reason == "length"

    def stepped(self, step: tuple[Conversation, float, bool, bool, Mapping[str, Any]]) -> None:
        """What came of it. Raises EnvironmentFault where the environment only notes one."""
        before = float(self.info.get("tool_calls", 0.0))
        self.messages, reward, self.terminated, truncated, self.info = step
        if self.info.get("fault"):
            raise EnvironmentFault(f"the environment notes a fault ({self.info.get('stop_reason')})")
        self.reward += float(reward)
        self.over = self.terminated or truncated
        made = int(self.info.get("tool_calls", 0.0) - before)
        self.turns[-1] = replace(self.turns[-1], tool_calls=made)

    def outcome(self) -> Outcome:
        """What the environment made of an episode that it ended. A reply that was cut off for its length before an
        answer could be read is a budget that ran out."""
        if not self.terminated:
            return Outcome.TRUNCATED
        if self.info.get("stop_reason") != "format":
            return Outcome.ANSWERED
        return Outcome.TRUNCATED if self.cut_off else Outcome.NO_ANSWER


class Runner:
    """Plays what is missing in `directory`, in `arenas` (by id). `watcher` is told as it happens. `secret` is what no
    file may hold, whoever says it."""

    def __init__(
        self, directory: RunDirectory, arenas: Sequence[Arena], agent: Agent, limits: Limits, watcher: Watcher,
        secret: Secret | None = None,
    ) -> None:
        self.directory, self.config, self.agent, self.limits = directory, directory.config, agent, limits
        self.purse = Purse(limits.max_cost)
        self._arenas = {(arena.config.id, arena.config.split): arena for arena in arenas}
        self._watcher, self._secret = watcher, secret or Secret()
        self._scribe = Scribe(directory)
        self._faults_in_a_row = self._stopped = 0

    async def run(self) -> None:
        """Play until nothing is missing. Raises Halted where it ends early, and whatever EsplError ends it; what was
        played is written down."""
        if self.limits.max_cost is not None:
            self._settle()
        queue = iter(order(self.config, self.directory.missing()))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.limits.concurrency):
                    group.create_task(self._work(queue))
        except BaseExceptionGroup as problems:
            raise _first(problems) from None
        finally:
            await self._scribe.aclose()
            for arena in self._arenas.values():
                await arena.aclose()
        if self._stopped or next(queue, None) is not None:
            raise Halted(self.purse.exhausted)

    def _settle(self) -> None:
        """What earlier sessions cost counts, too."""
        self.purse.spent = self.directory.spent
        for episode in self.directory.episodes(transcripts=False):
            if episode.outcome is not Outcome.FAULT:
                self.purse.finished(episode.cost or 0.0)

    async def _work(self, queue: Iterator[EpisodeKey]) -> None:
        """One place at the table: play episodes until none is left, or none can be paid for."""
        stopped = False
        while not stopped and await self.purse.begin():
            cost = None
            try:
                if (key := next(queue, None)) is None:
                    return
                episode, stopped = await self._episode(key)
                cost = None if episode.outcome is Outcome.FAULT else episode.cost
            finally:
                self.purse.end(cost)
            self._stopped += stopped
            if stopped and not episode.turns:
                continue                                # nothing came of it, nor was anything paid for it
            episode = _without(self._secret, episode)
            await self._scribe.write(episode)
            self._watcher.finished(episode)
            if not stopped:
                self._count_faults(episode)

    def _count_faults(self, episode: Episode) -> None:
        self._faults_in_a_row = self._faults_in_a_row + 1 if episode.outcome is Outcome.FAULT else 0
        if self._faults_in_a_row >= MOST_FAULTS_IN_A_ROW:
            raise Halted(f"{self._faults_in_a_row} episodes in a row came to nothing; the last one: {episode.error}")

    async def _episode(self, key: EpisodeKey) -> tuple[Episode, bool]:
        """Play one, and tell whether it was stopped because the money is spent."""
        began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="milliseconds")
        attempt = 0
        while True:
            attempt += 1
            play, stopped = _Play(), False
            try:
                outcome, error = await self._attempt(key, play)
            except Unpaid as stop:
                outcome, error, stopped = Outcome.FAULT, f"stopped: {stop}", True
            except EnvironmentFault as fault:
                if attempt <= self.limits.retries and not isinstance(fault, AgentFault):
                    continue
                outcome, error = Outcome.FAULT, sentence(fault) if not str(fault) else " ".join(str(fault).split())
            return _record(key, play, outcome, error, attempt, time.monotonic() - began, started), stopped

    async def _attempt(self, key: EpisodeKey, play: _Play) -> tuple[Outcome, str | None]:
        """One attempt in an environment that is used again unless it failed."""
        arena = self._arenas[key.env, key.split]
        env = arena.take()
        try:
            outcome = await self._play(key, play, arena, env)
            if not play.over:
                await env.aclose()
        except BaseException:
            await env.aclose()
            raise
        arena.give(env)
        return outcome

    async def _play(self, key: EpisodeKey, play: _Play, arena: Arena, env: Any) -> tuple[Outcome, str | None]:
        error = None
        options: dict[str, Any] = {"task": key.task}
        if self.config.system_prompts:
            options["system_prompt"] = self.config.system_prompts[key.system_prompt]
        seed, parts = self.config.seed, (key.env, key.split, key.task, key.sample, key.system_prompt)
        play.messages, play.info = await _of_env(
            env.areset(seed=derive(seed, "environment", *parts), options=options)
        )
        inner = env.unwrapped
        play.reference = inner.task.answer
        tab = Tab(self.purse, self._watcher.paid)
        seat = Seat(key, derive(seed, "agent", *parts), inner.task.id, inner.tools, arena.native, inner, tab)
        try:
            async with self.agent.sit(seat) as act:
                while not play.over:
                    if self.purse.empty:
                        raise Unpaid(self.purse.exhausted)
                    asked = time.monotonic()
                    try:
                        reply = await act(play.messages)
                    except (AgentFailed, AgentFault, ContextExceeded, Unpaid) as problem:
                        play.turns += problem.calls
                        tab.charge(problem.calls)
                        raise
                    play.said(reply, time.monotonic() - asked)
                    if not reply.calls and self.purse.limit is not None:
                        self.purse.pay(None)            # nobody says what that took
                    tab.charge(reply.calls)
                    play.stepped(await _of_env(env.astep(reply.message)))
        except AgentFailed as failed:
            error = str(failed)
            if not play.over:
                return Outcome.AGENT_ERROR, error
        except ContextExceeded as exceeded:
            return Outcome.TRUNCATED, str(exceeded)
        return play.outcome(), error


def order(config: EvalConfig, keys: Sequence[EpisodeKey]) -> list[EpisodeKey]:
    """The keys in the order in which they are played: every task once, under every prompt, before any a second time."""
    place = {(env.id, env.split): number for number, env in enumerate(config.envs)}
    return sorted(keys, key=lambda key: (key.sample, key.system_prompt, place[key.env, key.split], key.task))


async def _of_env(step: Awaitable[T]) -> T:
    """A step of an environment. What it raises that is no EsplError is its own mistake: a fault, not the agent's."""
    try:
        async with asyncio.timeout(STEP_S) as limit:
            return await step
    except EsplError:
        raise
    except Exception as problem:
        if isinstance(problem, TimeoutError) and limit.expired():
            raise EnvironmentFault(f"the environment did not come back within {STEP_S:g} s") from problem
        raise EnvironmentFault(f"the environment raised {sentence(problem)}") from problem


def _first(problems: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one that a person should read: of several that came at once, one that explains itself."""
    leaves = [leaf for problem in problems.exceptions for leaf in _leaves(problem)]
    return next((leaf for leaf in leaves if isinstance(leaf, EsplError)), leaves[0])


def _leaves(problem: BaseException) -> Iterator[BaseException]:
    if isinstance(problem, BaseExceptionGroup):
        for inner in problem.exceptions:
            yield from _leaves(inner)
    else:
        yield problem


def _record(
    key: EpisodeKey, play: _Play, outcome: Outcome, error: str | None, attempts: int, seconds: float, started: str
) -> Episode:
    scored = {Outcome.FAULT: None, Outcome.AGENT_ERROR: 0.0}
    info = play.info
    return Episode(
        key=key,
        task_id=str(info.get("task_id", "")),
        task_hash=str(info.get("task_hash", "")),
        outcome=outcome,
        score=scored.get(outcome, float(info.get("score", play.reward))),
        reward=None if outcome is Outcome.FAULT else play.reward,
        stop_reason=_stop_reason(play, outcome),
        answer=str(info["answer"]) if info.get("answer") else None,
        reference=play.reference,
        info=info,
        messages=play.messages,
        turns=tuple(play.turns),
        error=error,
        attempts=attempts,
        seconds=seconds,
        started=started,
    )


def _without(secret: Secret, episode: Episode) -> Episode:
    """The episode as it may be written down: an agent that reads the key may say it, or raise it."""
    if not secret.key or not secret.held(line := episode.to_json()):
        return episode
    said = ("answer", "error", "reference", "info", "messages", "turns")
    record = json.loads(line)
    return Episode.from_json(json.dumps({**record, **{name: secret.hidden_in(record[name]) for name in said}}))


def _stop_reason(play: _Play, outcome: Outcome) -> str:
    """The environment's word, else what ended the episode from outside."""
    outside = {Outcome.AGENT_ERROR: "agent_error", Outcome.FAULT: "fault", Outcome.TRUNCATED: "context"}
    return str(play.info.get("stop_reason") or "") or outside.get(outcome, "")
