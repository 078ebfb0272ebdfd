"""Who owns a box, and what removes it when its owner goes: labels, the reaper's verdict, exit hooks, signals, forks.

A box ends by itself when its owner dies (dead-man switch) or when its lifetime is over. This file is for the rest: the
box whose supervisor cannot, the container that was only created, the owner that leaves in an orderly way.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

MARK = "espl.sandbox"            # on every box of ours; its value is the provider's name
OWNER = "espl.owner"             # boot id, pid namespace, pid and start time of the process that made it
EXPIRES = "espl.expires"         # seconds since the epoch
GRACE = 60.0                     # seconds past the lifetime that a box has to end itself
SIGNALS = ("SIGTERM", "SIGHUP")

Remover = Callable[[Sequence[str]], None]


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from every other that has or will have its number."""

    boot: str
    namespace: str
    pid: int
    start: str

    def __str__(self) -> str:
        return f"{self.boot}.{self.namespace}.{self.pid}.{self.start}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner that a label names; None for a text that is no such label."""
        boot, _, rest = text.partition(".")
        namespace, _, rest = rest.partition(".")
        pid, _, start = rest.partition(".")
        return cls(boot, namespace, int(pid), start) if boot and pid.isdecimal() and start else None


def owner() -> Owner:
    """This process."""
    boot, namespace = _here()
    return Owner(boot, namespace, os.getpid(), _start_time(os.getpid()) or "unknown")


def labels(provider: str, lifetime_s: float) -> dict[str, str]:
    """What a box of this process carries from its creation on."""
    return {MARK: provider, OWNER: str(owner()), EXPIRES: str(int(time.time() + lifetime_s + GRACE))}


def abandoned(found: Mapping[str, str], now: float | None = None) -> str:
    """Why the box with these labels must go: its owner is dead, or its time is over; empty if it may stay.

    The owner's life can be judged only in its own boot and pid namespace; seen from elsewhere (a shared daemon) a box
    goes when its time is over. A box of ours with labels that nobody can read goes too: nobody else would remove it.
    """
    if MARK not in found:
        return ""
    who = Owner.parse(found.get(OWNER, ""))
    try:
        expires = float(found.get(EXPIRES, ""))
    except ValueError:
        return "its labels cannot be read"
    if who is None:
        return "its labels cannot be read"
    if (time.time() if now is None else now) > expires:
        return "its lifetime is over"
    if (who.boot, who.namespace) == _here() and not alive(who):
        return f"its owner, process {who.pid}, is dead"
    return ""


def alive(who: Owner) -> bool:
    """Whether the process still runs: a zombie does not, and one that inherited the number is another process."""
    start = _start_time(who.pid)
    if start is not None or Path("/proc/self/stat").exists():
        return start == who.start
    try:
        os.kill(who.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_time(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process; None if it is dead or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@cache
def _here() -> tuple[str, str]:
    """Boot and pid namespace, where the system has such things."""
    boot, namespace = "unknown", "0"
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    return boot, namespace


# name → what removes it, and its end of the box's stream. Plain dict operations only: a signal handler that waited for
# a lock of the thread that it interrupted would wait for ever.
_live: dict[str, tuple[Remover, int | None]] = {}


def keep(name: str, remover: Remover, descriptor: int | None = None) -> None:
    """Note a box: `remover([names])` is called for what is left when the process ends, at exit or by a signal.

    `remover` is plain blocking code of a second or two at most, without locks, threads or an event loop; boxes with the
    same remover come in one call. `descriptor` is the owner's end of the stream: a forked child lets go of it, or it
    would keep the box alive after the owner's death.
    """
    _live[name] = (remover, descriptor)


def forget(name: str) -> None:
    """The box is gone, or its stream closed. Fine for names that were never kept."""
    _live.pop(name, None)


def kept() -> tuple[str, ...]:
    """The boxes that would be removed now."""
    return tuple(_live)


def remove_all() -> None:
    """Remove every box that is still noted. What fails here is left to the dead-man switch and the next reaper."""
    groups: dict[Remover, list[str]] = {}
    for name, (remover, _) in dict(_live).items():
        groups.setdefault(remover, []).append(name)
        _live.pop(name, None)
    for remover, names in groups.items():
        with suppress(Exception):
            remover(names)


def catch_signals() -> bool:
    """Remove the boxes when a signal ends the process. Only from the main thread, and only where the application has no
    handler of its own: one that it has decides itself when to go, and leads through the exit hook. A handler that it
    installs later and that calls the one before it reaches ours. Returns whether this thread could."""
    if threading.current_thread() is not threading.main_thread():
        return False
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ended_by)
    return True


def _ended_by(number: int, _frame: FrameType | None) -> None:
    """Remove what there is, then die of the signal as if nobody had caught it."""
    remove_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _after_fork() -> None:
    """In a forked child the boxes are the parent's. Descriptors are replaced, not closed: objects of the parent that
    the child still holds will close these numbers, which must not be somebody else's by then. Signals end the child as
    they did before: a handler waits for the interpreter, and a child that waits for a lock would outlive SIGTERM, and
    whoever sent it (`multiprocessing.Pool` does) would wait for ever."""
    for number in (getattr(signal, name, None) for name in SIGNALS):
        if number is not None and signal.getsignal(number) is _ended_by:
            signal.signal(number, signal.SIG_DFL)       # whoever forks is the main thread of the child
    streams = [descriptor for _, descriptor in _live.values() if descriptor is not None]
    _live.clear()
    if streams:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in streams:
            with suppress(OSError):
                os.dup2(null, descriptor, inheritable=False)
        os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(remove_all)
