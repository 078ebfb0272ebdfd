"""A run that is interrupted in every phase of every step ends as the run that was not: weights, optimiser, population,
metrics, events and rollouts, bit for bit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from espl_train.config import Config
from espl_train.loop import Trainer
from espl_train.runs import checkpoint
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.settings import load

TINY = {
    "steps": 3, "tensorboard": False, "rollout.problems": 4, "rollout.samples": 4, "rollout.prompts": 2,
    "evaluation.every": 2, "evaluation.problems": 4, "evaluation.test_problems": 4, "learner.learning_rate": 1e-3,
    "evolution.crossover_probability": 1.0, "keep_checkpoints": 9,
}


class Interrupting(Console):
    """Ctrl-C when a phase begins, once for every (finished steps, phase)."""

    def __init__(self, run: RunDirectory, done: set[tuple[int | None, str]]) -> None:
        super().__init__(quiet=True)
        self.run, self.done = run, done

    def phase(self, name: str, total: int | None = None) -> None:
        super().phase(name, total)
        where = (self.run.saved_step, name)
        if where not in self.done:
            self.done.add(where)
            raise KeyboardInterrupt


def config(folder: Path, **changes: Any) -> Config:
    return load(overrides={**TINY, **changes, "out": str(folder)})


def play(run: RunDirectory, console: Console) -> None:
    with run:
        Trainer(run.config, run, console).train()


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for seconds."""
    def timeless(line: str) -> Any:
        return untimed(json.loads(line))

    found: dict[str, Any] = {
        name: [timeless(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "events.jsonl")
    }
    for path in sorted((folder / "rollouts").iterdir()):
        found[path.name] = [timeless(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    step, payloads = checkpoint.load_newest(folder / "checkpoints")
    return {**found, "step": step, "state": untimed(payloads["state"]), "learner": payloads["learner"]}


def untimed(state: Any) -> Any:
    """Plain data without any seconds."""
    if isinstance(state, dict):
        return {key: untimed(value) for key, value in state.items() if not str(key).endswith("seconds")}
    return [untimed(value) for value in state] if isinstance(state, list) else state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    play(RunDirectory.create(config(folder)), Console(quiet=True))
    return contents(folder)


def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    folder = tmp_path / "broken"
    run, stops = RunDirectory.create(config(folder)), set[tuple[int | None, str]]()
    while True:
        try:
            play(run, Interrupting(run, stops))
            break
        except KeyboardInterrupt:
            run = RunDirectory.open(folder)
    assert {(step, phase) for step in range(3) for phase in ("rollouts", "reflection", "update")} < stops
    assert {(None, "validation"), (1, "validation"), (2, "validation"), (3, "test")} < stops
    broken = contents(folder)
    assert broken.keys() == uninterrupted.keys()
    for name, expected in uninterrupted.items():
        assert same(broken[name], expected), name


def test_the_run_bred_and_learned(uninterrupted: dict[str, Any]) -> None:
    """Without this the comparison above could be one of two runs in which nothing happened."""
    kinds = {event["kind"] for event in uninterrupted["events.jsonl"]}
    assert {"match", "born", "mutation", "crossover"} <= kinds
    assert any(record.get("update/grad_norm", 0) > 0 for record in uninterrupted["metrics.jsonl"])


def test_another_seed_is_another_run(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    folder = tmp_path / "other"
    play(RunDirectory.create(config(folder, seed=1, steps=1)), Console(quiet=True))
    assert contents(folder)["metrics.jsonl"][1] != uninterrupted["metrics.jsonl"][1]


class InterruptedOnce(Console):
    """Ctrl-C in the second step, while weights are updated and reflection runs beside."""

    def phase(self, name: str, total: int | None = None) -> None:
        self.updates = getattr(self, "updates", 0) + (name == "update and reflection")
        if self.updates == 2:
            raise KeyboardInterrupt
        super().phase(name, total)


def test_reflection_beside_the_update_changes_no_bit(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """Begun with overlap and interrupted in it, continued without: the run that never overlapped."""
    folder = tmp_path / "overlapping"
    with pytest.raises(KeyboardInterrupt):
        play(RunDirectory.create(config(folder, overlap="on")), InterruptedOnce(quiet=True))
    assert checkpoint.load_newest(folder / "checkpoints")[0] == 1
    play(RunDirectory.open(folder, {"overlap": "off"}), Console(quiet=True))
    found = contents(folder)
    for name, expected in uninterrupted.items():
        assert same(found[name], expected), name
