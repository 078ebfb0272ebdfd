"""The clients of the grading server: one per trade, started when first needed, safe from threads and from asyncio.

A `Service` hands jobs to killable processes. It raises `EnvironmentFault` where the server cannot be trusted: at start,
jobs whose outcome is known go through the very path that every later one takes. `GradingService` compares answers of
mathematics and never raises for what an answer says; it needs math-verify, or raises `MissingExtra`.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from espl_envs.core.errors import EnvironmentFault, EsplError, MissingExtra

Outcome = Literal["equal", "different", "timeout", "limit"]

DEADLINE = 5.0
START_LIMIT = 120.0
STALL = 30.0
REMEMBERED = 20_000
SELF_TEST: tuple[tuple[str, str, Outcome], ...] = (
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", "equal"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{3}}{2}", "different"),
)


class _Connection:
    """One server process and the thread that hands its outcomes to those who wait for them."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0, start_new_session=True
        )
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._count = 0
        self._heard = time.monotonic()
        self._longest = 0.0
        self._hello: Future[dict[str, Any]] = Future()
        self.alive = True
        threading.Thread(target=self._listen, name="espl-grading", daemon=True).start()

    def hello(self) -> dict[str, Any]:
        """The server's first line, when its imports are done."""
        try:
            return self._hello.result(START_LIMIT)
        except TimeoutError:
            raise EnvironmentFault(f"the grading server did not start within {START_LIMIT:.0f} s") from None

    def submit(self, arguments: Sequence[Any], deadline: float) -> Future[Any]:
        """Ask; the future fails with `EnvironmentFault` if the server dies before it answers, or cannot."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if not self.alive:
                future.set_exception(EnvironmentFault("the grading server is gone"))
                return future
            self._count += 1
            request = {"id": self._count, "deadline": deadline, "arguments": arguments}
            if not self._waiting:
                self._heard = time.monotonic()
            self._waiting[self._count] = future
            self._longest = max(self._longest, deadline)
            self._send(json.dumps(request).encode() + b"\n")
        return future

    def _send(self, line: bytes) -> None:
        """All of the line. A server that does not take it is ended; the listener then tells those who wait."""
        pipe = cast(Any, self.process.stdin)
        try:
            while line:
                line = line[pipe.write(line) :]
        except (OSError, ValueError):
            self.process.kill()

    def _listen(self) -> None:
        descriptor = cast(Any, self.process.stdout).fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        buffer = b""
        while True:
            if not poll.poll(1000):
                if self._waiting and time.monotonic() - self._heard > self._longest + STALL:
                    self.process.kill()
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._heard = time.monotonic()
                self._take(json.loads(line))
        self._lost()

    def _take(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            self._hello.set_result(message)
            return
        with self._lock:
            future = self._waiting.pop(message["id"])
        outcome = message["outcome"]
        if isinstance(outcome, dict) and "fault" in outcome:
            future.set_exception(EnvironmentFault(f"the grading server failed: {outcome['fault']}"))
        else:
            future.set_result(outcome)

    def _lost(self) -> None:
        """The server's output ended: nobody waits for ever, and nothing of it stays open."""
        with self._lock:
            self.alive = False
            left, self._waiting = self._waiting, {}
        with self.process:
            self.process.kill()
        for future in left.values():
            future.set_exception(EnvironmentFault("the grading server ended while it was grading"))
        if not self._hello.done():
            self._hello.set_exception(EnvironmentFault("the grading server ended before it was ready"))

    def close(self) -> None:
        """End the server and everything that it started."""
        cast(Any, self.process.stdin).close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Service:
    """Jobs of one trade in killable processes. `size`: jobs at a time; `command`: another server (for tests)."""

    trade: ClassVar[str]

    def __init__(self, size: int | None = None, command: Sequence[str] | None = None) -> None:
        self._size = size or min(4, os.cpu_count() or 1)
        self._command = command or (
            sys.executable, "-P", "-m", "espl_envs.grading.worker", str(self._size), self.trade
        )  # fmt: skip
        self._forget()
        _SERVICES.add(self)

    def _forget(self) -> None:
        """Start anew, also in a forked child: the parent's server stays the parent's."""
        self._starting = threading.Lock()
        self._connection: _Connection | None = None

    def _self_test(self, ask: Callable[..., Any]) -> None:
        """Raises EnvironmentFault unless jobs whose outcome is known have it; `ask(*arguments)` does one."""
        raise NotImplementedError

    def _missing(self, module: str) -> EsplError:
        """What to raise where the server cannot import this module."""
        return EnvironmentFault(f"the grading server has no module {module}")

    @property
    def running(self) -> bool:
        """Is a server up and tested?"""
        return self._connection is not None and self._connection.alive

    def start(self) -> None:
        """Start the server and test it, unless it runs. Raises `MissingExtra` or `EnvironmentFault`."""
        with self._starting:
            if self.running:
                return
            connection = _Connection(self._command)
            try:
                hello = connection.hello()
                if "missing" in hello:
                    raise self._missing(hello["missing"])
                self._self_test(lambda *arguments: connection.submit(arguments, START_LIMIT).result())
            except EsplError:
                connection.close()
                raise
            self._connection = connection

    def ask(self, *arguments: Any, deadline: float) -> Any:
        """The outcome of a job; `deadline` in seconds counts from when a worker takes it up, then it is "timeout"."""
        try:
            return self._submit(arguments, deadline).result()
        except EnvironmentFault:
            return self._submit(arguments, deadline).result()

    async def aask(self, *arguments: Any, deadline: float) -> Any:
        """`ask` for asyncio: the event loop is never blocked."""
        for last in (False, True):
            if not self.running:
                await asyncio.to_thread(self.start)
            try:
                return await asyncio.wrap_future(self._submit(arguments, deadline))
            except EnvironmentFault:
                if last:
                    raise
        raise AssertionError

    def _submit(self, arguments: Sequence[Any], deadline: float) -> Future[Any]:
        connection = self._connection
        if connection is None or not connection.alive:
            self.start()
            connection = self._connection
        assert connection is not None
        return connection.submit(arguments, deadline)

    def close(self) -> None:
        """End the server; the next job starts another."""
        with self._starting:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class GradingService(Service):
    """Compares answers of mathematics."""

    trade = "math"

    def _forget(self) -> None:
        super()._forget()
        self._known: dict[tuple[str, str, bool], Outcome] = {}

    def _self_test(self, ask: Callable[..., Any]) -> None:
        for reference, answer, expected in SELF_TEST:
            outcome = ask(reference, answer, False)
            if outcome != expected:
                raise EnvironmentFault(
                    f"the grader failed its self-test: {answer!r} against {reference!r} is {outcome!r}, "
                    f"not {expected!r}"
                )

    def _missing(self, module: str) -> EsplError:
        return MissingExtra("math", f"symbolic grading (no module {module})")

    def compare(self, reference: str, answer: str, percent: bool = False, deadline: float = DEADLINE) -> Outcome:
        """Compare two answer texts; `deadline` in seconds counts from when a worker takes the pair up."""
        key = (reference, answer, percent)
        return self._known.get(key) or self._remember(key, self.ask(*key, deadline=deadline))

    async def acompare(self, reference: str, answer: str, percent: bool = False, deadline: float = DEADLINE) -> Outcome:
        """`compare` for asyncio: the event loop is never blocked."""
        key = (reference, answer, percent)
        return self._known.get(key) or self._remember(key, await self.aask(*key, deadline=deadline))

    def _remember(self, key: tuple[str, str, bool], outcome: Outcome) -> Outcome:
        """Groups of rollouts repeat their answers. What depended on the machine's load is not remembered."""
        if outcome in ("equal", "different"):
            if len(self._known) >= REMEMBERED:
                self._known = {}
            self._known[key] = outcome
        return outcome


S = TypeVar("S", bound=Service)

_SERVICES: weakref.WeakSet[Service] = weakref.WeakSet()
_shared: dict[type[Service], Service] = {}
_sharing = threading.Lock()


def shared(kind: type[S]) -> S:
    """The service of this kind that all environments of this process use."""
    with _sharing:
        if kind not in _shared:
            _shared[kind] = kind()
        return cast(S, _shared[kind])


def shared_service() -> GradingService:
    """The service for mathematics that all environments of this process use."""
    return shared(GradingService)


def _after_fork() -> None:
    global _sharing
    _sharing = threading.Lock()
    for service in list(_SERVICES):
        connection = service._connection
        if connection is not None:
            connection.process.returncode = 0
        service._forget()


def _close_all() -> None:
    for service in list(_SERVICES):
        service.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
