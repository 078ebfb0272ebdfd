"""From rollouts to micro-batches: which tokens are learnt, with which weight, in which order they are computed.

`pack` is the only way in: sequences are padded on the right here, and a padding-free layout would change this file and
nothing else. What carries no gradient is left out: groups without contrast, faulted and filtered rollouts, empty
replies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espl_train.learner.losses import NORMALISATIONS, Measure
from espl_train.learner.naming import choose
from espl_train.records import Group, Rollout


class TrainingSequence(NamedTuple):
    """One rollout as the learner sees it; L ids, n of them sampled."""

    ids: Tensor           # [L] context₀ tokens₀ context₁ tokens₁ …
    sampled: Tensor       # [n] where in `ids` the sampled ones stand
    behaviour: Tensor     # [n] log-probabilities they were sampled with
    advantage: float
    prompt: str


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass computes, and the K sampled tokens that are learnt from it."""

    inputs: dict[str, Any]    # the decoder's arguments, `input_ids` [B, L] among them
    sequences: int
    before: Tensor        # [K] flat position, in [B·L], of the id before each sampled one: its logits predict it
    targets: Tensor       # [K] the sampled ids
    behaviour: Tensor     # [K]
    advantages: Tensor    # [K]
    weights: Tensor       # [K] one over the global denominator
    rows: Tensor          # [K] which sequence a sampled token belongs to, 0..sequences-1

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        tensors = [field.name for field in fields(self) if field.name not in ("inputs", "sequences")]
        moved = {name: getattr(self, name).to(device) for name in tensors}
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return MicroBatch(inputs=inputs, sequences=self.sequences, **moved)


def pack(groups: Sequence[Group], budget: int, normalise: str = "sum", constant: int = 1) -> list[MicroBatch]:
    """Micro-batches of at most `budget` padded ids, longest sequences first (a longer one stands alone).

    Weights are set before the split, over all sequences at once: no sum over micro-batches depends on `budget`.
    """
    sequences = [s for group in groups for s in training_sequences(group)]
    measures = [Measure(len(s.sampled), s.prompt) for s in sequences]
    weights = choose(NORMALISATIONS, normalise, "learner.normalise")(measures, constant)
    weighted = sorted(zip(sequences, weights, strict=True), key=lambda pair: -len(pair[0].ids))
    return [_padded(chunk) for chunk in _chunks(weighted, budget)]


def training_sequences(group: Group) -> list[TrainingSequence]:
    """The sequences of one group; none where no rollout did better than another."""
    if len(group.advantages) != len(group.rollouts):
        raise ValueError(f"group of task '{group.task_id}' has no advantages: assign them before the update")
    if not group.contrast:
        return []
    return [
        training_sequence(rollout, advantage)
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        if advantage is not None and rollout.sampled_tokens and not rollout.faulted
    ]


def training_sequence(rollout: Rollout, advantage: float) -> TrainingSequence:
    """One rollout's ids in the order in which they came, the sampled ones marked."""
    ids: list[int] = []
    sampled: list[int] = []
    behaviour: list[float] = []
    for turn in rollout.turns:
        if len(turn.tokens) != len(turn.logprobs):
            raise ValueError(f"{rollout.key} has {len(turn.tokens)} tokens and {len(turn.logprobs)} log-probabilities")
        ids += turn.context
        sampled += range(len(ids), len(ids) + len(turn.tokens))
        ids += turn.tokens
        behaviour += turn.logprobs
    if sampled[0] == 0:
        raise ValueError(f"{rollout.key} was sampled from an empty context: nothing predicts its first token")
    old = torch.tensor(behaviour, dtype=torch.float32)
    return TrainingSequence(torch.tensor(ids), torch.tensor(sampled), old, advantage, rollout.key.prompt)


Weighted = tuple[TrainingSequence, float]


def _chunks(weighted: Sequence[Weighted], budget: int) -> Iterable[list[Weighted]]:
    """Cut a list that is sorted by falling length where rows × longest row would pass the budget."""
    chunk: list[Weighted] = []
    for pair in weighted:
        if chunk and (len(chunk) + 1) * len(chunk[0][0].ids) > budget:
            yield chunk
            chunk = []
        chunk.append(pair)
    if chunk:
        yield chunk


def _padded(chunk: Sequence[Weighted]) -> MicroBatch:
    sequences = [sequence for sequence, _ in chunk]
    counts = torch.tensor([len(s.sampled) for s in sequences])                                    # [B]
    rows = torch.repeat_interleave(torch.arange(len(chunk)), counts)                              # [K]
    ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in sequences], batch_first=True)           # [B, L]
    lengths = torch.tensor([len(s.ids) for s in sequences])                                       # [B]
    at = rows * ids.shape[1] + torch.cat([s.sampled for s in sequences])                          # [K]
    return MicroBatch(
        inputs={"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()},
        sequences=len(chunk),
        before=at - 1,
        targets=ids.flatten()[at],
        behaviour=torch.cat([s.behaviour for s in sequences]),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32)[rows],
        weights=torch.tensor([weight for _, weight in chunk], dtype=torch.float32)[rows],
        rows=rows,
    )
