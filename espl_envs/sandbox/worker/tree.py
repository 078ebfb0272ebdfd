"""The processes of the box: who is there, who has ended, and ending those that should not be there.

As PID 1 the supervisor inherits every orphan; elsewhere it is the subreaper of its descendants, which comes to the same
but for `kill(-1)`: only PID 1 may say that, because it reaches everybody in the pid namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from resource import struct_rusage

from .kernel import PR_SET_CHILD_SUBREAPER, prctl

_PATIENCE = 0.1        # seconds for ending processes one by one, before a fork bomb is ended at one blow
_BOMB = 3              # what gives birth in more rounds than this is a fork bomb
_GIVE_UP = 8.0         # seconds; dying takes its time where the machine is busy


class Stuck(Exception):
    """Processes remain that SIGKILL does not end: only the end of the box does."""


class Exit:
    """How a watched process ended."""

    __slots__ = ("status", "usage")

    def __init__(self, status: int, usage: struct_rusage) -> None:
        self.status, self.usage = status, usage


class Tree:
    """Everybody below this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.first = self.pid == 1
        if not self.first:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.exits: dict[int, Exit] = {}
        self._watched: set[int] = set()
        self.orphans_cpu = 0.0
        self._children = -1
        with contextlib.suppress(OSError):
            self._children = os.open(f"/proc/self/task/{self.pid}/children", os.O_RDONLY | os.O_CLOEXEC)

    def watch(self, pid: int) -> None:
        """Keep how `pid` ends in `exits`."""
        self._watched.add(pid)

    def forget(self, pid: int) -> None:
        self._watched.discard(pid)
        self.exits.pop(pid, None)

    def reap(self) -> None:
        """Collect everybody who has ended."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._watched:
                self.exits[pid] = Exit(status, usage)
            else:
                self.orphans_cpu += usage.ru_utime + usage.ru_stime

    def strays(self, spare: int | None) -> bool:
        """Whether anybody but `spare` is a child of the supervisor: orphans become its children."""
        if self._children < 0:
            return bool(self._doomed(spare, spare_children=True))
        found = os.pread(self._children, 4096, 0).split()
        return any(int(pid) != spare for pid in found)

    def sweep(self, spare: int | None = None, *, spare_children: bool = True) -> None:
        """SIGKILL until nobody is left but `spare` (and what it started). Raises Stuck.

        The blow that ends a fork bomb ends `spare` too. So time alone does not call for it, births do: on a busy
        machine those who were struck may take long to go, and nobody else must pay for that.
        """
        start, births = time.monotonic(), -1
        struck: set[int] = set()
        everybody = self.first and spare is None
        while True:
            if everybody:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            self.reap()
            doomed = self._doomed(spare, spare_children)
            if not doomed:
                return
            waited = time.monotonic() - start
            if waited > _GIVE_UP:
                raise Stuck(f"{len(doomed)} processes do not end")
            births += not struck.issuperset(doomed)
            everybody = everybody or (self.first and waited > _PATIENCE and births > _BOMB)
            if not everybody:
                self._kill(doomed)
                struck.update(doomed)
            time.sleep(0.001)

    @staticmethod
    def _kill(pids: list[int]) -> None:
        for number in (signal.SIGSTOP, signal.SIGKILL):        # stopped first: what stands does not fork
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)

    def _doomed(self, spare: int | None, spare_children: bool) -> list[int]:
        parents = _parents()
        children: dict[int, list[int]] = {}
        for pid, parent in parents.items():
            children.setdefault(parent, []).append(pid)
        doomed, queue = [], list(children.get(self.pid, ()))
        while queue:
            pid = queue.pop()
            if pid != spare:
                doomed.append(pid)
            elif spare_children:
                continue
            queue += children.get(pid, ())
        return doomed

    def count(self) -> int:
        """How many processes there are besides the supervisor."""
        return len(self._doomed(None, spare_children=False))


def _parents() -> dict[int, int]:
    """pid -> parent of every process that is not merely waiting to be collected by its parent."""
    me = os.getpid()
    parents = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{name}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fields = os.read(fd, 1024).rpartition(b")")[2].split()
        except ProcessLookupError:
            continue
        finally:
            os.close(fd)
        state, parent, threads = fields[0], int(fields[1]), int(fields[17])
        if state in (b"Z", b"X") and threads <= 1 and parent != me:
            continue
        parents[int(name)] = parent
    return parents
