"""What an iteration came to, as a record, as events, as notes and as the final table, from parts made by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evolution_cases import group, rollout

from espl_train import report
from espl_train.config import EvaluationConfig, EvolutionConfig, RatingConfig
from espl_train.evaluation import Evaluation
from espl_train.evolution.breeding import BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Principle
from espl_train.learner.update import UpdateReport
from espl_train.records import Group, Rollout, StopReason, Turn
from espl_train.report import IslandReport, IterationReport, Totals


def talk(reward: float, *sampled: int, stop: StopReason = StopReason.ANSWER, sample: int = 0) -> Rollout:
    """An episode of one turn per number, which is how many tokens were sampled in it."""
    turns = tuple(Turn((1, 2, 3), (5,) * count, (-1.0,) * count) for count in sampled)
    return replace(rollout("p0000", 0, sample, reward, stop), turns=turns)


def grouped(prompt: str, task: int, *rollouts: Rollout) -> Group:
    return Group(prompt, task, f"t{task}", rollouts)


GROUPS = (
    grouped("p0000", 0, talk(1.0, 4), talk(0.0, 6, stop=StopReason.MAX_TOKENS)),
    grouped("p0000", 1, talk(0.0, 2, 3), talk(0.0, 1)),
    grouped("p0001", 0, talk(1.0, 5), talk(1.0, 7, stop=StopReason.FAULT)),
    grouped("p0001", 1, talk(1.0, 1), talk(0.5, 1, stop=StopReason.DEADLINE)),
)


def family() -> tuple[Population, tuple[Any, ...]]:
    """The root and two children: a mutation that changes one principle, and a crossover."""
    people = Population(EvolutionConfig(root=("Be exact.", "Draw.")), RatingConfig(), 0)
    mutant = Child((Principle("G1", "Be exact."), Principle("G3", "Count twice.")), "mutation", ("p0000",), 3)
    mixed = Child((Principle("G1", "Be exact."),), "crossover", ("p0000", "p0001"), 3)
    born = people.add([mutant], 4)
    return people, (*born, *people.add([mixed], 4))


class Alone:
    """The report of an iteration on one island, without any part that a mode may leave out."""

    def __init__(self, update: UpdateReport | None = None, **parts: Any) -> None:
        absent: dict[str, Any] = {"match": None, "bred": None, "born": (), "validation": {}}
        given: dict[str, Any] = {"groups": GROUPS, "reflection_tokens": 17, "best": "p0001"}
        self.report = IterationReport(4, {"": IslandReport(**{**absent, **given, **parts})}, update, 2.5)

    def metrics(self, people: Population) -> dict[str, Any]:
        return self.report.metrics({"": people})

    def events(self, people: Population) -> Iterator[tuple[str, dict[str, Any]]]:
        return self.report.events({"": people})

    def notes(self, people: Population) -> Iterator[str]:
        return self.report.notes({"": people})


iteration = Alone


def test_rewards_are_means_over_what_has_one_by_prompt_and_in_all() -> None:
    record = iteration().metrics(family()[0])
    assert record["reward/mean"] == pytest.approx(3 / 6)
    assert record["reward/p0000"] == pytest.approx(1 / 4) and record["reward/p0001"] == 1.0
    assert (record["step"], record["best"], record["seconds"]) == (4, "p0001", 2.5)


def test_counts_tokens_turns_contrast_and_stop_reasons() -> None:
    record = iteration().metrics(family()[0])
    assert record["rollouts/count"] == 8 and record["rollouts/faulted"] == 2
    assert record["groups/contrast"] == 0.25        # a faulted reward is no contrast
    assert record["tokens/sampled"] == 4 + 6 + 5 + 1 + 5 + 7 + 1 + 1 and record["tokens/reflection"] == 17
    assert record["rollouts/turns"] == pytest.approx(9 / 8)
    stops = {key: value for key, value in record.items() if key.startswith("stop/")}
    assert stops == {"stop/answer": 5, "stop/max_tokens": 1, "stop/fault": 1, "stop/deadline": 1}


def test_a_batch_in_which_everything_failed_has_no_mean() -> None:
    record = iteration(groups=(group("p0000", 0, [], faults=2),)).metrics(family()[0])
    assert math.isnan(record["reward/mean"]) and math.isnan(record["reward/p0000"])
    assert record["groups/contrast"] == 0 and record["rollouts/faulted"] == 2


def test_what_a_mode_leaves_out_is_not_in_the_record() -> None:
    record = iteration().metrics(family()[0])
    sections = {key.partition("/")[0] for key in record}
    assert sections.isdisjoint({"update", "rating", "population", "evolution", "parents", "validation"})


def test_update_match_children_and_validation_are_in_the_record() -> None:
    people, born = family()
    match = {"ratings": {"p0000": {"mu": 24.0, "sigma": 3.0}}, "values": {}, "ranks": {}}
    bred = BreedingReport((), [], calls=9, rejections={"a": 2, "b": 3}, repaired=1)
    update = UpdateReport(3, None, loss=-0.5, grad_norm=0.25, tokens=31)
    validation = {"validation/root": 0.25}
    done = iteration(update=update, match=match, bred=bred, born=born, validation=validation)
    record = done.metrics(people)
    assert (record["update/loss"], record["update/grad_norm"], record["update/tokens"]) == (-0.5, 0.25, 31)
    assert record["update/skipped"] == 0.0 and record["validation/root"] == 0.25
    assert (record["rating/p0000/mu"], record["rating/p0000/sigma"], record["population/size"]) == (24.0, 3.0, 3)
    assert record["rating/p0001/mu"] == people.rating("p0001").mu
    assert record["rating/p0002/sigma"] == people.rating("p0002").sigma
    assert (record["parents/p0001"], record["parents/p0002"]) == ("p0000", "p0000+p0001")
    assert (record["evolution/children"], record["evolution/calls"], record["evolution/rejections"]) == (2, 9, 5)
    skipped = iteration(update=UpdateReport(3, "no contrast")).metrics(people)
    assert skipped["update/skipped"] == 1.0


def test_events_tell_the_match_a_skipped_update_the_breeding_and_every_birth() -> None:
    people, born = family()
    bred = BreedingReport((), [{"event": "mutation", "step": 4, "outcome": "child"}], 1, {}, 0)
    done = iteration(update=UpdateReport(3, "no contrast"), match={"ranks": {"p0000": 0}}, bred=bred, born=born)
    events = list(done.events(people))
    assert events[:2] == [("match", {"ranks": {"p0000": 0}}), ("mutation", {"outcome": "child"})]
    assert events[-1] == ("update_skipped", {"reason": "no contrast"})
    births = [(kind, details["id"], details["rating"]["mu"]) for kind, details in events[2:-1]]
    assert births == [("born", child.id, people.rating(child.id).mu) for child in born]


def test_notes_say_what_is_new_in_a_child_and_what_it_does_without() -> None:
    people, born = family()
    notes = list(iteration(born=born, update=UpdateReport(3, "no contrast")).notes(people))
    assert notes == [
        "p0001 born by mutation of p0000: “Count twice.”, without “Draw.”",
        "p0002 born by crossover of p0000 and p0001: without “Draw.”",
        "no weight update: no contrast",
    ]


def test_totals_are_sums_over_all_iterations() -> None:
    first = Totals().plus([talk(1.0, 4, 2), talk(0.0, 3, stop=StopReason.FAULT)], 10, 1.5)
    assert first == Totals(rollouts=2, faulted=1, tokens=9, reflection_tokens=10, seconds=1.5)
    second = first.plus([talk(0.0, 5), talk(0.0, 1, stop=StopReason.DEADLINE), talk(1.0, 1)], 7, 0.25)
    assert second == Totals(rollouts=5, faulted=2, tokens=16, reflection_tokens=17, seconds=1.75)
    assert Totals(**second.to_json()) == second


def cell(mean: float) -> dict[str, float]:
    return {"": mean, "/low": mean - 0.01, "/high": mean + 0.01}


def record(count: int, **means: float) -> dict[str, Any]:
    cells = {f"validation/{name}{end}": v for name, mean in means.items() for end, v in cell(mean).items()}
    return {**cells, "validation/count": count}


HISTORY = [
    record(9, root=0.11, best=0.12, p0000=0.13), {"step": 1}, record(9, root=0.21, best=0.22, p0000=0.23, p0001=0.24),
    record(8, root=0.31, best=0.32, p0000=0.33, p0001=0.34, p0002=0.35),
]  # fmt: skip


def test_the_validation_table_reads_the_start_and_the_end() -> None:
    rows = report.validation_table(HISTORY, "p0000", "p0002")
    assert [(row.mean, row.count) for row in rows] == [(0.11, 9), (0.33, 8), (0.35, 8)]
    for row, words in zip(rows, ("start", "end root", "end best *"), strict=True):
        assert row.name.startswith("validation") and all(word in row.name for word in words.split())
    assert [(row.low, row.high) for row in rows] == [
        (pytest.approx(m - 0.01), pytest.approx(m + 0.01)) for m in (0.11, 0.33, 0.35)
    ]


def test_the_validation_table_has_no_row_twice_and_none_that_was_not_taken() -> None:
    assert [row.mean for row in report.validation_table(HISTORY, "p0000", "p0000")] == [0.11, 0.33]
    assert [row.mean for row in report.validation_table(HISTORY, "p0000", "p0099")] == [0.11, 0.33]
    assert report.validation_table([{"step": 0}, {"step": 1}], "p0000", "p0001") == []


def scored(mean: float, problems: int = 7) -> Evaluation:
    return Evaluation(mean, mean - 0.02, mean + 0.02, problems, 0)


def test_the_test_table_has_the_start_each_half_alone_and_both_together() -> None:
    start, after = {"p0": scored(0.1), "p3": scored(0.2)}, {"p0": scored(0.3), "p3": scored(0.4)}
    rows = report.table(start, after, "p0", "p3")
    assert [row.mean for row in rows] == [0.1, 0.2, 0.3, 0.4]
    for row, words in zip(rows, ("base root", "base best", "trained root", "trained best"), strict=True):
        assert row.name.startswith("test") and all(word in row.name for word in words.split())
    assert [(row.count, row.low, row.high) for row in rows] == [(7, row.mean - 0.02, row.mean + 0.02) for row in rows]


def test_the_test_table_leaves_out_what_is_the_same_was_not_played_or_has_no_score() -> None:
    start, after = {"p0": scored(0.1), "p3": scored(0.2)}, {"p0": scored(0.3), "p3": scored(0.4)}
    assert [row.mean for row in report.table(start, after, "p0", "p0")] == [0.1, 0.3]
    assert [row.mean for row in report.table(start, {}, "p0", "p3")] == [0.1, 0.2]
    assert [row.mean for row in report.table({**start, "p3": scored(math.nan, 0)}, {}, "p0", "p3")] == [0.1]


def test_a_second_look_at_the_test_split_is_said(tmp_path: Path) -> None:
    assert report.opened(tmp_path, 20) == ()
    assert report.opened(tmp_path, 20) == ()            # the same look, interrupted and taken up again
    (said,) = report.opened(tmp_path, 40)
    assert "opened before, at step 20" in said and "no first look" in said
    (said,) = report.opened(tmp_path, 60)
    assert "at step 20, at step 40:" in said


def test_the_notes_say_how_scores_were_taken_and_how_the_prompt_was_chosen() -> None:
    assert report.notes(EvaluationConfig(), chosen=False) == (
        "scores: greedy decoding, 1 sample per problem, 95 % intervals",
    )
    sampled = EvaluationConfig(temperature=0.7, samples=4)
    star, how = report.notes(sampled, chosen=True)
    assert star.startswith("* chosen")
    assert how == "scores: sampled at temperature 0.7, 4 samples per problem, 95 % intervals"
