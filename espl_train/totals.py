"""What a run has used, by what it was for: methods can be compared only at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from espl_train.records import Rollout


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the whole run, resumptions included. Tokens are sampled ones.

    Trials are what decides who is born and who may breed; nothing learns from them. Validation is watching the run and
    choosing the prompt. The final test is in none of these.
    """

    rollouts: int = 0            # of training
    faulted: int = 0
    tokens: int = 0
    trial_rollouts: int = 0
    trial_tokens: int = 0
    validation_rollouts: int = 0
    validation_tokens: int = 0
    reflection_tokens: int = 0
    seconds: float = 0.0

    @property
    def used(self) -> int:
        """Rollouts that count against `budget_rollouts`: training and trials."""
        return self.rollouts + self.trial_rollouts

    def exhausts(self, budget: int | None, more: int = 0) -> bool:
        """Whether `budget_rollouts` is used up, or will be once `more` of them are counted."""
        return budget is not None and self.used + more >= budget

    def plus(
        self, rollouts: Sequence[Rollout], reflection_tokens: int, seconds: float, tried: Sequence[Rollout] = ()
    ) -> Totals:
        """The sums after one more iteration."""
        return replace(
            self,
            rollouts=self.rollouts + len(rollouts),
            faulted=self.faulted + sum(r.faulted for r in rollouts),
            tokens=self.tokens + _tokens(rollouts),
            trial_rollouts=self.trial_rollouts + len(tried),
            trial_tokens=self.trial_tokens + _tokens(tried),
            reflection_tokens=self.reflection_tokens + reflection_tokens,
            seconds=self.seconds + seconds,
        )

    def validated(self, rollouts: Sequence[Rollout]) -> Totals:
        """The sums after one more validation."""
        return replace(
            self,
            validation_rollouts=self.validation_rollouts + len(rollouts),
            validation_tokens=self.validation_tokens + _tokens(rollouts),
        )

    def validation_since(self, before: Totals) -> dict[str, float]:
        """What validation took since then, as metrics; nothing where there was none."""
        rollouts = self.validation_rollouts - before.validation_rollouts
        tokens = self.validation_tokens - before.validation_tokens
        return {"validation/rollouts": rollouts, "validation/tokens": tokens} if rollouts else {}

    def note(self) -> str:
        """The sums as a line for people."""
        trials = f", {self.trial_rollouts:,} in trials ({self.trial_tokens:,})" if self.trial_rollouts else ""
        return (
            f"rollouts (sampled tokens): {self.rollouts:,} of training ({self.tokens:,}){trials}, "
            f"{self.validation_rollouts:,} of validation ({self.validation_tokens:,}); "
            f"reflection: {self.reflection_tokens:,} tokens"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint and the log."""
        return asdict(self)


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.sampled_tokens for rollout in rollouts)
