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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from espl_train.compiling import compiled
from espl_train.engines.written import Step, attend_one

Rows = Sequence[int]
log = logging.getLogger(__name__)


class Slab(Protocol):
    """What the decoder needs. Positions of a row beyond what was written are garbage, finite and never read."""

    model: nn.Module           # may be exchanged for one of the same architecture
    bytes_per_token: int

    def resize(self, rows: int, width: int) -> None:
        """Make room; what was written stays."""
        ...

    def move(self, source: Rows, target: Rows, length: int) -> None:
        """Copy the first `length` positions of rows, all reads before all writes (so rows can be swapped)."""
        ...

    def write(self, rows: Rows, starts: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        """Append `pieces[i]` to row `rows[i]`, which holds `starts[i]` tokens already."""
        ...

    def step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Feed one token to each of the first rows at its position, all below `width`; logits (rows, vocab)."""
        ...

    def drop(self) -> None:
        """Give the memory back; nothing that was written survives."""
        ...


@dataclass(slots=True)
class _Plan:
    """Where the forward pass under way reads (rows and width) and writes (slab index from batch index)."""

    rows: slice | Tensor
    width: int
    into: tuple[Tensor, Tensor]
    source: tuple[Tensor, Tensor] | None      # None: every row has exactly one new token


class _SlabCache(Cache):
    """A transformers cache over rows of preallocated slabs; positions and masks are the caller's business."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slabs: list[tuple[Tensor, Tensor]] = []      # per layer keys, values: (rows, heads, width, dim)
        self.shape = (0, 0)
        self.plan: _Plan | None = None
        self._scratch = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        plan = self.plan
        assert plan is not None
        if layer_idx == len(self.slabs):
            self.slabs.append((self._empty(key_states), self._empty(value_states)))
        keys, values = self.slabs[layer_idx]
        for slab, new in ((keys, key_states), (values, value_states)):
            rows, positions = plan.into
            slab[rows, :, positions] = new[:, :, 0] if plan.source is None else new[plan.source[0], :, plan.source[1]]
        return keys[plan.rows, :, : plan.width], values[plan.rows, :, : plan.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:      # noqa: ARG002
        return 0

    def resize(self, rows: int, width: int) -> None:
        """In place where the memory of a slab is large enough: fresh memory is slow, and scarce."""
        self.shape = (rows, width)
        for layer, pair in enumerate(self.slabs):
            self.slabs[layer] = self._resized(pair[0]), self._resized(pair[1])

    def _resized(self, slab: Tensor) -> Tensor:
        kept = slab[: self.shape[0], :, : self.shape[1]]
        shape = (self.shape[0], slab.shape[1], self.shape[1], slab.shape[3])
        capacity = slab.untyped_storage().nbytes() // slab.element_size()
        if capacity < math.prod(shape):
            resized = self._empty(slab)
        else:
            if self._scratch.numel() < kept.numel() or self._scratch.dtype != slab.dtype:
                self._scratch = slab.new_empty(kept.numel())
            kept = self._scratch[: kept.numel()].view(kept.shape).copy_(kept)
            resized = slab.as_strided((math.prod(shape),), (1,), 0).view(shape)
        resized[: kept.shape[0], :, : kept.shape[2]] = kept
        return resized

    def _empty(self, like: Tensor) -> Tensor:
        """A slab of the present shape; what nobody wrote in it is finite. Untouched memory of a CPU costs nothing."""
        shape = (self.shape[0], like.shape[1], self.shape[1], like.shape[3])
        ahead = 2 if like.device.type == "cpu" else 1
        return like.new_zeros(ahead * math.prod(shape))[: math.prod(shape)].view(shape)


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
        self.cache = _SlabCache()
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
    def compiles(self) -> bool:
        """Whether there is a step that is compiled, or would be if there were a compiler (which was said then)."""
        return self.compile and self._step is not None

    def resize(self, rows: int, width: int) -> None:
        """See `Slab`."""
        self.cache.resize(rows, width)

    def move(self, source: Rows, target: Rows, length: int) -> None:
        """See `Slab`."""
        src, dst = self._index(source), self._index(target)
        for pair in self.cache.slabs:
            for slab in pair:
                slab[dst, :, :length] = slab[src, :, :length]

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
        self.cache.plan = _Plan(
            slice(rows[0], rows[-1] + 1) if contiguous else index.to(self.device),
            width,
            (index[batch].to(self.device), positions[batch, column].to(self.device)),
            (batch.to(self.device), column.to(self.device)),
        )
        self._forward(ids.to(self.device), positions.to(self.device), width)

    def step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """See `Slab`."""
        whole = self.cache.shape[1]
        count, width = len(tokens), whole if self.device.type == "cpu" else _round(width, whole)
        if self._step is not None and self.cache.slabs and len(self.windows) == 1:
            (mask,) = self._masks(positions[:, None], width).values()
            return self._step(tokens, positions, mask[:, 0], self.cache.slabs, width)
        self.cache.plan = _Plan(
            slice(0, count), width, (torch.arange(count, device=self.device), positions), None
        )
        return self._forward(tokens[:, None], positions[:, None], width)

    def drop(self) -> None:
        """See `Slab`."""
        self.cache = _SlabCache()

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
                slab.shape[1] * slab.shape[3] * slab.element_size() for pair in self.cache.slabs for slab in pair
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
        return torch.tensor(rows, device=self.device)


class TokenSlab:
    """Token ids only; every step is a forward pass over the whole sequences. For models that `KVSlab` cannot serve."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bytes_per_token = model, 8
        self.ids = torch.zeros(0, 0, dtype=torch.long, device=next(model.parameters()).device)

    def resize(self, rows: int, width: int) -> None:
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

    def step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
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
    return attend_one(query[:, :, 0], key, value, attention_mask[:, 0], scale)[:, None], None


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
    found = slab.step(torch.tensor([ids[12], ids[8]], device=device), torch.tensor([12, 8], device=device), 13)
    expected, found = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    bound = tolerance if slab.dtype == torch.float32 else 100 * tolerance
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
