"""Trials: candidates are played by the weights of the moment; nothing is learnt from it or rated, all is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_model import hub_model
from loop_kit import Theatre, config, deal, run

from espl_envs.core.errors import EsplError
from espl_envs.core.tasks import Task
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.problems import Problems
from espl_train.records import Group, RolloutKey, StopReason
from espl_train.rollout import Collector
from espl_train.runs.metrics import read_lines
from espl_train.trials import Trials

GOOD, BAD = (Principle("G1", "Be good."),), (Principle("G1", "Be bad."),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


def by_candidate(key: RolloutKey, policy: int | None) -> float:
    """In trials "good" is always right; elsewhere every second sample is."""
    del policy
    return float(key.prompt == "good") if key.split.startswith("trial") else float(key.sample % 2)


def breed_with_a_trial(monkeypatch: pytest.MonkeyPatch, tables: list[Any], other: Problems | None = None) -> None:
    """Every step tries two candidates on two problems, three times each, and bears the first."""

    async def breed(
        self: Breeder, step: int, population: Population, groups: Sequence[Group], tasks: Mapping[int, Task],
        complete: object, trial: Trials, closed: object = None,
    ) -> BreedingReport:
        del self, groups, tasks, complete, closed
        tables.append(await trial({"good": GOOD, "bad": BAD}, [4, 2], 3, other))
        child = Child((Principle("G1", f"Rule of step {step}."),), "mutation", (population.root.id,), 1)
        return BreedingReport((child,), [], 0, {}, 0)

    monkeypatch.setattr(Breeder, "breed", breed)


def played(theatre: Theatre) -> list[Any]:
    return [play for play in theatre.plays if play.jobs[0].key.split.startswith("trial")]


def test_candidates_are_played_as_often_as_asked_with_their_own_prompts_and_the_weights_of_the_moment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[Any] = []
    theatre = deal(monkeypatch, by_candidate)
    breed_with_a_trial(monkeypatch, tables)
    trainer, _ = run(config(model, tmp_path / "run"))
    assert tables == [{"good": {4: [1.0] * 3, 2: [1.0] * 3}, "bad": {4: [0.0] * 3, 2: [0.0] * 3}}] * 2
    first, second = played(theatre)
    assert (first.policy, second.policy) == (0, 1) and first.temperature is None, "training's temperature"
    texts = {job.key.prompt: job.system_prompt for job in first.jobs}
    templates = trainer.islands[0].templates
    assert texts == {"good": templates.system(GOOD), "bad": templates.system(BAD)}


def test_nothing_of_a_trial_is_learnt_rated_or_kept_as_a_rollout_and_all_of_it_is_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theatre = deal(monkeypatch, by_candidate)
    breed_with_a_trial(monkeypatch, [])
    trainer, summary = run(config(model, tmp_path / "run"))
    learnt = {r.key.split for groups in theatre.updates for g in groups for r in g.rollouts}
    assert learnt == {"train"} and summary.rollouts == 2 * 2 * 3 * 2, "training alone"
    assert {m.prompt.id for m in trainer.islands[0].population.members} == {"p0000", "p0001", "p0002"}
    records = list(read_lines(tmp_path / "run" / "metrics.jsonl"))[1:]
    assert [(r["trials/rollouts"], r["trials/tokens"]) for r in records] == [(12, 24), (12, 24)]


def test_a_run_without_trials_does_not_speak_of_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deal(monkeypatch)
    run(config(model, tmp_path / "run", mode="rl"))
    assert not any("trials/rollouts" in r for r in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_other_problems_have_a_collector_of_their_own_which_is_closed_in_the_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Collector] = []
    original = Collector.close
    monkeypatch.setattr(Collector, "close", lambda self: (closed.append(self), original(self))[1])
    theatre = deal(monkeypatch, by_candidate)
    settings = config(model, tmp_path / "run")
    from espl_train.problems import ProblemSets

    other = replace(ProblemSets.of(settings.env).validation, part="train")
    breed_with_a_trial(monkeypatch, [], other)
    run(settings)
    assert [play.split for play in played(theatre)] == ["validation"] * 2
    assert {job.key.split for play in played(theatre) for job in play.jobs} == {f"trial/{other.env_id}/validation"}
    assert len(set(map(id, closed))) == 4, "three of the run and one, not two, of the others"


class Faulty(Collector):
    """Deals two rollouts of which the second one faults."""

    def __init__(self) -> None:
        self.earlier = 0

    async def acollect(self, jobs: Any, *_: Any, earlier: Any = (), **__: Any) -> Any:  # type: ignore[override]
        from loop_kit import dealt

        self.earlier = len(earlier)
        rollouts = [dealt(job, 1.0, 0) for job in jobs]
        return [replace(r, stop=StopReason.FAULT) if r.key.sample else r for r in rollouts]


def test_what_faults_is_left_out_and_counted_among_what_the_step_has_played(model: Path) -> None:
    import asyncio

    from espl_train.evolution.templates import TemplateSet

    del model
    collector = Faulty()
    problems: Any = type("P", (), {"part": "train"})()
    trials = Trials(1, 0, problems, TemplateSet.load("english"), lambda _: collector, lambda _: 0, [None] * 5)  # type: ignore[list-item]
    table = asyncio.run(trials({"a": GOOD}, [7], 2))
    assert table == {"a": {7: [1.0]}} and collector.earlier == 5
    asyncio.run(trials({"a": GOOD}, [7], 2))
    assert collector.earlier == 7 and len(trials.played) == 4


def test_too_many_faults_in_trials_stop_the_run_as_in_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deal(monkeypatch, by_candidate)
    dealing = Collector.acollect

    async def acollect(self: Collector, jobs: Any, *rest: Any, **more: Any) -> Any:
        if jobs[0].key.split == "trial":
            raise EsplError("12 of 24 episodes have no reward")
        return await dealing(self, jobs, *rest, **more)

    monkeypatch.setattr(Collector, "acollect", acollect)
    breed_with_a_trial(monkeypatch, [])
    with pytest.raises(EsplError, match="12 of 24 episodes"):
        run(config(model, tmp_path / "run"))
