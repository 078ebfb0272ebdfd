"""The matrix on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from espl_envs.evaluate.plain import one_line

if TYPE_CHECKING:
    from espl_envs.evaluate.intervals import Estimate
    from espl_train.transplant.matrix import Matrix


def show(matrix: Matrix, notes: Sequence[str], files: Sequence[Path], console: Console | None = None) -> None:
    """Print the cells, the differences, what has to be known beside them, and where the files are."""
    out = console or Console(highlight=False)
    for table in (_cells(matrix), _contrasts(matrix)):
        if table.row_count:
            out.print(table)
            out.print()
    for prompt in matrix.plan.prompts:
        out.print(Text(f"{prompt.name}: {one_line(prompt.origin)}", "dim"), soft_wrap=True)
    for note in notes:
        out.print(Text(note, "dim"), soft_wrap=True)
    for file in files:
        out.print(Text(str(file)), soft_wrap=True)


def _cells(matrix: Matrix) -> Table:
    table = _table("weights \\ prompt", *(prompt.name for prompt in matrix.plan.prompts))
    for weights in matrix.plan.weights:
        found = (matrix.means[weights.name, prompt.name] for prompt in matrix.plan.prompts)
        table.add_row(Text(weights.name), *map(_cell, found))
    return table


def _cell(mean: Estimate | None) -> Text:
    if mean is None:
        return Text("–")
    interval = f"[{mean.low:.3f}, {mean.high:.3f}]" if mean.low is not None else ""
    return Text.assemble((f"{mean.mean:.3f}", "bold"), "\n", (interval, "dim"))


def _contrasts(matrix: Matrix) -> Table:
    table = _table("difference")
    table.add_column()
    for contrast, found in matrix.contrasts:
        decided = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
        asked = Text.assemble(contrast.question, "\n", (str(contrast), "dim"))
        table.add_row(Text(_signed(found), "bold" if decided else ""), asked)
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(Text(name), no_wrap=True)
    return table


def _signed(found: Estimate) -> str:
    interval = f" [{found.low:+.3f}, {found.high:+.3f}]" if found.low is not None else ""
    return f"{found.mean:+.3f}{interval}"
