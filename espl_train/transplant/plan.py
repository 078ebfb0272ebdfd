"""What is transplanted: whose weights, whose prompts, on which problems, sampled how. Decided before a model is read.

A plan has an identity: what decides its scores, and nothing else. Two commands with the same one are the same command,
which is how an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.config import Config
from espl_train.problems import Problems
from espl_train.snapshot import Snapshot

BASE, NONE = "base", "none"
LIMITS = ("max_new_tokens", "max_total_tokens", "max_turns", "deadline_s")


@dataclass(frozen=True)
class Weights:
    """A row of the matrix: the weights that `run` has trained; None are those that all runs began with."""

    name: str
    run: Snapshot | None = None

    def to_json(self) -> dict[str, Any]:
        """What they are."""
        if self.run is None:
            return {"name": self.name}
        run = self.run
        return {"name": self.name, "run": str(run.folder), "step": run.step, "checkpoint": run.weights}


@dataclass(frozen=True)
class Prompt:
    """A column: a system prompt as the model reads it, where it comes from, and the run whose evolution wrote it."""

    name: str
    text: str = ""
    origin: str = "no system prompt"
    run: Snapshot | None = None

    def to_json(self) -> dict[str, Any]:
        """What it is."""
        return {"name": self.name, "origin": self.origin, "text": self.text}


@dataclass(frozen=True)
class Plan:
    """Rows, columns, and what is the same for all cells. `config` is the first run's, with what was changed for here;
    `played` the id of an environment and a split; `notes` what was left out, and why."""

    weights: Sequence[Weights]
    prompts: Sequence[Prompt]
    config: Config
    problems: Problems
    indices: Sequence[int]
    samples: int
    temperature: float
    seed: int
    notes: Sequence[str] = ()

    @property
    def cells(self) -> Iterator[tuple[Weights, Prompt]]:
        """Row by row: the weights of a row are loaded once."""
        return ((weights, prompt) for weights in self.weights for prompt in self.prompts)

    @property
    def runs(self) -> list[Snapshot]:
        """Everybody who takes part, each once."""
        everybody = [one.run for one in self.weights] + [one.run for one in self.prompts]
        return list({run.folder.resolve(): run for run in everybody if run}.values())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Plain data that says which scores these are."""
        rollout = self.config.rollout
        return {
            "weights": [one.to_json() for one in self.weights],
            "prompts": [one.to_json() for one in self.prompts],
            "model": {key: getattr(self.config.model, key) for key in ("path", "revision", "dtype")},
            "environment": {
                "id": self.problems.env_id, "args": self.problems.args, "split": self.problems.split,
                "part": self.problems.part, "content": self.problems.env.tasks.hash,
            },
            "problems": list(self.indices),
            "sampling": {"samples": self.samples, "temperature": self.temperature, "seed": self.seed},
            "limits": {name: getattr(rollout, name) for name in LIMITS},
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """The identity in 8 hex digits."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]

    def own_test(self, run: Snapshot) -> bool:
        """Whether these are problems of a run's own sealed test."""
        if self.problems.part != "test":
            return False
        met = [row for row in run.events if row["kind"] == "problems" and row["part"] == "test"]
        return any(row["content"] == self.problems.env.tasks.hash for row in met)


def base_of(run: Snapshot) -> tuple[str, str | None, str]:
    """Which weights a run began with."""
    from espl_train.learner.loading import locate

    model, source = run.config.model, locate(run.config.model.path)
    return (str(Path(source).resolve()) if Path(source).is_dir() else source), model.revision, model.dtype


def one_base(runs: Sequence[Snapshot]) -> None:
    """Raises EsplError where runs began with different weights: there would be no row that they have in common."""
    first = runs[0]
    for other in runs[1:]:
        if (mine := base_of(first)) != (theirs := base_of(other)):
            a, b = (f"{path}{f'@{rev}' if rev else ''} in {dtype}" for path, rev, dtype in (mine, theirs))
            raise EsplError(
                f"{first.folder} began with {a} and {other.folder} with {b}: their weights have no base in common, so "
                "they have no matrix together; transplant runs of one model"
            )
