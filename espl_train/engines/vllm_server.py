"""vLLM at work: one thread feeds and steps a core, for as long as anybody waits, and builds another where it broke.

The core is in this process (`vllm_core.py`) or in an actor on another GPU (`vllm_ray.py`): to this thread they are the
same. On a CPU requests are admitted at reproducible moments where the configuration asks for it, as in the local
engine; on a GPU vLLM's own arithmetic depends on the batch, so nothing waits for that.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from espl_train.engines.adapters import Adapter
from espl_train.engines.base import EngineError, Request
from espl_train.engines.callers import Callers, Waiter, waiter
from espl_train.engines.probe import Passage, Probe
from espl_train.engines.vllm_core import Pause, Score

T = TypeVar("T")

LIVES = 2         # times in a row that a vLLM which broke is built again


class Lost(EngineError):
    """The sampler is gone, with all that it had under way."""


def named(number: int, error: EngineError) -> EngineError:
    """An error of one among several."""
    return EngineError(f"replica {number} of vLLM: {error}")


class Sampler(Protocol):
    """What `vllm_core.Core` does, wherever it does it."""

    def step(self, fresh: Sequence[tuple[str, Request | Score]], gone: Sequence[str]) -> list[tuple[str, Any]]: ...
    def complete(self, asked: Sequence[Request | Score]) -> list[Any]: ...
    def load(self, adapter: Adapter) -> None: ...
    def unload(self) -> None: ...
    def sleep(self, how: Pause) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Call:
    """A request somebody awaits."""

    asked: Request | Score
    waiter: Waiter
    cancelled: bool = False

    @property
    def order(self) -> tuple[Any, ...]:
        asked = self.asked
        policy = -1 if asked.policy is None else asked.policy
        if isinstance(asked, Score):
            return (0, policy, asked.tokens, asked.start)
        law = (asked.temperature, asked.top_p, asked.stop_ids)
        return (1, policy, -asked.expected, asked.tokens, asked.seed, asked.max_new, *law, asked.session or "")


class Server:
    """One sampler and the thread that works it. `adapter` is what a sampler that is built again serves, once `probe`
    has seen that it does."""

    def __init__(self, build: Callable[[], Sampler], probe: Probe, deterministic: bool) -> None:
        self.probe = probe
        self.adapter: Adapter | None = None
        self.callers = Callers(deterministic)
        self.core: Sampler | None = None
        self._build = build
        self._changed = self.callers.changed
        self._queue: list[_Call] = []
        self._running: dict[str, _Call] = {}
        self._jobs: list[tuple[Callable[[Sampler], Any], Future[Any]]] = []
        self._asked = 0
        self._deaths = 0
        self._thread = threading.Thread(target=self._work, name="espl-vllm", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Requests that wait or are under way."""
        with self._changed:
            return len(self._queue) + len(self._running)

    async def ask(self, asked: Request | Score) -> Any:
        """A Sample for a Request, log-probabilities for a Score. Raises EngineError."""
        self._check_open()
        call = _Call(asked, waiter())
        with self._changed:
            self._queue.append(call)
            self.callers.asked(call.waiter[0])
        try:
            return await call.waiter[1]
        except asyncio.CancelledError:
            call.cancelled = True
            raise

    def submit(self, job: Callable[[Sampler], T]) -> Future[T]:
        """Run `job` with the sampler on the worker's thread, between two steps."""
        future: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._jobs.append((job, future))
            self._changed.notify_all()
        return future

    def do(self, job: Callable[[Sampler], T]) -> T:
        """`submit`, and wait for it."""
        return self.submit(job).result()

    def look(
        self, requests: Sequence[Request], passages: Sequence[Passage], start: int
    ) -> tuple[list[Any], list[list[float]]]:
        """See `probe.Witness`."""
        return self.do(partial(look, requests=requests, passages=passages, start=start))

    def close(self) -> None:
        """Stop the worker; whatever still waits gets an EngineError."""
        self.callers.close()
        self._thread.join()
        self._fail([*self._queue, *self._running.values()], EngineError("the engine was closed"))

    def _check_open(self) -> None:
        if self.callers.closed:
            raise EngineError("the engine is closed")

    def _work(self) -> None:
        """The worker: jobs, then requests and a step, for as long as anybody waits."""
        while self.callers.wait(lambda: len(self._queue) + len(self._running), lambda: bool(self._jobs)):
            self._run_jobs()
            try:
                fresh, gone = self._admit()
                if self._running or gone:
                    self._deliver(self._live().step(fresh, gone))
            except Exception as error:
                self._break(error)
        if self.core is not None:
            self.core.close()
        for _, future in self._jobs:
            future.set_exception(EngineError("the engine was closed"))

    def _run_jobs(self) -> None:
        with self._changed:
            jobs, self._jobs = self._jobs, []
        for job, future in jobs:
            try:
                future.set_result(job(self._live()))
            except Lost as error:
                self._break(error)
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)

    def _live(self) -> Sampler:
        """The sampler; one that broke is built again, with what it served, and proven. On the worker's thread."""
        if self.core is None:
            if self._deaths > LIVES:
                raise EngineError(f"vLLM broke {self._deaths} times in a row and is not started again")
            self.core = core = self._build()
            if self.adapter is not None:
                core.load(self.adapter)
                self.probe.again(_Witness(core), self.adapter.version)
        return self.core

    def _admit(self) -> tuple[list[tuple[str, Request | Score]], list[str]]:
        """What was queued, in an order that only the requests decide, and what nobody waits for any more."""
        with self._changed:
            fresh, self._queue = [call for call in self._queue if not call.cancelled], []
            gone = [key for key, call in self._running.items() if call.cancelled]
            for key in gone:
                del self._running[key]
            calls = {f"{self._asked + i}": call for i, call in enumerate(sorted(fresh, key=lambda call: call.order))}
            self._asked += len(calls)
            self._running |= calls
        return [(key, call.asked) for key, call in calls.items()], gone

    def _deliver(self, ended: Sequence[tuple[str, Any]]) -> None:
        with self._changed:
            calls = [(self._running.pop(key), found) for key, found in ended if key in self._running]
        if calls:
            self._deaths = 0
            self.callers.deliver([
                (call.waiter, None, found) if isinstance(found, EngineError) else (call.waiter, found, None)
                for call, found in calls
            ])

    def _fail(self, calls: Sequence[_Call], error: Exception) -> None:
        self.callers.deliver([(call.waiter, None, error) for call in calls])

    def _break(self, error: Exception) -> None:
        """vLLM failed: everybody who waits is told, and the next request finds a new one."""
        with self._changed:
            failed = [*self._running.values(), *self._queue]
            self._queue = []
            self._running.clear()
        core, self.core = self.core, None
        self._deaths += 1
        let_go(error)
        if core is not None:
            with suppress(Exception):                     # it is broken already, and the reason is told
                core.close()
        broken = error
        if not isinstance(error, EngineError):
            broken = EngineError(f"vLLM broke: {type(error).__name__}: {error}")
            broken.__cause__ = error
        self._fail(failed, broken)


def look(
    core: Sampler, requests: Sequence[Request], passages: Sequence[Passage], start: int
) -> tuple[list[Any], list[list[float]]]:
    """See `probe.Witness`: everything at once, while nothing else is under way."""
    found = core.complete([*requests, *(Score(tokens, start, policy) for tokens, policy in passages)])
    return found[: len(requests)], found[len(requests) :]


class _Witness:
    """A sampler as the probe asks it, on the worker's thread itself."""

    def __init__(self, core: Sampler) -> None:
        self._core = core

    def look(
        self, requests: Sequence[Request], passages: Sequence[Passage], start: int
    ) -> tuple[list[Any], list[list[float]]]:
        return look(self._core, requests, passages, start)


def let_go(error: BaseException | None) -> None:
    """Forget what the frames below an error hold. Whoever keeps the error would keep vLLM with it, and on a GPU all of
    its memory, which the next one needs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
