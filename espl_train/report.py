"""What an iteration came to, in the shapes that others want: a flat record, events, notes for people, the final table.

Nothing is computed here that the loop has not decided; nothing is shown here either (that is runs/console.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from espl_train.config import EvaluationConfig
from espl_train.evaluation import Evaluation, weighted
from espl_train.evolution.breeding import BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import WORDS, SystemPrompt
from espl_train.learner.update import UpdateReport
from espl_train.records import Group, Rollout
from espl_train.runs import seal
from espl_train.runs.islands import under
from espl_train.runs.metrics import read_lines
from espl_train.runs.summary import Score
from espl_train.totals import Totals

__all__ = [
    "IslandReport", "IterationReport", "Totals", "UpdateReport", "history", "notes", "opened", "table",
    "validation_table",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class IslandReport:
    """What an iteration came to on one island. Parts that the mode leaves out are None."""

    groups: tuple[Group, ...]
    match: Mapping[str, Any] | None          # what Population.rate returned
    bred: BreedingReport | None
    born: tuple[SystemPrompt, ...]
    reflection_tokens: int
    validation: Mapping[str, float]
    best: str                                # the prompt of the moment; after the last step the chosen one
    batch: Mapping[str, float] = field(default_factory=dict)     # how it came about: dynamic sampling, shaping
    reviewed: tuple[Mapping[str, Any], ...] = ()                 # what a person has decided, who waits for it

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    def metrics(self, population: Population) -> dict[str, Any]:
        """Its part of a record of metrics.jsonl: numbers, and `parents/<id>` as text."""
        record = {**played(self.groups, self.reflection_tokens), **self.batch}
        for prompt in dict.fromkeys(group.prompt for group in self.groups):
            record[f"reward/{prompt}"] = _mean([x for g in self.groups if g.prompt == prompt for x in g.rewards])
        if self.match is not None:
            for prompt, rating in self.match["ratings"].items():
                record |= {f"rating/{prompt}/mu": rating["mu"], f"rating/{prompt}/sigma": rating["sigma"]}
            record["population/size"] = len(population)
        for child in self.born:
            rating = population.rating(child.id)
            record |= {f"rating/{child.id}/mu": rating.mu, f"rating/{child.id}/sigma": rating.sigma}
            record[f"parents/{child.id}"] = "+".join(child.parents)
        return {**record, **self.evolution(), **self.validation, "best": self.best}

    def evolution(self) -> dict[str, int]:
        """What reflection brought and took; nothing in mode `rl`."""
        if self.bred is None:
            return {}
        return {
            "evolution/children": len(self.born),
            "evolution/calls": self.bred.calls,
            "evolution/rejections": sum(self.bred.rejections.values()),
        }

    def events(self, population: Population) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every decision on the island, for events.jsonl: what it was, and its details."""
        if self.match is not None:
            yield "match", dict(self.match)
        for event in (*(self.bred.events if self.bred else ()), *self.reviewed):
            yield event["event"], {key: value for key, value in event.items() if key not in ("event", "step")}
        for younger, older in self.bred.retired.items() if self.bred else ():
            yield "retired", {"prompt": younger, "like": older}
        for child in self.born:
            yield "born", {**asdict(child), "rating": asdict(population.rating(child.id))}

    def notes(self, population: Population) -> Iterator[str]:
        """What a person should hear of it: who was born, and with what; who copied; who retired."""
        if self.bred is not None and (copies := self.bred.rejections.get("canary")):
            yield (
                f"WARNING: the reflector copies its evidence: planted words came back in {copies} "
                f"repl{'y' if copies == 1 else 'ies'}, the child was refused"
            )
        for younger, older in self.bred.retired.items() if self.bred else ():
            yield f"{younger} retires: it says and does what {older} says and does"
        for child in self.born:
            before = population.lineage.principles(child.parents[0])
            texts = [principle.text for principle in before.values()]
            new = "; ".join(f"“{text}”" for text in child.texts if text not in texts)
            gone = "; ".join(f"“{text}”" for text in texts if text not in child.texts)
            change = ", ".join(part for part in (new, gone and f"without {gone}") if part) or "nothing new"
            yield f"{child.id} born by {WORDS[child.operator]} of {' and '.join(child.parents)}: {change}"
        for event in self.reviewed:
            if event["outcome"] not in ("accepted", "edited"):
                yield f"{event['id']} {event['outcome']}: {event['detail']}"


