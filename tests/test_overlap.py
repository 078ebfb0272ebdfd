"""Reflection beside the update: really at the same time, with the same results, and nothing left behind on failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_model import hub_model
from loop_kit import Theatre, config, deal, run

from espl_envs.core.errors import EsplError
from espl_train import archipelago
from espl_train.config import Config
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.island import Batch
from espl_train.learner.update import Learner, UpdateReport
from espl_train.overlap import beside, overlaps
from espl_train.records import Group
from espl_train.settings import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(autouse=True)
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    return deal(monkeypatch)


class Branches:
    """Reflection waits for the update to begin, and the update for what `ending` waits for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ending: Callable[[Branches], None]) -> None:
        self.updating, self.reflected, self.tidied = threading.Event(), threading.Event(), threading.Event()
        original = Learner.update

        def update(learner: Learner, groups: Sequence[Group]) -> UpdateReport:
            self.updating.set()
            ending(self)
            return original(learner, groups)

        async def breed(*_: Any, **__: Any) -> BreedingReport:
            try:
                assert await asyncio.to_thread(self.updating.wait, 20), "the update did not begin meanwhile"
                self.reflected.set()
                await self.reflect()
                return BreedingReport((), [], 0, {}, 0)
            finally:
                self.tidied.set()

        monkeypatch.setattr(Learner, "update", update)
        monkeypatch.setattr(Breeder, "breed", breed)

    async def reflect(self) -> None:
        pass


def test_both_are_at_work_at_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Branches(monkeypatch, lambda both: both.reflected.wait(20) or pytest.fail("reflection did not run meanwhile"))
    trainer, _ = run(config(model, tmp_path / "run", overlap="on", steps=1))
    assert trainer.overlaps and trainer.policy.version == 1


def test_children_are_tried_by_the_weights_that_played_their_parents(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the update is over before breeding has begun."""
    learnt, told = threading.Event(), []
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda self, groups: (update(self, groups), learnt.set())[0])
    monkeypatch.setattr(archipelago, "announce", lambda _: learnt.wait(20) or pytest.fail("nothing was learnt"))

    async def breed(batch: Batch, step: int, policy: int, client: object) -> BreedingReport:
        del batch, step, client
        told.append(policy)
        return BreedingReport((), [], 0, {}, 0)

    monkeypatch.setattr(Batch, "breed", breed)
    trainer, _ = run(config(model, tmp_path / "run", overlap="on", steps=2))
    assert told == [0, 1] and trainer.policy.version == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, EsplError])
def test_what_ends_the_update_ends_reflection_and_is_told_alone(
    error: type[BaseException], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ending(both: Branches) -> None:
        assert both.reflected.wait(20)
        raise error("ended")

    both = Branches(monkeypatch, ending)
    monkeypatch.setattr(both, "reflect", lambda: asyncio.sleep(1000))
    with pytest.raises(error, match="ended"):
        run(config(model, tmp_path / "run", overlap="on", steps=1))
    assert both.tidied.is_set()


def test_what_ends_reflection_is_raised_when_the_update_is_over(
    model: Path, tmp_path: Path, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reflect() -> None:
        raise EsplError("a broken template")

    both = Branches(monkeypatch, lambda both: both.tidied.wait(20) or pytest.fail("reflection did not end"))
    monkeypatch.setattr(both, "reflect", reflect)
    with pytest.raises(EsplError, match="a broken template"):
        run(config(model, tmp_path / "run", overlap="on", steps=1))
    assert "rate" not in theatre.journal and theatre.journal.count("save") == 1     # that of the start


def test_the_body_decides_even_where_both_fail() -> None:
    async def fails() -> None:
        raise ValueError("the coroutine")

    with pytest.raises(KeyError, match="the body"), beside(fails()) as future:
        assert isinstance(future.exception(20), ValueError)
        raise KeyError("the body")


def engine(concurrent: bool) -> Any:
    return SimpleNamespace(concurrent=concurrent)


@pytest.mark.parametrize(
    ("overlap", "concurrent", "device", "expected"),
    [
        ("auto", True, "cuda", True), ("auto", True, "cpu", False), ("auto", False, "cuda", False),
        ("on", True, "cpu", True), ("off", True, "cuda", False),
    ],
)
def test_where_reflection_runs_beside_the_update(overlap: str, concurrent: bool, device: str, expected: bool) -> None:
    assert overlaps(load(overrides={"overlap": overlap}), engine(concurrent), device) is expected


def test_what_cannot_be_is_refused_with_a_way_out() -> None:
    settings: Config = load(overrides={"overlap": "on"})
    with pytest.raises(EsplError, match=r"engine 'local' cannot sample while the learner works.*--overlap auto"):
        overlaps(settings, engine(False), "cpu")


REMOTE = {"evolution.reflector": "endpoint", "reflection.base_url": "http://localhost:1/v1", "reflection.model": "m"}


@pytest.mark.parametrize(("overlap", "trials", "runs"), [("auto", 0, True), ("off", 0, False), ("auto", 0.5, False)])
def test_where_a_server_reflects_there_is_nothing_to_share_unless_trials_are_played(
    overlap: str, trials: float, runs: bool
) -> None:
    settings = load(overrides={"overlap": overlap, "evolution.prune_probability": trials, **REMOTE})
    assert overlaps(settings, engine(False), "cpu") is runs
