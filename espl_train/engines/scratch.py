"""A folder for as long as its owner lives, however that ends: what a killed one left is removed by the next."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

LOCK = "lock"


class Scratch:
    """A new `folder` below `root`, whose name begins with `prefix`. Its lock, a file in it, dies with the process."""

    def __init__(self, prefix: str, root: Path) -> None:
        _sweep(prefix, root)
        self.folder, lock = _new(prefix, root)
        self._close = weakref.finalize(self, _remove, self.folder, lock)

    def close(self) -> None:
        """Remove it with all that is in it. May be repeated."""
        self._close()


def _new(prefix: str, root: Path) -> tuple[Path, int]:
    """A folder with its lock held; a sweep that took it for a dead one's in between is answered with another."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            lock = _locked(folder, os.O_CREAT)
        except (BlockingIOError, FileNotFoundError):
            continue
        if (folder / LOCK).exists():
            return folder, lock
        os.close(lock)                  # of a file that the sweep has removed


def _sweep(prefix: str, root: Path) -> None:
    """Remove folders whose owner is gone: the lock died with it."""
    for folder in root.glob(f"{prefix}*"):
        try:
            lock = _locked(folder)
        except OSError:          # its owner lives, or it is somebody else's
            continue
        _remove(folder, lock)


def _locked(folder: Path, create: int = 0) -> int:
    descriptor = os.open(folder / LOCK, create | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
