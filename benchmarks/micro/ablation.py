"""Does training weights and prompt together beat either alone, and where does it not? The bundled model's experiment.

    python -m benchmarks.micro.ablation tune       # every arm's trials on development worlds, into tuning.jsonl
    python -m benchmarks.micro.ablation fix        # the best trial of each arm, into fixed.json
    python -m benchmarks.micro.ablation check      # side questions, on development worlds
    python -m benchmarks.micro.ablation report     # the worlds of the report, with what was fixed, into rows.jsonl
    python -m benchmarks.micro.ablation tabular    # the tabular tier, minutes without a model, into tabular.json
    python -m benchmarks.micro.ablation show       # tables, pictures and summary.json from these records

Everything lies under benchmarks/results/micro. A run that is in a record already is not run again, so an interrupted
command goes on where it stopped; several may share the work (--share 0/2, --share 1/2). Worlds from 1000 on are opened
by `report` alone, and `report` takes its settings from fixed.json alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.micro.arms import ARMS, BELIEFS, BOTH, NO_DECLARATIVE, NO_PROCEDURAL, REPORT, Cell
from benchmarks.micro.record import Row, read, work
from benchmarks.micro.runs import Job

RESULTS = Path(__file__).resolve().parents[1] / "results" / "micro"
TUNING_WORLDS = (20, 21, 22)
TUNING_CELLS = (BOTH, NO_DECLARATIVE)
CHECK_WORLDS = range(40, 44)
PATIENCE, PATIENT_RATES = 120, (3e-3, 1e-3)      # ten times the steps
WORLDS, HALF, PHASE_WORLDS = 30, 15, 4
PHASE = tuple(Cell(d, p) for d in (0.0, 0.5, 1.0) for p in (0.0, 0.5, 1.0))
OTHERS = ("placebo", "shuffled_evidence", "sequential", "paper", "rl_oracle")


def tuning(names: Sequence[str]) -> Iterator[Job]:
    """Every trial of the arms, on the same development worlds with both dials on and with the declarative one off."""
    for name in names:
        for trial in ARMS[name].trials:
            for cell in TUNING_CELLS:
                for world in TUNING_WORLDS:
                    yield Job("tuning", name, world, cell, trial)


def choose(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Per arm the trial with the best mean test accuracy on the development worlds. KeyError while runs are missing."""
    fixed: dict[str, Any] = {}
    for name, arm in ARMS.items():
        scores = [
            np.mean([rows[job.key]["test"] for job in tuning([name]) if job.chosen == trial]) for trial in arm.trials
        ]
        fixed[name] = dict(arm.trials[int(np.argmax(scores))]) if scores else {}
    return fixed


def checks(fixed: Mapping[str, Any]) -> Iterator[Job]:
    """After tuning, on other development worlds: the item-response rating with Thompson selection beside the defaults,
    and RL alone for ten times the steps."""
    for world in CHECK_WORLDS:
        for arm in ("evolution_rl", "evolution"):
            yield Job("defaults", arm, world, BOTH, fixed[arm])
            yield Job("beliefs", arm, world, BOTH, {**fixed[arm], **BELIEFS})
    for rate in PATIENT_RATES:
        yield Job("patience", "rl", CHECK_WORLDS[0], BOTH, {"learner.learning_rate": rate}, steps=PATIENCE)


def report(fixed: Mapping[str, Any]) -> Iterator[Job]:
    """What the report consists of, the most important first, world by world: were time to end it, arms would still
    have the same worlds."""
    worlds = range(REPORT, REPORT + WORLDS)
    for world in worlds:
        joint = Job("main", "evolution_rl", world, BOTH, fixed["evolution_rl"], transplant=True)
        yield joint
        yield Job("main", "rl", world, BOTH, fixed["rl"], transplant=True, after=joint.key)
        yield Job("main", "evolution", world, BOTH, fixed["evolution"])
        yield Job("main", "base", world, BOTH, transplant=True, after=joint.key)
        yield Job("main", "oracle", world, BOTH)
    yield from crossed("control", ("evolution_rl", "rl"), worlds, (NO_DECLARATIVE,), fixed)
    yield from crossed("main", OTHERS, worlds, (BOTH,), fixed)
    sides = ("evolution_rl", "rl", "evolution")
    yield from crossed("control", sides, worlds[:HALF], (NO_PROCEDURAL,), fixed)
    rest = [cell for cell in PHASE if cell not in (BOTH, NO_DECLARATIVE, NO_PROCEDURAL)]
    for world in worlds[:PHASE_WORLDS]:
        yield from crossed("phase", sides, [world], rest, fixed)
        yield from crossed("phase", ("evolution",), [world], (NO_DECLARATIVE,), fixed)


def crossed(
    stage: str, arms: Sequence[str], worlds: Sequence[int], cells: Sequence[Cell], fixed: Mapping[str, Any]
) -> Iterator[Job]:
    """All arms in all cells, world by world."""
    for world in worlds:
        for cell in cells:
            for arm in arms:
                yield Job(stage, arm, world, cell, fixed[arm])


def main() -> None:
    """One step of the experiment, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "fix", "check", "report", "tabular", "show"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="tune: these only")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--share", type=share, default=(0, 1), help="I/N: only every N-th world, from the I-th on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the records")
    options = parser.parse_args()
    folder: Path = options.results
    folder.mkdir(parents=True, exist_ok=True)

    def done(jobs: Iterator[Job], name: str) -> dict[str, Row]:
        part, parts = options.share
        mine = [job for job in jobs if job.world % parts == part]
        return work(mine, folder / name, options.processes, options.seconds)

    if options.what == "tune":
        done(tuning(options.arms), "tuning.jsonl")
    elif options.what == "fix":
        try:
            chosen = choose(read(folder / "tuning.jsonl"))
        except KeyError as missing:
            sys.exit(f"ablation: {folder / 'tuning.jsonl'} lacks the run {missing}: first `tune`")
        (folder / "fixed.json").write_text(json.dumps(chosen, indent=1) + "\n")
    elif options.what == "check":
        done(checks(fixed(folder)), "checks.jsonl")
    elif options.what == "report":
        done(report(fixed(folder)), "rows.jsonl")
    elif options.what == "tabular":
        from benchmarks.micro import phases

        phases.measure(folder, options.processes)
    else:
        from benchmarks.micro import tables

        if not read(folder / "rows.jsonl"):
            sys.exit(f"ablation: there is nothing to show in {folder}: first `report`")
        tables.show(folder)


def share(text: str) -> tuple[int, int]:
    """"1/2" as numbers."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: of two, the first is 0/2 and the second 1/2")
    return int(part), int(parts)


def fixed(folder: Path) -> dict[str, Any]:
    """What tuning chose, as it was written down."""
    path = folder / "fixed.json"
    if not path.exists():
        sys.exit(f"ablation: there is no {path}: first `tune`, then `fix`")
    return dict(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
