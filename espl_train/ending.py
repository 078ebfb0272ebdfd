"""The end of a run: the test split is opened once, what the run is worth is left behind, and all of it is summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espl_train import archipelago, report
from espl_train.export.bundle import write_prompts
from espl_train.runs.islands import own
from espl_train.runs.summary import Chosen, Score, Summary
from espl_train.snapshot import Snapshot

if TYPE_CHECKING:
    from espl_train.loop import Trainer


def finish(trainer: Trainer) -> Summary:
    """Test what the last validation has chosen: the start, each half alone, and both together."""
    run, totals, islands = trainer.run, trainer.totals, trainer.islands
    history = report.history(run.path)
    histories = {island.name: [own(record, island.name) for record in history] for island in islands}
    best = {name: str(records[-1]["best"]) for name, records in histories.items()}
    opened = report.opened(run.path, trainer.step)
    tables = _tested(trainer, histories, best)
    trainer.policy.save_adapter(run.path / "policy")
    write_prompts(Snapshot.of(run.path), run.path / "export", "best", "../policy")
    run.log.event(trainer.step, "totals", **totals.to_json())
    roots = {island.name: island.population.root.id for island in islands}
    notes = (
        *trainer.boxes.notes(), *report.notes(trainer.config.evaluation, chosen=best != roots), totals.note(),
        *archipelago.notes(islands), *opened, *trainer.client.ledger.table(), *_waiting(trainer),
    )  # fmt: skip
    return Summary(
        run=run.path,
        steps=trainer.step,
        seconds=totals.seconds,
        tokens=totals.tokens,
        rollouts=totals.rollouts,
        faulted=totals.faulted,
        chosen=tuple(Chosen(best[i.name], i.text(best[i.name]), i.name) for i in islands),
        scores=report.mixed(tables, trainer.config.shares),
        history=tuple(history),
        notes=notes,
    )


def _tested(
    trainer: Trainer, histories: Mapping[str, Sequence[Mapping[str, Any]]], best: Mapping[str, str]
) -> dict[str, list[Score]]:
    """By island, the scores of validation and test, which are played here."""
    roots = {island.name: island.population.root.id for island in trainer.islands}
    prompts = {name: list(dict.fromkeys([root, best[name]])) for name, root in roots.items()}
    most = trainer.config.evaluation.test_problems
    start = trainer.evaluate("test", prompts, most, "test, base weights", base=True)
    after = trainer.evaluate("test", prompts, most, "test") if trainer.config.mode != "evolution" else {}
    tables = {}
    for name, root in roots.items():
        table = report.table(start.get(name, {}), after.get(name, {}), root, best[name])
        where = {"env": name} if name else {}
        trainer.run.log.event(trainer.step, "test", scores={s.name: s.mean for s in table}, best=best[name], **where)
        tables[name] = [*report.validation_table(histories[name], root, best[name]), *table]
    return tables


def _waiting(trainer: Trainer) -> tuple[str, ...]:
    """How many children wait for a person, and what can be done about it."""
    waiting = sum(len(island.queue or ()) for island in trainer.islands)
    return (f"children that wait for a person: {waiting:,}; espl-train review {trainer.run.path}",) if waiting else ()
