"""Which problems a run trains on, validates on and is tested on: three disjoint sets and a keyed order.

An environment that declares its splits is used as it declares them. One that comes in one piece is parted by a hash of
the task's id (70 % train, 15 % validation, 15 % test), the same parts in every run; the run says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Any, Literal

import gymnasium

import espl_envs
from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError
from espl_envs.core.tasks import Task, Twinned
from espl_train.config import EnvConfig
from espl_train.randomness import generator

Part = Literal["train", "validation", "test"]
SHARES: tuple[tuple[Part, int], ...] = (("train", 70), ("validation", 85), ("test", 100))


@dataclass(frozen=True)
class Problems:
    """One part: an environment id with its arguments and the indices (into its split) that belong to the part."""

    part: Part
    env_id: str
    args: dict[str, Any]
    split: str
    indices: Sequence[int]
    env: TextEnv
    carved: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        """What it is, in words."""
        origin = f"carved from {self.env_id} '{self.split}'" if self.carved else f"of {self.env_id}"
        return f"{len(self):,} problems {origin}, content {self.env.tasks.hash}"

    def facts(self) -> dict[str, Any]:
        """What it is, for the log of a run: whoever reads it later may have other data under the same name."""
        return {
            "part": self.part, "id": self.env_id, "split": self.split, "problems": len(self),
            "content": self.env.tasks.hash,
        }  # fmt: skip

    def make(self) -> gymnasium.Env[Any, Any]:
        """A fresh environment of this part."""
        return espl_envs.make(self.env_id, split=self.split, **self.args)

    @cached_property
    def tasks(self) -> Mapping[int, Task]:
        """All tasks of the part, by the indices that `batch` and `sample` give out."""
        return {int(index): self.env.tasks[int(index)] for index in self.indices}

    @cached_property
    def twins(self) -> Problems | None:
        """The same indices with a task of the same kind and other numbers at each; None where nobody makes such."""
        if not isinstance(self.env.tasks, Twinned):
            return None
        args = {**self.args, "twins": self.args.get("twins", 0) + 1}
        return replace(self, args=args, env=text_env(self.env_id, args, self.split))

    def order(self, seed: int, epoch: int) -> list[int]:
        """All task indices, in the order of an epoch."""
        return [int(self.indices[int(i)]) for i in generator(seed, "order", self.part, epoch).permutation(len(self))]

    def sample(self, seed: int, size: int) -> list[int]:
        """A fixed subset of at most `size` indices, the same in the whole run, in ascending order."""
        if size >= len(self):
            return [int(i) for i in self.indices]
        chosen = generator(seed, "subset", self.part).choice(len(self), size=size, replace=False)
        return sorted(int(self.indices[int(i)]) for i in chosen)


class Deck:
    """Problems in a keyed order: every epoch is a permutation of its own, and none comes twice in an epoch.

    `position` (epoch, problems dealt in it) is all that a resumed run needs.
    """

    def __init__(self, problems: Problems, seed: int, position: Sequence[int] = (0, 0)) -> None:
        self.problems, self.seed = problems, seed
        self.epoch, self.dealt = position

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.dealt

    def batch(self, size: int) -> list[int]:
        """`size` different task indices, or all of them where there are fewer.

        What is left over at the end of an epoch (less than a batch) sits it out, so no problem comes twice in a batch.
        """
        size = min(size, len(self.problems))
        if self.dealt + size > len(self.problems):
            self.epoch, self.dealt = self.epoch + 1, 0
        return self.more(size)

    def untouched(self, most: int) -> list[int]:
        """Up to `most` problems that have never been dealt, the last ones of the first epoch; none after it."""
        order = [] if self.epoch else self.problems.order(self.seed, 0)[self.dealt :]
        return order[::-1][:most]

    def more(self, most: int) -> list[int]:
        """Up to `most` further problems of this epoch: others than all those dealt in it."""
        found = self.problems.order(self.seed, self.epoch)[self.dealt : self.dealt + most]
        self.dealt += len(found)
        return found


@dataclass(frozen=True)
class ProblemSets:
    """The three parts of a run."""

    train: Problems
    validation: Problems
    test: Problems

    @classmethod
    def of(cls, config: EnvConfig) -> ProblemSets:
        """Open the environments that the config names. Raises EsplError for unknown ids, missing data, empty sets."""
        splits = text_env(config.id, config.args).splits
        whole = config.holdout_from or (splits[0] if len(splits) == 1 else None)
        if whole is not None and whole not in splits:
            raise EsplError(f"{config.id} has no split '{whole}' to carve from; it has: {', '.join(splits)}")

        def part(name: Part) -> Problems:
            if name == "test" and config.test_id is not None:
                return _whole("test", config.test_id, config.test_args, "test")
            if whole is not None:
                return _carved(config, whole, name)
            return _whole(name, config.id, config.args, name)

        return cls(part("train"), part("validation"), part("test"))

    def __iter__(self) -> Iterator[Problems]:
        return iter((self.train, self.validation, self.test))

    def __getitem__(self, part: Part) -> Problems:
        return {"train": self.train, "validation": self.validation, "test": self.test}[part]


def text_env(env_id: str, args: dict[str, Any], split: str | None = None) -> TextEnv:
    """The bare environment. Raises EsplError for an unknown id, for what is no text environment, and for arguments that
    it stumbles over."""
    chosen = {} if split is None else {"split": split}
    try:
        env = espl_envs.make(env_id, **chosen, **args).unwrapped
    except (TypeError, ValueError) as error:
        if not args:
            raise
        given = ", ".join(f"{name} = {value!r}" for name, value in args.items())
        said = str(error).partition(" was raised from the environment creator")[0]          # gymnasium's postscript
        raise EsplError(f"{env_id} cannot be made with {given}: {type(error).__name__}: {said}") from error
    if not isinstance(env, TextEnv):
        raise EsplError(f"{env_id} is a {type(env).__name__}, not a TextEnv: only text environments can be trained on")
    return env


def _checked(problems: Problems) -> Problems:
    if not len(problems):
        raise EsplError(
            f"{problems.env_id} has no {problems.part} problems (split '{problems.split}', "
            f"{len(problems.env.tasks)} tasks in all): choose a larger set"
        )
    return problems


def _whole(part: Part, env_id: str, args: dict[str, Any], split: str) -> Problems:
    declared = text_env(env_id, args).splits
    if split not in declared:
        raise EsplError(
            f"{env_id} has no {split} split (it has: {', '.join(declared)}): name another environment to test on "
            f"(--env.test_id ID), or part one of its splits into three (--env.holdout_from {declared[0]})"
        )
    env = text_env(env_id, args, split)
    return _checked(Problems(part, env_id, args, split, range(len(env.tasks)), env))


def _carved(config: EnvConfig, split: str, part: Part) -> Problems:
    env = text_env(config.id, config.args, split)
    indices = [i for i in range(len(env.tasks)) if carve(env.tasks[i].id) == part]
    return _checked(Problems(part, config.id, config.args, split, indices, env, carved=True))


def carve(task_id: str) -> Part:
    """The part that a task belongs to when a set in one piece is parted. Depends on nothing but the id."""
    place = int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big") % 100
    return next(part for part, upto in SHARES if place < upto)


def shares(weights: Sequence[float], size: int, step: int) -> list[int]:
    """How many of the `size` problems of `step` (from 1) go to each environment, by its weight.

    Seats are given one by one over all steps, each to the largest weight / (2·seats + 1) (Webster, Sainte-Laguë). So
    nobody ever gives a seat back, the sums are exact whenever the weights divide them, and there is nothing to remember
    from step to step.
    """
    after, before = _seats(weights, size * step), _seats(weights, size * (step - 1))
    return [now - then for now, then in zip(after, before, strict=True)]


def _seats(weights: Sequence[float], count: int) -> list[int]:
    """The first `count` seats, by weight. Ties go to who comes first."""
    exact = [Fraction(repr(weight)) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    sure = count - Fraction(len(parts), 2)          # rounding quotas of that many seats gives out no more than `count`
    seats = [max(floor(part * sure + Fraction(1, 2)), 0) for part in parts]
    while sum(seats) < count:
        neediest = max(range(len(parts)), key=lambda i: (parts[i] / (2 * seats[i] + 1), -i))
        seats[neediest] += 1
    return seats
