"""A norm as one kernel is the norm that it was, in value and gradient; and one that is another stays itself."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from learner_kit import tiny_model
from torch import nn

from espl_train.learner import norms

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
GPU = torch.device("cuda")          # asks for the kernel; what is computed stays here
IDS = torch.arange(2, 22).view(2, 10)


def rough(model: nn.Module) -> nn.Module:
    """With norms that are not 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (hf.Qwen2Config(**SIZES), 5), (hf.Qwen3Config(**SIZES, head_dim=8), 9), (hf.LlamaConfig(**SIZES), 5),
        (hf.GemmaConfig(**SIZES, head_dim=8), 0),             # whose weight is an offset to 1
        (hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4), 0),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_plain_norms_are_fused_and_say_the_same(config, count):
    plain = rough(hf.AutoModelForCausalLM.from_config(config))
    fused = copy.deepcopy(plain)
    assert norms.fuse(fused, torch.device("cpu")) == 0
    assert norms.fuse(fused, GPU) == count
    ours, theirs = (model(input_ids=IDS).logits for model in (fused, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    for (name, mine), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_what_is_fused_is_called_what_it_was_and_can_be_copied():
    model = tiny_model()
    names = [type(module).__name__ for module in model.modules()]
    assert norms.fuse(model, GPU)
    assert [type(module).__name__ for module in model.modules()] == names
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_norm_that_is_almost_one_is_left_alone():
    """Mutants of the kind: another power, another place for epsilon."""

    class CubicRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.abs().pow(3).mean(-1, keepdim=True) + self.eps) ** (1 / 3)

    class LateRMSNorm(CubicRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.01)

    for norm in (CubicRMSNorm(), LateRMSNorm()):
        assert norms.fuse(nn.Sequential(norm), GPU) == 0
