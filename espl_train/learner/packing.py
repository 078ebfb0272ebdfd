"""From training sequences to micro-batches: what is computed together, in which layout.

Two layouts. *Packed*: one row without padding, in which a head that sequences share is computed once (`forest.py`).
*Padded*: sequences of similar length, one a row, for models whose attention cannot be told about packed rows. The
gradient of an update depends on neither, nor on how it is split: weights were set before.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from espl_train.learner.attention import Packed, arguments
from espl_train.learner.forest import grow, heads, lexicographic
from espl_train.learner.sequences import TrainingSequence
from espl_train.transfer import upload

OVERHEAD = 1.1       # time per token of a packed row over that of a padded one, where nothing is shared


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass computes, and the K sampled tokens that are learnt from it."""

    inputs: dict[str, Any]    # the decoder's arguments, `input_ids` [B, L] among them
    sequences: int
    cost: float           # in tokens: what the attention to earlier ones costs is counted in
    before: Tensor        # [K] flat position, in [B·L], of the id before each sampled one: its logits predict it
    targets: Tensor       # [K] the sampled ids
    behaviour: Tensor     # [K]
    advantages: Tensor    # [K]
    weights: Tensor       # [K] one over the global denominator
    rows: Tensor          # [K] which sequence a sampled token belongs to, 0..sequences-1

    @property
    def size(self) -> int:
        """Ids that are computed, padding included."""
        return int(self.inputs["input_ids"].numel())

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device; nobody waits for it to arrive."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return MicroBatch(**{name: _moved(value, device) for name, value in moved.items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if isinstance(value, Packed):
        return value.to(device)
    return upload(value, device) if isinstance(value, Tensor) else value


@dataclass(frozen=True, slots=True)
class Limits:
    """What a micro-batch may hold. `width` is the model's hidden size: looking at one earlier id costs 1 / (6·width) of
    what computing one costs (4·width operations per layer, as against about 24·width²)."""

    tokens: int
    width: int = 1024
    packed: bool = True      # whether the model can be given packed rows
    share: int = 1           # ranks that they are dealt to: as many for each of them, where there are enough sequences


def pack(sequences: Sequence[TrainingSequence], limits: Limits) -> list[MicroBatch]:
    """Micro-batches of at most `limits.tokens` ids (a longer sequence stands alone), as few as that allows and of costs
    as even as their order allows. Packed where that is cheaper: sharing saves more than the packed attention costs.
    """
    if not sequences:
        return []
    padded = _Padded(sequences, limits.width)
    if not limits.packed:
        return padded.cut(limits)
    packed = _InOneRow(sequences, limits.width)
    cheaper = packed.price(limits.tokens) * OVERHEAD < padded.price(limits.tokens)
    return (packed if cheaper else padded).cut(limits)


class _Layout:
    """Sequences in the order in which they are cut; subclasses say what one costs and what a stretch looks like."""

    def __init__(self, sequences: Sequence[TrainingSequence], width: int) -> None:
        self.sequences = sequences
        self.width = width

    def own(self, index: int, first: int) -> tuple[int, float]:
        """Ids and cost that sequence `index` adds to a micro-batch that begins with sequence `first`."""
        raise NotImplementedError

    def build(self, first: int, last: int) -> tuple[dict[str, Any], list[Tensor]]:
        """The decoder's arguments for sequences first..last-1, and where the ids of each of them stand."""
        raise NotImplementedError

    def price(self, tokens: int) -> float:
        """What all sequences cost in micro-batches of at most `tokens`."""
        return sum(self._cost(*stretch) for stretch in self._stretches(tokens))

    def cut(self, limits: Limits) -> list[MicroBatch]:
        """As few micro-batches as the limits allow, the dearest of them as cheap as can be."""
        bound = self._even(limits.tokens, limits.share)
        return [self._batch(first, last) for first, last in self._stretches(limits.tokens, bound)]

    def _even(self, tokens: int, share: int) -> float:
        """The smallest bound on the cost of one micro-batch that makes no more of them than `tokens` alone, rounded up
        to a multiple of `share`."""
        stretches = self._stretches(tokens)
        count = -(-len(stretches) // share) * share
        if count == 1:
            return math.inf
        dearest = math.ceil(max(self._cost(*stretch) for stretch in stretches))
        return bisect_left(range(dearest), True, key=lambda c: len(self._stretches(tokens, c)) <= count)

    def _cost(self, first: int, last: int) -> float:
        return sum(self.own(index, first)[1] for index in range(first, last))

    def _stretches(self, tokens: int, cost: float = math.inf) -> list[tuple[int, int]]:
        """First and last + 1 of the sequences that stand together: cut wherever one more would pass a bound."""
        found: list[tuple[int, int]] = []
        first = used = 0
        spent = 0.0
        for index in range(len(self.sequences)):
            ids, price = self.own(index, first)
            if index > first and (used + ids > tokens or spent + price > cost):
                found.append((first, index))
                first, used, spent = index, 0, 0.0
                ids, price = self.own(index, first)
            used, spent = used + ids, spent + price
        return [*found, (first, len(self.sequences))]

    def _batch(self, first: int, last: int) -> MicroBatch:
        chosen = self.sequences[first:last]
        inputs, places = self.build(first, last)
        counts = torch.tensor([len(s.targets) for s in chosen])                                  # [B]
        rows = torch.repeat_interleave(torch.arange(len(chosen)), counts)                        # [K]
        return MicroBatch(
            inputs=inputs,
            sequences=len(chosen),
            cost=self._cost(first, last),
            before=torch.cat([place[s.before] for place, s in zip(places, chosen, strict=True)]),
            targets=torch.cat([s.targets for s in chosen]),
            behaviour=torch.cat([s.behaviour for s in chosen]),
            advantages=torch.tensor([s.advantage for s in chosen], dtype=torch.float32)[rows],
            weights=torch.tensor([s.weight for s in chosen], dtype=torch.float32)[rows],
            rows=rows,
        )


class _InOneRow(_Layout):
    """Lexicographic order: what neighbours share stands once."""

    def __init__(self, sequences: Sequence[TrainingSequence], width: int) -> None:
        order = lexicographic([s.ids for s in sequences])
        super().__init__([sequences[i] for i in order], width)
        self.shared = heads([s.ids for s in self.sequences])

    def own(self, index: int, first: int) -> tuple[int, float]:
        length, head = len(self.sequences[index].ids), self.shared[index] if index > first else 0
        return length - head, length - head + (length**2 - head**2) / (12 * self.width)

    def build(self, first: int, last: int) -> tuple[dict[str, Any], list[Tensor]]:
        forest = grow([s.ids for s in self.sequences[first:last]], self.shared[first:last])
        return arguments(Packed(forest)), list(forest.places)


class _Padded(_Layout):
    """Falling length: a row is as long as the first of its micro-batch, padded on the right.

    No mask says so: what is causal does not look to the right, and what stands there is not learnt from. A mask would
    cost a GPU its fastest kernel.
    """

    def __init__(self, sequences: Sequence[TrainingSequence], width: int) -> None:
        super().__init__(sorted(sequences, key=lambda s: -len(s.ids)), width)

    def own(self, index: int, first: int) -> tuple[int, float]:
        length = len(self.sequences[min(first, index)].ids)
        return length, length + length**2 / (12 * self.width)

    def build(self, first: int, last: int) -> tuple[dict[str, Any], list[Tensor]]:
        rows = [s.ids for s in self.sequences[first:last]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)                            # [B, L]
        return {"input_ids": ids}, list(torch.arange(ids.numel()).view_as(ids))
