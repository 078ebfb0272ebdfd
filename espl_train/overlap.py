"""What happens at once in an iteration: branches of it on the environments' loop, and what the calling thread does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_train.config import Config
from espl_train.engines.base import Engine

T = TypeVar("T")
GRACE = 30.0      # seconds that a cancelled branch may take to clean up


def overlaps(config: Config, engine: Engine, device: str) -> bool:
    """Whether reflection runs while the learner works. Raises EsplError where it is asked for and cannot be.

    `auto` leaves it on GPUs: a step of decoding leaves most of a GPU idle, and an update waits for nothing. On a CPU
    both are made of the same threads, and two teams of them on the same cores slow each other down. Where a server
    reflects, there is nothing to share.
    """
    check(config, engine.concurrent)
    beneficial = elsewhere(config) or (engine.concurrent and not device.startswith("cpu"))
    return config.overlap == "on" or (config.overlap == "auto" and beneficial)


def elsewhere(config: Config) -> bool:
    """Whether breeding leaves the engine alone: a server reflects, and nobody plays trials."""
    evolution = config.evolution
    tried = evolution.prune_probability or evolution.acceptance != "none"
    return evolution.reflector == "endpoint" and not tried


def check(config: Config, concurrent: bool) -> None:
    """Raises EsplError where overlap is asked for and the engine is not `concurrent`."""
    if config.overlap == "on" and not concurrent and not elsewhere(config):
        raise EsplError(
            f"overlap is 'on', but the engine '{config.engine.kind}' cannot sample while the learner works under these "
            "settings (learner.mode full shares its weights, engine.pause puts vLLM to sleep): use --overlap auto"
        )


@contextmanager
def beside(coroutine: Coroutine[Any, Any, T]) -> Iterator[Future[T]]:
    """Run `coroutine` while the body runs; yields the future of its result, which the end of the body waits for.

    Whatever ends the body (an interrupt too) cancels the coroutine, waits for its clean-up and is raised, alone. What
    the coroutine raises is raised when the body is over: it cannot end an update that is under way.
    """
    ended = threading.Event()

    async def whole() -> T:
        try:
            return await coroutine
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(whole(), background.loop())
    try:
        yield future
        future.result()
    except BaseException:
        if future.cancel():
            ended.wait(GRACE)
        raise


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all of them, in their order. What fails first ends the others, and is raised alone."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
