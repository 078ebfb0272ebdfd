"""Grade the episodes of a run again with the environments and graders of today, offline, from their transcripts.

The result is a run of its own beside the old one (`<run>-regraded`), so that summary, comparison and report work on it;
the old one is never touched. An environment without tools plays the stored replies once more, which covers games and
whatever the environment says in between; with tools, the final answer alone is graded, since calls are not made twice.
What depends on more than the text (the state of a box) cannot be graded again and keeps its score, with the reason.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from espl_envs import registry
from espl_envs.core import background
from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.messages import Conversation
from espl_envs.evaluate.config import EnvConfig, EvalConfig
from espl_envs.evaluate.directory import RunDirectory, RunError
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome

CHANGES = "regrade.json"
AT_ONCE = 16
CUT_OFF = "the episode was cut off before its end, and no grader can change that"


@dataclass(frozen=True, slots=True)
class Change:
    """An episode whose outcome or score is another one now."""

    key: EpisodeKey
    answer: str | None
    before: tuple[str, float | None]
    after: tuple[str, float | None]


@dataclass(frozen=True, slots=True)
class Regrading:
    """`out` is the new run; `kept` counts, by reason, the episodes that could not be graded again."""

    run: Path
    out: Path
    graded: int
    changes: tuple[Change, ...]
    kept: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run), "out": str(self.out), "graded": self.graded, "kept": dict(self.kept),
            "changes": [
                {"episode": str(c.key), "answer": c.answer, "before": c.before, "after": c.after} for c in self.changes
            ],
        }  # fmt: skip

    def __rich__(self) -> Any:
        from espl_envs.evaluate.tables import regrading_table

        return regrading_table(self)

    def __str__(self) -> str:
        from espl_envs.evaluate.tables import plain_text

        return plain_text(self)


class CannotRegrade(Exception):
    """Why an episode keeps its score."""


def regrade(run: Path, out: Path | None = None) -> Regrading:
    """Grade `run` again into a new run directory `out` (default: `<run>-regraded`, with a number where that is taken).

    Raises RunError where there is no run or `out` is taken, and EsplError where an environment cannot be made.
    """
    source = RunDirectory.read(run)
    target = out or next(path for path in _places(run) if not path.exists())
    if target.exists():
        raise RunError(f"{target} exists already: choose another place for the regraded run.")
    for env in source.config.envs:
        _ = _environment(env).tasks     # what cannot be had is missed once, before anything is written
    new = RunDirectory.create(target, source.config)
    try:
        with new:
            result = _rewritten(source, new)
    except BaseException:
        shutil.rmtree(target)
        raise
    return result


def _rewritten(source: RunDirectory, new: RunDirectory) -> Regrading:
    kept: Counter[str] = Counter()
    changes, graded = [], 0
    for batch in _batches(source.episodes()):
        found = background.run(_regraded(batch, source.config))
        for old, now in zip(batch, found, strict=True):
            if isinstance(now, str):
                kept[now] += 1
                new.append(old)
                continue
            graded += 1
            new.append(now)
            before, after = (str(old.outcome), old.score), (str(now.outcome), now.score)
            if before != after:
                changes.append(Change(old.key, now.answer, before, after))
    result = Regrading(source.path, new.path, graded, tuple(changes), dict(kept.most_common()))
    new.write_json(CHANGES, result.to_json())
    return result


async def _regraded(batch: list[Episode], config: EvalConfig) -> list[Episode | str]:
    """Each episode graded anew, or why it is not."""
    envs = {(env.id, env.split): env for env in config.envs}

    async def one(old: Episode) -> Episode | str:
        try:
            prompts = config.system_prompts
            prompt = prompts[old.key.system_prompt] if prompts else None
            return await _again(old, envs[old.key.env, old.key.split], prompt)
        except CannotRegrade as why:
            return str(why)
        except EnvironmentFault as fault:
            return f"grading failed: {fault}"

    return await asyncio.gather(*(one(old) for old in batch))


async def _again(old: Episode, config: EnvConfig, prompt: str | None) -> Episode:
    if old.outcome is Outcome.AGENT_ERROR:
        raise CannotRegrade("the agent failed, and no grader can change that")
    env = await asyncio.to_thread(_environment, config)
    try:
        tasks = await asyncio.to_thread(lambda: env.tasks)
        if old.key.task >= len(tasks) or (await asyncio.to_thread(lambda: tasks[old.key.task].hash)) != old.task_hash:
            raise CannotRegrade(f"{config.id} has another task in its place today")
        return await (_answer_alone(old, env) if env.tools else _replayed(old, env, prompt))
    finally:
        await env.aclose()


async def _replayed(old: Episode, env: TextEnv, prompt: str | None) -> Episode:
    """The stored replies, said to the environment once more. What it says in between must be what it said then."""
    options = {"task": old.key.task} | ({} if prompt is None else {"system_prompt": prompt})
    messages, info = await env.areset(options=options)
    over = False
    for reply in (message for message in old.messages if message.role == "assistant"):
        if over:
            raise CannotRegrade("the environment ends the episode earlier today")
        messages, _, terminated, truncated, info = await env.astep(reply)
        over = terminated or truncated
        if _heard(messages) != _heard(old.messages)[: len(_heard(messages))]:
            raise CannotRegrade("the environment says something else today")
    if not over:
        raise CannotRegrade(CUT_OFF)
    ends: dict[str, Outcome] = {"answer": Outcome.ANSWERED, "format": Outcome.NO_ANSWER}
    outcome = ends.get(str(info["stop_reason"]), Outcome.TRUNCATED)
    return replace(
        old, outcome=outcome, score=float(info["score"]), answer=info["answer"] or None, info=info, error=None,
        stop_reason=str(info["stop_reason"]),
    )  # fmt: skip


async def _answer_alone(old: Episode, env: TextEnv) -> Episode:
    """The final answer, by the environment's grader."""
    if type(env).judge is not TextEnv.judge:
        raise CannotRegrade(f"{old.key.env} with tools is judged by what they left behind, which no transcript holds")
    if old.outcome is Outcome.TRUNCATED or not old.messages:
        raise CannotRegrade(CUT_OFF)
    last = old.messages[-1]
    answer = env.family.protocol.extract(last.content) if last.role == "assistant" else old.answer
    if answer is None:
        return replace(old, outcome=Outcome.NO_ANSWER, score=0.0, answer=None, error=None)
    verdict = await env.family.grade(env.tasks[old.key.task], answer)
    if verdict.status == "unavailable":
        raise EnvironmentFault("the grader could not judge")
    outcome = Outcome.NO_ANSWER if verdict.status == "no_answer" else Outcome.ANSWERED
    return replace(old, outcome=outcome, score=float(verdict.score), answer=verdict.extracted, error=None)


def _heard(messages: Conversation) -> list[str]:
    """What the agent was told after its first reply."""
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    return [message.content for message in messages[first:] if message.role != "assistant"]


def _environment(config: EnvConfig) -> TextEnv:
    env = registry.make(config.id, split=config.split, **config.kwargs).unwrapped
    if not isinstance(env, TextEnv):
        raise EsplError(f"{config.id} is no text environment of this package: it cannot be graded offline")
    return env


def _batches(episodes: Iterator[Episode]) -> Iterator[list[Episode]]:
    while batch := list(islice(episodes, AT_ONCE)):
        yield batch


def _places(run: Path) -> Iterator[Path]:
    """Names beside the run that are free of meaning: `<run>-regraded`, `<run>-regraded-2`, …"""
    first = run.resolve().with_name(f"{run.resolve().name}-regraded")
    return chain([first], (first.with_name(f"{first.name}-{number}") for number in count(2)))
