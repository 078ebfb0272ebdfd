"""The adapted linear layer as one product, W x + s · B (A x): one autograd function instead of PEFT's six operations.

PEFT casts the layer's input to the adapter's fp32 and carries fp32 copies of input and output through forward and
backward pass. Here the adapter is cast to the dtype of the base, as vLLM does it: on a bf16 base everything of the size
of a token's hidden state stays bf16, and so do the matrix units. The adapter itself, its gradient and its optimiser
stay fp32. In fp32 it is the same function with fewer passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class AdaptedLinear(Linear):
    """PEFT's LoRA layer, saved, merged and switched off as it is; only its product is another."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, in] to […, out], in the dtype of `x`."""
        base: Any = self.get_base_layer()
        if args or kwargs or self.disable_adapters or self.merged or base.weight.requires_grad:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        if torch.is_grad_enabled():
            out: Tensor = _Adapted.apply(x, base.weight, base.bias, a, b, self.scaling[name])
            return out
        return _product(x, base.weight, base.bias, a, b, self.scaling[name])[0]


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer of a PEFT model its one product; layers of other kinds stay PEFT's."""
    for module in model.modules():
        if type(module) is Linear and _plain(module):
            module.__class__ = AdaptedLinear


def _plain(layer: Linear) -> bool:
    """Whether `layer` computes W x + s · B (A x) and nothing else."""
    alone = len(layer.lora_A) == 1 and not layer.lora_variant and not any(layer.lora_bias.values())
    dropout = any(isinstance(m, nn.Dropout) and m.p for m in layer.lora_dropout.values())
    return type(layer.get_base_layer()) is nn.Linear and alone and not dropout and not layer.fan_in_fan_out


class _Adapted(torch.autograd.Function):
    """Keeps the input, which the layers that read the same one share, and A x, which is thin."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        out, low = _product(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        by_out = grad.reshape(-1, grad.shape[-1])                                # [T, out]
        by_low = by_out @ (b * ctx.scale).to(x.dtype)                            # [T, rank]
        by_a = (by_low.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)               # [rank, in]
        by_b = (by_out.T @ low).to(b.dtype).mul_(ctx.scale)                      # [out, rank]
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (by_out @ weight).addmm_(by_low, a.to(x.dtype)).view_as(x)
        return by_x, None, None, by_a, by_b, None


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output […, out] and A x [T, rank]: x [T or …, in], weight [out, in], a [rank, in], b [out, rank]."""
    low = x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).T
    out = nn.functional.linear(x, weight, bias)
    out.view(-1, out.shape[-1]).addmm_(low, b.to(x.dtype).T, alpha=scale)
    return out, low
