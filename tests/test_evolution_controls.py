"""The controls: shuffled evidence says nothing about right and wrong, and a placebo has never seen any evidence."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evolution_cases import ADD, Scripted, batch, breed, plan, setting, tasks, two

from espl_envs.core.errors import EsplError
from espl_envs.tasks.conventions import RULES, SYMBOLS
from espl_train.config import RatingConfig
from espl_train.evolution import breeding, operators
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.edits import fingerprint
from espl_train.evolution.encounters import Encounter
from espl_train.evolution.evidence import Evidence, shuffled
from espl_train.evolution.guards import Guard
from espl_train.evolution.placebo import placebo
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle, SystemPrompt
from espl_train.evolution.ratings import scores
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.evolution.templates import TemplateSet, available
from espl_train.records import StopReason

MIXED = batch(p0000=[[1, 0], [1, 1], [0, 1, 1]], p0001=[[0, 0], [0, 1], [1, 1, 0]])
LONG = {"op": "add", "text": "Write every intermediate product down before you go on to the next step."}
PLACEBO = setting(writer="placebo")
POOL = TemplateSet.load("english").placebo()


def random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def test_every_problem_keeps_its_rewards_and_every_attempt_its_text() -> None:
    dealt = shuffled(MIXED, seed=1, step=3)
    assert [(g.prompt, g.task) for g in dealt] == [(g.prompt, g.task) for g in MIXED]
    for problem in range(3):
        before = Counter(r for g in MIXED if g.task == problem for r in g.rewards)
        assert Counter(r for g in dealt if g.task == problem for r in g.rewards) == before
    plain = [replace(r, reward=0.0) for g in MIXED for r in g.rollouts]
    assert [replace(r, reward=0.0) for g in dealt for r in g.rollouts] == plain
    assert shuffled(MIXED, 1, 3) == dealt != shuffled(MIXED, 1, 4)


def test_what_faulted_keeps_out_of_the_deal() -> None:
    lost = batch(p0000=[[1, 1]])[0]
    lost = replace(lost, rollouts=(*lost.rollouts, replace(lost.rollouts[0], reward=9.0, stop=StopReason.FAULT)))
    assert shuffled([lost], 1, 1)[0].rewards == (1, 1)


def agreement(deal: bool) -> float:
    """How often the first attempt, a right one, counts as right: 4 of 16 attempts of two prompts are."""
    groups = batch(p0000=[[1] * 4 + [0] * 4], p0001=[[0] * 8])
    seen = [shuffled(groups, 0, step) if deal else groups for step in range(400)]
    return float(np.mean([groups[0].rewards[0] for groups in seen]))


def test_a_shuffled_verdict_is_chance_whoever_made_the_attempt() -> None:
    assert agreement(deal=False) == 1.0
    assert abs(agreement(deal=True) - 4 / 16) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_reflection_and_crossover_see_the_shuffled_rewards_and_ratings_the_real_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = batch(p0000=[[1] * 8, [0] * 8, [1] * 8], p0001=[[0] * 8, [1] * 8, [0] * 8])
    crossed: list[dict[str, dict[int, tuple[float, ...]]]] = []

    async def cross(best: SystemPrompt, others: object, encounters: Sequence[Encounter], *_: object) -> Rejection:
        del others
        assert best.id == "p0000", "the parent is chosen by the truth"
        crossed.append({p: {e.problem: e.rewards[p] for e in encounters} for p in ("p0000", "p0001")})
        return Rejection(Reason.NO_CONTRAST)

    monkeypatch.setattr(operators, "cross", cross)
    asked = {}
    for evidence in ("real", "shuffled"):
        config = setting(evidence=evidence, crossover_probability=1.0, attempts=16)
        model = Scripted()
        breed(model, groups, config, two(config))
        asked[evidence] = [text for stage, text, _ in model.asked if stage == "critique"]
    assert crossed == [scores(groups), scores(shuffled(groups, 1, 0))] and crossed[0] != crossed[1]
    assert len(asked["real"]) == len(asked["shuffled"]) == 3
    assert all(a != b for a, b in zip(*asked.values(), strict=True))


def test_the_truth_is_not_even_in_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Evidence] = []
    original = Evidence.record
    monkeypatch.setattr(Evidence, "record", lambda self, *a: (kept.append(self), original(self, *a))[1])
    breed(Scripted(), MIXED, setting(evidence="shuffled"))
    traces = [t for row in kept[0].to_json().values() for t in row["traces"]]
    wanted = scores(shuffled(MIXED, 1, 0))
    assert Counter((t["prompt"], t["reward"]) for t in traces) == Counter(
        (p, r) for p, rows in wanted.items() for row in rows.values() for r in row
    )


def texts(report: BreedingReport) -> list[str]:
    return [p.text for child in report.children for p in child.principles]


def test_a_placebo_has_the_number_and_the_length_of_what_was_written() -> None:
    model, real = Scripted(critique=plan(ADD, LONG)), Scripted(critique=plan(ADD, LONG))
    child, written = breed(model, MIXED, PLACEBO).children[0], breed(real, MIXED, setting()).children[0]
    assert model.asked == real.asked, "the same calls for the same tokens"
    assert [len(p.text.split()) for p in written.principles] == [2, 1, 4, 13]
    for fresh, old in zip(child.principles[2:], written.principles[2:], strict=True):
        assert fresh.text in POOL and abs(len(fresh.text.split()) - len(old.text.split())) <= 2
    assert child.principles[:2] == written.principles[:2] and child.last_id == written.last_id
    assert child.parents == written.parents


def test_a_placebo_does_not_change_with_what_reflection_saw_or_said() -> None:
    """Same counts, other evidence, other words: the same child. And which principle is taken back is chance."""
    parent = SystemPrompt("p0003", tuple(Principle(f"G{i}", f"Advice {i}.") for i in range(1, 5)), last_id=6)

    def child(*kept: int, text: str) -> Child:
        return Child((*(parent.principles[i] for i in kept), Principle("G7", text)), "mutation", ("p0003",), 7)

    one = placebo(child(0, 1, 2, text="Count the apples twice."), parent, POOL, random(5))
    other = placebo(child(1, 2, 3, text="Secrets of the evidence!"), parent, POOL, random(5))
    assert one.principles == other.principles
    gone = Counter(
        next(iter({p.id for p in parent.principles} - {p.id for p in born.principles}))
        for born in (placebo(child(0, 1, 2, text="a b c d"), parent, POOL, random(i)) for i in range(200))
    )
    assert len(gone) == 4 and min(gone.values()) > 25


def test_the_test_above_fails_for_a_placebo_that_keeps_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breeding, "placebo", lambda child, *_: child)
    assert ADD["text"] in texts(breed(Scripted(critique=plan(ADD)), MIXED, PLACEBO))
    monkeypatch.undo()
    assert ADD["text"] not in texts(breed(Scripted(critique=plan(ADD)), MIXED, PLACEBO))


def test_where_reflection_writes_nothing_a_placebo_is_not_written_either() -> None:
    assert breed(Scripted(critique="garbage", repair=""), MIXED, PLACEBO).children == ()


def test_no_sentence_twice_and_a_small_pool_gives_what_it_has() -> None:
    parent = SystemPrompt("p0000", (Principle("G1", "one two"),), last_id=1)
    new = tuple(Principle(f"G{i}", f"x {i}") for i in range(2, 12))
    born = Child((*parent.principles, *new), "mutation", ("p0000",), 11)
    child = placebo(born, parent, ("One two.", "three four", "five six"), random(0))
    assert sorted(p.text for p in child.principles) == ["five six", "one two", "three four"]
    empty = placebo(replace(born, principles=born.principles[1:]), SystemPrompt("p0000", ()), POOL, random(0))
    assert len({fingerprint(p.text) for p in empty.principles}) == 10


def test_equal_lengths_are_all_drawn_from() -> None:
    """The dialect's sentences have two words each: not only the first of them may come."""
    pool = TemplateSet.load("micro").placebo()
    assert set(pool) == {f"{symbol} {rule}" for symbol in SYMBOLS for rule in RULES} and len(pool) == 240
    born = Child((Principle("G1", "⊕ adds"),), "mutation", ("p0000",), 1)
    drawn = {placebo(born, SystemPrompt("p0000", ()), pool, random(i)).principles[0].text for i in range(400)}
    assert len(drawn) > 150


