"""Several environments in one run: a population on each, one learner for all, shares by weight, nothing mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from espl_little import LETTERS
from hub_model import hub_model
from loop_kit import SMALL, Theatre, breed_simply, deal, keys, resume, run

from espl_envs.core.tasks import Task
from espl_train import archipelago, loop
from espl_train.config import Config, RolloutConfig, SandboxConfig
from espl_train.evaluation import weighted
from espl_train.evolution.guards import Guard
from espl_train.evolution.rejections import Reason
from espl_train.problems import Deck
from espl_train.records import RolloutKey
from espl_train.runs.checkpoint import load_newest
from espl_train.runs.islands import names, own, under
from espl_train.runs.metrics import read_lines
from espl_train.sandboxes import Boxes
from espl_train.settings import load
from espl_train.snapshot import Snapshot

PARITY = "espl_parity:espl-test/Parity-v0"
TWO = {
    **{key: value for key, value in SMALL.items() if key != "env.id"},
    "envs.letters.id": LETTERS, "envs.letters.weight": 2, "envs.parity.id": PARITY, "rollout.problems": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


def two(model: Path, out: Path, **changes: Any) -> Config:
    return load(overrides={**TWO, "model.path": str(model), "out": str(out), **changes})


def rewards(key: RolloutKey, policy: int | None) -> float:
    """Contrast in every group; letters are easier than parity, and a newer prompt is the better one."""
    del policy
    island, _, prompt = key.prompt.partition(":")
    easy = 0.25 if island == "letters" else 0.0
    return min(0.125 * int(prompt[1:]), 0.5) + easy + 0.125 * (key.sample % 2)


@pytest.fixture
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    breed_simply(monkeypatch)
    return deal(monkeypatch, rewards)


def dealt(theatre: Theatre, island: str) -> dict[int, list[int]]:
    """The problems that an island trained on, by step."""
    plays = [p for p in theatre.of("train") if p.jobs and p.prompts[0].startswith(f"{island}:")]
    return {play.jobs[0].key.step: play.tasks for play in plays}


def records(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder / "metrics.jsonl"))


def test_problems_come_from_each_environments_own_deck_by_weight_and_one_update_learns_from_all(
    model: Path, tmp_path: Path, theatre: Theatre
) -> None:
    trainer, _ = run(two(model, tmp_path / "run", steps=4))
    for island, size in (("letters", 2), ("parity", 1)):
        found = next(i for i in trainer.islands if i.name == island)
        deck = Deck(found.sets.train, found.seed)
        assert dealt(theatre, island) == {step: deck.batch(size) for step in range(1, 5)}
    assert len(theatre.updates) == 4 == trainer.policy.version
    assert all({g.prompt.partition(":")[0] for g in groups} == {"letters", "parity"} for groups in theatre.updates)
    assert [len(g.rollouts) for g in theatre.updates[0]] == [6, 6, 6]
    played = keys(theatre.plays)
    assert len({(k, p.policy) for p in theatre.plays for k in keys([p])}) == len(played)       # no two episodes alike
    letters, parity = trainer.islands
    assert letters.seed != parity.seed and letters.breeder is not parity.breeder


def test_who_gets_no_problem_in_a_step_is_neither_rated_nor_bred_there(
    model: Path, tmp_path: Path, theatre: Theatre
) -> None:
    trainer, _ = run(two(model, tmp_path / "run", steps=3, **{"rollout.problems": 1}))
    assert dealt(theatre, "letters").keys() == {1, 3} and dealt(theatre, "parity").keys() == {2}
    assert [len(island.population) for island in trainer.islands] == [3, 2]
    steps = records(tmp_path / "run")[1:]
    assert ["envs/parity/reward/mean" in record for record in steps] == [False, True, False]
    assert all("envs/parity/best" in record and "reward/mean" in record for record in steps)


@pytest.mark.usefixtures("theatre")
def test_a_record_has_each_environment_as_if_alone_and_all_of_them_weighted(
    model: Path, tmp_path: Path
) -> None:
    _, summary = run(two(model, tmp_path / "run"))
    start, *_, last = records(tmp_path / "run")
    assert names([last]) == ["letters", "parity"]
    letters, parity = own(last, "letters"), own(last, "parity")
    assert last["reward/mean"] == pytest.approx((2 * letters["reward/mean"] + parity["reward/mean"]) / 3)
    assert last["rollouts/count"] == letters["rollouts/count"] + parity["rollouts/count"] == 18
    assert last["evolution/children"] == 2 and letters["population/size"] == 3
    assert letters["rating/letters:p0001/mu"] > letters["rating/letters:p0000/mu"]
    for name in ("validation/root", "validation/best"):
        for record in (start, last):
            parts = [own(record, island) for island in ("letters", "parity")]
            bounds = [(s, p[name], p[f"{name}/low"], p[f"{name}/high"]) for s, p in zip((2, 1), parts, strict=True)]
            assert [record[name], record[f"{name}/low"], record[f"{name}/high"]] == list(weighted(bounds))
    rows = {score.name: score for score in summary.scores}
    assert rows["all: validation, start"].mean == start["validation/root"]
    assert rows["all: test, trained weights, best prompt"].mean == pytest.approx(
        (2 * rows["letters: test, trained weights, best prompt"].mean
         + rows["parity: test, trained weights, best prompt"].mean) / 3
    )  # fmt: skip
    assert rows["all: validation, start"].count == 6


@pytest.mark.parametrize(("mode", "updates", "prompts"), [("rl", 1, 1), ("evolution", 0, 2)])
def test_the_two_halves_of_the_method_have_several_environments_too(
    mode: str, updates: int, prompts: int, model: Path, tmp_path: Path, theatre: Theatre
) -> None:
    trainer, summary = run(two(model, tmp_path / "run", mode=mode, steps=1))
    assert len(theatre.updates) == updates and [len(i.population) for i in trainer.islands] == [prompts] * 2
    assert [c.prompt for c in summary.chosen] == ["letters:p0000", "parity:p0000"]
    assert all(g.prompt.endswith(":p0000") and len(g.rollouts) == 6 for groups in theatre.updates for g in groups)


@pytest.mark.usefixtures("theatre")
def test_every_environment_has_its_best_prompt_and_its_files(model: Path, tmp_path: Path) -> None:
    trainer, summary = run(two(model, tmp_path / "run"))
    assert [(c.env, c.prompt) for c in summary.chosen] == [("letters", "letters:p0001"), ("parity", "parity:p0001")]
    for island, chosen in zip(trainer.islands, summary.chosen, strict=True):
        assert chosen.text == island.text(chosen.prompt)
        written = json.loads((tmp_path / f"run/population/{island.name}.json").read_text())
        assert [m["prompt"]["id"] for m in written["members"]] == [m.prompt.id for m in island.population.members]
    assert not (tmp_path / "run/population/population.json").exists()
    events = list(read_lines(tmp_path / "run/events.jsonl"))
    assert [e["env"] for e in events if e["kind"] == "match" and e["step"] == 1] == ["letters", "parity"]
    assert {e["env"]: e["best"] for e in events if e["kind"] == "test"} == {c.env: c.prompt for c in summary.chosen}
    snapshot = Snapshot.of(tmp_path / "run")
    assert {name: snapshot.best(name).id for name in snapshot.populations} == {c.env: c.prompt for c in summary.chosen}
    assert snapshot.find_one("parity:p0000")[0] == "parity" == snapshot.find_one("parity/best")[0]


def test_a_resumed_run_is_the_straight_one(model: Path, tmp_path: Path, theatre: Theatre) -> None:
    run(two(model, tmp_path / "straight", steps=3))
    straight, plays = contents(tmp_path / "straight"), keys(theatre.of("train"))
    theatre.plays.clear()
    run(two(model, tmp_path / "halted", steps=1))
    resume(tmp_path / "halted", steps=3)
    assert keys(theatre.of("train")) == plays and contents(tmp_path / "halted") == straight


def contents(folder: Path) -> dict[str, Any]:
    """What the next step would depend on, but for seconds."""
    _, payloads = load_newest(folder / "checkpoints")
    state = json.loads(json.dumps(payloads["state"]["islands"]))
    return {"islands": state, "rollouts": [r.get("rollouts/count") for r in records(folder)[-2:]]}


def test_a_resume_that_mixes_the_islands_up_is_found_out(
    model: Path, tmp_path: Path, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Island.restore
    decks = {"letters": (0, 0), "parity": (0, 0)}
    monkeypatch.setattr(loop.Island, "restore", lambda self, state: original(self, {**state, "deck": decks[self.name]}))
    with pytest.raises(AssertionError):
        test_a_resumed_run_is_the_straight_one(model, tmp_path, theatre)


class Guarded:
    """As much of an island as its neighbours see."""

    def __init__(self, name: str, answer: str) -> None:
        self.name, self.breeder, self.sets = name, self, self
        self.guard, self.train = Guard(32), self
        self.tasks = {0: Task("t0", "train", f"A question of {name}.", answer)}


def test_no_island_gives_away_what_another_trains_on() -> None:
    here, there = Guarded("a", "48151"), Guarded("b", "62342")
    here.guard.learn(here.tasks)
    there.guard.learn(there.tasks)
    leak = "The result is often 62342."
    assert here.guard.check(leak) is None              # what it cannot know it lets pass
    archipelago.acquaint([here, there])  # type: ignore[list-item]
    refused = here.guard.check(leak)
    assert refused is not None and refused.reason == Reason.LEAKED_ANSWER
    assert here.guard.check("Work step by step.") is None and there.guard.check("Try 48151 first.") is not None


def test_places_and_boxes_are_shared_among_those_who_need_them() -> None:
    boxes = Boxes(SandboxConfig(max_live=8), None, 0.5)
    boxes.settings = object()  # type: ignore[assignment]
    limits = RolloutConfig(concurrency=100)
    assert boxes.limited(limits, 0.25, boxed=True).concurrency == 4          # half of the boxes: half of the users
    assert boxes.limited(limits, 0.5, boxed=False).concurrency == 50
    assert boxes.limited(limits, 0.001, boxed=False).concurrency == 1
    assert Boxes(SandboxConfig(), None).limited(limits) is limits


def test_records_of_environments_are_told_apart_by_their_names() -> None:
    record = {"step": 3, "reward/mean": 0.5, **under("a", {"reward/mean": 0.1}), **under("a-2", {"best": "a-2:p0001"})}
    assert names([{"step": 0}, record]) == ["a", "a-2"] and names([{"step": 0}]) == [""]
    assert own(record, "a") == {"step": 3, "reward/mean": 0.1} and own(record, "") == record
    assert under("", {"best": "p0001"}) == {"best": "p0001"}
