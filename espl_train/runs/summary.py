"""What a run came to: the record that the loop hands to the console at the end, and the small table it is shown as."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
CURVES = (
    ("reward", ("reward/mean",)),
    ("validation, root prompt", ("validation/root",)),
    ("validation, best prompt", ("validation/best",)),
    ("tokens per step", ("tokens/sampled",)),
    ("gradient norm", ("update/grad_norm",)),
)


@dataclass(frozen=True, slots=True)
class Score:
    """One evaluation: the mean reward over `count` problems, with its 95 % interval where it is known."""

    name: str  # "test, best prompt"
    mean: float
    count: int = 0
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None and self.high is not None else ""
        return f"{self.mean:.3f}{interval}" + (f" (n = {self.count})" if self.count else "")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best system prompt of an environment (`env` is its name, "" where there is one), as the model saw it: model
    text, to be escaped before it is shown."""

    prompt: str      # its id
    text: str
    env: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run. `chosen` has a prompt for each of its environments, in their order."""

    run: Path
    steps: int
    seconds: float
    tokens: int
    rollouts: int
    faulted: int
    chosen: tuple[Chosen, ...]
    scores: tuple[Score, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()  # the records of metrics.jsonl
    plot: Path | None = None
    notes: tuple[str, ...] = ()


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share `mean` of `count` (Wilson 1927); sound near 0 and 1, where a run often ends."""
    if count <= 0:
        return 0.0, 1.0
    mean = min(max(mean, 0.0), 1.0)
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was recorded and finite."""
    points = [(r.get("step"), r.get(key)) for r in history]
    good = [(float(x), float(y)) for x, y in points if isinstance(x, int | float) and isinstance(y, int | float)]
    good = [(x, y) for x, y in good if math.isfinite(y)]
    return [x for x, _ in good], [y for _, y in good]


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The values as unicode bars, resampled to at most `width` columns by averaging."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span <= 1e-12 * max(1.0, abs(low)):
        return BARS[len(BARS) // 2] * columns
    return "".join(BARS[min(int((m - low) / span * len(BARS)), len(BARS) - 1)] for m in means)


def curves(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows (name, first, sparkline, last) of the metrics that every run has."""
    rows = []
    for name, keys in CURVES:
        values = next((v for k in keys if (v := series(history, k)[1])), [])
        if values:
            rows.append((name, f"{values[0]:.3g}", sparkline(values), f"{values[-1]:.3g}"))
    return rows


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
