"""The decoding step of Llama-shaped models, written out: one token per row, a few rows, nothing but the arithmetic.

A step of a small model, or of few rows, is mostly the cost of calling modules and many small operations, not of the
arithmetic. `Step.of` takes the weights out of a transformers model whose architecture it knows; whether it really
computes the same is for `slab_for` to prove on the model at hand. Weights are shared with the model, never copied, so
merging a new adapter into them is all that an update needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from espl_train.engines import shared
from espl_train.engines.cache import Kept
from espl_train.engines.shared import NOTHING, Shared

KNOWN = {"llama", "mistral", "qwen2", "qwen3"}
FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn"}      # those of others depend on the length of the sequence
TABLE = 1024                                                   # positions by which the table of rotations grows


class Linear(NamedTuple):
    """x Wᵀ + b."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x Wᵀ (+ b), the first sum within the product."""
        out = torch.addmm(residual, x, self.weight.t())
        return out if self.bias is None else out.add_(self.bias)


class Norm(NamedTuple):
    """Root mean square normalisation over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer."""

    before_attention: Norm
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    out: Linear
    scaling: float
    before_mlp: Norm
    gate: Linear
    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, module: Any) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        return cls(
            before_attention=_norm(module.input_layernorm),
            query=_linear(attention.q_proj),
            key=_linear(attention.k_proj),
            value=_linear(attention.v_proj),
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            out=_linear(attention.o_proj),
            scaling=attention.scaling,
            before_mlp=_norm(module.post_attention_layernorm),
            gate=_linear(mlp.gate_proj),
            up=_linear(mlp.up_proj),
            down=_linear(mlp.down_proj),
            activation=mlp.act_fn,
        )


class Rotations:
    """cos and sin by position, as the model's own module computes them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._cos = self._sin = torch.empty(0)

    def __call__(self, positions: Tensor, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """For positions (rows,) below `width`; two of (rows, 1, dim)."""
        if len(self._cos) < width or self._cos.dtype != like.dtype:
            everything = torch.arange(-(-width // TABLE) * TABLE, device=like.device)
            cos, sin = self._module(like, everything[None])
            half = sin.shape[-1] // 2
            self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return self._cos[positions, None], self._sin[positions, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, heads, dim) turned by its position; `sin` carries the signs."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Step:
    """One token per row, through all layers."""

    def __init__(self, model: Any) -> None:
        body = model.model
        self.embedding: Tensor = body.embed_tokens.weight
        self.layers = [Layer.of(layer) for layer in body.layers]
        self.norm = _norm(body.norm)
        self.head = _linear(model.get_output_embeddings())
        self.rotations = Rotations(body.rotary_emb)
        self.dim = int(body.layers[0].self_attn.head_dim)

    @classmethod
    def of(cls, model: Any) -> Step | None:
        """The step of `model`; None where it is of another kind, or where an adapter hangs on its layers."""
        config = model.config.get_text_config()
        rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if config.model_type not in KNOWN or rotation not in FIXED_ROTATIONS:
            return None
        try:
            return cls(model)
        except (AttributeError, TypeError):
            return None

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, slabs: Sequence[tuple[Kept, Kept]], width: int,
        common: Shared = NOTHING,
    ) -> Tensor:
        """Logits (rows, vocab) after `tokens` (rows,) at `positions`, whose keys and values are written in `slabs`.

        mask: (rows, 1, width), added to the scores; common: what is read once for several rows.
        """
        count = len(tokens)
        rows = torch.arange(count, device=tokens.device)
        hidden = functional.embedding(tokens, self.embedding)                              # (rows, hidden)
        cos, sin = self.rotations(positions, width, hidden)
        columns, own = positions - common.length, width - common.length
        for layer, (keys, values) in zip(self.layers, slabs, strict=True):
            x = layer.before_attention(hidden)
            query, key, value = (of(x).view(count, -1, self.dim) for of in (layer.query, layer.key, layer.value))
            if layer.query_norm and layer.key_norm:
                query, key = layer.query_norm(query), layer.key_norm(key)
            keys.tail[rows, :, columns] = rotate(key, cos, sin)
            values.tail[rows, :, columns] = value
            seen = Kept(keys.head, keys.tail[:count, :, :own]), Kept(values.head, values.tail[:count, :, :own])
            mixed = shared.attend(rotate(query, cos, sin), *seen, mask, layer.scaling, common)
            hidden = layer.out.onto(hidden, mixed.reshape(count, -1))
            x = layer.before_mlp(hidden)
            hidden = layer.down.onto(hidden, layer.activation(layer.gate(x)).mul_(layer.up(x)))
        return self.head(self.norm(hidden))


def _linear(module: Any) -> Linear:
    """Raises TypeError for anything but a plain linear layer (an adapter that is not merged, quantised weights)."""
    if type(module) is not nn.Linear:
        raise TypeError(type(module).__name__)
    return Linear(module.weight, module.bias)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
