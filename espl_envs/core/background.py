"""One event loop per process, on a daemon thread, that drives the synchronous shell of every environment.

Blocking calls work from any thread, also from inside a running loop (a notebook), because the work happens elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 0.5      # seconds after which an interrupt is noticed at the latest

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_finishing: set[asyncio.Task[Any]] = set()         # a loop itself holds no task


def loop() -> asyncio.AbstractEventLoop:
    """The shared loop; started on first use and again in a forked child, which has no threads."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="espl-envs", daemon=True).start()
        return _loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` on the shared loop and wait for its result. An interrupt cancels it.

    Raises RuntimeError when called on the shared loop itself, where waiting would never end.
    """
    shared = loop()
    if asyncio._get_running_loop() is shared:
        coroutine.close()
        raise RuntimeError("reset/step were called on the environments' own loop; await areset/astep there")
    future = asyncio.run_coroutine_threadsafe(coroutine, shared)
    try:
        return _result(future)
    except BaseException:
        future.cancel()
        raise


def finish(work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """`run`, for a clean-up that may be called from anywhere: on the shared loop (where the garbage collector may call
    it) it goes on by itself, and when the interpreter ends, the loop has ended before it and nothing is done."""
    if sys.is_finalizing():
        return
    if asyncio._get_running_loop() is not (shared := loop()):
        run(work())
        return
    task = shared.create_task(work())
    _finishing.add(task)
    task.add_done_callback(_finishing.discard)


def run_through(coroutine: Coroutine[Any, Any, T], grace: float = 30.0) -> T:
    """`run`, for work that holds things: an interrupt cancels it and waits up to `grace` seconds for its clean-up."""
    shared, ended = loop(), threading.Event()
    tasks: list[asyncio.Task[T]] = []

    def start() -> None:
        tasks.append(shared.create_task(coroutine))
        tasks[0].add_done_callback(lambda _: ended.set())

    def stop() -> None:
        if tasks:
            tasks[0].cancel()
        else:
            coroutine.close()
            ended.set()

    try:
        shared.call_soon_threadsafe(start)
        while not ended.wait(PATIENCE):
            pass
    except BaseException:
        shared.call_soon_threadsafe(stop)
        ended.wait(grace)
        raise
    return tasks[0].result()


def _result(future: Future[T]) -> T:
    """What `future` comes to. A signal that arrives in the instant before a thread begins to wait does not end the
    wait: so nobody waits longer than `PATIENCE` without looking up.
    """
    while True:
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            if future.done():
                return future.result()


def _forget() -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
