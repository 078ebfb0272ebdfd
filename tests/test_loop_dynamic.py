"""Dynamic sampling: other problems in place of those without contrast; everything that was played counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_model import hub_model
from loop_kit import Theatre, breed_simply, config, deal, keys, resume, run

from espl_train.evolution.population import Population
from espl_train.problems import Deck
from espl_train.records import Group, RolloutKey
from espl_train.runs.metrics import read_lines

DYNAMIC = {"rollout.dynamic_rounds": 3, "rollout.problems": 4, "steps": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


def on_every_third(key: RolloutKey, policy: int | None) -> float:
    """Problems whose number three divides are mixed, the others are not."""
    del policy
    return float(key.sample % 2) if key.task % 3 == 0 else 1.0


@pytest.fixture
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    breed_simply(monkeypatch)
    return deal(monkeypatch, on_every_third)


def steps(theatre: Theatre) -> dict[int, list[list[int]]]:
    """The problems of each round of each step."""
    found: dict[int, list[list[int]]] = {}
    for play in theatre.of("train"):
        found.setdefault(play.jobs[0].key.step, []).append(play.tasks)
    return found


def test_rounds_go_on_until_there_are_enough_with_contrast_or_rounds_or_epoch_are_used_up(
    model: Path, tmp_path: Path, theatre: Theatre
) -> None:
    trainer, _ = run(config(model, tmp_path / "run", **DYNAMIC))
    seen: set[int] = set()
    why = []
    for rounds in steps(theatre).values():
        played: list[int] = []
        for tasks in rounds:
            assert len(tasks) <= 4 - mixed(played)          # never more than are missing
            played += tasks
        assert len(played) == len(set(played))
        seen = seen | set(played) if seen.isdisjoint(played) else set(played)      # the epoch so far
        why.append((mixed(played) == 4, len(rounds) == 4, len(seen) == len(trainer.islands[0].sets.train)))
    assert all(any(reasons) for reasons in why)
    assert max(map(len, steps(theatre).values())) > 1
    assert len(set(keys(theatre.of("train")))) == len(keys(theatre.of("train")))


def mixed(tasks: list[int]) -> int:
    return sum(task % 3 == 0 for task in tasks)


def test_all_that_was_played_is_learnt_from_rated_and_reported(
    model: Path, tmp_path: Path, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    rated: list[list[Group]] = []
    original = Population.rate
    monkeypatch.setattr(Population, "rate", lambda self, groups: (rated.append(groups), original(self, groups))[1])
    trainer, _ = run(config(model, tmp_path / "run", **DYNAMIC))
    records = {r["step"]: r for r in read_lines(trainer.run.path / "metrics.jsonl")}
    for step, rounds in steps(theatre).items():
        played = [task for tasks in rounds for task in tasks]
        rollouts = [r for play in theatre.of("train") if play.jobs[0].key.step == step for r in play.rollouts]
        assert theatre.updates[step - 1] == rated[step - 1]
        assert sorted(r.key.task for g in rated[step - 1] for r in g.rollouts) == sorted(r.key.task for r in rollouts)
        counts = {k: v for k, v in records[step].items() if k.startswith("dynamic/")}
        assert counts == {
            "dynamic/rounds": len(rounds), "dynamic/problems": len(played), "dynamic/contrast": mixed(played),
        }
        assert records[step]["reward/mean"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts))
        assert records[step]["rollouts/count"] == len(rollouts)


def test_a_resumed_run_plays_what_the_straight_one_plays(model: Path, tmp_path: Path, theatre: Theatre) -> None:
    run(config(model, tmp_path / "straight", **DYNAMIC))
    straight = keys(theatre.of("train"))
    theatre.plays.clear()
    run(config(model, tmp_path / "halted", **{**DYNAMIC, "steps": 1}))
    resume(tmp_path / "halted", steps=3)
    assert keys(theatre.of("train")) == straight


def standing_still(deck: Deck, most: int) -> list[int]:
    return deck.problems.order(deck.seed, deck.epoch)[:most]


@pytest.mark.parametrize(("broken", "by"), [("more", standing_still), ("position", (0, 0))])
def test_a_broken_deck_is_found_out(
    broken: str, by: object, model: Path, tmp_path: Path, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that deals a problem twice, and one that forgets its place when a run is halted."""
    monkeypatch.setattr(Deck, broken, by)
    with pytest.raises(AssertionError):
        if broken == "more":
            test_rounds_go_on_until_there_are_enough_with_contrast_or_rounds_or_epoch_are_used_up(
                model, tmp_path, theatre
            )
        else:
            test_a_resumed_run_plays_what_the_straight_one_plays(model, tmp_path, theatre)


def test_off_it_is_one_round_and_says_nothing(model: Path, tmp_path: Path, theatre: Theatre) -> None:
    trainer, _ = run(config(model, tmp_path / "run", **{**DYNAMIC, "rollout.dynamic_rounds": 0, "steps": 2}))
    assert [len(rounds) for rounds in steps(theatre).values()] == [1, 1]
    assert not any(k.startswith("dynamic/") for r in read_lines(trainer.run.path / "metrics.jsonl") for k in r)