@dataclass(frozen=True, slots=True)
class IterationReport:
    """One finished iteration: what it came to on each island, by name, and what they have in common."""

    step: int
    islands: Mapping[str, IslandReport]
    update: UpdateReport | None
    seconds: float
    victories: Sequence[Mapping[str, Any]] | None = None     # principles that win on a further island, if they migrate
    shared: Mapping[str, float] = field(default_factory=dict)    # the engine's counts, seconds by phase

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for island in self.islands.values() for rollout in island.rollouts]

    @property
    def reflection_tokens(self) -> int:
        return sum(island.reflection_tokens for island in self.islands.values())

    def metrics(self, populations: Mapping[str, Population]) -> dict[str, Any]:
        """The flat record of metrics.jsonl."""
        record = self._islands({name: island.metrics(populations[name]) for name, island in self.islands.items()})
        if self.update is not None:
            numbers = {key: value for key, value in asdict(self.update).items() if isinstance(value, int | float)}
            record |= {f"update/{key}": value for key, value in numbers.items()}
            record["update/skipped"] = float(self.update.skipped is not None)
        return {"step": self.step, **record, **self.shared, "seconds": self.seconds}

    def _islands(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The record of the only island; with several, the sums over all of them, and below them their own."""
        record: dict[str, Any] = {}
        if len(records) > 1:
            groups = [group for island in self.islands.values() for group in island.groups]
            record |= played(groups, self.reflection_tokens)
            for counts in (island.evolution() for island in self.islands.values()):
                record |= {name: record.get(name, 0) + count for name, count in counts.items()}
        if self.victories is not None:
            migrants = [p for i in self.islands.values() for p in i.born if p.operator == "migration"]
            record |= {"migration/children": len(migrants), "migration/won": len(self.victories)}
        for name, own in records.items():
            record |= under(name, own)
        return record

    def events(self, populations: Mapping[str, Population]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every decision of the iteration, for events.jsonl: what it was, and its details."""
        for name, island in self.islands.items():
            where = {"env": name} if name else {}
            yield from ((kind, {**details, **where}) for kind, details in island.events(populations[name]))
        yield from (("won_in_several", dict(victory)) for victory in self.victories or ())
        if self.update is not None and self.update.skipped:
            yield "update_skipped", {"reason": self.update.skipped}

    def notes(self, populations: Mapping[str, Population]) -> Iterator[str]:
        """What a person should hear about the iteration."""
        for name, island in self.islands.items():
            yield from island.notes(populations[name])
        for victory in self.victories or ():
            yield f"“{victory['principle']}” wins in {' and '.join(victory['islands'])}"
        if self.update is not None and self.update.skipped:
            yield f"no weight update: {self.update.skipped}"
        if self.update is not None:
            yield from self.update.notes


def played(groups: Sequence[Group], reflection_tokens: int) -> dict[str, Any]:
    """What was played, as metrics: rewards, counts, contrast, tokens, tools, and why episodes ended."""
    if not groups:
        return {}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "reward/mean": _mean([r.reward for r in rollouts if not r.faulted]),
        "rollouts/count": len(rollouts),
        "rollouts/faulted": sum(r.faulted for r in rollouts),
        "rollouts/turns": _mean([float(len(r.turns)) for r in rollouts]),
        "rollouts/forks": sum(r.forks for r in rollouts),
        "groups/contrast": sum(len(set(group.rewards)) > 1 for group in groups) / len(groups),
        "tokens/sampled": sum(r.sampled_tokens for r in rollouts),
        "tokens/reflection": reflection_tokens,
        **_tools(rollouts),
        **{f"stop/{reason}": count for reason, count in sorted(Counter(r.stop for r in rollouts).items())},
    }


