"""Stands between an evaluation and a program that is an agent, so that nothing of the program outlives its episode.

Run as a script, `python -I -S warden.py PROGRAM WORD …`, with one end of a socket for its standard input. Whatever the
program starts, in whatever session and through however many forks, becomes a child of this process when its own parent
ends (PR_SET_CHILD_SUBREAPER; where that is missing, off Linux, the program's process group has to do). When the program
ends, or the other end of the socket is closed (the episode is over, or the evaluation was killed), the children of this
process are killed until there are none. Nobody else can be hit: a child keeps its number until it has been waited for.
This process ends as the program did, with the same code or by the same signal; why a program could not be started is
said on the socket. It stands alone, so that starting it takes milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

SUBREAPER = 36              # prctl(2)
LIFELINE = 0
SWEEP_S = 10.0              # for children that cannot be killed (setuid, a device that hangs)


def main(words: list[str]) -> NoReturn:
    """Start the program, watch over it, and end as it does."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    adopting = adopt()
    files: list[tuple[int, ...]] = [(os.POSIX_SPAWN_CLOSE, reading), (os.POSIX_SPAWN_CLOSE, writing)]
    try:
        program = os.posix_spawn(
            words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), *files],
            setsid=True, setsigdef=signal.valid_signals(),
        )  # fmt: skip
    except OSError as problem:
        os.write(LIFELINE, (problem.strerror or str(problem)).encode())
        os._exit(127)
    status = watch(program, reading)
    if not adopting:
        with suppress(OSError):
            os.killpg(program, signal.SIGKILL)
    sweep()
    end_as(status)


def adopt() -> bool:
    """Become the parent of every descendant that loses its own; whether that can be had."""
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def watch(program: int, woken: int) -> int | None:
    """The wait status of the program when it ends; None when the lifeline ends first. Whoever else ends is reaped."""
    while True:
        while (found := reaped()) is not None:
            if found[0] == program:
                return found[1]
        if LIFELINE in select.select([LIFELINE, woken], [], [])[0]:
            return None
        with suppress(BlockingIOError):
            os.read(woken, 4096)


def reaped() -> tuple[int, int] | None:
    """A child that has ended, and its wait status. Raises ChildProcessError where there is no child at all."""
    pid, status = os.waitpid(-1, os.WNOHANG)
    return (pid, status) if pid else None


def sweep() -> None:
    """Kill children, and those that become children by that, until there are none."""
    deadline, pause = time.monotonic() + SWEEP_S, 0.0005
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            for child in children():
                with suppress(OSError):
                    os.kill(child, signal.SIGKILL)
            while reaped() is not None:
                pass
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


def children() -> list[int]:
    """The processes whose parent is this one."""
    me = os.getpid()
    with suppress(OSError), open(f"/proc/{me}/task/{me}/children") as file:
        return [int(word) for word in file.read().split()]
    found = []                              # a kernel without that file: ask everybody
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == me:
                found.append(int(name))
    return found


def end_as(status: int | None) -> NoReturn:
    """The program's code, or its signal; 0 where it did not end by itself."""
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
