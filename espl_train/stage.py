"""The stage: where the rounds of a step are played, by the engine with the weights of the moment.

Seconds and tokens are booked by phase, and the console is told what is going on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from espl_envs.core import background
from espl_train.engines.base import Engine
from espl_train.island import Batch, Round, play
from espl_train.learner.policy import Policy
from espl_train.profiling import Phases, Spent
from espl_train.records import Rollout
from espl_train.runs.console import Console

PHASES = {"train": "rollouts", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Stage:
    """`policy` is the one in training, whose newest weights `engine` is given before anything is played."""

    engine: Engine
    policy: Policy
    console: Console
    phases: Phases

    @contextmanager
    def phase(self, name: str, shown: str = "", total: int | None = None) -> Iterator[Spent]:
        """A phase that people are told about, as `shown` if its name says too little."""
        self.console.phase(shown or name, total)
        with self.phases(name) as spent:
            yield spent

    def sync(self) -> None:
        """Give the engine the weights of the moment."""
        with self.phases("sync"):
            self.engine.load_policy(self.policy.version)

    def play(
        self, rounds: Sequence[Round], step: int, temperature: float, name: str, base: bool = False
    ) -> list[list[Rollout]]:
        """All rounds (of one part of the problems) at once; their rollouts, round by round. `base`: by the weights that
        the run began with."""
        if not rounds:
            return []
        self.sync()
        policy = None if base else self.policy.version
        part = rounds[0].problems.part
        with self.phase(PHASES[part], name, sum(map(len, rounds))) as spent:
            played = background.run_through(play(rounds, step, policy, temperature, self.console.progress))
            spent.tokens += sum(rollout.sampled_tokens for rollouts in played for rollout in rollouts)
        return played

    def play_out(self, batches: Sequence[Batch], step: int, temperature: float) -> dict[str, float]:
        """Play all batches to their ends, all islands at once; what the engine counted meanwhile."""
        self.engine.counts()                         # of whatever came before
        while rounds := [due for batch in batches if (due := batch.due())]:
            again = max(batch.rounds for batch in batches)
            name = f"rollouts, round {again + 1}" if again else "rollouts"
            played = self.play(rounds, step, temperature, name)
            found = {round.island: rollouts for round, rollouts in zip(rounds, played, strict=True)}
            for batch in batches:
                if batch.island in found:
                    batch.take(found[batch.island])
        return dict(self.engine.counts())
