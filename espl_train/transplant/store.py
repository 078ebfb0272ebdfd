"""The directory of a transplant: the plan, and every cell that has been played. Cells are written whole or not at all.

    plan.json  cells/WEIGHTS--PROMPT.json  matrix.json  matrix.svg  matrix.png
"""

from __future__ import annotations

import json
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
        """Opens or makes it. Raises EsplError where it holds another plan, or something else."""
        self.path, self._plan = path, plan
        _refuse_foreign(path)
        if (path / PLAN).is_file():
            self._same()
            return
        try:
            (path / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EsplError(f"{path} cannot be made: {problem.strerror}") from None
        self.write(PLAN, plan.identity)

    def cell(self, weights: str, prompt: str) -> Cell | None:
        """A cell that was played; None where it was not yet."""
        return read_cell(self.path, weights, prompt) if self._file(weights, prompt).is_file() else None

    def keep(self, cell: Cell) -> None:
        """Write a cell down."""
        disk.write(self._file(cell.weights, cell.prompt), _json(asdict(cell)))

    def write(self, name: str, value: Any) -> Path:
        """A file of JSON."""
        disk.write(self.path / name, _json(value))
        return self.path / name

    def there(self) -> int:
        """How many cells have been played."""
        return sum(self._file(weights.name, prompt.name).is_file() for weights, prompt in self._plan.cells)

    def standing(self) -> str:
        """How much is there, in words."""
        return f"{self.there()} of {len(list(self._plan.cells))} cells are kept in {self.path}"

    def _file(self, weights: str, prompt: str) -> Path:
        return _cell_file(self.path, weights, prompt)

    def _same(self) -> None:
        stored, wanted = json.loads((self.path / PLAN).read_text("utf-8")), json.loads(_json(self._plan.identity))
        if changed := [key for key in wanted if stored.get(key) != wanted[key]]:
            raise EsplError(
                f"{self.path} holds another transplant (it differs in: {', '.join(changed)}): choose another --out"
            )


def read_cell(path: Path, weights: str, prompt: str) -> Cell:
    """A cell of the transplant in `path`."""
    data = json.loads(_cell_file(path, weights, prompt).read_text("utf-8"))
    return Cell(**{**data, "rewards": {int(task): rewards for task, rewards in data["rewards"].items()}})


def _cell_file(path: Path, weights: str, prompt: str) -> Path:
    return path / CELLS / f"{weights}--{prompt}.json"


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise EsplError(f"{path} is a file: choose another --out")
    if path.is_dir() and not (path / PLAN).is_file() and any(p.name != CELLS for p in path.iterdir()):
        raise EsplError(f"{path} is not empty and is no transplant (it has no {PLAN}): choose another --out")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace") + b"\n"
