"""The engine's memory: one preallocated slab per layer, a row per sequence, right-padded, written in place.

`KVSlab` serves every model whose layers attend to keys and values (it is a transformers `Cache`, so any of them runs
on it unchanged). `TokenSlab` has the same face and keeps token ids only: each step runs the whole sequences again.
Slow, but right for any causal model. `slab_for` decides, by comparing a probe with the plain forward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from espl_train.compiling import compiled
from espl_train.engines import shared
from espl_train.engines.cache import Kept, Plan, SlabCache, Target
from espl_train.engines.shared import NOTHING, Group, Shared
from espl_train.engines.written import Step
from espl_train.transfer import upload

PRICE = 2**17     # bytes that a CPU reads in the time of the operations that one more group costs in a layer
Rows = Sequence[int]
log = logging.getLogger(__name__)


class Slab(Protocol):
    """What the decoder needs. Positions of a row beyond what was written are garbage, finite and never read."""

    model: nn.Module           # may be exchanged for one of the same architecture
    bytes_per_token: int

    @property
    def price(self) -> float:
        """Of one more group of rows that share what they read, in positions of a row: see `shared.find`."""
        ...

    def resize(self, rows: int, width: int, cut: int = 0) -> None:
        """Make room; what was written stays. Steps will have `cut` positions in common: see `shared.py`."""
        ...

    def move(self, source: Rows, target: Rows, length: int) -> None:
        """Copy the first `length` positions of rows, all reads before all writes (so rows can be swapped)."""
        ...

    def write(self, rows: Rows, starts: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        """Append `pieces[i]` to row `rows[i]`, which holds `starts[i]` tokens already."""
        ...

    def step(self, tokens: Tensor, positions: Tensor, width: int, common: Shared = NOTHING) -> Tensor:
        """Feed one token to each of the first rows at its position, all below `width`; logits (rows, vocab).

        `common` positions are before all of them.
        """
        ...

    def drop(self) -> None:
        """Give the memory back; nothing that was written survives."""
        ...


class KVSlab:
    """Keys and values of every layer, for attention models.

    `attention` is the implementation that transformers' modules use; `written`: a step goes around the modules where
    the architecture is known (`written.py`), and is compiled then where that is asked for (`compile`).
    """

    def __init__(
        self, model: nn.Module, attention: str | None = "espl", written: bool = True, compile: bool = False
    ) -> None:
        self.attention, self.written, self.compile = attention, written, compile
        self.model = model
        self.config = _text_config(model)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.cache = SlabCache()
        self.bytes_per_token = 1
        self.windows = _windows(self.config)

    @property
    def model(self) -> nn.Module:
        """See `Slab`."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        if model is not getattr(self, "_model", None):
            self._model = model
            step = Step.of(model) if self.written else None
            self._step = compiled(step, next(model.parameters()).device) if step and self.compile else step

    @property
    def price(self) -> float:
        """See `Slab`. A compiled step would be compiled anew for every number of groups; and for a GPU, to which it is
        not reading that the time goes with few rows, starting the operations is too dear."""
        plain = self._step is not None and not self.compile and len(self.windows) == 1 and self.device.type == "cpu"
        return PRICE * self.config.num_hidden_layers / self.bytes_per_token if plain else math.inf

    @property
    def compiles(self) -> bool:
        """Whether there is a step that is compiled, or would be if there were a compiler (which was said then)."""
        return self.compile and self._step is not None

    def resize(self, rows: int, width: int, cut: int = 0) -> None:
        """See `Slab`."""
        self.cache.resize(rows, width, cut)

    def move(self, source: Rows, target: Rows, length: int) -> None:
        """See `Slab`."""
        self.cache.move(self._index(source), self._index(target), length)

    def write(self, rows: Rows, starts: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        """See `Slab`."""
        longest = max(map(len, pieces))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, piece in enumerate(pieces):
            ids[i, : len(piece)] = torch.tensor(piece)
        lengths, begin = torch.tensor([len(p) for p in pieces]), torch.tensor(starts)
        offsets = torch.arange(longest)
        batch, column = (offsets < lengths[:, None]).nonzero(as_tuple=True)
        positions = begin[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        width = _round(int((begin + lengths).max()), self.cache.shape[1])
        index = torch.tensor(rows)
        contiguous = bool((index.diff() == 1).all())
        self.cache.plan = Plan(
            slice(rows[0], rows[-1] + 1) if contiguous else upload(index, self.device),
            width,
            self.cache.targets(index[batch], positions[batch, column], batch, column, self.device),
        )
        self._forward(upload(ids, self.device), upload(positions, self.device), width)

    def step(self, tokens: Tensor, positions: Tensor, width: int, common: Shared = NOTHING) -> Tensor:
        """See `Slab`."""
        whole = self.cache.shape[1]
        count, width = len(tokens), whole if self.device.type == "cpu" else _round(width, whole)
        if self._step is not None and self.cache.slabs and len(self.windows) == 1:
            assert common.length == self.cache.cut
            (mask,) = self._masks(positions[:, None], width).values()
            return self._step(tokens, positions, mask[:, 0], self.cache.slabs, width, common)
        assert not self.cache.cut
        target = Target(1, torch.arange(count, device=self.device), positions, None)
        self.cache.plan = Plan(slice(0, count), width, [target])
        return self._forward(tokens[:, None], positions[:, None], width)

    def drop(self) -> None:
        """See `Slab`."""
        self.cache = SlabCache()

    def _forward(self, ids: Tensor, positions: Tensor, width: int) -> Tensor:
        masks = self._masks(positions, width)
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        with self._own_attention():
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
                logits_to_keep=1,
            )
        if self.bytes_per_token == 1:
            self.bytes_per_token = sum(
                kept.tail.shape[1] * kept.tail.shape[3] * kept.tail.element_size()
                for pair in self.cache.slabs for kept in pair
            )
        return out.logits[:, -1]

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        config = _text_config(self.model)
        before = config._attn_implementation
        config._attn_implementation = self.attention or before
        try:
            yield
        finally:
            config._attn_implementation = before

    def _masks(self, positions: Tensor, width: int) -> dict[str, Tensor]:
        """By layer type, what is added to the scores of tokens at `positions` (rows, new): (rows, 1, new, width)."""
        columns = torch.arange(width, device=self.device)
        ahead = columns > positions[:, :, None]                                # (rows, new, width)
        return {kind: self._mask(ahead if window is None else ahead | (columns <= positions[:, :, None] - window))
                for kind, window in self.windows.items()}

    def _mask(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(self.dtype).min)[:, None]

    def _index(self, rows: Rows) -> Tensor:
        return upload(torch.tensor(rows), self.device)


class TokenSlab:
    """Token ids only; every step is a forward pass over the whole sequences. For models that `KVSlab` cannot serve."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bytes_per_token, self.price = model, 8, math.inf
        self.ids = torch.zeros(0, 0, dtype=torch.long, device=next(model.parameters()).device)

    def resize(self, rows: int, width: int, cut: int = 0) -> None:  # noqa: ARG002
        """See `Slab`."""
        grown = self.ids.new_zeros(rows, width)
        grown[: self.ids.shape[0], : self.ids.shape[1]] = self.ids[:rows]
        self.ids = grown

    def move(self, source: Rows, target: Rows, length: int) -> None:
        """See `Slab`."""
        self.ids[list(target), :length] = self.ids[list(source), :length]

    def write(self, rows: Rows, starts: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        """See `Slab`."""
        for row, start, piece in zip(rows, starts, pieces, strict=True):
            self.ids[row, start : start + len(piece)] = self.ids.new_tensor(piece)

    def step(self, tokens: Tensor, positions: Tensor, width: int, common: Shared = NOTHING) -> Tensor:  # noqa: ARG002
        """See `Slab`."""
        count = len(tokens)
        rows = torch.arange(count, device=self.ids.device)
        self.ids[rows, positions] = tokens
        mask = (torch.arange(width, device=self.ids.device) <= positions[:, None]).long()
        keep, place = positions.unique(return_inverse=True)
        out = self.model(
            input_ids=self.ids[:count, :width], attention_mask=mask, use_cache=False, logits_to_keep=keep
        )
        return out.logits[rows, place]

    def drop(self) -> None:
        """See `Slab`."""
        self.ids = self.ids.new_zeros(0, 0)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per row to all of the slab: a matrix product per row and head, heads that share keys
    together. More new tokens than one are left to torch. Raises NotImplementedError for what it does not know.

    query: (rows, heads, 1, dim); key, value: (rows, kv heads, width, dim); returns (rows, 1, heads, dim).
    """
    if any(settings.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention with a soft cap, sinks or a position bias")
    if query.shape[2] > 1 or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = Kept.uncut(key), Kept.uncut(value)
    return shared.attend(query[:, :, 0], keys, values, attention_mask[:, 0], scale)[:, None], None


AttentionInterface.register("espl", attend)


def slab_for(model: nn.Module, tolerance: float = 1e-3, compile: bool = False) -> Slab:
    """A `KVSlab` where it reproduces the model's plain forward pass on a ragged probe, else a `TokenSlab`."""
    reason = ""
    ways = [("espl", True, True)] * compile + [("espl", True, False), ("espl", False, False), (None, False, False)]
    for attention, written, compiling in ways:
        try:
            slab = KVSlab(model, attention, written, compiling)
            if _reproduces(slab, tolerance):
                slab.drop()
                if compile and not slab.compiles:
                    log.warning("decoding is not compiled: %s", reason or f"{type(model).__name__} has no written step")
                return slab
            reason = "log-probabilities differ from those of the plain forward pass"
        except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    log.warning("%s does not run on the KV slab (%s): every token costs a pass over its whole sequence",
                type(model).__name__, reason)
    return TokenSlab(model)


def _reproduces(slab: KVSlab, tolerance: float) -> bool:
    model, device = slab.model, slab.device
    ids = (torch.arange(1, 14) * 7919 % slab.config.vocab_size).tolist()
    expected = torch.stack([
        model(input_ids=torch.tensor([ids[:n]], device=device), use_cache=False, logits_to_keep=1).logits[0, -1]
        for n in (13, 9)
    ])
    slab.resize(3, 16)
    slab.write([2, 0], [0, 0], [ids[:8], ids[:4]])
    slab.write([0], [4], [ids[4:12]])
    slab.move([2], [1], 8)
    tokens, positions = torch.tensor([ids[12], ids[8]], device=device), torch.tensor([12, 8], device=device)
    found = [slab.step(tokens, positions, 13)]
    if slab.price < math.inf:
        slab.resize(3, 16, 5)
        found.append(slab.step(tokens, positions, 13, Shared(5, (Group(1, slice(0, 2)),))))
    bound = tolerance if slab.dtype == torch.float32 else 100 * tolerance
    return all(_close(one, expected, bound) for one in found)


def _close(found: Tensor, expected: Tensor, bound: float) -> bool:
    found, expected = found.float().log_softmax(-1), expected.float().log_softmax(-1)
    return bool(((found - expected).abs() <= bound * expected.abs().clamp_min(1.0)).all())


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _windows(config: Any) -> dict[str, int | None]:
    """Attention span by layer type: None is full. One entry where all layers are alike."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {"full_attention": window if getattr(config, "use_sliding_window", True) else None}
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of type {', '.join(sorted(unknown))}")
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def _round(width: int, limit: int) -> int:
    return min(-(-width // 8) * 8, limit)