@pytest.mark.parametrize("name", available())
def test_every_set_has_sentences_that_may_be_principles(name: str) -> None:
    pool, guard = TemplateSet.load(name).placebo(), Guard(32)
    assert len({fingerprint(text) for text in pool}) == len(pool) >= 60
    assert all(len(text.split()) <= 32 and guard.check(text) is None for text in pool)


def test_english_sentences_come_in_every_length() -> None:
    lengths = {len(text.split()) for text in POOL}
    assert all(any(abs(words - n) <= 1 for n in lengths) for words in range(3, 33))


def test_a_set_without_sentences_says_so_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text("")
    for stage in ("system", "summary", "critique", "revision", "crossover", "repair"):
        (tmp_path / f"{stage}.jinja").write_text("x")
    templates = TemplateSet.load(str(tmp_path))
    with pytest.raises(EsplError, match=r"placebo\.txt: one a line"):
        Breeder(PLACEBO, templates, 0)
    Breeder(setting(), templates, 0)


def test_an_empty_root_can_have_a_placebo_child() -> None:
    people = Population(setting(root=(), writer="placebo"), RatingConfig(), seed=1)
    breeder = Breeder(setting(root=(), writer="placebo"), TemplateSet.load("english"), seed=1)
    report = asyncio.run(breeder.breed(0, people, MIXED[:3], tasks(4), Scripted(critique=plan(ADD))))
    assert len(texts(report)) == 1 and texts(report)[0] in POOL
