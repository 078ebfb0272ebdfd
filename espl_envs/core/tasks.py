"""Tasks as data: a `Task` is one problem, a `TaskSource` is a pure function index → task with a length.

Behaviour (how to ask, what tools, how to grade) stands beside it in an environment family. Splits are disjoint by
construction and every source has a content hash, so that two results on "the same" tasks can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from espl_envs.core.errors import EsplError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. `data` holds whatever the family's grader and tools need (JSON-able), never shown to the agent."""

    id: str
    split: Split
    question: str
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """16 hex digits over the normalised content; equal for equal tasks, on every machine."""
        row = {"id": self.id, "question": self.question, "answer": self.answer, "data": dict(self.data)}
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TaskSource(Protocol):
    """Random access to the tasks of one split. Pure: the same index is the same task in every process.

    A source whose tasks take milliseconds to make has `slow = True`: they are then made in a thread, and an event loop
    that drives many environments goes on.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task:
        """The task at `index`; IndexError outside `range(len(self))`."""
        ...

    @property
    def hash(self) -> str:
        """Content hash of all rows (16 hex digits), recorded in every result."""
        ...


@runtime_checkable
class Twinned(Protocol):
    """A `TaskSource` that can write every task anew."""

    def twins(self, key: int) -> TaskSource:
        """As many tasks, at every index one of the same kind and difficulty, with other content (other numbers).

        `key` > 0: different keys give different twins. They belong to the same split: none is a task of another one.
        """
        ...


def twins_of(source: TaskSource, key: int) -> TaskSource:
    """The `key`-th twins of a source; the source itself for 0. Raises EsplError where it makes none."""
    if key == 0:
        return source
    if not isinstance(source, Twinned):
        raise EsplError("these tasks are a fixed list, there are no twins of them: leave out `twins`")
    return source.twins(key)


class StaticTasks:
    """A `TaskSource` over rows that are already in memory."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tuple(tasks)
        self.hash = hashlib.sha256("".join(t.hash for t in self._tasks).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self._tasks):
            raise IndexError(f"task {index} is outside 0..{len(self._tasks) - 1}")
        return self._tasks[index]
