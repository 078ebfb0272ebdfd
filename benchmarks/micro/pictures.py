"""The pictures of the report, from figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.micro.arms import ARMS
from benchmarks.micro.figures import PROMPTS, WEIGHTS, Interval, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, OWN, OTHER = "#1f2430", "#7a8190", "#e7e9ee", "#0b7a75", "#c8553d"
COLOURS = {"evolution_rl": OWN, "rl": OTHER, "evolution": "#c9952b", "placebo": "#7464b8", "sequential": "#3f78b5"}
TITLES = {"none": "no prompt", "evolved": "evolved prompt", "oracle": "oracle prompt"}


def save(name: Path, draw: Any, *figures: Any, size: tuple[float, float], panels: int = 1) -> None:
    """One picture: `draw` gets the axes (a list of them where there are several panels) and the figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(axes[0] if panels == 1 else list(axes), *figures)
    figure.savefig(name)


def intervals(axes: Axes, found: Mapping[str, Interval], names: Mapping[str, str], label: str) -> None:
    """One row per entry, the first one at the top: a point with its interval, in points."""
    for place, (key, value) in enumerate(reversed(list(found.items()))):
        colour = OWN if key.startswith("evolution_rl") else INK
        axes.plot([100 * value["low"], 100 * value["high"]], [place, place], color=colour, lw=2.2)
        axes.plot(100 * value["mean"], place, "o", color=colour, ms=6)
        axes.annotate(f"{100 * value['mean']:.1f}", (100 * value["mean"], place), (0, 7), textcoords="offset points",
                      ha="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(found)), [names.get(key, key) for key in reversed(list(found))], color=INK)
    axes.set_ylim(-0.6, len(found) - 0.2)
    axes.set_xlabel(label, color=MUTED)
    plain(axes)


def differences(axes: Axes, found: Mapping[str, Interval]) -> None:
    """Paired differences; zero is marked."""
    names = {key: " − ".join(ARMS[arm].title for arm in key.split("-")) for key in found}
    axes.axvline(0, color=MUTED, lw=1)
    intervals(axes, found, names, "difference in points of test accuracy, world by world, with its 95 % interval")


def curves(panels: Sequence[Axes], table: Table, arms: Sequence[str]) -> None:
    """Training reward by step, of the whole batch and of the prompt that led before the step."""
    for axes, leader in zip(panels, (False, True), strict=True):
        for arm in arms:
            points = table.curve(arm, leader)
            axes.plot(range(1, len(points) + 1), points, color=COLOURS.get(arm, MUTED), lw=1.8, label=ARMS[arm].title)
        axes.set_title("under the leading prompt" if leader else "all rollouts of the step", loc="left", fontsize=10)
        axes.set_xlabel("step", color=MUTED)
        axes.set_ylim(0, 1)
        plain(axes)
    panels[0].set_ylabel("training reward", color=MUTED)
    panels[1].legend(frameon=False, fontsize=8)


def heat(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], signed: bool) -> None:
    """A table in colours, each cell with its number in points."""
    bound = np.nanmax(np.abs(values)) if signed else 100.0
    axes.imshow(values, cmap="BrBG" if signed else "GnBu", vmin=-bound if signed else 0, vmax=bound, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        dark = abs(value) > 0.62 * bound
        text = "–" if np.isnan(value) else f"{value:+.0f}" if signed and round(value) else f"{value:.0f}".lstrip("-")
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else INK, fontsize=10)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def transplant(axes: Axes, found: Mapping[str, Mapping[str, Interval]]) -> None:
    """Weights × prompt."""
    values = np.array([[100 * found[arm][prompt]["mean"] for prompt in PROMPTS] for arm in WEIGHTS])
    rows = {"base": "base weights", "rl": "RL's weights", "evolution_rl": "E-SPL's weights"}
    heat(axes, values, [rows[arm] for arm in WEIGHTS], [TITLES[p] for p in PROMPTS], signed=False)


def phase(panels: Sequence[Axes], found: Mapping[str, Mapping[tuple[float, float], float]]) -> None:
    """Differences over both dials, declarative upwards: one panel per other side."""
    for axes, (other, cells) in zip(panels, found.items(), strict=True):
        ups, acrosses = sorted({d for d, _ in cells}, reverse=True), sorted({p for _, p in cells})
        values = np.array([[100 * cells.get((d, p), np.nan) for p in acrosses] for d in ups])
        heat(axes, values, [f"{d:g}" for d in ups], [f"{p:g}" for p in acrosses], signed=True)
        axes.set_title(f"E-SPL − {ARMS[other].title}", loc="left", fontsize=10)
        axes.set_xlabel("procedural gap", color=MUTED)
    panels[0].set_ylabel("declarative gap", color=MUTED)


def plain(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0)
