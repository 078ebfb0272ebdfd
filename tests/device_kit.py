"""What the checks on a device share: the pretended one, which importing this registers for the life of the process, or
the first GPU where the program's arguments say `cuda`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from learner_kit import related_groups, shake, tiny_model, tiny_tokenizer
from pretend_device import Meter, meter, register
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from espl_train.config import LearnerConfig
from espl_train.learner.packing import Limits
from espl_train.learner.policy import Policy
from espl_train.learner.update import Learner, UpdateReport
from espl_train.records import Group

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if "cuda" in sys.argv else register()
PLAIN: dict[str, Any] = {"rank": 4, "alpha": 8, "gradient_checkpointing": "off"}
Model = Callable[[], Any]


@contextmanager
def measured() -> Iterator[Meter]:
    """Count what is asked of the device inside; of a GPU, what torch itself calls synchronising."""
    meter.reset()
    if DEVICE.type != "cuda":
        yield meter
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield meter
        finally:
            torch.cuda.set_sync_debug_mode("default")
            meter.waits["synchronising"] = sum("synchronizing CUDA operation" in str(w.message) for w in heard)


def is_there(tensor: Tensor) -> bool:
    return tensor.device == DEVICE


def groups(seed: int) -> list[Group]:
    return related_groups(seed, count=2, samples=3)


def qwen() -> Any:
    """The kit's model, one layer of it: biases, and a head that is the embedding."""
    return tiny_model(num_hidden_layers=1)


def llama() -> Any:
    """Random, with a head of its own and no biases."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ))


def policy_on(
    device: torch.device, model: Model = qwen, dtype: torch.dtype = torch.float32, **settings: Any
) -> Policy:
    made = model().to(dtype).to(device)
    made.tie_weights()                      # a move to a device of this kind makes new parameters, one for each module
    config = LearnerConfig(**{**PLAIN, "learning_rate": 1e-3, **settings})
    policy = Policy(made, tiny_tokenizer(), config)
    shake(policy, 0.1)
    return policy


def learner_on(device: torch.device, limits: Limits | None = None, **settings: Any) -> Learner:
    policy = policy_on(device, **settings)
    learner = Learner(policy, policy.config)
    if limits is not None:
        learner.limits = limits
    return learner


def close(one: float, other: float, bound: float = 1e-4) -> None:
    assert abs(one - other) <= bound * max(1.0, abs(other)), (one, other)


def same_report(one: UpdateReport, other: UpdateReport, bound: float = 1e-4) -> None:
    assert one.skipped is other.skipped is None
    for name in ("loss", "grad_norm", "ratio_mean", "ratio_max", "entropy", "behaviour_kl", "reference_kl",
                 "mismatch_mean", "corrected", "effective", "tokens", "computed"):
        close(getattr(one, name), getattr(other, name), bound)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor], bound: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.device == CPU, name
        assert (value - other[name]).abs().max() <= bound, name


def both(limits: Limits | None = None, bound: float = 1e-4, updates: int = 1, **settings: Any) -> None:
    """Two updates on the device are two updates on the CPU, and every tensor of the model is on the device."""
    here, there = (learner_on(device, limits, **settings) for device in (CPU, DEVICE))
    for step in range(updates):
        same_report(there.update(groups(step)), here.update(groups(step)), bound)
    same_tensors(there.policy.state(), here.policy.state(), bound)
    weights = [*there.policy.model.parameters(), *there.policy.model.buffers()]
    assert all(map(is_there, weights)), "a weight was left on the CPU"


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` in here."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def refused(act: Callable[[], Any], kind: type[Exception], words: str) -> None:
    """`act()` raises an error of this kind that says these words."""
    try:
        act()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was raised that says '{words}'")
