"""What a run writes down as it goes: `metrics.jsonl` (numbers, one record per step) and `events.jsonl` (decisions).

Lines are appended and flushed at once; not-a-number becomes null, so every line is strict JSON. Trackers are optional
sinks behind it: whatever fails in one of them costs a warning and that tracker, never the run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from espl_envs.core.errors import EsplError
from espl_train.disk import explained
from espl_train.runs.checkpoint import to_stderr

BLOCK = 1 << 16


class Sink(Protocol):
    """A tracker. `write` gets the same record as metrics.jsonl and may raise."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def plain(value: Any) -> Any:
    """`value` as strict JSON: numpy and torch scalars become numbers, NaN and infinities null, tuples lists."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


class JsonLines:
    """An append-only file of JSON records whose length can be noted and returned to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(path):
            _cut_torn(path)
            self._file = path.open("ab", buffering=0)   # nothing is left to be written when a full disk ends the run

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises DiskError; what was written of it then is no line."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        left = line.encode("utf-8", "surrogatepass") + b"\n"
        with explained(self.path):
            while left:
                left = left[self._file.write(left) :]

    def size(self) -> int:
        """Bytes so far, after they are safe on disk."""
        with explained(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, size: int) -> None:
        """Go back to an earlier length. A file that is already shorter stays as it is."""
        if self.path.stat().st_size > size:
            os.truncate(self.path, size)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file; an unfinished last line (a process died while writing) is left out. Raises EsplError
    for a line that is no record, or has not all the `fields`."""
    if not path.exists():
        return
    try:
        content = path.open("rb")
    except OSError as problem:
        raise EsplError(f"{path} cannot be read: {problem.strerror}") from None
    with content as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not all(field in record for field in fields):
                raise EsplError(f"{path} is damaged: line {number} is no record; restore the file, or take it out")
            yield record


def _cut_torn(path: Path) -> None:
    """Take an unfinished last line away: the next one would be glued to it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(whole - BLOCK, 0)
            file.seek(start)
            if (found := file.read(whole - start).rfind(b"\n")) >= 0:
                whole = start + found + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)


class TensorBoard:
    """The numbers of each record as TensorBoard scalars; texts stay out."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, record: Mapping[str, Any]) -> None:
        step = int(record.get("step", 0))
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class RunLog:
    """Both files of a run and its trackers. `sinks`, by name, are made at the first record."""

    def __init__(
        self,
        folder: Path,
        sinks: Mapping[str, Callable[[], Sink]] | None = None,
        warn: Callable[[str], None] = to_stderr,
    ) -> None:
        self.warn = warn
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._events = JsonLines(folder / "events.jsonl")
        self._makers = dict(sinks or {})
        self._sinks: dict[str, Sink] = {}

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One flat record of one step; it must have a "step"."""
        self._metrics.write(record)
        for name, make in self._makers.items():
            self._guarded(name, partial(self._open, name, make))
        self._makers.clear()
        for name, sink in list(self._sinks.items()):
            self._guarded(name, partial(sink.write, plain(record)))

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        self._sinks[name] = make()

    def event(self, step: int, kind: str, **fields: Any) -> None:
        """One decision: what happened at `step` and why."""
        self._events.write({"step": step, "kind": kind, **fields})

    def sizes(self) -> dict[str, int]:
        """Length of each file, after it is safe on disk; the other half of `truncate`."""
        return {"metrics": self._metrics.size(), "events": self._events.size()}

    def truncate(self, sizes: Mapping[str, int]) -> None:
        """Forget what was written after `sizes` was taken."""
        self._metrics.truncate(sizes["metrics"])
        self._events.truncate(sizes["events"])

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.close)
        self._metrics.close()
        self._events.close()

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        """A tracker is somebody else's code and disk: whatever it raises is reported once and ends only the tracker."""
        try:
            act()
        except Exception as error:
            self._sinks.pop(name, None)
            self.warn(f"{name} is off for the rest of this run: {error or type(error).__name__}")
