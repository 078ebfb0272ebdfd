"""Processes that do one thing at a time and are measured while they do it: seconds, processor time, memory, tokens."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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


class Side:
    """A trainer in another process, for a `with`. `step()` makes it do one step and returns its figures."""

    def __init__(self, run: Callable[[Work, Connection], None], work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(work.threads)
        self._process = context.Process(target=run, args=(work, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._pipe.send("end")
        self._pipe.close()
        self._process.join(60)
        self._process.terminate()

    def ready(self) -> None:
        """Wait until everything is loaded."""
        self._receive()

    def step(self) -> Figures:
        self._pipe.send("step")
        figures = self._receive()
        assert isinstance(figures, Figures)
        return figures

    def _receive(self) -> object:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(f"a side ended with exit code {self._process.exitcode}; its words are above") from None


def told(pipe: Connection) -> object:
    """What the parent says next; "end" where it is gone."""
    try:
        return pipe.recv()
    except EOFError:
        return "end"


def in_process(function: Callable[[Work], Any], work: Work) -> Any:
    """Call it in a fresh process, so that nothing of it stays."""
    os.environ["OMP_NUM_THREADS"] = str(work.threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, work).result()
