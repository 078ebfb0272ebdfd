"""Small charts as inline SVG. Colours are classes, so that the page's light and dark themes apply; all text is escaped.

Coordinates are in the units of the view box; the browser scales the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espl_envs.core.errors import MissingExtra
from espl_envs.evaluate.plain import one_line

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 10, 38
MOST_CELLS = 4000


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: (x, mean, low, high) per point, in a colour class, with an optional dash."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, float | None, float | None]]


def curves(lines: Sequence[Line], label: str, logarithmic: bool = False, steps: bool = False) -> Markup:
    """Curves from 0 to 1 with their bands. `logarithmic`: the x axis, with 0 at its left end; `steps`: a value holds
    until the next budget."""
    xs = sorted({point[0] for line in lines for point in line.points})
    place = _axis(xs, logarithmic)
    parts = [_frame(label), *_ticks(xs, place, logarithmic)]
    for line in lines:
        known = [p for p in line.points if p[2] is not None and p[3] is not None]
        if len(known) > 1:
            upper = _path([(place(x), _y(high or 0.0)) for x, _, _, high in known], steps)
            lower = _path([(place(x), _y(low or 0.0)) for x, _, low, _ in reversed(known)], steps, back=True)
            parts.append(_svg('<path class="band {}" d="M{} L{} Z"/>', line.colour, upper, lower))
        parts.append(_svg('<path class="line {}" d="M{}"/>', line.colour,
                          _path([(place(x), _y(mean)) for x, mean, _, _ in line.points], steps)))  # fmt: skip
        for x, mean, low, high in line.points:
            around = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
            text = f"{line.name}, {label} {_number(x)}: {mean:.3f}{around}"
            parts.append(_svg('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>',
                              line.colour, place(x), _y(mean), text))  # fmt: skip
    return _whole(parts, WIDTH, HEIGHT, label)


def whisker(mean: float, low: float | None, high: float | None, size: str = "small") -> Markup:
    """A mean and its interval on a line from 0 to 1."""
    width, height, radius = (560, 34, 7) if size == "large" else (150, 16, 4)
    middle = height / 2

    def at(value: float) -> float:
        return 8 + min(max(value, 0.0), 1.0) * (width - 16)

    parts = [_svg('<line class="rail" x1="8" x2="{}" y1="{m}" y2="{m}"/>', width - 8, m=middle)]
    parts += [_svg('<line class="rail" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>', middle - 4, middle + 4, x=at(tick))
              for tick in (0.0, 0.25, 0.5, 0.75, 1.0)]  # fmt: skip
    if low is not None and high is not None:
        reach = '<line class="reach" x1="{:.1f}" x2="{:.1f}" y1="{m}" y2="{m}"/>'
        parts.append(_svg(reach, at(low), at(high), m=middle))
    parts.append(_svg('<circle class="point" cx="{:.1f}" cy="{}" r="{}"/>', at(mean), middle, radius))
    return _whole(parts, width, height, f"{mean:.3f}", "whisker")


def stacked(shares: Mapping[str, int]) -> Markup:
    """Counts as one bar of parts, in the order given; the class of a part is its name."""
    total, x, parts = sum(shares.values()), 0.0, []
    for name, count in shares.items():
        width = 600 * count / total if total else 0.0
        if width:
            parts.append(_svg('<rect class="{}" x="{:.2f}" y="0" width="{:.2f}" height="18"><title>{}</title></rect>',
                              name, x, max(width - 1.5, 0.75), f"{name.replace('_', ' ')}: {count:,}"))  # fmt: skip
        x += width
    return _whole(parts, 600, 18, "outcomes", "stack")


def heat(cells: Sequence[tuple[float | None, str, str | None]]) -> Markup:
    """One square per task: its score (None: unknown), a tooltip, and the anchor of a transcript if there is one."""
    squares = []
    for score, text, anchor in cells[:MOST_CELLS]:
        shade = "none" if score is None else f"h{round(10 * min(max(score, 0.0), 1.0))}"
        if anchor:
            squares.append(_svg('<a class="{}" title="{}" href="#{}"></a>', shade, text, anchor))
        else:
            squares.append(_svg('<i class="{}" title="{}"></i>', shade, text))
    return _svg('<div class="heat">{}</div>', _join(squares))


def _frame(label: str) -> Markup:
    lines = [
        _svg('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/><text class="tick" x="{}" y="{t:.1f}" '
             'text-anchor="end">{}</text>', LEFT, WIDTH - RIGHT, LEFT - 7, f"{value:g}", y=_y(value), t=_y(value) + 4)
        for value in (0, 0.25, 0.5, 0.75, 1)
    ]  # fmt: skip
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return _svg("{}", _join(lines)) + _svg(
        '<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>', middle, HEIGHT - 3, label
    )


def _axis(xs: Sequence[float], logarithmic: bool) -> Any:
    """x → place in the view box."""
    def scaled(x: float) -> float:
        return math.log(max(x, 1e-9)) if logarithmic else x

    positive = [x for x in xs if x > 0] if logarithmic else list(xs)
    low, high = (scaled(positive[0]), scaled(positive[-1])) if positive else (0.0, 1.0)
    span = (high - low) or 1.0
    lone = high == low

    def place(x: float) -> float:
        share = 0.5 if lone else min(max((scaled(x) - low) / span, 0.0), 1.0)
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)

    return place


def _ticks(xs: Sequence[float], place: Any, logarithmic: bool) -> list[Markup]:
    """Labels under the axis: as many of the points as have room."""
    shown: list[float] = []
    wanted = [x for x in xs if not logarithmic or str(int(x)).rstrip("0") in ("1", "2", "5")]
    for x in wanted or xs:
        if not shown or place(x) - place(shown[-1]) >= 30:
            shown.append(x)
    return [_svg('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>', place(x), HEIGHT - BOTTOM + 17,
                 _number(x)) for x in shown]  # fmt: skip


def _path(points: Sequence[tuple[float, float]], steps: bool, back: bool = False) -> str:
    """`x,y x,y …`; in steps, a value holds until the next x."""
    if not steps:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    out: list[tuple[float, float]] = []
    for x, y in points:
        if out:
            out.append((out[-1][0], y) if back else (x, out[-1][1]))
        out.append((x, y))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in out)


def _y(value: float) -> float:
    return TOP + (1 - min(max(value, 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)


def _number(x: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if x >= unit:
            return f"{x / unit:g}{name}"
    return f"{x:g}"


def _whole(parts: Sequence[Any], width: float, height: float, label: str, kind: str = "chart") -> Markup:
    fit = "none" if kind == "stack" else "xMidYMid"
    return _svg('<svg class="{}" viewBox="0 0 {} {}" preserveAspectRatio="{}" role="img" aria-label="{}">{}</svg>',
                kind, width, height, fit, one_line(label), _join(parts))  # fmt: skip


def _join(parts: Sequence[Any]) -> Markup:
    return _svg("").join(parts)


def _svg(template: str, *values: Any, **named: Any) -> Markup:
    """A template filled in, every value escaped."""
    try:
        from markupsafe import Markup
    except ImportError as missing:
        raise MissingExtra("eval", "report.html (no module markupsafe)") from missing
    return Markup(template).format(*values, **named)
