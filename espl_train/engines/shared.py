"""Attention of one new token per row, for which what rows have in common is read once.

Samples of one prompt, and prompts under one system prompt, begin with the same tokens, whose keys and values are the
same. Reading them again for every row is most of the work of decoding short replies. So rows are put into groups that
share their first positions: the scores of a group's tokens for those are one matrix product per key head, for the rest
of each row there is one per row; all of a row's scores go through one softmax. Exact, up to the order of a sum.
(The idea is that of Hydragen, arXiv 2402.05099, and of cascade attention.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from espl_train.engines.cache import Kept


class Group(NamedTuple):
    """Rows whose first positions hold the same tokens, and the one of them whose memory is read for all."""

    leader: int
    rows: slice | Tensor


STEP = 16        # of the position where rows are cut: it shall not move whenever another two tokens are the same


class Shared(NamedTuple):
    """What a batch has in common: every row is in one group, whose rows agree in their first `length` tokens."""

    length: int = 0
    groups: tuple[Group, ...] = ()


NOTHING = Shared()


def find(held: Sequence[np.ndarray], slots: Sequence[int], price: float, device: torch.device) -> Shared:
    """What is best shared by rows that hold these ids each and stand in these slots; of a group the first is read.

    Sharing n positions in g groups spares reading (rows - g) · n of them; a group costs as much time as reading `price`
    positions of a row. What is shared depends on the ids alone.
    """
    if len(held) < 2 or math.isinf(price):
        return NOTHING
    known = np.stack([ids[: min(map(len, held))] for ids in held])
    keys = [row.astype(">i8").tobytes() for row in known]            # big-endian bytes compare as the ids do
    ranked = sorted(range(len(keys)), key=keys.__getitem__)
    common = _common(known[ranked]) // STEP * STEP                   # of neighbours
    best, length = 0.0, 0
    for candidate in np.unique(common[common > 0]).tolist():
        groups = 1 + int((common < candidate).sum())
        if (spared := (len(keys) - groups) * candidate - groups * price) > best:
            best, length = spared, candidate
    if not length:
        return NOTHING
    members: list[list[int]] = [[ranked[0]]]
    for row, with_last in zip(ranked[1:], common.tolist(), strict=True):
        if with_last < length:
            members.append([])
        members[-1].append(row)
    chosen = (_selected(sorted(slots[row] for row in rows), device) for rows in members)
    return Shared(length, tuple(Group(slots[min(rows)], where) for rows, where in zip(members, chosen, strict=True)))


def attend(query: Tensor, keys: Kept, values: Kept, mask: Tensor, scaling: float, shared: Shared = NOTHING) -> Tensor:
    """A matrix product per row and key head, for all heads that share it at once; of what a group has in common, one
    per key head for all its rows.

    query (rows, heads, dim); keys, values (rows, key heads, width, dim), cut where the rows cease to be alike; mask
    (rows, 1, width), added to the scores; returns (rows, heads, dim).
    """
    rows, heads, dim = query.shape
    kept, common = keys.tail.shape[1], shared.length
    query = query * scaling
    own = torch.bmm(query.view(rows * kept, -1, dim), keys.tail.flatten(0, 1).transpose(1, 2))
    scores = own.view(rows, heads, -1).add_(mask[:, :, common:])
    if common:
        scores = torch.cat([scores.new_empty(rows, heads, common), scores], -1)
    for leader, members in shared.groups:
        theirs = torch.bmm(_by_head(query[members], kept), keys.head[leader].transpose(1, 2))
        scores[members, :, :common] = _by_row(theirs, heads) + mask[members, :, :common]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    mine = weights[:, :, common:].reshape(rows * kept, -1, own.shape[-1])
    out = torch.bmm(mine, values.tail.flatten(0, 1)).view(rows, heads, -1)
    for leader, members in shared.groups:
        theirs = torch.bmm(_by_head(weights[members, :, :common], kept), values.head[leader])
        out[members] += _by_row(theirs, heads)
    return out


def _by_head(x: Tensor, kept: int) -> Tensor:
    """(rows, heads, n) to (key heads, rows · heads that share it, n)."""
    return x.unflatten(1, (kept, -1)).transpose(0, 1).flatten(1, 2)


def _by_row(x: Tensor, heads: int) -> Tensor:
    """And back."""
    return x.unflatten(1, (-1, heads // len(x))).transpose(0, 1).flatten(1, 2)


def _common(ranked: np.ndarray) -> np.ndarray:
    """How many leading ids each row has in common with the next: (rows - 1,)."""
    same = ranked[1:] == ranked[:-1]
    return np.where(same.all(1), same.shape[1], same.argmin(1)) if same.shape[1] else np.zeros(len(same), dtype=int)


def _selected(rows: list[int], device: torch.device) -> slice | Tensor:
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device)
