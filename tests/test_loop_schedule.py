"""Schedules: which half learns in which step, that the other one stands still, and that every step costs the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_model import hub_model
from loop_kit import Play, Theatre, breed_simply, config, deal, resume, run

from espl_train import loop, schedule
from espl_train.config import Config
from espl_train.learner.update import Learner
from espl_train.loop import Trainer
from espl_train.records import RolloutKey
from espl_train.runs.lock import RunError
from espl_train.runs.metrics import read_lines
from espl_train.settings import ConfigError, load
from espl_train.settings.layers import preset_descriptions

SCHEDULES = ("joint", "sequential", "weights_then_prompts", "alternating")


def letters(steps: int, **settings: object) -> str:
    """A letter per step: b(oth), p(rompts), w(eights)."""
    chosen = Config.model_validate({"steps": steps, **settings})
    names = {schedule.BOTH: "b", schedule.PROMPTS: "p", schedule.WEIGHTS: "w"}
    return "".join(names[schedule.phase(chosen, step)] for step in range(1, steps + 1))


def test_every_schedule_step_by_step() -> None:
    assert letters(4) == "bbbb"
    assert letters(4, mode="rl") == "wwww" and letters(4, mode="evolution") == "pppp"
    assert letters(5, schedule="sequential", schedule_share=0.4) == "ppwww"
    assert letters(5, schedule="weights_then_prompts", schedule_share=0.4) == "wwppp"
    assert letters(7, schedule="alternating", schedule_period=2) == "ppwwppw"
    assert schedule.counts(Config(steps=7, schedule="alternating", schedule_period=2)) == (4, 3)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"schedule": "sequential", "mode": "rl"}, "in mode rl only one of them learns"),
        ({"schedule": "alternating", "mode": "evolution"}, "in mode evolution only one of them learns"),
        ({"schedule": "sequential", "steps": 1}, "leaves none of 1 steps for the weights"),
        ({"schedule": "weights_then_prompts", "schedule_share": 1.0}, "none of 30 steps for the prompts"),
        ({"schedule": "alternating", "steps": 5}, "schedule_period 5, which leaves none of 5 steps for the weights"),
    ],
)
def test_a_schedule_without_two_halves_is_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(overrides=settings)


def test_a_falling_learning_rate_falls_over_the_steps_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(Learner, "__init__", lambda *_, **settings: seen.update(settings))

    class Alone:
        def load(self, _: Config) -> None: ...
        def together(self) -> object:
            return torch.no_grad()

    Learner.of(Config(steps=10, schedule="sequential", schedule_share=0.3), Alone())  # type: ignore[arg-type]
    assert seen["updates"] == 7


def odd(key: RolloutKey, policy: int | None) -> float:
    """In validation the second child is the best one; in training there is contrast everywhere."""
    del policy
    return float(key.sample % 2) if key.split == "train" else float(key.prompt == "p0002")


SETTINGS = {"steps": 4, "rollout.problems": 2, "evaluation.prompts": 5}
SEQUENTIAL = {**SETTINGS, "steps": 5, "schedule": "sequential", "schedule_share": 0.6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    breed_simply(monkeypatch)
    return deal(monkeypatch, odd)


def weights(trainer: Trainer) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trainer.learner.policy.trainable_parameters().values()]


def trained(plays: list[Play], step: int) -> Counter[str]:
    return Counter(j.key.prompt for p in plays for j in p.jobs if j.key.split == "train" and j.key.step == step)


def test_sequential_freezes_first_the_weights_and_then_the_prompts(
    theatre: Theatre, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = Trainer.iterate

    def iterate(self: Trainer) -> object:
        before = weights(self)
        done = original(self)
        seen.append((before == weights(self), len(self.islands[0].population), self.islands[0].chosen))
        return done

    monkeypatch.setattr(Trainer, "iterate", iterate)
    trainer, summary = run(config(model, tmp_path / "a", **SEQUENTIAL))
    assert seen == [(True, size, None) for size in (2, 3, 4)] + [(False, 4, "p0002")] * 2
    assert summary.chosen[0].prompt == "p0002" == trainer.islands[0].leader
    plays = theatre.plays
    assert trained(plays, 4) == trained(plays, 5) == {"p0002": 2 * 3 * 2}
    assert {g.prompt for groups in theatre.updates for g in groups} == {"p0002"}
    assert theatre.journal.count("reflection") == 3 == theatre.journal.count("rate")
    events = [e for e in read_lines(tmp_path / "a" / "events.jsonl") if e["kind"] == "chosen"]
    assert [(e["step"], e["prompt"]) for e in events] == [(4, "p0002")]


def test_the_test_above_notices_a_switch_that_never_comes(
    theatre: Theatre, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = SimpleNamespace(**{**vars(schedule), "phase": lambda *_: schedule.PROMPTS})
    monkeypatch.setattr(loop, "schedule", never)
    trainer, _ = run(config(model, tmp_path / "a", **SEQUENTIAL))
    assert theatre.updates == [] and trainer.islands[0].chosen is None


def test_weights_first_learn_with_the_root_and_prompts_then_breed_on_them(
    theatre: Theatre, model: Path, tmp_path: Path
) -> None:
    trainer, _ = run(config(model, tmp_path / "a", schedule="weights_then_prompts", **SETTINGS))
    plays = theatre.plays
    assert trained(plays, 1) == trained(plays, 2) == {"p0000": 12} and len(trained(plays, 4)) == 2
    assert len(theatre.updates) == 2 and len(trainer.islands[0].population) == 3
    policies = {p.policy for p in plays for j in p.jobs if j.key.step in (3, 4) and j.key.split == "train"}
    assert policies == {2}, "prompts are bred on the trained weights, which stand still"


def test_every_step_of_every_schedule_costs_the_same_rollouts(theatre: Theatre, model: Path, tmp_path: Path) -> None:
    plays = theatre.plays
    for name in SCHEDULES:
        plays.clear()
        run(config(model, tmp_path / name, schedule=name, schedule_period=1, **SETTINGS))
        assert [trained(plays, step).total() for step in range(1, 5)] == [12] * 4, name


def test_a_resumed_schedule_is_the_same_run(
    theatre: Theatre, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each step of p w p w, the choice included."""
    del theatre
    settings = {**SETTINGS, "schedule": "alternating", "schedule_period": 1}
    whole, _ = run(config(model, tmp_path / "whole", **settings))
    original = Trainer.iterate
    for stop in (1, 2, 3):

        def iterate(self: Trainer, stop: int = stop) -> object:
            if self.step == stop:
                raise KeyboardInterrupt
            return original(self)

        folder = tmp_path / f"stopped {stop}"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Trainer, "iterate", iterate)
            run(config(model, folder, **settings))
        again, _ = resume(folder)
        assert again.islands[0].state() == whole.islands[0].state()
        assert weights(again) == weights(whole)
        first, second = (list(read_lines(tmp_path / d / "events.jsonl")) for d in ("whole", folder.name))
        assert [e for e in first if e["kind"] == "chosen"] == [e for e in second if e["kind"] == "chosen"]


def test_the_turn_cannot_be_moved_afterwards(theatre: Theatre, model: Path, tmp_path: Path) -> None:
    del theatre
    run(config(model, tmp_path / "a", schedule="sequential", **SETTINGS))
    with pytest.raises(RunError, match="turns after a share of 4 steps: leave --steps away"):
        resume(tmp_path / "a", steps=8)


@pytest.mark.parametrize("name", ["sequential", "weights_then_prompts", "alternating"])
def test_schedules_are_presets(name: str) -> None:
    assert load([name]).schedule == name and preset_descriptions()[name].startswith("Baseline: ")
    assert load(["rl"]).mode == "rl" and load(["evolution"]).mode == "evolution"
