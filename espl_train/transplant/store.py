"""The directory of a transplant: the plan, and every cell that has been played. Cells are written whole or not at all.

    plan.json  cells/WEIGHTS--PROMPT.json  matrix.json  matrix.svg  matrix.png
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train import disk
from espl_train.records import Rollout
from espl_train.transplant.plan import Plan

PLAN, CELLS = "plan.json", "cells"


class Unreadable(Exception):
    """A file does not hold what belongs there; the message goes on after its name."""


@dataclass(frozen=True)
class Cell:
    """What one combination came to. `rewards`: problem → reward of every sample that has one; `stops`: why episodes
    ended; `tokens` were sampled in all."""

    weights: str
    prompt: str
    rewards: Mapping[int, Sequence[float]]
    faulted: int
    tokens: int
    stops: Mapping[str, int]

    @classmethod
    def of(cls, weights: str, prompt: str, rollouts: Sequence[Rollout]) -> Cell:
        """The record of these episodes; faulted ones are masked."""
        rewards: dict[int, list[float]] = {rollout.key.task: [] for rollout in rollouts}
        for rollout in rollouts:
            if not rollout.faulted:
                rewards[rollout.key.task].append(rollout.reward)
        stops = Counter(str(rollout.stop) for rollout in rollouts)
        return cls(
            weights, prompt, rewards, sum(r.faulted for r in rollouts), sum(r.sampled_tokens for r in rollouts),
            dict(sorted(stops.items())),
        )


class Store:
    """The directory of one plan."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """Opens or makes it. Raises EsplError where it holds another plan or something else, or a file is damaged."""
        self.path, self._plan = path, plan
        _refuse_foreign(path)
        if (path / PLAN).exists():
            self._same()
        with disk.explained(path):
            (path / CELLS).mkdir(parents=True, exist_ok=True)
        if not (path / PLAN).exists():
            self.write(PLAN, plan.identity)
        for row, column in plan.cells:
            self.cell(row.name, column.name)

    def cell(self, weights: str, prompt: str) -> Cell | None:
        """A cell that was played; None where it was not yet. Raises EsplError for one that is damaged."""
        if not (file := self._file(weights, prompt)).exists():
            return None
        cell = read_cell(self.path, weights, prompt)
        if cell.rewards.keys() != set(self._plan.indices):
            raise _play_again(file, "has rewards of other problems than the plan")
        return cell

    def keep(self, cell: Cell) -> None:
        """Write a cell down."""
        disk.write(self._file(cell.weights, cell.prompt), _json(asdict(cell)))

    def write(self, name: str, value: Any) -> Path:
        """A file of JSON."""
        disk.write(self.path / name, _json(value))
        return self.path / name

    def there(self) -> int:
        """How many cells have been played."""
        return sum(self._file(weights.name, prompt.name).exists() for weights, prompt in self._plan.cells)

    def standing(self) -> str:
        """How much is there, in words."""
        return f"{self.there()} of {len(list(self._plan.cells))} cells are kept in {self.path}"

    def _file(self, weights: str, prompt: str) -> Path:
        return _cell_file(self.path, weights, prompt)

    def _same(self) -> None:
        wanted = json.loads(_json(self._plan.identity))
        try:
            stored = _read_object(self.path / PLAN)
        except Unreadable as why:
            raise EsplError(
                f"{self.path / PLAN} {why}, so nobody knows what its cells are of: delete the folder {self.path}, and "
                "all of it is played again, or choose another --out"
            ) from None
        if changed := [key for key in wanted if stored.get(key) != wanted[key]]:
            raise EsplError(
                f"{self.path} holds another transplant (it differs in: {', '.join(changed)}): choose another --out"
            )


def read_cell(path: Path, weights: str, prompt: str) -> Cell:
    """A cell of the transplant in `path`. Raises EsplError where its file holds none."""
    file = _cell_file(path, weights, prompt)
    try:
        return _cell(_read_object(file), weights, prompt)
    except Unreadable as why:
        raise _play_again(file, why) from None


def _play_again(file: Path, why: object) -> EsplError:
    return EsplError(f"{file} {why}: delete it, and that cell is played again")


def _cell(data: Mapping[str, Any], weights: str, prompt: str) -> Cell:
    try:
        rewards = {int(task): [float(reward) for reward in row] for task, row in data["rewards"].items()}
        stops = {str(reason): int(count) for reason, count in data["stops"].items()}
        cell = Cell(data["weights"], data["prompt"], rewards, int(data["faulted"]), int(data["tokens"]), stops)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise Unreadable(f"is no cell of a transplant ({type(problem).__name__}: {problem})") from None
    if (cell.weights, cell.prompt) != (weights, prompt):
        raise Unreadable(f"is the cell of {cell.weights!r} and {cell.prompt!r}")
    if not all(math.isfinite(reward) for row in rewards.values() for reward in row):
        raise Unreadable("has a reward that is no number")
    return cell


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except OSError as problem:
        raise Unreadable(f"cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError):
        raise Unreadable("is damaged (no JSON)") from None
    if not isinstance(data, dict):
        raise Unreadable("is damaged (no object)")
    return data


def _cell_file(path: Path, weights: str, prompt: str) -> Path:
    return path / CELLS / f"{weights}--{prompt}.json"


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise EsplError(f"{path} is a file: choose another --out")
    if path.is_dir() and not (path / PLAN).exists() and any(map(_foreign, path.iterdir())):
        raise EsplError(f"{path} is not empty and is no transplant (it has no {PLAN}): choose another --out")


def _foreign(path: Path) -> bool:
    """Whether it is more than what a start that died leaves behind. Without a plan nobody knows what cells are of."""
    if path.name == CELLS and path.is_dir():
        return any(path.iterdir())
    return not path.name.startswith(disk.WRITING)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace") + b"\n"
