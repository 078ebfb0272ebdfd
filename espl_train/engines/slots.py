"""Who holds which row of the slab: requests being decoded, and sessions that wait for their next turn.

Rows being decoded are kept in the slots 0 … n-1, so that a step reads the slab without gathering. What a slot holds is
known token by token, which is how a prefix that is there already is found. Memory is bounded: the sessions that have
waited longest are forgotten first, and simply computed again when they come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from espl_train.engines.base import Request
from espl_train.engines.kv import Slab
from espl_train.engines.shared import Shared, find


@dataclass(slots=True, eq=False)
class Row:
    """One request being decoded. `limit` is how many tokens it may get: as asked for, as far as the context allows."""

    request: Request
    limit: int
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: Literal["stop", "length"] | None = None
    cancelled: bool = False
    prompt: np.ndarray = field(init=False)          # all but the last token of the request

    def __post_init__(self) -> None:
        self.prompt = np.array(self.request.tokens[:-1], dtype=np.int64)

    @property
    def known(self) -> int:
        """Tokens so far; the slab holds all but the last."""
        return len(self.request.tokens) + len(self.tokens)

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.request.tokens[-1]

    @property
    def reach(self) -> int:
        """The slab width that this row may come to need."""
        return len(self.request.tokens) + self.limit


@dataclass(slots=True)
class Held:
    """What a slot holds: the first `length` tokens of a sequence, under one policy, for a session or a running row."""

    length: int = 0
    policy: int | None = None
    session: str | None = None
    row: Row | None = None
    used: int = 0

    @property
    def free(self) -> bool:
        return self.row is None and self.session is None


class Slots:
    """The rows of one slab, within `budget` bytes. Widths come in multiples of `block`, or of about an eighth."""

    def __init__(self, slab: Slab, device: torch.device, budget: int, block: int) -> None:
        self.slab, self.device, self.budget, self.block = slab, device, budget, block
        self.width = self.cut = 0
        self.held: list[Held] = []
        self._ids = np.zeros((0, 0), dtype=np.int64)      # (slots, width): the tokens written in the slab
        self._sessions: dict[str, int] = {}
        self._clock = 0

    def room(self, width: int) -> int:
        """Rows of `width` tokens that fit the budget."""
        return self.budget // (self.slab.bytes_per_token * max(self._blocks(width), 1))

    def place(self, rows: Sequence[Row], policy: int | None, width: int, reach: int, cut: int) -> None:
        """Give every row a slot: its session's own where that is kept under this policy, else a free one.

        The slab is at least `width` wide afterwards, holds so few rows that it may become `reach` wide, and is cut at
        `cut` (see `fit`).
        """
        self._clock += 1
        fresh = []
        for row in rows:
            session = row.request.session
            slot = self._sessions.get(session, -1) if session is not None else -1
            if session is not None:
                self.release(session)
            if slot >= 0 and self.held[slot].policy == policy:
                self._hold(slot, row, policy)
            else:
                fresh.append(row)
        self._reserve(len(fresh), width, reach, cut)
        free = (slot for slot, held in enumerate(self.held) if held.free)
        for row, slot in zip(fresh, free, strict=False):
            self.held[slot].length = 0
            self._hold(slot, row, policy)

    def lacks(self, row: Row) -> int:
        """How many tokens of the request are not in the slab yet; the last one never is."""
        return len(row.request.tokens) - 1 - self.held[row.slot].length

    def note(self, slot: int, start: int, tokens: Sequence[int], length: int | None = None) -> None:
        """Tokens from `start` on are written in the slab (all of them, or the first `length` of the whole sequence)."""
        self._ids[slot, start : start + len(tokens)] = tokens
        self.held[slot].length = start + len(tokens) if length is None else length

    def donor(self, row: Row, goal: Sequence[int], policy: int | None) -> tuple[int, int]:
        """The slot that holds the longest prefix of `goal`, and its length. Who holds something keeps to its own."""
        own = self.held[row.slot].length
        lengths = np.array([held.length if held.policy == policy and not held.free else 0 for held in self.held])
        if own or not goal or not lengths.any():
            return row.slot, own
        width = min(len(goal), int(lengths.max()))
        same = self._ids[:, :width] == np.asarray(goal[:width])
        shared = np.minimum(np.where(same.all(1), width, same.argmin(1)), lengths)
        best = int(shared.argmax())
        return best, int(shared[best])

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy prefixes: (from slot, to slot, length)."""
        if not copies:
            return
        self.slab.move([s for s, _, _ in copies], [t for _, t, _ in copies], max(n for _, _, n in copies))
        for source, target, length in copies:
            self.note(target, 0, self._ids[source, :length].tolist())

    def leave(self, row: Row) -> None:
        """The row has ended; what its session wrote is kept."""
        held, session = self.held[row.slot], row.request.session
        held.row = None
        if session is not None and not row.cancelled:
            self.release(session)
            self._sessions[session] = row.slot
            held.session = session
        row.slot = -1

    def release(self, session: str) -> None:
        """Forget a session."""
        slot = self._sessions.pop(session, None)
        if slot is not None:
            self.held[slot].session = None

    def forget(self) -> None:
        """Forget every session."""
        for session in list(self._sessions):
            self.release(session)

    def fit(self, width: int, cut: int) -> None:
        """Make the slab as wide as it must be and no wider: what is not there is not read. Cut it at `cut`.

        The width is a function of what is held now, not of what was before: arithmetic over another width may round
        differently, and the same requests shall give the same bits in a run that was resumed.
        """
        width = self._blocks(max(width, self._longest()))
        if (width, cut) != (self.width, self.cut):
            while self.held and self.held[-1].free:
                self.held.pop()
            self._resize(len(self.held), width, cut)

    def compact(self, active: Sequence[Row]) -> None:
        """Move active rows into the slots 0 … n-1; sessions that stood there swap places with them."""
        count = len(active)
        outside = sorted((row.slot for row in active if row.slot >= count), reverse=True)
        holes = [slot for slot in range(count) if self.held[slot].row is None]
        if not outside:
            return
        source, target = [*outside], [*holes]
        for high, low in zip(outside, holes, strict=True):
            if not self.held[low].free:
                source.append(low)
                target.append(high)
            self._swap(high, low)
        self.slab.move(source, target, max(self.held[slot].length for slot in (*outside, *holes)))

    def common(self, rows: Sequence[Row]) -> Shared:
        """What the prompts of rows that stand, or will, in the first slots have in common, as far as it is worth it. In
        a group the first of them is read: slots depend on what was before, and shall decide no bit."""
        return find([row.prompt for row in rows], [row.slot for row in rows], self.slab.price, self.device)

    def shrink(self, active: Sequence[Row], width: int) -> None:
        """Make room for wider rows: forget all sessions and keep only the rows that are being decoded."""
        self.forget()
        self.compact(active)
        del self.held[len(active) :]
        self._resize(len(self.held), self._blocks(width), 0)

    def _hold(self, slot: int, row: Row, policy: int | None) -> None:
        held = self.held[slot]
        held.row, held.policy, held.used = row, policy, self._clock
        row.slot = slot
        if held.length:
            tokens = row.request.tokens
            held.length = min(common_prefix(self._ids[slot, : held.length], tokens), len(tokens) - 1)

    def _reserve(self, fresh: int, width: int, reach: int, cut: int) -> None:
        """Have `fresh` free slots of a slab at least `width` wide, growing it or evicting the oldest sessions."""
        room = max(self.room(max(reach, self._longest())), fresh)
        excess = len(self.held) + self._missing(fresh) - room
        if excess > 0:
            oldest = sorted(self._sessions, key=lambda s: (self.held[self._sessions[s]].used, self._sessions[s]))
            for session in oldest[:excess]:
                self.release(session)
        rows = len(self.held) + self._missing(fresh)
        if rows > len(self.held):
            rows = max(rows, min(len(self.held) * 3 // 2, room))
        width = self._blocks(max(width, self._longest()))
        if rows <= self.room(self.width) and width <= self.width <= 2 * width:
            width = self.width
        if rows > len(self.held) or (width, cut) != (self.width, self.cut):
            self._resize(rows, width, cut)

    def _longest(self) -> int:
        return max((held.length for held in self.held if not held.free), default=0)

    def _missing(self, fresh: int) -> int:
        return max(fresh - sum(held.free for held in self.held), 0)

    def _resize(self, rows: int, width: int, cut: int) -> None:
        self.slab.resize(rows, width, cut)
        ids = np.zeros((rows, width), dtype=np.int64)
        kept = self._ids[:rows, :width]
        ids[: kept.shape[0], : kept.shape[1]] = kept
        self._ids, self.width, self.cut = ids, width, cut
        self.held += [Held() for _ in range(rows - len(self.held))]

    def _swap(self, high: int, low: int) -> None:
        self.held[high], self.held[low] = self.held[low], self.held[high]
        self._ids[[high, low]] = self._ids[[low, high]]
        for slot in (high, low):
            held = self.held[slot]
            if held.row is not None:
                held.row.slot = slot
            if held.session is not None:
                self._sessions[held.session] = slot

    def _blocks(self, width: int) -> int:
        block = max(self.block, 1 << max(width.bit_length() - 4, 0))
        return -(-width // block) * block


def common_prefix(held: np.ndarray, tokens: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = min(len(held), len(tokens))
    differs = held[:length] != np.asarray(tokens[:length])
    return int(differs.argmax()) if differs.any() else length
