"""The tabular tier in full: its own tuning, all arms on 60 fresh worlds, and the phase diagram over both dials.

The rate of every arm is the best of `RATES` on development worlds with both dials on, and holds for all cells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.micro.arms import BOTH, NO_DECLARATIVE, NO_PROCEDURAL, Cell
from benchmarks.micro.figures import interval
from benchmarks.micro.tabular import ARMS, run

RATES = (0.2, 0.4, 0.8, 1.6)
TUNING, WORLDS, PHASE_WORLDS = range(20, 28), range(2000, 2060), range(2000, 2008)
DIALS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIDES = ("evolution_rl", "rl", "evolution", "sequential")
Key = tuple[str, int, Cell, float]


def measure(folder: Path, processes: int) -> None:
    """Tune, run, and keep the figures as tabular.json."""
    started = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        tried = accuracies(pool, [(a, w, BOTH, r) for a in ARMS for r in RATES for w in TUNING])
        scores = {a: {r: float(np.mean([tried[a, w, BOTH, r] for w in TUNING])) for r in RATES} for a in ARMS}
        rates = {arm: max(row, key=lambda rate: row[rate]) for arm, row in scores.items()}
        jobs = [(arm, world, BOTH, rates[arm]) for world in WORLDS for arm in ARMS]
        jobs += [(a, w, cell, rates[a]) for cell in (NO_DECLARATIVE, NO_PROCEDURAL) for w in WORLDS for a in SIDES]
        grid = [Cell(d, p) for d in DIALS for p in DIALS]
        jobs += [(arm, world, cell, rates[arm]) for world in PHASE_WORLDS for cell in grid for arm in SIDES]
        found = accuracies(pool, dict.fromkeys(jobs))
    figures = {
        "worlds": len(WORLDS), "tuning": scores, "rates": rates,
        "arms": {arm: interval([found[arm, w, BOTH, rates[arm]] for w in WORLDS], arm) for arm in ARMS},
        "paired": {
            f"evolution_rl-{arm}": paired(found, rates, arm, BOTH, WORLDS) for arm in ARMS if arm != "evolution_rl"
        },
        "declarative 0": {f"evolution_rl-{a}": paired(found, rates, a, NO_DECLARATIVE, WORLDS) for a in SIDES[1:]},
        "procedural 0": {f"evolution_rl-{a}": paired(found, rates, a, NO_PROCEDURAL, WORLDS) for a in SIDES[1:]},
        "phase": {
            "worlds": len(PHASE_WORLDS),
            **{
                other: [
                    {"declarative": c.declarative, "procedural": c.procedural,
                     **paired(found, rates, other, c, PHASE_WORLDS)}
                    for c in grid
                ]
                for other in SIDES[1:]
            },
        },
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    (folder / "tabular.json").write_text(json.dumps(figures, indent=1) + "\n")


def accuracies(pool: ProcessPoolExecutor, keys: Iterable[Key]) -> dict[Key, float]:
    """Test accuracy of every run."""
    keys = list(keys)
    return dict(zip(keys, pool.map(accuracy, keys, chunksize=8), strict=True))


def accuracy(key: Key) -> float:
    """Of one run."""
    arm, world, cell, rate = key
    return float(run(ARMS[arm], world, cell, rate)["test"])


def paired(
    found: Mapping[Key, float], rates: Mapping[str, float], other: str, cell: Cell, worlds: Sequence[int]
) -> dict[str, Any]:
    """E-SPL minus the other arm, world by world."""
    gaps = [
        found["evolution_rl", w, cell, rates["evolution_rl"]] - found[other, w, cell, rates[other]] for w in worlds
    ]
    return interval(gaps, other, str(cell))
