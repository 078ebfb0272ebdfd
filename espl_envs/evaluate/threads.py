"""An agent's code off the event loop that everybody shares: blocking calls in threads, coroutines on a loop of their
own, and nobody waits for either.

Python cannot end a thread. A call that never returns is given up: its thread is left behind as a daemon, everybody else
goes on with others, and the process still ends when it is done (the threads of `concurrent.futures` would hold it). A
coroutine that blocks its loop holds up the agent's other episodes, which is the agent's own doing, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from typing import Any

Call = tuple[Callable[[], Any], "asyncio.Future[Result]"]
Result = tuple[Any, BaseException | None]
CLOSE_S = 5.0           # for coroutines to end when they are cancelled


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


class Loop:
    """An event loop in a daemon thread, started when it is first needed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._asked: float | None = None                # when the loop was asked for a sign of life, if it gave none

    async def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """What the coroutine that `call` makes returns or raises, as in `Threads.run`. Cancelling cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._turn, args=(self._loop,), name="espl-agent-loop", daemon=True).start()
        value, problem = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_result(call), self._loop))
        if problem is not None:
            raise problem
        return value

    def still(self) -> float:
        """For how many seconds the loop is known to have stood still. Any thread may ask, now and then."""
        loop, now = self._loop, time.monotonic()
        if loop is None:
            return 0.0
        if self._asked is None:
            self._asked = now
            loop.call_soon_threadsafe(self._alive)
        return now - (self._asked or now)

    def close(self) -> None:
        """Cancel what is left, and end the loop when that has ended; nobody waits for it."""
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(lambda: setattr(self, "_ending", loop.create_task(self._end(loop))))

    def _alive(self) -> None:
        self._asked = None

    @staticmethod
    def _turn(loop: asyncio.AbstractEventLoop) -> None:
        """A task that raises SystemExit throws it out of the loop: it goes on for the others."""
        stopped = False
        while not stopped:
            with contextlib.suppress(BaseException):
                loop.run_forever()
                stopped = True
        loop.close()

    @staticmethod
    async def _end(loop: asyncio.AbstractEventLoop) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if not tasks or not (await asyncio.wait(tasks, timeout=CLOSE_S))[1]:
            loop.stop()


async def _result(call: Callable[[], Awaitable[Any]]) -> Result:
    """Exceptions as values: SystemExit out of a task would end the loop."""
    try:
        return await call(), None
    except BaseException as problem:
        return None, problem
