"""The limits and counters of the control group that this process is in, versions 1 and 2."""

from __future__ import annotations

import contextlib
import os

_UNLIMITED = 1 << 60


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return None


def _directories() -> dict[str, str]:
    """Controller -> directory of our own group, "" for the unified hierarchy. A group that is not mounted is not there:
    counters of a group that others are in would tell lies."""
    paths = {}
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    found = {}
    for line in (_read("/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, point = before.split(" ")[3:5]
        for controller in [""] if kind == "cgroup2" else options.split(" ")[-1].split(","):
            own = paths.get(controller)
            if own is not None and (own == root or root == "/" or own.startswith(root + "/")):
                found[controller] = os.path.normpath(point + "/" + os.path.relpath(own, root))
    return found


def _number(text: str | None) -> int | None:
    """None for what is not there and for what is not limited."""
    if text is None or not text.strip().isdigit():
        return None
    value = int(text)
    return None if value >= _UNLIMITED else value


class Cgroup:
    """What the kernel allows us and counts for us. Everything is None where it cannot be known."""

    def __init__(self) -> None:
        own = _directories()
        unified = own.get("")
        self.version = 1 if "memory" in own else 2 if unified else None
        if self.version == 1:
            memory, pids, cpu = own["memory"], own.get("pids", ""), own.get("cpu", "")
            self.memory = _number(_read(memory + "/memory.limit_in_bytes"))
            self.memory_and_swap = _number(_read(memory + "/memory.memsw.limit_in_bytes"))
            self._usage, self._peak = memory + "/memory.usage_in_bytes", memory + "/memory.max_usage_in_bytes"
            events = memory + "/memory.oom_control"
            quota = [_number(_read(f"{cpu}/cpu.cfs_{name}_us")) for name in ("quota", "period")]
        else:
            memory = pids = unified or ""
            self.memory = _number(_read(memory + "/memory.max"))
            swap = _number(_read(memory + "/memory.swap.max"))
            self.memory_and_swap = None if self.memory is None or swap is None else self.memory + swap
            self._usage, self._peak = memory + "/memory.current", memory + "/memory.peak"
            events = memory + "/memory.events"
            quota = [_number(part) for part in (_read(memory + "/cpu.max") or "").split()]
        self.pids = _number(_read(f"{pids}/pids.max"))
        self._pids_used = f"{pids}/pids.current"
        self.cpus = quota[0] / quota[1] if len(quota) == 2 and quota[0] and quota[1] else None
        self._events = -1
        if self.memory is not None:
            with contextlib.suppress(OSError):
                self._events = os.open(events, os.O_RDONLY | os.O_CLOEXEC)
        self._kills_seen = self._kills()

    def killed(self) -> bool:
        """Whether processes of the group were ended for want of memory since this was last asked."""
        before, self._kills_seen = self._kills_seen, self._kills()
        return self._kills_seen > before

    def _kills(self) -> int:
        """How many, ever; 0 where that is not counted."""
        if self._events < 0:
            return 0
        for line in os.pread(self._events, 1024, 0).split(b"\n"):
            name, _, value = line.partition(b" ")
            if name == b"oom_kill":
                return int(value)
        return 0

    def usage(self) -> dict[str, float]:
        """Current numbers, where known."""
        known = {"memory_mb": self._usage, "peak_mb": self._peak, "pids": self._pids_used}
        numbers = {name: _number(_read(path)) for name, path in known.items()}
        return {
            name: value / (1 << 20) if name.endswith("_mb") else float(value)
            for name, value in numbers.items() if value is not None
        }
