"""Keys and values of every layer, a row per sequence, in memory that is allocated once and written in place.

Rows are cut at one position, and what is before it is kept apart from what is behind: a step reads the heads of a few
rows only (`shared.py`), and the tails of all, which should not be scattered over memory then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from espl_train.transfer import upload

LINE = 64      # bytes that a CPU reads at once


class Kept(NamedTuple):
    """The keys, or the values, of one layer."""

    head: Tensor       # (rows, heads, cut, dim)
    tail: Tensor       # (rows, heads, width - cut, dim)

    @classmethod
    def uncut(cls, whole: Tensor) -> Kept:
        """(rows, heads, width, dim), cut at 0."""
        return cls(whole[:, :, :0], whole)

    @property
    def cut(self) -> int:
        return self.head.shape[2]

    def read(self, rows: slice | Tensor, width: int) -> Tensor:
        """The first `width` positions of rows, uncut."""
        behind = self.tail[rows, :, : max(width - self.cut, 0)]
        return torch.cat([self.head[rows, :, :width], behind], 2) if self.cut else behind


class Target(NamedTuple):
    """Where new keys and values are written: `kept[part][rows, :, columns]`, from batch and column of what is new."""

    part: int
    rows: Tensor
    columns: Tensor
    source: tuple[Tensor, Tensor] | None      # None: every row has exactly one new token


@dataclass(slots=True)
class Plan:
    """Where the forward pass under way reads (rows and width) and writes."""

    rows: slice | Tensor
    width: int
    targets: Sequence[Target]


class SlabCache(Cache):
    """A transformers cache over preallocated memory; positions and masks are the caller's business."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slabs: list[tuple[Kept, Kept]] = []      # keys and values by layer
        self.shape = (0, 0)
        self.cut = 0
        self.plan: Plan | None = None
        self._scratch = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        plan = self.plan
        assert plan is not None
        if layer_idx == len(self.slabs):
            self.slabs.append((self._fresh(key_states), self._fresh(value_states)))
        pair = self.slabs[layer_idx]
        for kept, new in zip(pair, (key_states, value_states), strict=True):
            for part, rows, columns, source in plan.targets:
                kept[part][rows, :, columns] = new[:, :, 0] if source is None else new[source[0], :, source[1]]
        return tuple(kept.read(plan.rows, plan.width) for kept in pair)

    def get_seq_length(self, layer_idx: int = 0) -> int:      # noqa: ARG002
        return 0

    def targets(
        self, rows: Tensor, positions: Tensor, batch: Tensor, column: Tensor, device: torch.device
    ) -> list[Target]:
        """Where tokens are written on `device` that stand in `batch`, `column` of what is new: at `positions` of
        `rows`. All of these are on the CPU, where a mask is looked at without waiting for anybody."""
        found = []
        for part, (chosen, offset) in enumerate(((positions < self.cut, 0), (positions >= self.cut, self.cut))):
            if chosen.any():
                kept = (rows[chosen], positions[chosen] - offset, batch[chosen], column[chosen])
                where, columns, *source = (upload(x, device) for x in kept)
                found.append(Target(part, where, columns, (source[0], source[1])))
        return found

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` positions of rows, all reads before all writes."""
        for kept in (kept for pair in self.slabs for kept in pair):
            kept.head[target, :, :length] = kept.head[source, :, :length]
            if length > self.cut:
                kept.tail[target, :, : length - self.cut] = kept.tail[source, :, : length - self.cut]

    def resize(self, rows: int, width: int, cut: int) -> None:
        """In place where the memory there is large enough: fresh memory is slow, and scarce."""
        before, self.shape, self.cut = self.cut, (rows, width), cut
        for layer, pair in enumerate(self.slabs):
            self.slabs[layer] = self._laid_out(pair[0], before), self._laid_out(pair[1], before)

    def _laid_out(self, kept: Kept, before: int) -> Kept:
        rows, width = self.shape
        if before != self.cut:
            whole = kept.read(slice(rows), min(width, before + kept.tail.shape[2]))
            parts = whole[:, :, : self.cut], whole[:, :, self.cut :]
            return Kept(*(self._filled(*x) for x in zip(parts, (self.cut, width - self.cut), strict=True)))
        return Kept(*(self._resized(*x) for x in zip(kept, (self.cut, width - self.cut), strict=True)))

    def _resized(self, part: Tensor, width: int) -> Tensor:
        shape = (self.shape[0], part.shape[1], width, part.shape[3])
        content = part[: shape[0], :, :width]
        if shape == part.shape:
            return part
        if part.untyped_storage().nbytes() < math.prod(shape) * part.element_size():
            return self._filled(content, width)
        spare = self._scratch
        if (spare.dtype, spare.device) != (content.dtype, content.device) or spare.numel() < content.numel():
            self._scratch = content.new_empty(content.numel())
        content = self._scratch[: content.numel()].view(content.shape).copy_(content)
        resized = part.as_strided((math.prod(shape),), (1,), 0).view(shape)
        resized[: content.shape[0], :, : content.shape[2]] = content
        return resized

    def _filled(self, content: Tensor, width: int) -> Tensor:
        """Fresh memory for all rows, `width` wide, with this content."""
        filled = self._empty(content, (self.shape[0], content.shape[1], width, content.shape[3]))
        filled[: content.shape[0], :, : content.shape[2]] = content
        return filled

    def _fresh(self, like: Tensor) -> Kept:
        rows, width = self.shape
        parts = (self._empty(like, (rows, like.shape[1], n, like.shape[3])) for n in (self.cut, width - self.cut))
        return Kept(*parts)

    def _empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What nobody wrote in it is finite. On a CPU there is memory for growth, which costs nothing until then."""
        size = math.prod(shape)
        memory = _untouched(2 * size, like.dtype) if like.device.type == "cpu" else like.new_zeros(size)
        return memory[:size].view(shape)


def _untouched(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before something is written: `torch.zeros` writes them all."""
    size = count * dtype.itemsize
    raw = np.zeros(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return torch.from_numpy(raw[start : start + size]).view(dtype)
