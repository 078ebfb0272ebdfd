"""Ranks for tests: the test is rank 0; the others are forked by a process that has imported everything once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from espl_train.config import Config
from espl_train.learner.distributed import Team, serve
from espl_train.learner.ranks import Place
from espl_train.learner.update import Learner
from espl_train.records import Group

HERE = Path(__file__).resolve().parent


class Nursery:
    """Forks followers."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._mother = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def fork(self, place: Place) -> int:
        """The process id of a new follower."""
        assert self._mother.stdin is not None and self._mother.stdout is not None
        print(json.dumps(asdict(place)), file=self._mother.stdin, flush=True)
        return int(self._mother.stdout.readline())

    def ended(self, pid: int) -> int:
        """Wait for the end of a follower; its exit code."""
        assert self._mother.stdin is not None and self._mother.stdout is not None
        print(json.dumps(pid), file=self._mother.stdin, flush=True)
        return int(self._mother.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._mother.stdin is not None
        self._mother.stdin.close()
        self._mother.wait()

    @contextmanager
    def team(self, size: int = 2) -> Iterator[tuple[Team, list[int]]]:
        """Rank 0 of a new team, and the process ids of the others."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = [Place(rank, size, rank, size, "127.0.0.1", port, False) for rank in range(size)]
        followers = [self.fork(place) for place in places[1:]]
        with Team(places[0]) as team:
            yield team, followers

    @contextmanager
    def learner(self, config: Config, size: int = 2) -> Iterator[Learner]:
        """Rank 0's learner under `config`."""
        with self.team(size) as (team, _):
            team.check(config)
            yield Learner.of(config, team)


def gradients(learner: Learner, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """What one more update would step with, unclipped, as far as rank 0 holds it; the team's work is over then."""
    found: dict[str, torch.Tensor] = {}

    def look(_: float) -> None:
        weights = learner.policy.trainable_parameters()
        found.update((name, local(p.grad).clone()) for name, p in weights.items() if p.grad is not None)
        learner._forget_gradients()

    learner.config = learner.config.model_copy(update={"clip": 1e9})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "_step", look)
        learner.update(groups)
    return found


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main() -> None:
    """Read places and process ids; fork for the one, wait for the other."""
    for line in sys.stdin:
        asked: Any = json.loads(line)
        if isinstance(asked, int):
            print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            sys.stdin.close()
            serve(Place(**asked))


if __name__ == "__main__":
    main()
