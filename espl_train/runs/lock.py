"""The lock of a run directory: one process at a time is at work in it, and whoever comes second is told who that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from espl_envs.core.errors import EsplError

LOCK = ".lock"


class RunError(EsplError):
    """A run directory that cannot be used as asked."""


_held: set[Path] = set()        # by this process, which the kernel would let in again


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """The directory is this process's until the lock is released, or by itself again where the block fails."""
    lock = acquire(path)
    try:
        yield lock
    except BaseException:
        release(path, lock)
        raise


def acquire(path: Path) -> int:
    """Lock the directory for this process. The kernel gives it free when the process dies, however it dies."""
    path = path.resolve()
    if path in _held:
        raise RunError(f"{path} is in use by this very process.")
    while True:
        try:
            handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"The run directory {path} cannot be used: {LOCK}: {error.strerror}.") from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 64, 0).decode("ascii", "replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise RunError(f"The run directory {path} cannot be locked: {error.strerror}.") from None
            raise RunError(
                f"{path} is in use by another espl-train (process {owner or 'unknown'}): wait for it or stop it."
            ) from None
        if _is(handle, path / LOCK):
            break
        os.close(handle)                # of a run that was abandoned, and its directory removed, just now
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    _held.add(path)
    return handle


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def release(path: Path, handle: int) -> None:
    """Give the directory free."""
    _held.discard(path.resolve())
    with contextlib.suppress(OSError):
        os.close(handle)
