"""Log-probabilities of the sampled tokens only, through a head that works in chunks.

The decoder gives hidden states; the output head is applied to the positions that predict a sampled token, a few at a
time, so that `tokens × vocabulary` never exists. `head_of` knows how architectures finish their logits (scale, bias,
soft cap) and `check_head` proves it on the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espl_envs.core.errors import EsplError

CHUNK = {"cpu": 2**20, "cuda": 2**26}      # logits that exist at once, twice over: 4 and 256 MiB in fp32
FEWEST = 64                                # rows of a chunk at least: fewer would read the head's weights in vain


@dataclass(frozen=True, slots=True)
class Head:
    """How hidden states become logits: cap · tanh(scale · (h Wᵀ + b) / cap), the cap only where there is one."""

    weight: Tensor               # [V, H]
    bias: Tensor | None          # [V]
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[k, H] to [k, V] in fp32 at least; the product itself in the model's dtype, as the model does it."""
        out = nn.functional.linear(hidden, self.weight, self.bias)
        out = out.to(_wide(out.dtype))
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.cap is None else torch.tanh(out / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of `logits` by the plain product. [k, V] or one number"""
        return self.scale if self.cap is None else (1 - (logits / self.cap) ** 2) * self.scale


def head_of(causal: Any) -> Head:
    """The output head of a Hugging Face causal model."""
    module, config = causal.get_output_embeddings(), causal.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)                   # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)               # Granite divides
    cap = getattr(config, "final_logit_softcapping", None)                       # Gemma
    return Head(module.weight, getattr(module, "bias", None), scale, float(cap) if cap else None)


@torch.no_grad()
def check_head(causal: Any, name: str = "") -> None:
    """Prove that decoder and head give the model's own logits. Raises EsplError where they do not."""
    ids = torch.arange(1, 6, device=next(causal.parameters()).device)[None]      # [1, 5]
    theirs = causal(input_ids=ids, use_cache=False).logits[0].float()
    try:
        ours = head_of(causal).logits(_hidden(causal, {"input_ids": ids})[0])
        agree = ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-3 * theirs.abs().max())
    except (AttributeError, TypeError) as error:
        raise EsplError(f"model '{name}' cannot be trained: its output head is of an unknown kind ({error})") from error
    if not agree:
        raise EsplError(f"model '{name}' cannot be trained: it finishes its logits in a way the learner does not know")


def token_logprobs(
    causal: Any, inputs: Mapping[str, Any], before: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy (without gradient) of the distribution it came from, at `temperature`.

    `inputs` are the decoder's arguments, `input_ids` [B, L] among them; before [K] flat positions in [B·L] whose logits
    predict targets [K] (one may predict several); returns two [K] in fp32.
    """
    hidden = _hidden(causal, inputs).flatten(0, 1)[before]                       # [K, H]
    return chunked_logprobs(head_of(causal), hidden, targets, temperature)


def sequence_logprobs(causal: Any, tokens: Sequence[int], start: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of tokens[start:], each given all before it. [len(tokens) - start]"""
    ids = torch.tensor(tokens, device=next(causal.parameters()).device)          # [L]
    before = torch.arange(start - 1, len(tokens) - 1, device=ids.device)
    return token_logprobs(causal, {"input_ids": ids[None]}, before, ids[start:], temperature)[0]


def passage_logprobs(causal: Any, passages: Sequence[tuple[Sequence[int], float]], start: int) -> list[Tensor]:
    """Of each of (tokens, temperature) the log-probabilities of tokens[start:], in one padded forward pass.
    [len(tokens) - start] each, on the CPU in fp64
    """
    device = next(causal.parameters()).device
    rows = [torch.tensor(tokens) for tokens, _ in passages]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)           # [B, L]
    hidden = _hidden(causal, {"input_ids": ids})                                 # nobody looks to the right: no mask
    head = head_of(causal)
    found = [
        chunked_logprobs(head, hidden[i, start - 1 : len(row) - 1], ids[i, start : len(row)], temperature)[0]
        for i, (row, (_, temperature)) in enumerate(zip(rows, passages, strict=True))
    ]
    return list(torch.cat(found).double().cpu().split([len(row) - start for row in rows]))


def chunked_logprobs(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [K, H] and targets [K] to log-probabilities and entropies, [K] each; `chunk` rows at a time."""
    rows = chunk or max(FEWEST, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // head.weight.shape[0])
    logp, entropy = _Chunked.apply(hidden, head.weight, head.bias, targets, head, temperature, rows)
    return logp, entropy


def _hidden(causal: Any, inputs: Mapping[str, Any]) -> Tensor:
    """[B, L, H], after the decoder's last norm."""
    return causal.get_decoder()(**inputs, use_cache=False).last_hidden_state


class _Chunked(torch.autograd.Function):
    """log softmax(logits / T)[target]. The gradient by `hidden` is made in the forward pass, while the chunk's logits
    are there (one number per token scales it later); only a trained head computes its logits a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        head = replace(head, weight=weight, bias=bias)
        logp = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))          # [K]
        entropy = torch.empty_like(logp)                                         # [K]
        unit = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None     # [K, H] d logp / d hidden
        for part in _parts(len(hidden), rows):
            logits = head.logits(hidden[part])                                   # [k, V]
            slope = head.slope(logits)
            table = torch.log_softmax(_at(logits, temperature), 1)               # [k, V]
            logp[part] = table.gather(1, targets[part, None])[:, 0]
            chances = torch.exp(table, out=logits)
            entropy[part] = -torch.bmm(table[:, None], chances[:, :, None])[:, 0, 0]
            del table
            if unit is not None:
                unit[part] = _by_product(chances, slope, targets[part], temperature).to(weight.dtype) @ weight
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(hidden, targets, unit)
        ctx.settings = head, temperature, rows
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, unit = ctx.saved_tensors
        head, temperature, rows = ctx.settings
        wide = _wide(head.weight.dtype)
        by_weight = torch.zeros_like(head.weight, dtype=wide) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(head.bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for part in _parts(len(hidden) if by_weight is not None or by_bias is not None else 0, rows):
            logits = head.logits(hidden[part])                                   # [k, V]
            slope = head.slope(logits)
            chances = torch.softmax(_at(logits, temperature), 1)
            by_product = _by_product(chances, slope, targets[part], temperature).mul_(grad[part, None])
            if by_weight is not None:
                by_weight += by_product.to(hidden.dtype).T @ hidden[part]
            if by_bias is not None:
                by_bias += by_product.sum(0)
        by_hidden = None if unit is None else (unit * grad[:, None]).to(hidden.dtype)
        return (
            by_hidden,
            None if by_weight is None else by_weight.to(head.weight.dtype),
            None if by_bias is None else by_bias.to(head.bias.dtype),
            *(None,) * 4,
        )


def _by_product(chances: Tensor, slope: Tensor | float, targets: Tensor, temperature: float) -> Tensor:
    """d logp / d (h Wᵀ + b): (one-hot - chances) / T, through scale and cap; in the place of `chances`. [k, V]"""
    share = 1 / temperature if isinstance(slope, Tensor) else slope / temperature
    out = chances.mul_(-share)
    out.scatter_add_(1, targets[:, None], out.new_full((len(out), 1), share))
    return out.mul_(slope) if isinstance(slope, Tensor) else out


def _at(logits: Tensor, temperature: float) -> Tensor:
    """`logits`, in their place: every pass over [k, V] that is spared is seen in the time of an update."""
    return logits if temperature == 1 else logits.div_(temperature)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))
