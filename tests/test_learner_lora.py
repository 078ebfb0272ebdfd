"""The one product of an adapted layer is PEFT's, in value and in every gradient, and keeps a base's narrow dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from learner_kit import shake, tiny_model, tiny_policy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espl_train.learner import lora
from espl_train.learner.lora import AdaptedLinear, fuse
from espl_train.learner.policy import Policy


class Two(nn.Module):
    """A layer with a bias over one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """PEFT's own model, its adapter away from zero."""
    torch.manual_seed(0)
    model = get_peft_model(Two().to(dtype), LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data)
    return model.to(dtype) if dtype == torch.float64 else model


def fused(model: Any) -> Any:
    again = copy.deepcopy(model)
    fuse(again)
    return again


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Of everything that has one, the input among them."""
    x = x.clone().requires_grad_(True)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "input": x.grad, "output": out.detach()}


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)], ids=str)
def test_values_and_gradients_are_pefts(shape):
    theirs, x = adapted(), torch.randn(shape, dtype=torch.float64)
    ours = fused(theirs)
    assert [type(m) for m in ours.modules() if isinstance(m, AdaptedLinear)] == [AdaptedLinear] * 2
    wanted, found = gradients(theirs, x), gradients(ours, x)
    assert wanted.keys() == found.keys() and len(wanted) == 6
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_a_wrong_scale_is_caught(monkeypatch):
    product = lora._product
    monkeypatch.setattr(lora, "_product", lambda *given: product(*given[:-1], 1.0))
    with pytest.raises(AssertionError):
        test_values_and_gradients_are_pefts((5, 6))


def test_gradients_are_those_of_finite_differences():
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,), (2, 4), (5, 2)))
    for tensor in (x, a, b):
        tensor.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, a, b: lora._Adapted.apply(x, weight, bias, a, b, 1.5), (x, a, b))


def test_an_adapter_that_is_off_merged_or_beside_a_learning_base_is_pefts():
    model, x = fused(adapted()), torch.randn(5, 6, dtype=torch.float64)
    base, with_adapter = model.get_base_model(), model(x)
    with model.disable_adapter():
        off = model(x)
    assert not torch.allclose(off, with_adapter)
    model.merge_adapter()
    torch.testing.assert_close(model(x), with_adapter)
    model.unmerge_adapter()
    base.first.base_layer.weight.requires_grad_(True)
    assert "base_model.model.first.base_layer.weight" in gradients(model, x)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_what_computes_something_else_stays_pefts(settings):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], **settings))
    fuse(model)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())


class Widest(TorchDispatchMode):
    """The most elements that a tensor of each dtype had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in (t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)):
            self.elements[tensor.dtype] = max(self.elements.get(tensor.dtype, 0), tensor.numel())
        return out


@contextmanager
def watched() -> Iterator[dict[torch.dtype, int]]:
    with Widest() as mode:
        yield mode.elements


def test_on_a_narrow_base_nothing_as_long_as_the_input_is_wide():
    theirs, x = adapted(torch.bfloat16), torch.randn(500, 6, dtype=torch.bfloat16)
    ours = fused(theirs)
    adapter = max(p.numel() for n, p in ours.named_parameters() if "lora_" in n)
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.float32}
    with watched() as elements:
        ours.get_base_model().first(x.clone().requires_grad_(True)).sum().backward()
    assert elements[torch.float32] <= 3 * adapter < 500
    with watched() as elements:
        theirs.get_base_model().first(x.clone().requires_grad_(True)).sum().backward()
    assert elements[torch.float32] >= 500 * 10            # what PEFT's own product does


def test_on_a_narrow_base_the_gradient_is_as_near_the_true_one_as_pefts():
    theirs, x = adapted(torch.bfloat16), torch.randn(200, 6, dtype=torch.bfloat16)
    true = gradients(copy.deepcopy(theirs).double(), x.double())

    def distance(model: Any) -> float:
        found = gradients(model, x)
        return max(float((found[n].double() - t).norm() / t.norm()) for n, t in true.items())

    assert distance(fused(theirs)) < max(0.01, 1.5 * distance(theirs))


def test_a_policy_learns_with_it_and_samples_a_narrow_copy():
    policy = tiny_policy(adapter=0.1)
    assert sum(isinstance(m, AdaptedLinear) for m in policy.model.modules()) == 2 * 7
    narrow = Policy(tiny_model(dtype=torch.bfloat16), policy.tokenizer, policy.config)
    shake(narrow, 0.1)
    ids = torch.arange(1, 9)[None]
    with narrow.sampling_weights(narrow.version) as model, torch.no_grad():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model(input_ids=ids).logits, narrow.causal(input_ids=ids).logits)
    assert {p.dtype for p in narrow.trainable_parameters().values()} == {torch.float32}
