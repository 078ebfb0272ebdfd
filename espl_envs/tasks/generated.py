"""Sources of generated tasks whose splits are disjoint by content.

The split of an instance is decided by its key (what makes two instances the same problem), never by its seed: however
small the space of a family is, no problem of one split can come up in another. Seeds are keyed by family, split, index
and attempt; an index draws until an instance belongs to its split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from espl_envs.core.errors import EsplError
from espl_envs.core.tasks import Split, StaticTasks, Task

SPLITS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
SIZES: dict[Split, int] = {"train": 2000, "validation": 500, "test": 500}
ATTEMPTS = 2000


@dataclass(frozen=True, slots=True)
class Draft:
    """An instance before it is a task. Two instances with one `key` are the same problem."""

    key: str
    question: str
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def task(self, name: str, split: Split) -> Task:
        """The instance as the task with this id."""
        return Task(name, split, self.question, self.answer, self.data)


def split_of(key: str) -> Split:
    """Half of all keys are train, a quarter each validation and test; the key alone decides."""
    return ("train", "train", "validation", "test")[hashlib.blake2b(key.encode(), digest_size=2).digest()[0] % 4]


def seed_of(family: str, *numbers: int) -> int:
    """A 64-bit seed for one draw of a family; different arguments give unrelated seeds."""
    name = int.from_bytes(hashlib.blake2b(family.encode(), digest_size=8).digest(), "little")
    return int(np.random.SeedSequence([name, *numbers]).generate_state(1, np.uint64)[0])


class DrawnTasks:
    """The tasks of one split of a large space. `draw(seed)` gives an instance, or None where none comes of the seed.

    `dials`: whatever else decides what a seed gives (arguments, versions); it goes into the source's hash.
    """

    def __init__(
        self, family: str, split: Split, draw: Callable[[int], Draft | None], dials: Any = None, *, slow: bool = False,
        twin: int = 0,
    ) -> None:
        self.slow = slow
        self._dials, self._twin = dials, twin
        self._family = family
        self._split = split
        self._draw = draw
        self._made = lru_cache(maxsize=256)(self._make)
        content = json.dumps(
            [family, split, SIZES[split], dials, *([twin] if twin else [])], sort_keys=True, ensure_ascii=False
        )
        self.hash = hashlib.sha256(content.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return SIZES[self._split]

    def __getitem__(self, index: int) -> Task:
        """The task at `index`; IndexError outside `range(len(self))`."""
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} is outside 0..{len(self) - 1}")
        return self._made(index)

    def twins(self, key: int) -> DrawnTasks:
        """Draws of the same family and split from other seeds."""
        return DrawnTasks(self._family, self._split, self._draw, self._dials, slow=self.slow, twin=key)

    def _make(self, index: int) -> Task:
        name = f"{self._family}-{self._split}-{index}"
        if not self._twin:
            return self._drawn(index).task(name, self._split)
        original = self._drawn(index).key
        return self._drawn(index, self._twin, other_than=original).task(f"{name}-twin-{self._twin}", self._split)

    def _drawn(self, index: int, *twin: int, other_than: str = "") -> Draft:
        for attempt in range(ATTEMPTS):
            draft = self._draw(seed_of(self._family, SPLITS[self._split], index, attempt, *twin))
            if draft is not None and split_of(draft.key) == self._split and draft.key != other_than:
                return draft
        raise EsplError(f"{ATTEMPTS} draws of {self._family} gave no task for the split {self._split!r}")


def listed_tasks(family: str, split: Split, drafts: Iterable[Draft]) -> StaticTasks:
    """The tasks of one split of a space small enough to go through: every problem once, at most `SIZES[split]`."""
    kept: dict[str, Draft] = {}
    for draft in drafts:
        if split_of(draft.key) == split:
            kept.setdefault(draft.key, draft)
        if len(kept) == SIZES[split]:
            break
    return StaticTasks([draft.task(f"{family}-{split}-{index}", split) for index, draft in enumerate(kept.values())])
