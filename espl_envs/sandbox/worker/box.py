"""The inside of the box as every call sees it: its roots, its processes, its session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from . import facts
from .cgroup import Cgroup
from .interpreter import Interpreter
from .kernel import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, prctl, remove_ipc
from .launch import Launcher
from .paths import Roots
from .tree import Tree


class Box:
    """Made once, from what HELLO says, before any user code runs."""

    def __init__(self, roots: Sequence[str], spec: Mapping[str, Any]) -> None:
        oom_fd = -1
        with contextlib.suppress(OSError):
            oom_fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        prctl(PR_SET_DUMPABLE, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        self.tree = Tree()
        self.cgroup = Cgroup()
        self.roots = Roots(roots)
        self.session: Interpreter | None = None
        # Where the session has all the processes or all the memory there is, it loses everything.
        self._launcher = Launcher(roots, spec, oom_fd, self.tree.sweep, memory_limited=self.cgroup.memory is not None)

    def attest(self) -> dict[str, Any]:
        """The facts of the READY frame."""
        return facts.gather(list(self.roots), self.cgroup, self._launcher)

    def session_pid(self) -> int | None:
        """The session's process, while it lives."""
        session = self.session
        return None if session is None or session.pid in self.tree.exits else session.pid

    def new_session(self) -> Interpreter:
        """A fresh session in place of one that ended, or the first one."""
        self.end_session()
        session = Interpreter(self._launcher)
        self.tree.watch(session.pid)
        self.session = session
        return session

    def end_session(self) -> None:
        """Put a session away that is dead, or is to die with everybody else."""
        if self.session is not None:
            self.session.close()
            self.tree.forget(self.session.pid)
            self.session = None

    def start(self, argv: Sequence[str], stdin: int, stdout: int, stderr: int, **how: Any) -> int:
        """A new process that runs user code, watched."""
        pid = self._launcher.start(argv, stdin, stdout, stderr, **how)
        self.tree.watch(pid)
        return pid

    def fork(self) -> int:
        """A fork that runs our own code, watched."""
        pid = self._launcher.fork()
        if pid:
            self.tree.watch(pid)
        return pid

    def scrub(self) -> list[str]:
        """End everybody and release what outlives processes; gives the directories to be emptied besides the roots."""
        self.tree.sweep()
        self.end_session()
        if not self.tree.first:
            return []
        for kind in ("shm", "sem", "msg"):
            for line in facts.lines(f"/proc/sysvipc/{kind}")[1:]:
                remove_ipc(kind, int(line.split()[1]))
        return ["/dev/shm", "/dev/mqueue"]

    def release_memory(self) -> None:
        """Remove shared segments that nobody is attached to: after a call that had no memory left, they would be the
        memory that the next one lacks."""
        if not self.tree.first:
            return
        for line in facts.lines("/proc/sysvipc/shm")[1:]:
            _, segment, _, _, _, _, attached, *_ = line.split()
            if attached == "0":
                remove_ipc("shm", int(segment))

    def stats(self) -> dict[str, float]:
        """Current figures of the whole box."""
        return {**self.cgroup.usage(), "processes": float(self.tree.count())}
