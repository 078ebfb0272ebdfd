"""From rollouts to training sequences: which ids are computed, which are learnt, and how much each of them weighs.

What carries no gradient is left out: groups without contrast, faulted and filtered rollouts, empty replies. A rollout
is one sequence, or several where the chat template rewrote what stood before a turn; its tokens weigh the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from espl_train.learner.losses import NORMALISATIONS, Measure
from espl_train.learner.naming import choose
from espl_train.records import Group, Rollout, Turn


class TrainingSequence(NamedTuple):
    """Ids in the order in which they came, n of them sampled. The last sampled one is predicted, but predicts nothing:
    it is among the targets and not among the ids."""

    ids: Tensor           # [L] context₀ tokens₀ context₁ tokens₁ … without the last one
    before: Tensor        # [n] place in `ids` of the id before each sampled one: its logits predict it
    targets: Tensor       # [n] the sampled ids
    behaviour: Tensor     # [n] log-probabilities they were sampled with
    advantage: float
    weight: float         # of each of its tokens: one over the global denominator


def training_sequences(groups: Sequence[Group], normalise: str = "sum", constant: int = 1) -> list[TrainingSequence]:
    """All sequences of an update. Weights are set here, before any split: rollouts are what is normalised over."""
    kept = [pair for group in groups for pair in _kept(group)]
    measures = [Measure(rollout.sampled_tokens, rollout.key.prompt) for rollout, _ in kept]
    weights = choose(NORMALISATIONS, normalise, "learner.normalise")(measures, constant)
    return [
        _sequence(rollout, turns, advantage, weight)
        for (rollout, advantage), weight in zip(kept, weights, strict=True)
        for turns in _stretches(rollout)
        if any(turn.tokens for turn in turns)
    ]


def _kept(group: Group) -> Iterator[tuple[Rollout, float]]:
    """The rollouts that are learnt from, with their advantages; none where no rollout did better than another."""
    if len(group.advantages) != len(group.rollouts):
        raise ValueError(f"group of task '{group.task_id}' has no advantages: assign them before the update")
    if group.contrast:
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            if advantage is not None and rollout.sampled_tokens and not rollout.faulted:
                yield rollout, advantage


def _stretches(rollout: Rollout) -> list[list[Turn]]:
    """The turns in runs that append to each other."""
    found: list[list[Turn]] = []
    for turn in rollout.turns:
        if turn.fork or not found:
            found.append([])
        found[-1].append(turn)
    return found


def _sequence(rollout: Rollout, turns: Sequence[Turn], advantage: float, weight: float) -> TrainingSequence:
    ids: list[int] = []
    sampled: list[int] = []
    behaviour: list[float] = []
    for turn in turns:
        if len(turn.tokens) != len(turn.logprobs):
            raise ValueError(f"{rollout.key} has {len(turn.tokens)} tokens and {len(turn.logprobs)} log-probabilities")
        ids += turn.context
        sampled += range(len(ids), len(ids) + len(turn.tokens))
        ids += turn.tokens
        behaviour += turn.logprobs
    if sampled[0] == 0:
        raise ValueError(f"{rollout.key} was sampled from an empty context: nothing predicts its first token")
    row, places = torch.tensor(ids), torch.tensor(sampled)
    old = torch.tensor(behaviour, dtype=torch.float32)
    return TrainingSequence(row[: sampled[-1]], places - 1, row[places], old, advantage, weight)
