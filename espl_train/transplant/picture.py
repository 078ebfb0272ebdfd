"""The matrix as a picture: a heat map of the cells, and the differences with their intervals beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espl_envs.evaluate.plain import one_line
from espl_train.runs.plot import GRID, INK, MUTED
from espl_train.transplant.matrix import Matrix

LIGHT, DARK = "#f3f6f5", "#0b7a75"
NO, YES = "#9aa1ad", "#c8553d"
MOST = 14                       # differences that are drawn; matrix.json has all


def draw(matrix: Matrix, folder: Path, title: str) -> list[Path]:
    """Write `matrix.svg` and `matrix.png` into `folder`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(matrix.plan.weights), len(matrix.plan.prompts)
    shown = list(matrix.contrasts)[:MOST]
    height = max(1.5 + 0.62 * rows, 1.3 + 0.42 * len(shown), 2.6)
    figure = Figure(figsize=(2.4 + 1.45 * columns + 7.6, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.6 + 1.45 * columns, 6.4))
    _cells(left, matrix)
    _differences(right, shown)
    figure.suptitle(one_line(title, 140), x=0.012, ha="left", fontsize=10, color=MUTED, parse_math=False)
    paths = [folder / f"matrix.{kind}" for kind in ("svg", "png")]
    with matplotlib.rc_context({"svg.hashsalt": "espl", "svg.fonttype": "none"}):      # the same bytes every time
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _cells(axis: Any, matrix: Matrix) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    plan = matrix.plan
    colours = LinearSegmentedColormap.from_list("espl", [LIGHT, DARK])
    known = [mean.mean for mean in matrix.means.values() if mean]
    low, high = min([0.0, *known]), max([*known, 0.05])
    table = [[(matrix.means[w.name, p.name]) for p in plan.prompts] for w in plan.weights]
    grid = [[cell.mean if cell else low for cell in row] for row in table]
    axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(table):
        for x, cell in enumerate(row):
            dark = cell is not None and (cell.mean - low) / (high - low) > 0.55
            _text(axis, x, y - 0.08, f"{cell.mean:.3f}" if cell else "–", 12, "white" if dark else INK)
            if cell and cell.low is not None:
                _text(axis, x, y + 0.24, f"{cell.low:.2f} – {cell.high:.2f}", 8, "white" if dark else MUTED)
    _ticks(axis.set_xticks, [p.name for p in plan.prompts])
    _ticks(axis.set_yticks, [w.name for w in plan.weights])
    axis.xaxis.set_ticks_position("top")
    axis.set_title("prompt →   weights ↓", loc="left", fontsize=10, color=MUTED)
    _bare(axis)


def _differences(axis: Any, shown: Sequence[Any]) -> None:
    axis.set_title("differences, paired over problems (95 %)", loc="left", fontsize=10, color=MUTED)
    axis.axvline(0, color=INK, linewidth=1)
    for y, (_, found) in enumerate(shown):
        low, high = (found.mean if end is None else end for end in (found.low, found.high))
        colour = YES if low > 0 or high < 0 else NO
        axis.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axis.plot([found.mean], [y], marker="o", markersize=5, color=colour)
    labels = [f"{contrast.question}\n{one_line(str(contrast), 72)}" for contrast, _ in shown]
    axis.set_yticks(range(len(labels)), labels, parse_math=False, linespacing=1.35)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.grid(True, axis="x", color=GRID, linewidth=1)
    axis.set_axisbelow(True)
    _bare(axis)


def _text(axis: Any, x: float, y: float, text: str, size: float, colour: str) -> None:
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def _ticks(put: Any, names: Sequence[str], most: int = 18) -> None:
    """Names as they are: a dollar sign in one begins no formula."""
    put(range(len(names)), [one_line(name, most) for name in names], parse_math=False)


def _bare(axis: Any) -> None:
    axis.tick_params(colors=INK, labelsize=9, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
