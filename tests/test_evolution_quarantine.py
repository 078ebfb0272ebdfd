"""A prompt that memorises helps on what it has seen and not on its twins: it is found out, set aside, and let out again
only by a clean check; one that advises is left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_model import hub_model
from loop_kit import Theatre, config, deal, run

import espl_envs
from espl_envs.core.errors import EsplError
from espl_envs.core.tasks import Twinned
from espl_train import loop
from espl_train.config import LEAST_TWINS
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.guards.quarantine import Quarantine, ancestry, compare
from espl_train.evolution.lineage import Lineage
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, SystemPrompt
from espl_train.loop import Trainer
from espl_train.problems import Deck, Problems
from espl_train.records import RolloutKey
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.metrics import read_lines
from espl_train.settings import ConfigError, load

Chance = Callable[[int], float]


def scores(chance: Chance, problems: range, attempts: int, draw: random.Random) -> dict[int, list[float]]:
    return {p: [float(draw.random() < chance(p)) for _ in range(attempts)] for p in problems}


def suspected(seen: float, unseen: float, twins: bool, seed: int, problems: int = 10, attempts: int = 8) -> bool:
    """Whether a prompt with these leads over the root is quarantined, where problems differ in difficulty."""
    draw = random.Random(seed)
    hard = {p: draw.uniform(0.1, 0.6) for p in range(2 * problems)}
    first = range(problems)
    others = first if twins else range(problems, 2 * problems)
    at = lambda lead: lambda p: hard[p] + lead  # noqa: E731
    shown = (scores(at(seen), first, attempts, draw), scores(at(0), first, attempts, draw))
    fresh = (scores(at(unseen), others, attempts, draw), scores(at(0), others, attempts, draw))
    finding = compare(shown, fresh, twins)
    assert finding is not None
    return Quarantine(3.0).judge("p1", finding)


@pytest.mark.parametrize("twins", [True, False])
def test_memory_is_found_out_and_advice_is_not(twins: bool) -> None:
    trials = range(200)
    assert sum(suspected(0.0, 0.0, twins, s) for s in trials) <= 4, "no lead at all"
    assert sum(suspected(0.3, 0.3, twins, s) for s in trials) <= 4, "a lead that carries over"
    assert sum(suspected(0.6, 0.0, twins, s, problems=16) for s in trials) > 140, "a lead that does not"


def test_without_the_root_hard_twins_would_be_mistaken_for_memory() -> None:
    """The difference of differences, and not the prompt's own difference, is what is judged."""
    easy, hard = {p: [1.0] * 8 for p in range(8)}, {p: [0.0] * 8 for p in range(8)}
    finding, naive = compare((easy, easy), (hard, hard), True), compare((easy, hard), (hard, hard), True)
    assert finding and finding.gap == 0 and naive and Quarantine(3.0).judge("p1", naive)


def test_too_little_says_nothing_and_faults_are_left_out() -> None:
    few = {p: [1.0] for p in range(LEAST_TWINS - 1)}
    assert compare((few, few), (few, few), True) is None
    holes = {**{p: [1.0, 0.0] for p in range(LEAST_TWINS)}, 77: []}
    finding = compare((holes, holes), (holes, holes), True)
    assert finding is not None and finding.problems == LEAST_TWINS


def test_one_clear_check_suffices_and_leaving_takes_a_cleaner_one() -> None:
    ward = Quarantine(3.0)
    memory = compare(({p: [1.0] * 8 for p in range(8)}, {p: [0.0] * 8 for p in range(8)}),
                     ({p: [0.0] * 8 for p in range(8)}, {p: [0.0] * 8 for p in range(8)}), True)  # fmt: skip
    even = {p: [0.0, 1.0] for p in range(8)}
    clean = compare((even, even), (even, even), True)
    assert memory and clean
    assert ward.due(["p1", "p2"], ["p0", "p1", "p2"], 1) == ["p1", "p2"]
    assert ward.due(["p1", "p2"], ["p1", "p2"], 1) == [], "nobody twice"
    assert ward.judge("p1", memory) and not ward.judge("p2", clean)
    again = Quarantine(3.0)
    again.restore(json.loads(json.dumps(ward.state())))
    assert again.due(["p2"], ["p1", "p2"], 2) == ["p1"], "the cleared one is not asked again, the held one is"
    assert not again.judge("p1", clean) and not again.held


def test_what_a_prompt_was_shown_goes_back_to_the_root() -> None:
    book = Lineage()
    for name, step, parents in (("p0", 0, ()), ("p1", 2, ("p0",)), ("p2", 3, ("p0",)), ("p3", 7, ("p1", "p2"))):
        book.add(SystemPrompt(name, (), parents=parents, born=step), {})
    assert ancestry("p3", book) == [7, 3, 2, 0] and ancestry("p2", book) == [3, 0] and ancestry("p9", book) == []


@pytest.mark.parametrize("env_id", ["espl/Conventions-v0", "espl/Countdown-v0", "espl/TrapGrid-v0"])
def test_a_twin_is_another_problem_of_the_same_kind_and_split(env_id: str) -> None:
    tasks, twins, others = (espl_envs.make(env_id, twins=k).unwrapped.tasks for k in (0, 1, 2))
    assert isinstance(tasks, Twinned) and len(tasks) == len(twins) and len({tasks.hash, twins.hash, others.hash}) == 3
    for index in range(6):
        task, twin = tasks[index], twins[index]
        assert twin == espl_envs.make(env_id, twins=1).unwrapped.tasks[index], "pure"
        assert len({task.question, twin.question, others[index].question}) == 3 or task.data != twin.data
        assert task.id != twin.id and task.split == twin.split and task.data.keys() == twin.data.keys()
    env = espl_envs.make(env_id, twins=1).unwrapped
    env.reset(options={"task": 3})
    done, reward = False, 0.0
    while not done:
        _, reward, terminated, truncated, _ = env.step(env.oracle())
        done = terminated or truncated
    assert reward == 1.0


