"""System prompts as data: a prompt is a tuple of principles with stable ids and a lineage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operator = Literal["root", "mutation", "crossover"]


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
class Child:
    """A bred prompt before the population gave it an id and a rating."""

    principles: tuple[Principle, ...]
    operator: Operator
    parents: tuple[str, ...]
    last_id: int = 0


@dataclass(frozen=True, slots=True)
class Rating:
    """What is known of a skill: its mean and standard deviation."""

    mu: float
    sigma: float

    def lower(self, k: float = 2.0) -> float:
        return self.mu - k * self.sigma

    def upper(self, k: float = 2.0) -> float:
        return self.mu + k * self.sigma
