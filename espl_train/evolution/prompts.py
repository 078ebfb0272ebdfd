"""System prompts as data: a prompt is a tuple of principles with stable ids and a lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Operator = Literal["root", "mutation", "crossover", "prune", "immigrant", "migration"]
# What people read: "born by pruning of p0003". In settings and data operators have the names above.
WORDS: Mapping[Operator, str] = {
    "root": "root", "mutation": "mutation", "crossover": "crossover", "prune": "pruning", "immigrant": "immigration",
    "migration": "migration",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Principle:
    """One short rule in natural language. `id` ("G3") is unique within its prompt and survives into children."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """A member of the population. `id` ("p0007") is unique within a run; the root is "p0000"."""

    id: str
    principles: tuple[Principle, ...]
    operator: Operator = "root"
    parents: tuple[str, ...] = ()
    born: int = 0          # step at which it was inserted
    last_id: int = 0       # highest number that a principle of this lineage ever had: ids are never used again

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(p.text for p in self.principles)


@dataclass(frozen=True, slots=True)
class Origin:
    """The edit that wrote a principle, and what went into it.

    `sources` are ids of the list that was edited; with the name of a prompt before them ("p0003.G2") once there are
    several. `evidence` is the model's own justification, `support` how many critiques asked for it.
    """

    op: Literal["root", "add", "modify", "merge"]
    sources: tuple[str, ...] = ()
    evidence: str = ""
    support: int = 1


@dataclass(frozen=True, slots=True)
class Child:
    """A bred prompt before the population gave it an id and a rating.

    The first parent is the list that was edited: a principle that it has under the same id and with the same text was
    handed down. `origins` tells what is known of the others, by id.
    """

    principles: tuple[Principle, ...]
    operator: Operator
    parents: tuple[str, ...]
    last_id: int = 0
    origins: Mapping[str, Origin] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rating:
    """What is known of a skill: its mean and standard deviation."""

    mu: float
    sigma: float

    def lower(self, k: float = 2.0) -> float:
        return self.mu - k * self.sigma

    def upper(self, k: float = 2.0) -> float:
        return self.mu + k * self.sigma
