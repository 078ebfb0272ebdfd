"""The written decoding step computes what the model's own modules compute, or is not used at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from espl_train.engines import shared
from espl_train.engines.kv import KVSlab, slab_for
from espl_train.engines.written import Linear, Rotations, Step

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=False, tie_word_embeddings=True),
    "llama with scaled positions": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
}


def random_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():      # the default 0.02 leaves nothing to tell one mistake from another
            parameter.mul_(6) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def steps(slab: KVSlab, width: int = 48) -> torch.Tensor:
    """Logits of 20 steps of 3 rows whose prompts have different lengths: (20, 3, vocab)."""
    ids = torch.randint(0, 61, (3, 64), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([20, 3, 11])
    slab.resize(3, width)
    slab.write([0, 1, 2], [0, 0, 0], [ids[i, :n].tolist() for i, n in enumerate(lengths)])
    rows = torch.arange(3)
    return torch.stack([slab.step(ids[rows, lengths + i], lengths + i, int(lengths.max()) + i + 1) for i in range(20)])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_written_step_computes_what_the_modules_compute(name: str) -> None:
    model = random_model(ARCHITECTURES[name])
    slab = slab_for(model)
    assert isinstance(slab, KVSlab) and slab.written and Step.of(model) is not None
    torch.testing.assert_close(steps(slab), steps(KVSlab(model, None, False)), atol=2e-5, rtol=1e-5)


def without_signs(patch: pytest.MonkeyPatch) -> None:
    rotations = Rotations.__call__

    def broken(self: Rotations, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotations(self, *args)
        return cos, sin.abs()

    patch.setattr(Rotations, "__call__", broken)


def without_the_last_layer(patch: pytest.MonkeyPatch) -> None:
    begin = Step.__init__

    def broken(self: Step, model: Any) -> None:
        begin(self, model)
        self.layers = self.layers[:1] * 2

    patch.setattr(Step, "__init__", broken)


def without_the_mask(patch: pytest.MonkeyPatch) -> None:
    attend = shared.attend
    patch.setattr(shared, "attend", lambda q, k, v, mask, *rest: attend(q, k, v, torch.zeros_like(mask), *rest))


def without_what_is_shared(patch: pytest.MonkeyPatch) -> None:
    attend = shared.attend
    patch.setattr(shared, "attend", lambda q, k, v, *rest: attend(q, k._replace(head=0 * k.head), v, *rest))


def without_the_residual(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Linear, "onto", lambda self, residual, x: self(x))    # noqa: ARG005


@pytest.mark.parametrize(
    "break_it",
    [without_signs, without_the_last_layer, without_the_mask, without_what_is_shared, without_the_residual],
)
@torch.no_grad()
def test_a_step_that_is_wrong_is_found_out_and_not_used(break_it: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    model = random_model(ARCHITECTURES["llama"])
    slab = slab_for(model)
    assert isinstance(slab, KVSlab) and not slab.written
    torch.testing.assert_close(steps(slab), steps(KVSlab(model, None, False)), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_merged_update_is_seen_without_another_word() -> None:
    """Weights are shared: an engine that keeps its step across versions serves the new version."""
    model = random_model(ARCHITECTURES["qwen2"])
    slab = slab_for(model)
    before = steps(slab)
    model.model.layers[1].mlp.down_proj.weight.add_(0.5)
    slab.model = model
    after = steps(slab)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, steps(KVSlab(model, None, False)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["another architecture", "rotations by length", "an adapter that is not merged"])
def test_what_is_not_known_is_left_to_the_modules(kind: str) -> None:
    if kind == "another architecture":
        model: Any = random_model(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    elif kind == "rotations by length":
        dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model = random_model(LlamaConfig(**SIZES, rope_parameters=dynamic))
    else:
        from peft import LoraConfig, get_peft_model

        model = random_model(ARCHITECTURES["llama"])
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert Step.of(model) is None
