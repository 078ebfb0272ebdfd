"""Blocking calls off the event loop, in threads that nobody waits for.

Python cannot end a thread. A call that never returns is given up: its thread is left behind as a daemon, everybody else
goes on with others, and the process still ends when it is done (the threads of `concurrent.futures` would hold it).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Call = tuple[Callable[[], Any], "asyncio.Future[Result]"]
Result = tuple[Any, BaseException | None]


class Threads:
    """As many threads as calls are under way; each is used again when its call has returned."""

    def __init__(self) -> None:
        self._idle: list[_Thread] = []

    async def run(self, call: Callable[[], Any]) -> Any:
        """What `call` returns or raises; whatever is no Exception (SystemExit, say) is raised as it is. Cancelling
        gives the call up."""
        loop = asyncio.get_running_loop()
        thread = self._idle.pop() if self._idle else _Thread(loop)
        future: asyncio.Future[Result] = loop.create_future()
        thread.calls.put((call, future))
        value, problem = await future
        self._idle.append(thread)
        if problem is not None:
            raise problem
        return value

    def close(self) -> None:
        """End the threads that are idle."""
        while self._idle:
            self._idle.pop().calls.put(None)


class _Thread:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.calls: SimpleQueue[Call | None] = SimpleQueue()
        self._loop = loop
        threading.Thread(target=self._work, name="espl-agent", daemon=True).start()

    def _work(self) -> None:
        while (task := self.calls.get()) is not None:
            call, future = task
            result: Result
            try:
                result = call(), None
            except BaseException as problem:
                result = None, problem
            with contextlib.suppress(RuntimeError):     # the loop is closed: the process is about to end
                self._loop.call_soon_threadsafe(self._deliver, future, result)

    def _deliver(self, future: asyncio.Future[Result], result: Result) -> None:
        if future.done():
            self.calls.put(None)                        # given up meanwhile: nobody will call here again
        else:
            future.set_result(result)