def history(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl so far."""
    return list(read_lines(run / "metrics.jsonl"))


def validation_table(records: Sequence[Mapping[str, Any]], root: str, best: str) -> list[Score]:
    """Validation at the start, and at the end for the root prompt and for the chosen one."""
    first, last = records[0], records[-1]
    rows = [_score("validation, start", first, "root"), _score("validation, end, root prompt", last, root)]
    if best != root:
        rows.append(_score("validation, end, best prompt *", last, best))
    return [row for row in rows if row is not None]


def table(
    start: Mapping[str, Evaluation], after: Mapping[str, Evaluation], root: str, best: str
) -> list[Score]:
    """The test: the start, each half of the method alone, and both together. Cells that are the same are left out."""
    cells = [("test, base weights, root prompt", start.get(root))]
    if best != root:
        cells.append(("test, base weights, best prompt", start.get(best)))
    cells.append(("test, trained weights, root prompt", after.get(root)))
    if best != root:
        cells.append(("test, trained weights, best prompt", after.get(best)))
    return [Score(name, e.mean, e.problems, e.low, e.high) for name, e in cells if e is not None and e.problems]


def mixed(tables: Mapping[str, Sequence[Score]], shares: Mapping[str, float]) -> tuple[Score, ...]:
    """The tables of all environments in one, each row named after its own; before them their weighted means.

    An environment whose best prompt is the root has no row of its own for the best: the root's stands for it.
    """
    if len(tables) == 1:
        return tuple(row for table in tables.values() for row in table)
    known = {name: {row.name: row for row in table} for name, table in tables.items()}
    rows = []
    for title in dict.fromkeys(row.name for table in tables.values() for row in table):
        roots = title.replace("best prompt *", "root prompt").replace("best prompt", "root prompt")
        found = {name: table.get(title) or table.get(roots) for name, table in known.items()}
        parts = [(shares[n], r.mean, _known(r.low), _known(r.high)) for n, r in found.items() if r is not None]
        if len(parts) == len(tables):
            mean, low, high = weighted(parts)
            rows.append(Score(f"all: {title}", mean, sum(r.count for r in found.values() if r), low, high))
    return (*rows, *(replace(r, name=f"{name}: {r.name}") for name, table in tables.items() for r in table))


def _known(bound: float | None) -> float:
    return math.nan if bound is None else bound


def notes(config: EvaluationConfig, chosen: bool) -> tuple[str, ...]:
    """What belongs under the scores: how they were taken, and how the prompt was chosen."""
    how = f"sampled at temperature {config.temperature:g}" if config.temperature else "greedy decoding"
    samples = f"{config.samples} sample{'s' * (config.samples > 1)} per problem"
    star = ("* chosen among the best rated on these very problems",) if chosen else ()
    return (*star, f"scores: {how}, {samples}, 95 % intervals")


def opened(run: Path, step: int) -> tuple[str, ...]:
    """Note that the test split was opened at `step`, and say so if it had been before."""
    return seal.told(seal.open_seal(run, seal.Opening(step)))


def _score(name: str, record: Mapping[str, Any], prompt: str) -> Score | None:
    mean, low, high = (record.get(f"validation/{prompt}{end}") for end in ("", "/low", "/high"))
    return None if mean is None else Score(name, mean, int(record.get("validation/count", 0)), low, high)


def _tools(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Calls of tools per episode, and how many of them went wrong; nothing where none was made."""
    played = [r.info for r in rollouts if not r.faulted]
    calls = _mean([float(info.get("tool_calls", 0.0)) for info in played])
    errors = _mean([float(info.get("tool_errors", 0.0)) for info in played])
    return {"tools/calls": calls, "tools/errors": errors} if calls > 0 else {}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
