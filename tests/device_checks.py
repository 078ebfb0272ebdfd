"""Does what works on the CPU work on a GPU? A program for a process of its own: it runs every check of
`device_learner.py` and `device_engine.py` on the pretend device, and prints "passed" or what went wrong, as JSON. With
the argument `cuda` it does so on a GPU, which also proves the pretended one.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import device_engine
import device_learner
import numpy as np
import torch
from device_kit import CPU, DEVICE, measured, refused


def the_device_is_as_strict_as_a_gpu() -> None:
    """And no stricter: numbers of the CPU, and indices into a tensor of the device, are taken."""
    cpu, there = torch.ones(3, 3), torch.ones(3, 3).to(DEVICE)
    rows = torch.tensor([0, 2])
    mixed: list[Callable[[], Any]] = [
        lambda: cpu + there, lambda: there @ cpu, lambda: there.add_(cpu), lambda: torch.cat([cpu, there]),
        lambda: there.gather(1, rows[:, None]), lambda: cpu[rows.to(DEVICE)], lambda: there.index_add(0, rows, cpu),
        lambda: torch.nn.functional.embedding(rows, there), lambda: cpu.add_(there),
        lambda: torch.where(cpu > 0, there, there), lambda: torch.nn.functional.linear(there, cpu),
        lambda: there.index_select(0, rows),
    ]
    for act in mixed:
        refused(act, RuntimeError, "same device")
    for act in (there.numpy, lambda: np.asarray(there)):
        refused(act, TypeError, "host memory")
    assert (there * torch.tensor(2.0)).device == there[rows].device == DEVICE
    assert torch.where(there > 0, there, torch.tensor(0.0)).tolist() == cpu.tolist()
    waiting: list[Callable[[], Any]] = [
        lambda: float(there.sum()), there.tolist, lambda: there[there > 0], there.nonzero, lambda: there.to(CPU),
        lambda: cpu.to(DEVICE), lambda: bool(there.any()), lambda: torch.tensor([1], device=DEVICE),
    ]
    for act in waiting:
        with measured() as meter:
            act()
        assert meter.waited >= 1, dict(meter.waits)
    with measured() as meter:
        cpu.pin_memory().to(DEVICE, non_blocking=True) @ there
    assert not meter.waited


def checks(module: ModuleType) -> dict[str, Callable[[], None]]:
    """Its public functions."""
    mine = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in mine.items() if callable(value) and not name.startswith("_")}


def result_of(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return "passed"


if __name__ == "__main__":
    found = {**checks(device_learner), **checks(device_engine), "strict": the_device_is_as_strict_as_a_gpu}
    print(json.dumps({name: result_of(found[name]) for name in found}))
