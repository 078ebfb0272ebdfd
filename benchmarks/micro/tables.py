"""What the records come to: summary.json, tables.md and the pictures, all from what lies in one folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.micro import pictures
from benchmarks.micro.arms import ARMS, BOTH, NO_DECLARATIVE, NO_PROCEDURAL, SIZES, Cell
from benchmarks.micro.figures import PROMPTS, WEIGHTS, Interval, Table, interval, percent
from benchmarks.micro.record import Row, read

COMMAND = "python -m benchmarks.micro.ablation report"
CONTROLS = {"declarative 0": NO_DECLARATIVE, "procedural 0": NO_PROCEDURAL}
SIDES = (("evolution_rl", "rl"), ("evolution_rl", "evolution"))
CURVES = ("evolution_rl", "rl", "evolution", "sequential", "placebo")


def show(folder: Path) -> None:
    """Write all of it."""
    rows = read(folder / "rows.jsonl").values()
    checks, tuning = read(folder / "checks.jsonl").values(), read(folder / "tuning.jsonl").values()
    tabular = json.loads((folder / "tabular.json").read_text()) if (folder / "tabular.json").exists() else None
    fixed = json.loads((folder / "fixed.json").read_text())
    figures = summary(list(rows), fixed) | {"checks": side_questions(list(checks))}
    (folder / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    lines = [*markdown(figures), *tried(tuning, fixed), *tables_of(tabular)]
    (folder / "tables.md").write_text("\n".join(lines) + "\n")
    draw(folder, figures, Table(rows), tabular)


def summary(rows: Sequence[Row], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of the report."""
    main = Table(rows)
    controls = {name: Table(rows, cell) for name, cell in CONTROLS.items()}
    return {
        "worlds": len(main.worlds(*main.arms)),
        "arms": main.means(),
        "paired": main.paired(),
        "budget": main.budget(),
        "seed": 0,
        "command": COMMAND,
        "greedy": {"arms": main.means("greedy"), "paired": main.paired(what="greedy")},
        "right_principles": main.means("right"),
        "transplant": main.transplant(),
        "controls": {
            name: {"arms": table.means(), "paired": table.paired(SIDES), "greedy": table.means("greedy")}
            for name, table in controls.items()
        },
        "phase": [
            {"declarative": cell.declarative, "procedural": cell.procedural, "arms": table.means(),
             "paired": table.paired(SIDES)}
            for cell, table in phase(rows).items()
        ],
        "settings": {"common": SIZES, "tuned": fixed},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "peft")}},
    }  # fmt: skip


def phase(rows: Sequence[Row]) -> dict[Cell, Table]:
    """Every cell of the dials in which anything was run, on the worlds that all cells have."""
    cells = {Cell(row["declarative"], row["procedural"]) for row in rows}
    worlds = set(Table(rows).worlds("evolution_rl", "rl"))
    for cell in cells:
        worlds &= set(Table(rows, cell).worlds("evolution_rl", "rl")) or worlds
    shared = [row for row in rows if row["world"] in worlds]
    return {cell: Table(shared, cell) for cell in sorted(cells, key=lambda c: (c.declarative, c.procedural))}


def side_questions(rows: Sequence[Row]) -> dict[str, Any]:
    """The checks on development worlds: another rating beside the default, RL with ten times the steps."""
    found: dict[str, Any] = {}
    for arm in ("evolution_rl", "evolution"):
        sides = [{r["world"]: r["test"] for r in rows if r["arm"] == arm and r["stage"] == s} for s in STAGES]
        if worlds := sorted(set(sides[0]) & set(sides[1])):
            gaps = [sides[1][w] - sides[0][w] for w in worlds]
            found[f"{arm}: item_response, thompson, juvenile_games 1 - default"] = {
                **interval(gaps, arm), "worlds": len(worlds), "default": float(np.mean([sides[0][w] for w in worlds]))
            }  # fmt: skip
    for row in rows:
        if row["stage"] == "patience":
            name = f"rl, {row['steps']} steps, learning_rate {row['chosen']['learner.learning_rate']:g}"
            found[name] = {"world": row["world"], "test": row["test"], "greedy": row["greedy"], "curve": [
                round(float(np.mean([point[0] for point in row["curve"][i : i + 12]])), 3)
                for i in range(0, row["steps"], 12)
            ]}  # fmt: skip
    return found


