"""One directory per evaluation: `config.json`, `episodes.jsonl`, and what is computed from them.

`episodes.jsonl` only ever grows: every episode is one `write` to a descriptor in append mode, so a process that is
killed leaves whole lines and at most one torn one, which the next writer cuts off and counts. The last record of a key
counts. One process writes at a time; anybody may read meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from espl_envs.core.errors import EsplError
from espl_envs.evaluate.config import EvalConfig
from espl_envs.evaluate.records import BadRecord, Episode, EpisodeKey, Outcome

CONFIG, EPISODES, LOCK = "config.json", "episodes.jsonl", ".lock"
SYNC_SECONDS = 1.0


class RunError(EsplError):
    """A run directory that cannot be used as asked."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the last record of a key stands in `episodes.jsonl`."""

    start: int
    size: int
    fault: bool


class RunDirectory:
    """An evaluation on disk. Make one with `create`, continue one with `open`, look at one with `read`.

    damaged: lines in the middle of the file that are no records (a failing disk); they count as not there.
    torn: bytes that were cut off (`read`: passed over) at the end, 0 where the last writer finished its line.
    spent: what all records cost, also those that were played again: the money is gone.
    """

    def __init__(self, path: Path, config: EvalConfig, lock: int | None) -> None:
        self.path, self.config = path, config
        self.damaged = self.torn = 0
        self.spent = 0.0
        self._index: dict[EpisodeKey, _Place] = {}
        self._lock, self._guard, self._synced = lock, threading.Lock(), 0.0
        self._size = self._scan()
        self._file = -1
        if lock is not None:
            self._file = os.open(path / EPISODES, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            os.ftruncate(self._file, self._size)

    @classmethod
    def create(cls, path: Path, config: EvalConfig) -> Self:
        """A new run. Raises RunError where `path` holds a run already, or anything else."""
        refuse_foreign(path)
        with _on_disk(f"The run directory {path} cannot be made"):
            path.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
        try:
            if (path / CONFIG).exists():
                raise RunError(_taken(path, read_config(path), config))
            write_atomically(path / CONFIG, config.to_json())
            return cls(path, config, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open(cls, path: Path, config: EvalConfig | None = None, same_agent: bool = False) -> Self:
        """An existing run, to be continued as it is, or as `config` says: the same evaluation, or the same with more
        samples or tasks. Raises RunError where `config` is another evaluation, with the differences, of which other
        files of the `same_agent` are none."""
        read_config(path)
        lock = _acquire(path)
        try:
            stored = read_config(path)
            if config is not None and config != stored:
                now = stored.pardoned(config) if same_agent else stored
                if not now.grows_into(config):
                    raise RunError(_taken(path, stored, config))
                stored = replace(config, started=now.started, agent=now.agent)
                write_atomically(path / CONFIG, stored.to_json())
            return cls(path, stored, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def read(cls, path: Path) -> Self:
        """An existing run, to be looked at: no lock is taken and nothing is changed. Raises RunError."""
        return cls(path, read_config(path), None)

    def append(self, episode: Episode) -> None:
        """Write an episode down. On return it survives the death of this process, and within a second that of the
        machine. Raises RunError where the disk refuses; the file is then as it was. Threads may share the directory."""
        if self._lock is None:
            raise RunError(f"{self.path} was opened for reading only (or is closed).")
        line = episode.to_json().encode() + b"\n"
        with self._guard:
            try:
                written = os.write(self._file, line)
                while written < len(line):
                    written += os.write(self._file, line[written:])
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    os.fsync(self._file)
                    self._synced = time.monotonic()
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise RunError(f"{self.path / EPISODES} cannot be written: {error.strerror}.") from error
            self._index[episode.key] = _Place(self._size, len(line), episode.outcome is Outcome.FAULT)
            self._size += len(line)
            self.spent += episode.cost or 0.0

    def episodes(self, transcripts: bool = True) -> Iterator[Episode]:
        """The last record of every key of the configuration, in the order in which keys were first written; one at a
        time is in memory. Without `transcripts` they come without messages, reasoning and info: for those who keep
        them all."""
        if not self._index:
            return
        wanted = set(self.config.keys())
        with (self.path / EPISODES).open("rb") as file:
            for key, place in list(self._index.items()):
                if key in wanted:
                    file.seek(place.start)
                    episode = Episode.from_json(file.read(place.size))
                    yield episode if transcripts else _light(episode)

    def episode(self, key: EpisodeKey) -> Episode:
        """The last record of one key. Raises KeyError where there is none."""
        place = self._index[key]
        with (self.path / EPISODES).open("rb") as file:
            file.seek(place.start)
            return Episode.from_json(file.read(place.size))

    def missing(self, keys: Iterable[EpisodeKey] | None = None) -> list[EpisodeKey]:
        """Those of `keys` (by default all of the configuration) that are not there, or are faults."""
        places = ((key, self._index.get(key)) for key in (self.config.keys() if keys is None else keys))
        return [key for key, place in places if place is None or place.fault]

    def write_json(self, name: str, value: Any) -> Path:
        """A file of strict JSON beside the episodes, atomically."""
        return self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """A text file beside the episodes, atomically."""
        return write_atomically(self.path / name, text)

    def close(self) -> None:
        """Bring everything to disk and give the directory free. Calling it again is fine."""
        if self._lock is None:
            return
        with self._guard:
            os.fsync(self._file)
            os.close(self._file)
            fcntl.flock(self._lock, fcntl.LOCK_UN)      # also where a process that an agent forked still holds it
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scan(self) -> int:
        """Fill the index; the length of the file up to its last whole line."""
        if not (self.path / EPISODES).exists():
            return 0
        end = 0
        with _on_disk(f"{self.path / EPISODES} cannot be read"), (self.path / EPISODES).open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self.torn = len(line)
                    break
                try:
                    episode = Episode.from_json(line)
                    self._index[episode.key] = _Place(end, len(line), episode.outcome is Outcome.FAULT)
                    self.spent += episode.cost or 0.0
                except BadRecord:
                    self.damaged += 1
                end += len(line)
        return end


def _light(episode: Episode) -> Episode:
    return replace(episode, messages=(), info={}, turns=tuple(replace(turn, reasoning="") for turn in episode.turns))


def read_config(path: Path) -> EvalConfig:
    """The configuration of the run in `path`. Raises RunError where there is none."""
    with _on_disk(f"{path / CONFIG} cannot be read"):
        if not path.is_dir():
            raise RunError(f"There is no run directory {path}.")
        if not (path / CONFIG).is_file():
            raise RunError(f"{path} is no run of espl-eval: it has no {CONFIG}.")
        text = (path / CONFIG).read_bytes()
    try:
        return EvalConfig.from_json(text, str(path / CONFIG))
    except EsplError as error:
        raise RunError(str(error)) from error


def write_atomically(path: Path, text: str) -> Path:
    """Replace a file by `text` in one step: a reader, or a crash, finds the old one or the new one. Raises RunError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    with _on_disk(f"{path} cannot be written"):
        with aside.open("wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


@contextlib.contextmanager
def _on_disk(what: str) -> Iterator[None]:
    """What the file system refuses is a sentence: `what`, and its reason."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: {error.strerror or error}.") from error


def refuse_foreign(path: Path) -> None:
    """Raises RunError unless `path` is a run, or absent, or empty but for what a start that died leaves behind."""
    left_behind = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(CONFIG)}\.\d+\.new").fullmatch
    with _on_disk(f"{path} cannot be used"):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file: choose another --out.")
        if not path.is_dir() or (path / CONFIG).is_file() or all(left_behind(p.name) for p in path.iterdir()):
            return
        raise RunError(f"{path} is not empty and is no run of espl-eval: choose another --out.")


def _taken(path: Path, stored: EvalConfig, config: EvalConfig) -> str:
    changed = stored.differences(config)
    if not changed or stored.grows_into(config):
        return f"{path} holds this very evaluation already; continue it with --resume, or choose another --out."
    if stored.pardoned(config).grows_into(config):
        here, there = stored.agent.files, config.agent.files
        files = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        return (f"{path} was played with another version of the agent ({_several(files)} changed): results of two "
                "agents would be mixed; choose another --out, or add --same-agent where both answer alike.")
    shown = [f"{name}: {_short(there)} there, {_short(here)} here" for name, (there, here) in list(changed.items())[:5]]
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f"{path} belongs to another evaluation ({'; '.join(shown)}{more}): choose another --out."


def _several(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _acquire(path: Path) -> int:
    """Lock the directory for this process. The kernel gives it free when the process dies, however it dies."""
    with _on_disk(f"{path} cannot be written"):
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(handle, 64).decode("ascii", "replace").strip()
        os.close(handle)
        owner = f"process {owner or 'unknown'}"
        raise RunError(f"{path} is in use by another espl-eval ({owner}): wait for it or stop it.") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle
