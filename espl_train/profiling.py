"""Where the time of a run goes: seconds by phase, always; with `--profile` also inside the phases, and traces.

`Phases` costs two clock readings per phase. `span` and `window` mark what happens inside engine and learner; without a
profile they do nothing. A profile waits for the GPU at the end of every span, so that seconds stand where they were
spent: it slows a run a little. Its traces are of one step (or those asked for) and of a bounded number of pieces of
work; any viewer of Chrome traces opens them, ui.perfetto.dev for one.
"""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PIECES = 8        # of one kind of work in one trace: strides of decoding, micro-batches
INSIDE = ("update", "sampling")


@dataclass(slots=True)
class Spent:
    """Seconds of a phase or span, how often it was entered, and the tokens that it was for."""

    seconds: float = 0.0
    times: int = 0
    tokens: int = 0


class Phases:
    """Seconds by phase. Phases may overlap, also from several threads: each counts in full."""

    def __init__(self) -> None:
        self.whole: dict[str, Spent] = {}       # since this object was made
        self._since: dict[str, float] = {}      # since the last `take`

    @contextmanager
    def __call__(self, name: str) -> Iterator[Spent]:
        """Count what happens inside as `name`; yields the account, for its tokens."""
        account = self.whole.setdefault(name, Spent())
        started = time.perf_counter()
        try:
            yield account
        finally:
            seconds = time.perf_counter() - started
            account.seconds += seconds
            account.times += 1
            self._since[name] = self._since.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """`<phase>/seconds` since the last time, as metrics."""
        since, self._since = self._since, {}
        return {f"{name}/seconds": seconds for name, seconds in since.items()}


class Profile:
    """The profile of a run under way. It is the process's own while it is open: `span` and `window` report to it.

    `folder` gets `phases.txt`, `phases.json` and `step-000002-<work>.json.gz`; `steps` are those that are traced (none
    given: the second that this process makes, when everything is warm, or the only one).
    """

    def __init__(self, folder: Path, steps: Collection[int] = (), *, device: str = "cpu") -> None:
        self.folder, self.steps = folder, frozenset(steps)
        self.phases = Phases()
        self.inside: dict[str, Spent] = {}
        self.traces: list[Path] = []
        self._step: int | None = None           # being traced
        self._open = threading.Lock()           # torch records one trace at a time
        self._done: set[str] = set()
        self._wait: Callable[[], None] | None = None
        self._cuda = device.startswith("cuda")
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Profile:
        global _current
        from torch.profiler import profile

        if not self._cuda:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")      # it tells stderr of every start; of GPUs it may warn
        with profile():              # the first one has to be on the main thread
            pass
        if self._cuda:
            import torch

            self._wait = torch.cuda.synchronize
            torch.cuda.reset_peak_memory_stats()
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self.write()

    def begin(self, step: int, first: int, last: int) -> None:
        """Step `step` begins, of those from `first` to `last` that this process makes."""
        chosen = self.steps or {min(first + 1, last)}
        self._step, self._done = (step if step in chosen else None), set()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what happens inside, which is finished on the device when it is over."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._wait is not None:
                self._wait()
            account = self.inside.setdefault(name, Spent())
            account.seconds += time.perf_counter() - started
            account.times += 1

    @contextmanager
    def window(self, name: str) -> Iterator[Callable[[], None]]:
        """Trace this thread for the first `PIECES` pieces of work; call what it yields after each of them.

        Nothing is traced in a step that was not chosen, twice in a step, or while another trace is being taken.
        """
        step = self._step
        if step is None or name in self._done or not self._open.acquire(blocking=False):
            yield _nothing
            return
        self._done.add(name)
        try:
            trace = _Trace(self._cuda)
            try:
                yield trace.piece
            finally:
                path = self.folder / f"step-{step:06d}-{name}.json.gz"
                with self.span(f"{name}/trace"):
                    trace.write(path)
                self.traces.append(path)
        finally:
            self._open.release()

    def table(self) -> str:
        """Seconds, share and tokens per second by phase; then inside the update, of which they are shares, and inside
        the engine, which is at work in several phases. What writing a trace took stands there, too."""
        whole = sum(spent.seconds for spent in self.phases.whole.values()) or 1.0
        lines = [_HEAD, *(_line(name, spent, whole) for name, spent in self.phases.whole.items())]
        for group in INSIDE:
            parts = {n: s for n, s in self.inside.items() if n.startswith(f"{group}/")}
            known = sum(spent.seconds for spent in parts.values())
            phase = self.phases.whole.get(group, Spent(known))
            if phase.seconds > known:
                parts[f"{group}/other"] = Spent(phase.seconds - known, phase.times)
            lines += ["", f"inside: {group}"] if parts else []
            lines += [_line(f"  {n.partition('/')[2]}", s, phase.seconds or 1.0) for n, s in parts.items()]
        memory = "   ".join(f"{name} {mib:,.0f} MiB" for name, mib in self.memory().items())
        return "\n".join([*lines, "", f"peak memory: {memory}", *(f"trace: {path}" for path in self.traces)])

    def memory(self) -> dict[str, float]:
        """The most memory in use so far, MiB: resident of the process, and of the GPU what torch held."""
        found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if self._cuda:
            import torch

            found["GPU"] = torch.cuda.max_memory_allocated() / 2**20
        return found

    def write(self) -> None:
        """The table as it is now, for people and for programs."""
        (self.folder / "phases.txt").write_text(self.table() + "\n", "utf-8")
        data = {
            "phases": _plain(self.phases.whole), "inside": _plain(self.inside), "peak_memory_mib": self.memory(),
            "traces": [path.name for path in self.traces],
        }
        (self.folder / "phases.json").write_text(json.dumps(data, indent=1), "utf-8")


class _Trace:
    """A trace of this thread, of a bounded number of pieces of work."""

    def __init__(self, cuda: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        gpu = [ProfilerActivity.CUDA] if cuda else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._left = PIECES
        self._profiler.__enter__()

    def piece(self) -> None:
        self._left -= 1
        if not self._left:
            self._profiler.__exit__(None, None, None)

    def write(self, path: Path) -> None:
        if self._left > 0:
            self._profiler.__exit__(None, None, None)
        self._profiler.export_chrome_trace(str(path))


_current: Profile | None = None
_HEAD = f"{'phase':<16} {'seconds':>10} {'share':>7} {'times':>7} {'tokens/s':>12}"


def span(name: str) -> AbstractContextManager[None]:
    """Inside a phase: `<group>/<part>`, as in "update/forward"."""
    return nullcontext() if _current is None else _current.span(name)


def window(name: str) -> AbstractContextManager[Callable[[], None]]:
    """Work that a trace shows, piece by piece; see `Profile.window`."""
    return nullcontext(_nothing) if _current is None else _current.window(name)


def _nothing() -> None:
    pass


def _line(name: str, spent: Spent, whole: float) -> str:
    rate = f"{spent.tokens / spent.seconds:12,.0f}" if spent.tokens and spent.seconds else " " * 12
    return f"{name:<16} {spent.seconds:10.2f} {spent.seconds / whole:6.1%} {spent.times:8,} {rate}".rstrip()


def _plain(accounts: Mapping[str, Spent]) -> dict[str, Any]:
    return {name: asdict(spent) for name, spent in accounts.items()}
