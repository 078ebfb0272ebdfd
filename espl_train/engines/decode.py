"""Continuous batching: admit (prefill only what is new), decode a stride, free what is done.

A prefix that any live row already holds is copied, not computed: N samples of a prompt cost one prefill, prompts under
one system prompt share it, and the next turn of a session prefills only its suffix. Nothing here is asynchronous, and
nothing depends on time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch

from espl_train.engines.kv import Slab
from espl_train.engines.sampling import Law, draw, log_probabilities
from espl_train.engines.shared import Shared
from espl_train.engines.slots import Row, Slots, common_prefix
from espl_train.profiling import span
from espl_train.randomness import uniforms
from espl_train.transfer import upload

SHARE = 16                 # a common prefix shorter than this is not worth a second prefill call
PREFILL_TOKENS = 8192      # padded tokens in one prefill call
PREFILL_PIECE = 1024       # new tokens of one row in one prefill call
PADDING = 128              # padding that costs a CPU less than another prefill call
BLOCK = 32                 # the least by which the slab's width changes


@dataclass(slots=True)
class Reuse:
    """Tokens of admitted prompts whose keys and values were needed: all, those kept from the session's last turn, and
    those copied from other rows. The rest was computed."""

    needed: int = 0
    kept: int = 0
    copied: int = 0

    def metrics(self) -> dict[str, float]:
        """Hit rates; nothing where nothing was needed."""
        return {"kv/kept": self.kept / self.needed, "kv/copied": self.copied / self.needed} if self.needed else {}


class Decoder:
    """Decodes up to `slots` rows together. `budget` bounds the memory in bytes; `reuse` is counted on.

    On a CPU the slab is kept as narrow as the rows are long, because what lies between them costs time; elsewhere it
    gets the width that the rows may come to need, because moving it costs memory.
    """

    def __init__(
        self, slab: Slab, device: torch.device, slots: int, budget: int, reuse: Reuse | None = None
    ) -> None:
        self.slab, self.device, self.slots = slab, device, slots
        self.reuse = reuse or Reuse()
        self.active: list[Row] = []
        self.memory = Slots(slab, device, budget, BLOCK)
        self._tight = device.type == "cpu"
        self._padding = PADDING if self._tight else PREFILL_TOKENS

    def admit(self, queue: Sequence[Row], policy: int | None) -> list[Row]:
        """Start as many rows of `queue` as there is room for, first those that are expected to be longest, then in its
        order; returns them in its order."""
        reach = max((row.reach for row in self.active), default=0)
        chosen: set[Row] = set()
        for row in sorted(queue, key=lambda row: -row.request.expected):
            rows, wider = len(self.active) + len(chosen) + 1, max(reach, row.reach)
            if rows > self.slots or (rows > 1 and rows > self.memory.room(wider)):
                break
            reach = wider
            chosen.add(row)
        admitted = [row for row in queue if row in chosen]
        if admitted:
            width = max(row.known for row in (*self.active, *admitted)) if self._tight else reach
            if len(self.memory.held) > max(self.memory.room(reach), 1):
                self.memory.shrink(self.active, width)
            cut = self.memory.common([*self.active, *admitted]).length
            self.memory.place(admitted, policy, width, reach, cut)
            self.reuse.needed += sum(len(row.request.tokens) - 1 for row in admitted)
            self.reuse.kept += sum(self.memory.held[row.slot].length for row in admitted)
            with span("sampling/prefill"):
                self._prefill(admitted, policy)
            self.active += admitted
        return admitted

    def stride(self, steps: int) -> list[Row]:
        """Decode up to `steps` tokens for every active row; returns the rows that ended."""
        self.memory.compact(self.active)
        steps = min(steps, max(row.limit - len(row.tokens) for row in self.active))
        common = self.memory.common(self.active)
        if self._tight:
            self.memory.fit(max(min(row.known + steps, row.reach) for row in self.active), common.length)
        rows = sorted(self.active, key=attrgetter("slot"))
        with span("sampling/decode"):
            tokens, logprobs = self._run(rows, steps, common)
        for row, ids, values in zip(rows, tokens, logprobs, strict=True):
            self._record(row, ids, values)
        done = [row for row in rows if row.stop or row.cancelled]
        self.active = [row for row in rows if not (row.stop or row.cancelled)]
        for row in done:
            self.memory.leave(row)
        return done

    def _run(self, rows: list[Row], steps: int, common: Shared) -> tuple[list[list[int]], list[list[float]]]:
        """The hot loop: `steps` tokens for all rows, those past their end included (cheaper than asking)."""
        device, count = self.device, len(rows)
        known = np.array([row.known for row in rows])
        made = np.array([len(row.tokens) for row in rows])
        seeds = np.array([row.request.seed for row in rows], dtype=np.uint64)
        law = Law.of([r.request.temperature for r in rows], [r.request.top_p for r in rows], device)
        chance = upload(torch.from_numpy(uniforms(seeds[None], made[None] + np.arange(steps)[:, None])), device)
        stops = upload(_padded([row.request.stop_ids for row in rows]), device)
        left = upload(torch.from_numpy(np.array([row.limit for row in rows]) - made), device)
        tokens = upload(torch.tensor([row.last for row in rows]), device)
        positions = upload(torch.from_numpy(known - 1), device)
        alive = torch.ones(count, dtype=torch.bool, device=device)
        longest = int(known.max())
        drawn: list[torch.Tensor] = []
        scored: list[torch.Tensor] = []
        for step in range(steps):
            width = min(longest + step, self.memory.width)
            logp = log_probabilities(self.slab.step(tokens, positions, width, common), law)
            tokens, value = draw(logp, law, chance[step])
            drawn.append(torch.where(alive, tokens, -1))
            scored.append(value)
            positions = positions + alive      # a row that ended writes on behind its end, where nobody reads
            alive = alive & (tokens[:, None] != stops).all(1) & (left > step + 1)
            if device.type == "cpu" and not alive.any():
                break
        return torch.stack(drawn, 1).tolist(), torch.stack(scored, 1).double().tolist()

    def _record(self, row: Row, ids: list[int], values: list[float]) -> None:
        count = ids.index(-1) if ids[-1] < 0 else len(ids)
        self.memory.note(row.slot, row.known - 1, (row.last, *ids[:count]), length=row.known + count - 1)
        row.tokens += ids[:count]
        row.logprobs += values[:count]
        if row.tokens[-1] in row.request.stop_ids:
            row.stop = "stop"
        elif len(row.tokens) >= row.limit:
            row.stop = "length"

    def _prefill(self, rows: list[Row], policy: int | None) -> None:
        """Write all but the last token of every row. In waves: leaders are computed, those who share copy them."""
        waiting = sorted(rows, key=lambda row: (row.request.tokens, row.slot))
        while waiting:
            leaders: list[Row] = []
            deferred: list[Row] = []
            copies: list[tuple[int, int, int]] = []
            for row in waiting:
                goal = row.request.tokens[:-1]
                slot, shared = self.memory.donor(row, goal, policy)
                ahead = common_prefix(np.asarray(leaders[-1].request.tokens[:-1]), goal) if leaders else 0
                if ahead - shared >= SHARE or (ahead == len(goal) > shared):
                    deferred.append(row)
                    continue
                if slot != row.slot and shared:
                    copies.append((slot, row.slot, shared))
                leaders.append(row)
            self.memory.copy(copies)
            self.reuse.copied += sum(length for _, _, length in copies)
            self._compute(leaders)
            waiting = deferred

    def _compute(self, rows: list[Row]) -> None:
        """Run the model over what each row lacks, shortest first, in calls of bounded size and bounded padding."""
        waiting = [row for row in rows if self.memory.lacks(row)]
        while waiting:
            waiting.sort(key=lambda row: (self.memory.lacks(row), row.slot))
            batch: list[Row] = []
            total = 0
            for row in waiting:
                count = min(self.memory.lacks(row), PREFILL_PIECE)
                padded = count * (len(batch) + 1)
                if batch and (padded > PREFILL_TOKENS or padded - total - count > self._padding):
                    break
                batch.append(row)
                total += count
            slots = [row.slot for row in batch]
            starts = [self.memory.held[slot].length for slot in slots]
            pieces = [row.request.tokens[s : min(s + PREFILL_PIECE, len(row.request.tokens) - 1)]
                      for row, s in zip(batch, starts, strict=True)]
            self.slab.write(slots, starts, pieces)
            for slot, start, piece in zip(slots, starts, pieces, strict=True):
                self.memory.note(slot, start, piece)
            waiting = [row for row in waiting if self.memory.lacks(row)]


def _padded(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(1, *map(len, lists)) if lists else 1
    return torch.tensor([[*ids, *(-1 for _ in range(longest - len(ids)))] for ids in lists])
