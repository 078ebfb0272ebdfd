"""Files that are whole or not there, whatever dies while they are written.

What is new goes aside, is forced to disk and takes its name in one step: a reader, or a crash, finds the old content or
the new one. What the file system refuses is a sentence.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from espl_envs.core.errors import EsplError

WRITING = ".writing-"       # begins the names of what is not whole yet; left behind by a process that was killed


class DiskError(EsplError):
    """A file or a folder that cannot be written."""


@contextmanager
def explained(what: Path | str) -> Iterator[None]:
    """Raises DiskError, "`what` cannot be written" and why, for the OSError that the block raises."""
    try:
        yield
    except OSError as problem:
        raise DiskError(f"{what} cannot be written: {problem.strerror or problem}") from problem


def write(path: Path, data: bytes) -> None:
    """Replace a file, on disk on return; of several writers at once the last one counts. Raises DiskError."""
    with explained(path), _aside(path, data) as aside:
        aside.replace(path)
        sync(path.parent)


def write_once(path: Path, data: bytes) -> bool:
    """Make a file, unless it is there already: of several writers at once one has made it. Raises DiskError."""
    with explained(path), _aside(path, data) as aside:
        try:
            path.hardlink_to(aside)
        except FileExistsError:
            return False
        sync(path.parent)
        return True


def put(path: Path, data: bytes) -> None:
    """Write a file in a folder that is itself aside, and force it to disk. Raises OSError."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Force a file or a folder to disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Force a folder to disk with all that is in it. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def _aside(path: Path, data: bytes) -> Iterator[Path]:
    """The content of `path` under another name, which is gone afterwards."""
    aside = path.with_name(f"{WRITING}{secrets.token_hex(4)}-{path.name}")
    try:
        put(aside, data)
        yield aside
    finally:
        aside.unlink(missing_ok=True)
