"""How long an episode is going to be, from those played before: the long ones start first.

A batch is over when its last episode is. One that starts late and turns out long decodes alone at the end, so the
longest start first (Graham 1969: LPT, at most 4/3 of the best schedule). What an episode samples is taken to be the
usual number of tokens, times what its problem took beside others, times what its prompt did. Only earlier calls of
`learn` count, so the order depends on nothing that time decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from espl_train.records import Rollout, RolloutKey, StopReason

PROMPTS = 1000      # the newest that are remembered


@dataclass
class Lengths:
    """What is known so far: of each split the usual length, of problems and prompts how they compare to it."""

    usual: dict[str, float] = field(default_factory=dict)
    problems: dict[str, float] = field(default_factory=dict)       # by "split/task"
    prompts: dict[str, float] = field(default_factory=dict)

    def expected(self, key: RolloutKey) -> int:
        """Tokens that this episode is expected to sample; 0 where nothing of its kind was played yet."""
        usual = self.usual.get(key.split, 0.0)
        return round(usual * self.problems.get(_problem(key), 1.0) * self.prompts.get(key.prompt, 1.0))

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """These were played together, all of one split: the last time that something was played is what counts."""
        played = [r for r in rollouts if r.stop != StopReason.FAULT]
        mean = _mean([r.sampled_tokens for r in played])
        if not mean:
            return
        self.usual[played[0].key.split] = mean
        self.problems |= _beside(mean, [(_problem(r.key), r.sampled_tokens) for r in played])
        found = _beside(mean, [(r.key.prompt, r.sampled_tokens) for r in played])
        kept = {prompt: ratio for prompt, ratio in self.prompts.items() if prompt not in found}
        self.prompts = dict([*kept.items(), *found.items()][-PROMPTS:])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        return cls(**{name: dict(table) for name, table in state.items()})


def _problem(key: RolloutKey) -> str:
    return f"{key.split}/{key.task}"


def _beside(mean: float, lengths: Sequence[tuple[str, int]]) -> dict[str, float]:
    """By name, the mean length relative to `mean`."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, length in lengths:
        found[name].append(length)
    return {name: _mean(members) / mean for name, members in found.items()}


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
