"""Exact attention in a packed row: each place attends to the ids before it in its own sequence, and to nothing else.

`install` puts a function in the place of a model's attention (transformers' AttentionInterface) that does the model's
usual thing unless the forward pass carries a `Packed` layout. `prove` compares packed with one-by-one hidden states on
the model at hand; a model that fails is trained on padded rows instead.

Three kernels, one meaning: `varlen_attn` on CUDA in half precision (nothing is padded), torch's fused attention over
rows of similar size, and plain arithmetic where a layer caps its scores or has sinks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from espl_train.learner.forest import Forest
from espl_train.transfer import upload

varlen: ModuleType | None
try:
    from torch.nn.attention import varlen
except ImportError:              # torch before 2.10
    varlen = None

FILLED = 0.8                 # of a bucket's scores, at least, are of real queries and keys …
SMALL = 2**15                # … unless it has so few that calling the kernel once more costs as much
LARGE = 2**24                # scores per head in one bucket at most: bounds the mask
HALF = (torch.bfloat16, torch.float16)
TOLD = inspect.signature(varlen.varlen_attn).parameters.keys() if varlen else {}.keys()
INSTALLED = {"sdpa": "espl_packed", "eager": "espl_packed_eager"}


@dataclass(slots=True)
class Bucket:
    """R sequences of similar size: each asks for its own ids (at most Q) and looks at its whole path (at most N)."""

    queries: Tensor     # [R·Q] places; rows are filled up with their last one
    keys: Tensor        # [R·N]
    offsets: Tensor     # [R] keys before a row's first query
    shape: tuple[int, int, int]          # R, Q, N
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores: 0 on what is seen, -inf elsewhere [R, 1, Q, N]; None where it is causal."""
        _, queries, keys = self.shape
        if queries == keys and (window is None or window >= keys):
            return None
        if (window, dtype) not in self._masks:
            device = self.offsets.device
            at = self.offsets[:, None, None] + torch.arange(queries, device=device)[:, None]     # [R, Q, 1]
            at = at.clamp(max=keys - 1)          # filled up queries see something as well: no row without a key
            column = torch.arange(keys, device=device)
            hidden = column > at if window is None else (column > at) | (column <= at - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._masks[window, dtype] = mask.masked_fill_(hidden, float("-inf"))[:, None]
        return self._masks[window, dtype]


class Packed:
    """The layout of one forward pass, for the attention of its layers: tables are made once and serve all of them."""

    def __init__(self, forest: Forest, device: torch.device | None = None) -> None:
        self.forest = forest
        self.device = device or forest.ids.device      # where the tables are wanted; the forest stays where it is
        self._kept = [i for i, (p, s) in enumerate(zip(forest.places, forest.shared, strict=True)) if s < len(p)]
        self._buckets: list[Bucket] = []
        self._origin: Tensor | None = None
        self._spans: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return type(self)(self.forest, device)

    @torch.compiler.disable       # it would be compiled anew for the tables of every micro-batch
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None,
        cap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:
        """query [1, H, T, D], key and value [1, H or fewer, T, D] to [1, T, H, D].

        A place sees itself and the `window` - 1 places before it in its sequence (None: all). Scores are capped as
        cap · tanh(scores / cap); `sinks` [H] are scores of a key without a value.
        """
        if cap is None and sinks is None and _flashes(query, value):
            return self._varlen(query, key, value, scale, window)
        rows = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]                    # [T, H·D]
        heads, shared = query.shape[1], key.shape[1]
        found: list[Tensor] = []
        for bucket in self._tables():
            count, asked, seen = bucket.shape
            q = _Take.apply(rows[0], bucket.queries).view(count, asked, heads, -1).transpose(1, 2)
            k, v = (_Take.apply(x, bucket.keys).view(count, seen, shared, -1).transpose(1, 2) for x in rows[1:])
            mask = bucket.mask(window, query.dtype)
            if cap is None and sinks is None:
                out = _fused(q, k, v, mask, scale)
            else:
                out = _plain(q, k, v, mask, scale, cap, sinks)
            found.append(out.transpose(1, 2).reshape(count * asked, -1))
        return _Take.apply(torch.cat(found), self._origin).view(1, query.shape[2], heads, -1)

    def _tables(self) -> list[Bucket]:
        """The buckets; `_origin` [T] says which row of their outputs, one after another, belongs to each place."""
        if not self._buckets:
            forest = self.forest
            origin = torch.empty_like(forest.ids)
            end = 0
            for members in _similar([(len(forest.places[i]), forest.shared[i], i) for i in self._kept]):
                asked = max(keys - common for keys, common, _ in members)
                seen = max(keys for keys, _, _ in members)
                queries, paths = [], []
                for keys, common, i in members:
                    places = forest.places[i]
                    queries.append(places[torch.arange(common, common + asked).clamp(max=keys - 1)])
                    paths.append(places[torch.arange(seen).clamp(max=keys - 1)])
                    origin[places[common:]] = torch.arange(end, end + keys - common)
                    end += asked
                offsets = torch.tensor([common for _, common, _ in members])
                tables = [upload(x, self.device) for x in (torch.cat(queries), torch.cat(paths), offsets)]
                self._buckets.append(Bucket(tables[0], tables[1], tables[2], (len(members), asked, seen)))
            self._origin = upload(origin, self.device)
        return self._buckets

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Flash attention over sequences of any length; those that share a head read a copy of its keys."""
        assert varlen is not None
        if self._spans is None:
            paths = [self.forest.places[i] for i in self._kept]
            keys = [len(path) for path in paths]
            asked = [n - self.forest.shared[i] for n, i in zip(keys, self._kept, strict=True)]
            ends = [upload(torch.tensor([0, *n]).cumsum(0).int(), self.device) for n in (asked, keys)]
            self._spans = upload(torch.cat(paths), self.device), ends[0], ends[1], max(asked), max(keys)
        path, of_queries, of_keys, asked_most, seen_most = self._spans
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)     # [T, H, D]
        if len(path) > len(k):
            k, v = (_Take.apply(x.flatten(1), path).unflatten(1, x.shape[1:]) for x in (k, v))
        grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in TOLD else {}     # before 2.12 unasked
        out: Any = varlen.varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(), of_queries, of_keys, asked_most, seen_most, scale=scale,
            window_size=(-1 if window is None else window - 1, 0), **grouped,
        )
        return out.unsqueeze(0)


def install(causal: Any) -> str | None:
    """Teach the model packed rows; None, or why that cannot be. Plain forward passes stay what they were, except that
    a model that caps attention scores now does so: torch's fused attention, transformers' default, would not.
    """
    config = causal.config.get_text_config()
    plain = config._attn_implementation
    if plain in INSTALLED.values():
        return None
    if plain == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        plain = "eager"
    if plain not in INSTALLED:
        return f"its attention is '{plain}'"
    if not causal._can_set_attn_implementation():
        return "its attention cannot be replaced"
    causal.set_attn_implementation(INSTALLED[plain])
    return None


@torch.no_grad()
def prove(causal: Any) -> str | None:
    """Compare packed with one-by-one hidden states on a small forest; None, or what is wrong with the packed ones."""
    from espl_train.learner.forest import grow, heads

    config = causal.config.get_text_config()
    if config._attn_implementation not in INSTALLED.values():
        return install(causal)
    if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    device, decoder = next(causal.parameters()).device, causal.get_decoder()
    known = torch.arange(1, 49) * 7919 % config.vocab_size
    sequences = [known[:24], torch.cat([known[:18], known[30:37]]), known[40:48]]
    other = [*sequences[:2], known[32:40]]
    try:
        witness = _Witness(grow(sequences, heads(sequences)), device)
        ours = decoder(**arguments(witness), use_cache=False).last_hidden_state[0].float()        # [T, H]
        again = decoder(**arguments(Packed(grow(other, heads(other)), device)), use_cache=False)
        theirs = [decoder(input_ids=s[None].to(device), use_cache=False).last_hidden_state[0] for s in sequences]
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, RuntimeError) as error:
        return f"its packed forward pass fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    if witness.windows != expected_windows(config):
        return "its layers do not all say how far they look back"
    bound = 1e-4 if next(causal.parameters()).dtype in (torch.float32, torch.float64) else 0.05
    for places, hidden in zip(witness.forest.places, theirs, strict=True):
        if not bool((ours[places] - hidden.float()).abs().max() <= bound * hidden.float().abs().max()):
            return "packed sequences do not give what single ones give"
    kept = torch.cat(witness.forest.places[:2])
    if not bool((again.last_hidden_state[0, kept].float() - ours[kept]).abs().max() <= bound / 10 * ours.abs().max()):
        return "packed sequences see each other"      # bit-equality is not asked for: experts batch by what all say
    return None


def arguments(packed: Packed) -> dict[str, Any]:
    """What a decoder is called with to compute a packed row; the empty mask keeps it from making one of its own."""
    ids, positions = (upload(x, packed.device)[None] for x in (packed.forest.ids, packed.forest.positions))  # [1, T]
    nothing = torch.empty(1, 1, 0, 0, device=packed.device)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": nothing, "packed": packed}


def expected_windows(config: Any) -> list[int | None]:
    """How far each layer looks back by the model's configuration; None is all the way."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


