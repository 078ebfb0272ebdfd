"""What is learnt from a rollout besides its reward: what becomes of replies that run into the token limits.

Shaping changes advantages and nothing else: ratings, evaluation and every report read the reward as the environment
gave it.

`penalise` is DAPO's soft overlong punishment (arXiv 2503.14476): nothing up to the last part of the limit
(`overlong_buffer`, a share of it), then a penalty that grows linearly to `overlong_penalty` at the limit. `filter`
leaves out what was cut off: its reward says nothing of what it would have become. Such a rollout is neither learnt from
nor compared with. Were its 0 in the baseline, every finished reply would beat it, and the update would teach brevity;
without it, the update is the gradient of the reward among finished replies and is indifferent to the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from espl_train.config import LearnerConfig, RolloutConfig
from espl_train.records import Rollout, StopReason

CUT = (StopReason.MAX_TOKENS, StopReason.CONTEXT)


@dataclass(frozen=True, slots=True)
class Shaping:
    """The `judge` of `advantages.assign`. `stop_ids` are those that end a reply."""

    config: LearnerConfig
    limits: RolloutConfig
    stop_ids: frozenset[int]

    def __call__(self, rollout: Rollout) -> float | None:
        """The reward to learn from; None where the rollout is not learnt from."""
        if rollout.faulted or (self.config.overlong == "filter" and self.cut(rollout)):
            return None
        return rollout.reward - (self.penalty(rollout) if self.config.overlong == "penalise" else 0.0)

    def cut(self, rollout: Rollout) -> bool:
        """Whether a token limit ended the episode or one of its replies (which an environment then took as it was)."""
        unfinished = any(turn.tokens and turn.tokens[-1] not in self.stop_ids for turn in rollout.turns)
        return unfinished or rollout.stop in CUT

    def penalty(self, rollout: Rollout) -> float:
        """Of the reply, or of the whole episode, that went furthest into its limit: 0 to `overlong_penalty`."""
        lengths = [(len(turn.tokens), self.limits.max_new_tokens) for turn in rollout.turns]
        lengths.append((rollout.sampled_tokens, self.limits.max_total_tokens))
        return self.config.overlong_penalty * max(self._excess(tokens, limit) for tokens, limit in lengths)

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """What shaping did to an iteration, for metrics.jsonl; nothing where it is off."""
        valid = [r for r in rollouts if not r.faulted]
        if self.config.overlong == "keep" or not valid:
            return {}
        judged = [reward for r in valid if (reward := self(r)) is not None]
        shaped = {"reward/shaped": fsum(judged) / len(judged)} if judged else {}
        return {**shaped, "rollouts/cut": float(sum(map(self.cut, valid)))}

    def _excess(self, tokens: int, limit: int) -> float:
        buffer = self.config.overlong_buffer * limit
        return min(max((tokens - (limit - buffer)) / buffer, 0.0), 1.0)