def test_a_twin_of_a_chain_has_the_same_operators() -> None:
    tasks, twins = (espl_envs.make("espl/Conventions-v0", split="test", twins=k).unwrapped.tasks for k in (0, 1))
    for index in range(20):
        assert [s for s, _ in tasks[index].data["steps"]] == [s for s, _ in twins[index].data["steps"]]


def test_a_fixed_list_has_no_twins_and_says_so() -> None:
    assert not isinstance(espl_envs.make("espl/Game24-v0").unwrapped.tasks, Twinned)
    with pytest.raises(EsplError, match="no twins"):
        espl_envs.make("espl/Game24-v0", twins=1).unwrapped.tasks  # noqa: B018
    with pytest.raises(EsplError, match="twins is -1"):
        espl_envs.make("espl/Countdown-v0", twins=-1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


def memorising(key: RolloutKey, policy: int | None) -> float:
    """Children know the problems of train by heart, the root knows nothing; in twins nobody knows anything."""
    del policy
    child, seen = not key.prompt.endswith("p0000"), key.split in ("train", "trial")
    return float(child and (seen or key.split == "validation") and key.sample > 0)


def advising(key: RolloutKey, policy: int | None) -> float:
    """Children are better everywhere."""
    del policy
    return float(not key.prompt.endswith("p0000") and key.sample > 0)


def breed_and_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of the root in every step, which was shown all the problems of its batch and of those before."""

    async def breed(
        self: Breeder, step: int, population: Population, groups: Any, *_: Any, **__: Any
    ) -> BreedingReport:
        self._shown[step] = sorted({group.task for group in groups})
        child = Child((Principle("G1", f"Rule of step {step}."),), "mutation", (population.members[-1].prompt.id,), 1)
        return BreedingReport((child,), [], 0, {}, 0)

    monkeypatch.setattr(Breeder, "breed", breed)


CHANGES = {
    "env.id": "espl/Conventions-v0",
    "steps": 3, "evolution.twin_problems": 4, "rollout.problems": 4, "rollout.samples": 6,
    "evaluation.every": 2,
}  # fmt: skip


def events(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(folder / "events.jsonl") if row["kind"] == "twins"]


def test_a_run_sets_its_memorisers_aside_and_goes_on_with_the_root(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theatre = deal(monkeypatch, memorising)
    breed_and_show(monkeypatch)
    trainer, summary = run(config(model, tmp_path / "run", **CHANGES))
    (island,) = trainer.islands
    held = {row["prompt"] for row in events(tmp_path / "run") if row["held"]}
    assert held and held == set(island.population.aside) == set(island.quarantine.held)
    assert summary.chosen[0].prompt == "p0000"
    listed = json.loads((tmp_path / "run" / "population" / "population.json").read_text())["aside"]
    assert set(listed) == held and all("quarantine" in why for why in listed.values())
    assert twin_plays(theatre), "the twins were played, in an environment of their own"
    counted = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if row.get("twins/rollouts")]
    assert counted and all(row["twins/rollouts"] % 24 == 0 for row in counted)
    with RunDirectory.open(tmp_path / "run", {}) as directory:
        again = Trainer(directory.config, directory, Console(quiet=True)).islands[0]
    assert again.population.aside == island.population.aside, "a resumed run knows them still"
    assert again.quarantine.state() == island.quarantine.state() and again.breeder.shown([1, 2, 3])


def twin_plays(theatre: Theatre) -> list[Any]:
    return [play for play in theatre.plays if play.jobs[0].key.split.startswith("trial/")]


def test_prompts_that_advise_are_left_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deal(monkeypatch, advising)
    breed_and_show(monkeypatch)
    trainer, summary = run(config(model, tmp_path / "run", **CHANGES))
    assert not trainer.islands[0].population.aside and summary.chosen[0].prompt != "p0000"
    assert any(not row["held"] and "gap" in row for row in events(tmp_path / "run"))


def test_without_the_check_the_memoriser_is_the_best(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deal(monkeypatch, memorising)
    breed_and_show(monkeypatch)
    monkeypatch.setattr(loop, "examine", _nobody)
    _, summary = run(config(model, tmp_path / "run", **CHANGES))
    assert summary.chosen[0].prompt != "p0000"


async def _nobody(*_: object) -> list[object]:
    return []


def test_fresh_problems_stand_in_while_there_are_any() -> None:
    env = espl_envs.make("espl/Game24-v0").unwrapped
    problems = Problems("train", "espl/Game24-v0", {}, "train", range(12), env)
    assert problems.twins is None
    deck = Deck(problems, 1)
    dealt = deck.batch(5)
    assert len(deck.untouched(9)) == 7 and not set(deck.untouched(9)) & set(dealt)
    deck.batch(5), deck.batch(5)
    assert deck.untouched(9) == [], "after the first epoch reflection may have seen everything"


def test_settings_that_make_no_sense_are_refused() -> None:
    for overrides, said in (
        ({"mode": "rl", "evolution.twin_problems": 8}, "no prompt but the root"),
        ({"evolution.twin_problems": 2}, "fewer than 4"),
        ({"evolution.answer_visibility": "none"}, "crossover_probability 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(overrides=overrides)
    assert load(overrides={"evolution.answer_visibility": "none", "evolution.crossover_probability": 0.0})