class _Witness(Packed):
    """Remembers what the layers asked for."""

    def __init__(self, forest: Forest, device: torch.device | None = None) -> None:
        super().__init__(forest, device)
        self.windows: list[int | None] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None,
               cap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        self.windows.append(window)
        return super().attend(query, key, value, scale, window, cap, sinks)


def _attention(plain: Any) -> Any:
    """The function to register: `plain` (module → function) where the pass is not packed."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        packed: Packed | None = None, **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed is None:
            out: tuple[Tensor, Tensor | None] = plain(module)(module, query, key, value, attention_mask, **settings)
            return out
        if settings.get("position_bias") is not None:
            raise NotImplementedError("a position bias")
        scale, window = settings.get("scaling"), settings.get("sliding_window")
        return packed.attend(query, key, value, scale, window, settings.get("softcap"), settings.get("s_aux")), None

    return attention


def _eager(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward


AttentionInterface.register(INSTALLED["sdpa"], _attention(lambda _: sdpa_attention_forward))
AttentionInterface.register(INSTALLED["eager"], _attention(_eager))
AttentionMaskInterface.register(INSTALLED["sdpa"], sdpa_mask)
AttentionMaskInterface.register(INSTALLED["eager"], eager_mask)


def _flashes(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes these. Torch lets it know of windows since 2.11."""
    width = query.shape[-1]
    if not query.is_cuda or query.dtype not in HALF or width != value.shape[-1] or width > 256 or width % 8:
        return False
    return "window_size" in TOLD and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """[R, H, Q, D]"""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """[R, H, Q, D], by the textbook: softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)           # [R, H, Q, N]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is None:
        mask = torch.full(scores.shape[2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    chances = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return chances[..., : k.shape[2]] @ v


def _similar(sizes: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """(keys, shared, index) in buckets: those that share nothing by themselves, for their mask is the causal one."""
    members: list[tuple[int, int, int]] = []
    real = asked = seen = 0
    for size in sorted(sizes, key=lambda s: (s[1] > 0, s[1] - s[0], -s[0])):
        keys, common, _ = size
        wider = max(asked, keys - common), max(seen, keys)
        total = (len(members) + 1) * wider[0] * wider[1]
        filled = real + (keys - common) * keys >= FILLED * total or total <= SMALL
        alike = not members or (members[0][1] > 0) == (common > 0)
        if members and not (filled and alike and total <= LARGE):
            yield members
            members, real, wider = [], 0, (keys - common, keys)
        members.append(size)
        real += (keys - common) * keys
        asked, seen = wider
    if members:
        yield members


class _Take(torch.autograd.Function):
    """Rows of a matrix by index; the gradients of a row that was taken often are summed in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return nn.functional.embedding(index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.rows, grad.shape[1], dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None
