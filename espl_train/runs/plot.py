"""The picture of a run, from metrics.jsonl alone: reward, validation, and the prompts' ratings with their lineage.

Keys it reads: `best` (an id), `reward/mean`, `reward/<id>`, `validation/root`, `validation/best` (with `…/low` and
`…/high`, or `validation/count` for an interval), `rating/<id>/mu`, `rating/<id>/sigma`, `parents/<id>` ("p0001+p0003").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espl_train.runs.islands import names, own
from espl_train.runs.metrics import read_lines
from espl_train.runs.summary import series, wilson

INK, MUTED, GRID = "#1f2430", "#7a8190", "#e7e9ee"
ROOT, BEST, MEAN, FAINT = "#7a8190", "#0b7a75", "#c8553d", "#cdd2dc"
OTHERS = ("#c9952b", "#7464b8")
RATED = re.compile(r"rating/([^/]+)/mu")
PLAYED = re.compile(r"reward/((?:[\w-]+:)?p\d+)")


def plot(run: Path, target: Path | None = None) -> Path:
    """Draw `run`/metrics.jsonl into `target` (default: `run`/plot.png) and return its path."""
    target = target or run / "plot.png"
    draw(list(read_lines(run / "metrics.jsonl")), target, run.name)
    return target


def draw(history: Sequence[Mapping[str, Any]], target: Path, title: str = "") -> None:
    """Three panels side by side, readable at the width of a README; with several environments a row for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    islands = names(history)
    figure = Figure(figsize=(13.2, 4.3 * len(islands)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(islands), 1, squeeze=False)[:, 0] if len(islands) > 1 else [figure]
    for row, name in zip(rows, islands, strict=True):
        _panels(row, [own(record, name) for record in history])
        if title or name:
            row.suptitle(" · ".join(filter(None, (title, name))), x=0.012, ha="left", fontsize=11, color=MUTED)
    figure.savefig(target)


def _panels(figure: Any, history: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    best = best_prompt(history)
    _reward(axes[0], history)
    _validation(axes[1], history)
    _ratings(axes[2], history, best)
    last = max([float(r["step"]) for r in history if "step" in r], default=1.0)
    for axis in axes:
        _plain(axis, max(last, 1.0))


def best_prompt(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The prompt that the run names as its best (`best`), else the one with the highest last mu - 2 sigma."""
    named = [record["best"] for record in history if isinstance(record.get("best"), str)]
    if named:
        return named[-1]
    bounds: dict[str, float] = {}
    for record in history:
        bounds.update(lower_bounds(record))
    return max(bounds, key=lambda name: bounds[name], default=None)


def lower_bounds(record: Mapping[str, Any]) -> dict[str, float]:
    """mu - 2 sigma of every prompt that is rated in a record."""
    out = {}
    for key, mu in record.items():
        if (match := RATED.fullmatch(key)) and isinstance(mu, int | float):
            sigma = record.get(f"rating/{match[1]}/sigma")
            out[match[1]] = mu - 2 * sigma if isinstance(sigma, int | float) else float("-inf")
    return out


def _reward(axis: Any, history: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("Training reward", loc="left", fontsize=12, color=INK, fontweight="bold")
    lines = [("all prompts", *series(history, "reward/mean"), MEAN, 2.4)]
    if root := root_prompt(history):
        lines.append(("root prompt", *series(history, f"reward/{root}"), ROOT, 1.7))
        lines.append(("best rated", *best_rated(history), BEST, 1.7))
    for label, steps, values, colour, width in lines:
        if not steps:
            continue
        if len(steps) > 20:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            values = _smooth(values)
        marker = "o" if len(steps) <= 3 else None
        axis.plot(steps, values, color=colour, linewidth=width, label=label, marker=marker, markersize=4)
    _unit_scale(axis, [value for _, _, values, _, _ in lines for value in values])
    _legend(axis, "no rewards yet")


def best_rated(history: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Steps and rewards of whichever prompt that played in the step had the highest mu - 2 sigma after it."""
    steps, values = [], []
    for record in history:
        played = {
            m[1]: float(v) for k, v in record.items() if (m := PLAYED.fullmatch(k)) and isinstance(v, int | float)
        }
        bounds = {name: bound for name, bound in lower_bounds(record).items() if name in played}
        if bounds:
            steps.append(float(record["step"]))
            values.append(played[max(bounds, key=lambda name: bounds[name])])
    return steps, values


def _validation(axis: Any, history: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("Validation accuracy", loc="left", fontsize=12, color=INK, fontweight="bold")
    shown = []
    for label, name, colour in (("root prompt", "root", ROOT), ("best prompt", "best", BEST)):
        steps, values = series(history, f"validation/{name}")
        if not steps:
            continue
        low, high = _interval(history, name)
        axis.fill_between(steps, low, high, color=colour, alpha=0.14, linewidth=0)
        axis.plot(steps, values, color=colour, linewidth=2.2, marker="o", markersize=4.5, label=label)
        shown += [*low, *high]
    _, start = series(history, "validation/root")
    if start:
        axis.axhline(start[0], color=INK, linewidth=1, linestyle=(0, (2, 3)), label="start")
    _unit_scale(axis, shown)
    _legend(axis, "no validation yet")


def _interval(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The 95 % band: as recorded, else from the number of problems, else none."""
    key, low, high = f"validation/{name}", [], []
    for record in history:
        value = record.get(key)
        if not isinstance(value, int | float):
            continue
        count = record.get("validation/count", 0) or 0
        below, above = wilson(value, count) if count else (value, value)
        low.append(_or(record.get(f"{key}/low"), below))
        high.append(_or(record.get(f"{key}/high"), above))
    return low, high


def _or(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _ratings(axis: Any, history: Sequence[Mapping[str, Any]], best: str | None) -> None:
    axis.set_title("Ratings of the system prompts (μ ± 2σ)", loc="left", fontsize=12, color=INK, fontweight="bold")
    names = list(dict.fromkeys(m[1] for r in history for key in r if (m := RATED.fullmatch(key))))
    paths = {name: path for name in names if (path := rating_path(history, name))}
    if not paths:
        _empty(axis, "no ratings yet")
        return
    root = root_prompt(history)
    ranked = sorted(paths, key=lambda n: paths[n][-1][1] - 2 * paths[n][-1][2], reverse=True)
    ranked.sort(key=lambda n: n not in (best, root))
    colours = {**dict(zip([n for n in ranked if n not in (best, root)], OTHERS, strict=False)), root: ROOT, best: BEST}
    chosen = [name for name in ranked if name in colours]
    for name in reversed(ranked):
        steps, mus, sigmas = (list(column) for column in zip(*paths[name], strict=True))
        if name not in chosen:
            axis.plot(steps, mus, color=FAINT, linewidth=1, zorder=2)
            continue
        band = [[m + k * 2 * s for m, s in zip(mus, sigmas, strict=True)] for k in (-1, 1)]
        axis.fill_between(steps, *band, color=colours[name], alpha=0.18 if name == best else 0.1, linewidth=0)
        axis.plot(steps, mus, color=colours[name], linewidth=2.4 if name == best else 1.7, zorder=3)
    _lineage(axis, history, paths)
    axis.set_ylim(*_rating_range([paths[name] for name in chosen]))
    _end_labels(
        axis, [(paths[n][-1][0], paths[n][-1][1], n, colours[n]) for n in chosen], {root: "root", best: "best"}, best
    )


def _rating_range(paths: Sequence[list[tuple[float, float, float]]]) -> tuple[float, float]:
    """All means, and the bands at the end: the first bands are so wide that everything else would be flat."""
    low = min(min(min(m for _, m, _ in path), path[-1][1] - 2 * path[-1][2]) for path in paths)
    high = max(max(max(m for _, m, _ in path), path[-1][1] + 2 * path[-1][2]) for path in paths)
    pad = max((high - low) * 0.08, 0.5)
    return low - pad, high + pad


def rating_path(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float, float]]:
    """(step, mu, sigma) of one prompt over the run."""
    keys = (f"rating/{name}/mu", f"rating/{name}/sigma")
    rows = [(r.get("step"), r.get(keys[0]), r.get(keys[1])) for r in history]
    return [(float(s), float(m), float(d)) for s, m, d in rows if None not in (s, m, d)]  # type: ignore[arg-type]


def _lineage(
    axis: Any, history: Sequence[Mapping[str, Any]], paths: Mapping[str, list[tuple[float, float, float]]]
) -> None:
    """A dot where a prompt is first rated and a thin line from each parent's rating at that time."""
    for child, parents in parents_of(history).items():
        if child not in paths:
            continue
        step, mu, _ = paths[child][0]
        axis.plot([step], [mu], marker="o", markersize=3.5, color=INK, zorder=5)
        for parent in parents:
            before = [p for p in paths.get(parent, []) if p[0] < step] or paths.get(parent, [])[:1]
            if before:
                axis.plot(
                    [before[-1][0], step],
                    [before[-1][1], mu],
                    color=INK,
                    linewidth=0.8,
                    alpha=0.45,
                    linestyle=":",
                    zorder=4,
                )


def parents_of(history: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Child → parents, as recorded under `parents/<id>`."""
    return {
        key.removeprefix("parents/"): [p for p in value.split("+") if p]
        for record in history
        for key, value in record.items()
        if key.startswith("parents/") and isinstance(value, str)
    }


def root_prompt(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The root is the first id in order: ids are numbered by birth."""
    names = {m[1] for r in history for key in r if (m := RATED.fullmatch(key))}
    return min(names, default=None)


def _end_labels(
    axis: Any, ends: Sequence[tuple[float, float, str, str]], roles: Mapping[str | None, str], best: str | None
) -> None:
    """Names at the right end of their lines, moved apart so that none covers another."""
    low, high = axis.get_ylim()
    gap, last = (high - low) * 0.06, float("-inf")
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        last = max(y, last + gap)
        weight = "bold" if name == best else "normal"
        axis.annotate(
            _local(name) + (f" ({roles[name]})" if name in roles else ""),
            (x, last),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=colour,
            fontweight=weight,
            annotation_clip=False,
        )


def _local(prompt: str) -> str:
    """The id of a prompt without the environment, which its row is named after."""
    return prompt.rpartition(":")[2]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the run."""
    half = max(len(values) // 20, 1)
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def _unit_scale(axis: Any, values: Sequence[float]) -> None:
    """Accuracies get a little air around them and never a scale beyond what an accuracy can be."""
    if not values:
        return
    low, high = min(values), max(values)
    pad = max((high - low) * 0.1, 0.03)
    bounded = low >= 0 and high <= 1
    axis.set_ylim(max(low - pad, -0.02) if bounded else low - pad, min(high + pad, 1.02) if bounded else high + pad)


def _legend(axis: Any, otherwise: str) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncol=3, frameon=False, fontsize=9.5, labelcolor=INK,
            columnspacing=1.2, handlelength=1.6,
        )
    else:
        _empty(axis, otherwise)


def _empty(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=MUTED, fontsize=11)


def _plain(axis: Any, last: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(-0.02 * last, 1.02 * last)
    axis.set_xlabel("step", color=MUTED, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.tick_params(colors=MUTED, labelsize=9.5, length=0)
    axis.grid(True, axis="y", color=GRID, linewidth=1)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
