"""Lineage: who wrote each principle of each prompt, when, from what and why, and how the prompts that carried it fared.

Written down is what every prompt changed of its first parent; whatever it left alone is found there. Prompts that the
population has dropped stay in the book: principles outlive them. A comparison with a parent is one of whole prompts: a
principle shares it with all that was changed together with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from espl_train.evolution.edits import fingerprint
from espl_train.evolution.prompts import WORDS, Operator, Origin, Principle, SystemPrompt
from espl_train.evolution.ratings import Table, paired_difference


@dataclass(frozen=True, slots=True)
class Duel:
    """A prompt against its first parent on all problems that both attempted in the same iteration.

    `gain` is the mean over the problems of the difference in mean reward, `error` its standard error.
    """

    problems: int = 0
    gain: float = 0.0
    error: float = 0.0

    def plus(self, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Duel:
        """With one more batch of (own rewards, the parent's) per problem."""
        gain, error = paired_difference(pairs)
        before, now = self.problems, len(pairs)
        total = before + now
        return Duel(
            total,
            (before * self.gain + now * gain) / total,
            math.hypot(before * self.error, now * error) / total,
        )

    def __str__(self) -> str:
        if not self.problems:
            return "never met"
        return f"{self.gain:+.3f} ± {self.error:.3f} over {self.problems} problem{'s' * (self.problems > 1)}"


@dataclass(frozen=True, slots=True)
class Written:
    """A principle where it was written: in the first prompt that has this text under this id."""

    prompt: str
    principle: Principle
    origin: Origin

    @property
    def name(self) -> str:
        """Its name in the whole run, "p0003.G2"."""
        return f"{self.prompt}.{self.principle.id}"


@dataclass(frozen=True, slots=True)
class Birth:
    """A prompt as it was born: the ids of all its principles, and those that it did not have from its first parent."""

    prompt: str
    operator: Operator
    parents: tuple[str, ...]
    step: int
    ids: tuple[str, ...]
    written: Mapping[str, Written] = field(default_factory=dict)
    duel: Duel = Duel()


class Lineage:
    """The births of a population, oldest first, whoever of them is alive."""

    def __init__(self) -> None:
        self.births: dict[str, Birth] = {}

    def add(self, prompt: SystemPrompt, origins: Mapping[str, Origin]) -> None:
        """Write down a birth. What `origins` does not explain is told from the parents: under an id of the first one a
        change, otherwise an addition, whose source is a parent that says the same."""
        inherited = self.principles(prompt.parents[0]) if prompt.parents else {}
        written = {
            p.id: Written(prompt.id, p, origins.get(p.id) or self._guess(p, prompt))
            for p in prompt.principles
            if inherited.get(p.id) != p
        }
        ids = tuple(p.id for p in prompt.principles)
        self.births[prompt.id] = Birth(prompt.id, prompt.operator, prompt.parents, prompt.born, ids, written)

    def observe(self, rewards: Table) -> None:
        """Count a batch: every prompt that played beside its first parent has met it once more."""
        for prompt, row in rewards.items():
            birth = self.births.get(prompt)
            parents = rewards.get(birth.parents[0], {}) if birth and birth.parents else {}
            pairs = [(row[q], parents[q]) for q in sorted(row) if q in parents]
            if birth and pairs:
                self.births[prompt] = replace(birth, duel=birth.duel.plus(pairs))

    def principles(self, prompt: str) -> dict[str, Principle]:
        """The principles of a prompt by id, in their order; none of a prompt that is not in the book."""
        if prompt not in self.births:
            return {}
        return {i: self.written(prompt, i).principle for i in self.births[prompt].ids}

    def written(self, prompt: str, principle: str) -> Written:
        """Where a principle of a prompt was written. Raises KeyError where the prompt or the principle is unknown."""
        birth = self.births[prompt]
        if principle not in birth.ids:
            raise KeyError(f"{prompt}.{principle}")
        while principle not in birth.written:
            birth = self.births[birth.parents[0]]
        return birth.written[principle]

    def sources(self, written: Written) -> list[Written]:
        """Its direct sources, as far as they are in the book."""
        named = (source.rpartition(".") for source in written.origin.sources)
        return [self.written(p, i) for p, _, i in named if p in self.births and i in self.births[p].ids]

    def ancestors(self, written: Written) -> list[Written]:
        """All that went into it, the nearest first, each once."""
        found: dict[str, Written] = {}
        due = self.sources(written)
        while due:
            source = due.pop(0)
            if source.name not in found and source.name != written.name:
                found[source.name] = source
                due += self.sources(source)
        return list(found.values())

    def carriers(self, written: Written) -> list[str]:
        """The prompts that have it, the one in which it was written first."""
        own = written.principle.id
        return [p for p, birth in self.births.items() if own in birth.ids and self.written(p, own) == written]

    def droppers(self, written: Written) -> list[Birth]:
        """The prompts that were born without it although their first parent had it: removed, merged or changed."""
        carriers = set(self.carriers(written))
        return [b for b in self.births.values() if b.parents and b.parents[0] in carriers and b.prompt not in carriers]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data; floats survive `json` exactly."""
        return [
            {
                "prompt": b.prompt, "operator": b.operator, "parents": list(b.parents), "step": b.step,
                "ids": list(b.ids),
                "written": [{**asdict(w.principle), **asdict(w.origin)} for w in b.written.values()],
                "duel": asdict(b.duel),
            }
            for b in self.births.values()
        ]  # fmt: skip

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]]) -> Lineage:
        """The book that `to_json` wrote down."""
        lineage = cls()
        for row in rows:
            prompt = str(row["prompt"])
            lineage.births[prompt] = Birth(
                prompt,
                cast(Operator, row["operator"]),
                tuple(row["parents"]),
                row["step"],
                tuple(row["ids"]),
                {w["id"]: _written(prompt, w) for w in row["written"]},
                Duel(**row["duel"]),
            )
        return lineage

    def _guess(self, principle: Principle, prompt: SystemPrompt) -> Origin:
        if not prompt.parents:
            return Origin("root" if prompt.operator == "root" else "add")
        if principle.id in self.principles(prompt.parents[0]):
            return Origin("modify", (f"{prompt.parents[0]}.{principle.id}",))
        said = fingerprint(principle.text)
        known = ((parent, p) for parent in prompt.parents for p in self.principles(parent).values())
        return Origin("add", tuple(f"{parent}.{p.id}" for parent, p in known if fingerprint(p.text) == said)[:1])


def _written(prompt: str, row: Mapping[str, Any]) -> Written:
    origin = Origin(row["op"], tuple(row["sources"]), row["evidence"], row["support"])
    return Written(prompt, Principle(row["id"], row["text"]), origin)


def provenance(prompt: str, lineage: Lineage) -> list[dict[str, Any]]:
    """Where every principle of a prompt comes from, as plain data, in the order of the principles.

    Each has its `id`, `text`, what wrote it (`written`, see below), `ancestors` (the same of all that went into it, the
    nearest first), `carriers` (the prompts that have it) and `dropped` (those that no longer had it, against parents
    that did). A writing has `prompt`, `id`, `text`, `step`, `operator`, `op`, `sources`, `evidence`, `support` and
    `against_parent`: `problems`, `gain` and `error` of that prompt against its first parent.
    """
    rows = []
    for principle in lineage.principles(prompt).values():
        written = lineage.written(prompt, principle.id)
        rows.append(
            {
                "id": principle.id,
                "text": principle.text,
                "written": _row(written, lineage),
                "ancestors": [_row(ancestor, lineage) for ancestor in lineage.ancestors(written)],
                "carriers": lineage.carriers(written),
                "dropped": [_loss(birth) for birth in lineage.droppers(written)],
            }
        )
    return rows


def _loss(birth: Birth) -> dict[str, Any]:
    who = {"prompt": birth.prompt, "operator": birth.operator, "parent": birth.parents[0]}
    return {**who, "against_parent": asdict(birth.duel)}


def _row(written: Written, lineage: Lineage) -> dict[str, Any]:
    birth = lineage.births[written.prompt]
    return {
        "prompt": written.prompt,
        **asdict(written.principle),
        "step": birth.step,
        "operator": birth.operator,
        **asdict(written.origin),
        "sources": list(written.origin.sources),
        "against_parent": asdict(birth.duel),
    }


def told(prompt: str, lineage: Lineage, principle: str = "") -> Iterator[str]:
    """The lineage of one principle of a prompt, or of all of them, in lines for a person."""
    ids = [principle] if principle else list(lineage.births[prompt].ids)
    for i in ids:
        written = lineage.written(prompt, i)
        yield f"{prompt}.{i} “{written.principle.text}”"
        yield from (f"    {line}" for line in _history(written, lineage))
        for ancestor in lineage.ancestors(written):
            yield f"    from {ancestor.name} “{ancestor.principle.text}”"
            yield from (f"        {line}" for line in _history(ancestor, lineage))
        carriers = lineage.carriers(written)
        yield f"    carried by {len(carriers)} prompt{'s' * (len(carriers) > 1)}: {_listed(carriers)}"
        for birth in lineage.droppers(written):
            how = "changed" if i in birth.ids else "dropped"
            yield f"    {how} by {birth.prompt} ({WORDS[birth.operator]}), against {birth.parents[0]}: {birth.duel}"


def _history(written: Written, lineage: Lineage) -> Iterator[str]:
    birth, origin = lineage.births[written.prompt], written.origin
    if origin.op == "root":
        yield "there from the start"
        return
    sources = f" of {' and '.join(origin.sources)}" if origin.sources else ""
    asked = f", asked for {origin.support} times" if origin.support > 1 else ""
    yield f"step {birth.step}, {WORDS[birth.operator]} of {' and '.join(birth.parents)}: {origin.op}{sources}{asked}"
    if origin.evidence:
        yield f"because “{origin.evidence}”"
    yield f"{birth.prompt} against {birth.parents[0]}: {birth.duel}"


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
