"""vLLM in tests: one engine over a tiny model, shared by all tests of a process, because it takes seconds to set up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_kit import World
from learner_kit import shake, tiny_model, tiny_tokenizer

from espl_train.config import EngineConfig, LearnerConfig, ModelConfig
from espl_train.engines.vllm import VllmEngine
from espl_train.learner.policy import Policy

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}      # vLLM needs heads of 32
KV_BYTES = 2**24


class Shared:
    """The engine of a test session; `world()` is it with the weights of the start."""

    def __init__(
        self, folder: Path, seed: int = 0, dtype: str = "float32", replicas: int = 0, **changes: Any
    ) -> None:
        self.replicas = replicas
        tiny_model(seed, getattr(torch, dtype), **SHAPE, **changes).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        self.model = ModelConfig(path=str(folder), dtype=dtype)
        self.policy = Policy.load(self.model, LearnerConfig(rank=4, alpha=8))
        shake(self.policy, 0.1)
        self.state = self.policy.state()
        self.engine: VllmEngine | None = None

    def world(self) -> World:
        self.policy.load_state(self.state, 0)
        if self.engine is None or self.engine.closed:
            self.engine = self.start()
        self.engine.load_policy(0)
        return World(self.engine, self.policy)

    def start(self, model: ModelConfig | None = None, **settings: Any) -> VllmEngine:
        config = EngineConfig(kind="vllm", slots=64, replicas=self.replicas, **settings)
        return VllmEngine(self.policy, config, model or self.model, kv_bytes=KV_BYTES)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


def trained(policy: Policy, size: float = 0.1, seed: int = 1) -> int:
    """Move the weights as a learner would; returns their new version."""
    shake(policy, size, seed)
    return policy.advance()


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Policy, Path], None]:
    """A `Policy.save_adapter` that changes what it wrote."""
    from safetensors.torch import load_file, save_file

    original = Policy.save_adapter

    def save(policy: Policy, folder: Path) -> None:
        original(policy, folder)
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return save
