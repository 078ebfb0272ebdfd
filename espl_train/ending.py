"""The end of a run: the test split is opened once, what the run is worth is left behind, and all of it is summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from espl_train import archipelago, report
from espl_train.evaluation import Evaluation
from espl_train.export.bundle import write_prompts
from espl_train.island import Island
from espl_train.problems import Part
from espl_train.runs.directory import RunDirectory
from espl_train.runs.islands import own
from espl_train.runs.summary import Chosen, Score, Summary
from espl_train.snapshot import Snapshot
from espl_train.totals import Totals

Scores = Mapping[str, Mapping[str, Evaluation]]         # by island, by prompt


class Evaluate(Protocol):
    """Plays prompts with the weights of the moment, or (`base`) those of the start: `Trainer.evaluate`."""

    def __call__(
        self, part: Part, prompts: Mapping[str, Sequence[str]], most: int, name: str, base: bool = False
    ) -> Scores: ...


def finish(
    run: RunDirectory, islands: Sequence[Island], step: int, totals: Totals, evaluate: Evaluate,
    warnings: Sequence[str] = (), books: Sequence[str] = (),
) -> Summary:
    """Test what the last validation has chosen: the start, each half alone, and both together. The summary begins with
    `warnings` and has the `books` of reflection in it."""
    config, history = run.config, report.history(run.path)
    histories = {island.name: [own(record, island.name) for record in history] for island in islands}
    best = {name: str(records[-1]["best"]) for name, records in histories.items()}
    opened = report.opened(run.path, step)
    tables = _tested(run, islands, step, evaluate, histories, best)
    write_prompts(Snapshot.of(run.path), run.path / "export", "best", "../policy")
    run.log.event(step, "totals", **totals.to_json())
    roots = {island.name: island.population.root.id for island in islands}
    notes = (
        *warnings, *report.notes(config.evaluation, chosen=best != roots), totals.note(), *archipelago.notes(islands),
        *opened, *books, *_waiting(run, islands),
    )  # fmt: skip
    return Summary(
        run=run.path,
        steps=step,
        seconds=totals.seconds,
        tokens=totals.tokens,
        rollouts=totals.rollouts,
        faulted=totals.faulted,
        chosen=tuple(Chosen(best[i.name], i.text(best[i.name]), i.name) for i in islands),
        scores=report.mixed(tables, config.shares),
        history=tuple(history),
        notes=notes,
    )


def _tested(
    run: RunDirectory, islands: Sequence[Island], step: int, evaluate: Evaluate,
    histories: Mapping[str, Sequence[Mapping[str, Any]]], best: Mapping[str, str],
) -> dict[str, list[Score]]:
    """By island, the scores of validation and test, which are played here."""
    roots = {island.name: island.population.root.id for island in islands}
    prompts = {name: list(dict.fromkeys([root, best[name]])) for name, root in roots.items()}
    most = run.config.evaluation.test_problems
    start = evaluate("test", prompts, most, "test, base weights", base=True)
    after = evaluate("test", prompts, most, "test") if run.config.mode != "evolution" else {}
    tables = {}
    for name, root in roots.items():
        table = report.table(start.get(name, {}), after.get(name, {}), root, best[name])
        where = {"env": name} if name else {}
        run.log.event(step, "test", scores={s.name: s.mean for s in table}, best=best[name], **where)
        tables[name] = [*report.validation_table(histories[name], root, best[name]), *table]
    return tables


def _waiting(run: RunDirectory, islands: Sequence[Island]) -> tuple[str, ...]:
    """How many children wait for a person, and what can be done about it."""
    waiting = sum(len(island.queue or ()) for island in islands)
    return (f"children that wait for a person: {waiting:,}; espl-train review {run.path}",) if waiting else ()