STAGES = ("defaults", "beliefs")


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The tables of the report, in points."""
    def title(key: str) -> str:
        return " − ".join(ARMS[arm].title for arm in key.split("-"))

    budget, right = found["budget"], found["right_principles"]
    lines = [
        "# Tables", "", f"{found['worlds']} worlds, {BOTH}. Made by `{found['command']}` and `… show`. Accuracies in "
        "points, with 95 % bootstrap intervals over worlds.", "",
        "| arm | sampled | greedy | right principles of 8 | rollouts | tokens | of which reflection | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm, value in found["arms"].items():
        cost = budget[arm]
        lines.append(
            f"| {ARMS[arm].title} | {percent(value)} | {percent(found['greedy']['arms'][arm])} | "
            f"{right[arm]['mean']:.1f} | {cost['rollouts']:,} | {cost['tokens']:,} | {cost['reflection_tokens']:,} | "
            f"{cost['seconds']:.0f} |"
        )
    lines += ["", "| difference, world by world | sampled | greedy |", "|---|---|---|"]
    for key, value in found["paired"].items():
        greedy = found["greedy"]["paired"][key]
        lines.append(f"| {title(key)} | {percent(value, True)} | {percent(greedy, True)} |")
    for name, control in found["controls"].items():
        worlds = {key: value["worlds"] for key, value in control["paired"].items()}
        lines += ["", f"{name} ({max(worlds.values(), default=0)} worlds)", "", "| | sampled |", "|---|---|"]
        lines += [f"| {ARMS[arm].title} | {percent(value)} |" for arm, value in control["arms"].items()]
        lines += [f"| {title(key)} | {percent(value, True)} |" for key, value in control["paired"].items()]
    if found["transplant"]:
        lines += ["", "| weights | " + " | ".join(pictures.TITLES[p] for p in PROMPTS) + " |", "|---|---|---|---|"]
        for arm in WEIGHTS:
            row = " | ".join(percent(found["transplant"][arm][p]) for p in PROMPTS)
            lines.append(f"| {ARMS[arm].title} | {row} |")
    return lines + dials(found["phase"])


def dials(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """The phase diagram as a table."""
    lines = ["", "| declarative | procedural | worlds | E-SPL − RL | E-SPL − evolution |", "|---|---|---|---|---|"]
    for cell in cells:
        gaps = [cell["paired"].get("-".join(pair)) for pair in SIDES]
        worlds = max((gap["worlds"] for gap in gaps if gap), default=0)
        shown = " | ".join(percent(gap, True) if gap else "–" for gap in gaps)
        lines.append(f"| {cell['declarative']:g} | {cell['procedural']:g} | {worlds} | {shown} |")
    return lines


def tried(rows: Iterable[Row], fixed: Mapping[str, Any]) -> list[str]:
    """The trials of tuning: mean test accuracy on the development worlds."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        settings = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in row["chosen"].items()) or "defaults"
        scores.setdefault((row["arm"], settings), []).append(row["test"])
    lines = ["", "Tuning, on development worlds:", "", "| arm | settings | runs | mean test accuracy | |",
             "|---|---|---|---|---|"]  # fmt: skip
    for (arm, settings), values in sorted(scores.items()):
        best = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in fixed[arm].items()) or "defaults"
        mark = "fixed" if settings == best else ""
        lines.append(f"| {ARMS[arm].title} | {settings} | {len(values)} | {100 * np.mean(values):.1f} | {mark} |")
    return lines


def tables_of(tabular: Mapping[str, Any] | None) -> list[str]:
    """The tabular tier."""
    if tabular is None:
        return []
    lines = ["", f"## Tabular tier: {tabular['worlds']} worlds", "", "| arm | rate | test accuracy |", "|---|---|---|"]
    lines += [f"| {ARMS[a].title} | {tabular['rates'][a]:g} | {percent(v)} |" for a, v in tabular["arms"].items()]
    lines += ["", "| difference, world by world | both dials on | declarative 0 | procedural 0 |", "|---|---|---|---|"]
    for key, value in tabular["paired"].items():
        others = [tabular[name].get(key) for name in CONTROLS]
        shown = " | ".join(percent(v, True) if v else "–" for v in [value, *others])
        lines.append(f"| {' − '.join(ARMS[arm].title for arm in key.split('-'))} | {shown} |")
    return lines


def draw(folder: Path, found: Mapping[str, Any], main: Table, tabular: Mapping[str, Any] | None) -> None:
    """All pictures."""
    order = sorted(found["arms"], key=lambda arm: -found["arms"][arm]["mean"])
    means = {arm: found["arms"][arm] for arm in order}
    titles = {arm: ARMS[arm].title for arm in order}
    label = f"test accuracy in points, {found['worlds']} worlds, with 95 % intervals over worlds"
    pictures.save(folder / "arms.png", pictures.intervals, means, titles, label, size=(8.2, 4.6))
    pictures.save(folder / "paired.png", pictures.differences, found["paired"], size=(8.6, 5.2))
    pictures.save(folder / "curves.png", pictures.curves, main, [a for a in CURVES if a in main.arms], size=(9.6, 3.6),
                  panels=2)  # fmt: skip
    if found["transplant"]:
        pictures.save(folder / "transplant.png", pictures.transplant, found["transplant"], size=(5.2, 2.9))
    if len(found["phase"]) > 3:
        pictures.save(folder / "phase.png", pictures.phase, grid(found["phase"]), size=(8.2, 3.6), panels=2)
    if tabular is not None:
        sides = {
            other: {(c["declarative"], c["procedural"]): c["mean"] for c in cells}
            for other, cells in tabular["phase"].items() if other in ARMS
        }  # fmt: skip
        pictures.save(folder / "tabular_phase.png", pictures.phase, sides, size=(4.6 * len(sides), 4.2),
                      panels=len(sides))  # fmt: skip


def grid(cells: Iterable[Mapping[str, Any]]) -> dict[str, dict[tuple[float, float], float]]:
    """The other side → dials → mean difference."""
    found: dict[str, dict[tuple[float, float], float]] = {other: {} for _, other in SIDES}
    for cell in cells:
        for pair in SIDES:
            gap: Interval | None = cell["paired"].get("-".join(pair))
            if gap:
                found[pair[1]][cell["declarative"], cell["procedural"]] = gap["mean"]
    return found
