"""Processes that do one thing at a time and are measured while they do it: seconds, processor time, memory, tokens."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainer.work import Work


@dataclass(frozen=True)
class Figures:
    """Of one step: seconds of the clock and of all cores, sampled tokens, and the memory that it took on top."""

    seconds: float
    cpu: float
    tokens: int
    memory: float     # MiB: at most in use during the step, less what was in use after loading


class Meter:
    """Measures steps of this process on `device`. Tokens are counted from inside a step, with `add`.

    Memory is the process's resident size on a CPU, and what torch holds on a GPU (all of it, weights included).
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.loaded = _resident() if device == "cpu" else 0.0
        self.tokens = 0

    def start(self) -> None:
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")      # forget the high-water mark
        else:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.tokens, self._wall, self._cpu = 0, time.perf_counter(), time.process_time()

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def stop(self) -> Figures:
        if self.device != "cpu":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        most = _resident("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
        return Figures(wall, cpu, self.tokens, most - self.loaded)


def _resident(field: str = "VmRSS") -> float:
    """MiB of this process that are, or (`VmHWM`) at most were, in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


ENDING = 60.0       # seconds that a process has to end by itself


class Failed(SystemExit):
    """What another process was to do was not done; the message says why."""


class Side:
    """A trainer in another process, for a `with`. `step()` makes it do one step and returns its figures.

    Raises Failed where it ends, or is silent for `limit` seconds.
    """

    def __init__(self, run: Callable[[Work, Connection], None], work: Work, limit: float | None = None) -> None:
        self._limit = limit
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(work.threads)
        self._process = context.Process(target=run, args=(work, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is Failed:
            self._process.kill()
        with suppress(OSError):
            self._pipe.send("end")
        self._pipe.close()
        self._process.join(ENDING)
        self._process.kill()

    def ready(self) -> None:
        """Wait until everything is loaded."""
        self._receive()

    def step(self) -> Figures:
        self._pipe.send("step")
        figures = self._receive()
        assert isinstance(figures, Figures)
        return figures

    def _receive(self) -> object:
        return _heard(self._pipe, self._process, self._limit)


def told(pipe: Connection) -> object:
    """What the parent says next; "end" where it is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return "end"


def in_process(function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
    """Call it in a fresh process, so that nothing of it stays, with the threads of the work among its arguments. Raises
    Failed where it fails, ends, or takes longer than `limit` seconds.
    """
    os.environ["OMP_NUM_THREADS"] = str(max((a.threads for a in arguments if isinstance(a, Work)), default=1))
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        done, answer = _heard(pipe, process, limit)
    except Failed:
        process.kill()
        raise
    finally:
        pipe.close()                     # which lets it go
        process.join(ENDING)
        process.kill()
    if not done:
        raise Failed(answer)
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        pipe.send((False, "".join(traceback.format_exception_only(error)).strip()))
    with suppress(EOFError):
        pipe.recv()


def _heard(pipe: Connection, process: Any, limit: float | None) -> Any:
    if not pipe.poll(limit):
        raise Failed(f"nothing was heard within {limit:g} s")
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        raise Failed(f"a process ended with exit code {process.exitcode}; its words are above") from None
