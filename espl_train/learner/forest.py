"""Sequences laid out in one row so that what they have in common at their start stands there once.

In lexicographic order neighbours share the longest heads: each sequence adds only the ids that it does not share with
the one before it. The samples of one group share their whole prompt this way, prompts under one system prompt share
that, and two samples that begin alike share that much more. A position's hidden state depends on the ids up to it and
on nothing else, so computing a shared one once is exact; its gradient is the sum of what its sequences send back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

WORTH = 16      # a shared head below this many ids saves less than its bookkeeping costs


@dataclass(frozen=True, slots=True)
class Forest:
    """B sequences in T places, T at most the sum of their lengths."""

    ids: Tensor                     # [T]
    positions: Tensor               # [T] of each place within its sequences
    places: tuple[Tensor, ...]      # per sequence, [length]: where each of its ids stands
    shared: tuple[int, ...]         # per sequence: how many of its leading ids stand in the one before


def lexicographic(sequences: Sequence[Tensor]) -> list[int]:
    """The order (a stable one) in which neighbours have most in common."""
    keys = [s.numpy().astype(">i8").tobytes() for s in sequences]      # big-endian bytes compare as the ids do
    return sorted(range(len(keys)), key=keys.__getitem__)


def heads(sequences: Sequence[Tensor]) -> list[int]:
    """Per sequence, how many leading ids it shares with the one before it; 0 where that is not worth it."""
    found = [0] * len(sequences)
    for i, (one, other) in enumerate(pairwise(sequences), 1):
        most = min(len(one), len(other))
        differ = np.flatnonzero(one[:most].numpy() != other[:most].numpy())
        common = int(differ[0]) if len(differ) else most
        found[i] = common if common >= WORTH else 0
    return found


def grow(sequences: Sequence[Tensor], shared: Sequence[int]) -> Forest:
    """Lay out `sequences` [length each] in this order; the first of `shared` is taken as 0."""
    places: list[Tensor] = []
    end = 0
    shared = (0, *shared[1:])
    for sequence, common in zip(sequences, shared, strict=True):
        new = len(sequence) - common
        head = places[-1][:common] if common else torch.empty(0, dtype=torch.long)
        places.append(torch.cat([head, torch.arange(end, end + new)]))
        end += new
    fresh = [torch.arange(common, len(s)) for s, common in zip(sequences, shared, strict=True)]
    ids = torch.cat([s[common:] for s, common in zip(sequences, shared, strict=True)])
    return Forest(ids, torch.cat(fresh), tuple(places), shared)
