"""The gradient of an update is that of its loss: by finite differences, in every layout, split and memory mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from learner_kit import VOCABULARY, random_groups, related_groups, tiny_model, tiny_policy, tiny_tokenizer
from test_learner_update import on_policy
from transformers import GPT2Config, GPT2LMHeadModel

from espl_train.config import LearnerConfig
from espl_train.learner import attention
from espl_train.learner.losses import LOSSES, NORMALISATIONS
from espl_train.learner.packing import Limits, pack
from espl_train.learner.policy import Policy
from espl_train.learner.sequences import training_sequences
from espl_train.learner.update import Learner
from espl_train.runs import checkpoint

LAYOUTS = {"packed": Limits(10**6), "packed, in pieces": Limits(40), "padded": Limits(10**6, packed=False)}
ALONE = Limits(1, packed=False)


def learner(model: Any = None, **settings: Any) -> Learner:
    settings = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "ratio_bounds": (0.1, 9.0), **settings}
    if model is None:
        return Learner(tiny_policy(0.1, **settings), LearnerConfig(**settings))
    config = LearnerConfig(**settings)
    return Learner(Policy(model, tiny_tokenizer(), config), config)


def loss(who: Learner, limits: Limits, seed: int = 0) -> float:
    """Of the whole update; leaves its gradient behind."""
    config = who.config
    batches = pack(training_sequences(related_groups(seed), config.normalise, config.normalise_constant), limits)
    with who.policy.training(), torch.enable_grad():
        tally = who._gradient(batches)
    assert tally is not None
    return tally.sums["loss"]


def gradient(who: Learner, limits: Limits, seed: int = 0) -> dict[str, torch.Tensor]:
    loss(who, limits, seed)
    found = {n: p.grad.clone() for n, p in who.policy.trainable_parameters().items() if p.grad is not None}
    who._forget_gradients()
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one) / max(float(g.abs().max()) for g in one.values())


def slope(who: Learner, limits: Limits) -> tuple[float, float]:
    """Of the loss along a random direction: by the gradient, and by finite differences (of fourth order)."""
    weights = who.policy.trainable_parameters()
    random = torch.Generator().manual_seed(5)
    way = {n: torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in weights.items()}
    ours = sum(float((g * way[n]).sum()) for n, g in gradient(who, limits).items())

    def at(step: float) -> float:
        with torch.no_grad():
            for n, p in weights.items():
                p.add_(step * way[n])
        value = loss(who, limits)
        who._forget_gradients()
        with torch.no_grad():
            for n, p in weights.items():
                p.sub_(step * way[n])
        return value

    near, far = (at(h) - at(-h) for h in (1e-4, 2e-4))
    return ours, (8 * near - far) / 12e-4


def wide_learner(**settings: Any) -> Learner:
    """Everything in fp64: GPT-2 is the one whose norms and positions never leave the model's own width."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2,
        )
        model = GPT2LMHeadModel(config).double().eval()
    return learner(model, mode="full", kl=0.1, kl_estimator="k1", **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
def test_the_gradient_of_the_whole_path_is_that_of_finite_differences(name, layout):
    ours, theirs = slope(wide_learner(loss=name), LAYOUTS[layout])
    assert ours == pytest.approx(theirs, rel=1e-7)


def taken_once(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Of all the sequences that share a place, one sends its gradient back."""
    (index,) = ctx.saved_tensors
    return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad), None


def test_finite_differences_catch_a_shared_head_whose_gradients_are_not_summed(monkeypatch):
    monkeypatch.setattr(attention._Take, "backward", staticmethod(taken_once))
    ours, theirs = slope(wide_learner(), LAYOUTS["packed"])
    assert ours != pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(("name", "normalise"), list(zip([*LOSSES, *LOSSES], NORMALISATIONS, strict=False)))
def test_no_layout_and_no_split_changes_the_gradient(name, normalise):
    who = learner(loss=name, normalise=normalise, kl=0.3)
    single = gradient(who, ALONE)
    for limits in LAYOUTS.values():
        assert apart(single, gradient(who, limits)) < 1e-6


def test_weights_that_are_set_after_the_split_are_caught():
    def split_first(limits: Limits) -> dict[str, torch.Tensor]:
        who = learner()
        sequences = training_sequences(related_groups(0))
        with who.policy.training():
            for batch in pack(sequences, limits):
                who._gradient([replace(batch, weights=torch.full_like(batch.weights, 1 / len(batch.weights)))])
        return {n: p.grad.clone() for n, p in who.policy.trainable_parameters().items() if p.grad is not None}

    assert apart(split_first(LAYOUTS["packed"]), split_first(LAYOUTS["packed, in pieces"])) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_changes_no_bit_of_the_gradient(layout):
    plain, saving = (gradient(learner(gradient_checkpointing=mode), LAYOUTS[layout]) for mode in ("off", "on"))
    assert all(torch.equal(plain[n], saving[n]) for n in plain)


def test_an_update_of_the_adapter_leaves_every_base_weight_bit_identical():
    who = learner(kl=0.1)
    base = {n: p.clone() for n, p in who.policy.causal.named_parameters() if "lora_" not in n}
    before = who.policy.state()
    for seed in range(3):
        who.update(related_groups(seed))
    after = dict(who.policy.causal.named_parameters())
    assert all(torch.equal(base[n], after[n]) for n in base)
    assert not any(torch.equal(before[n], after) for n, after in who.policy.state().items())


def test_a_base_weight_that_learns_along_is_caught():
    policy = tiny_policy(0.1)
    name, weight = next((n, p) for n, p in policy.causal.named_parameters() if "base_layer" in n)
    weight.requires_grad_(True)
    who = Learner(policy, policy.config)
    before = weight.clone()
    who.update(related_groups(0))
    assert not torch.equal(dict(policy.causal.named_parameters())[name], before)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_saving_what_was_loaded_gives_the_same_bytes(mode, tmp_path):
    def files(step: int) -> dict[str, bytes]:
        folder = checkpoint.save(tmp_path, step, {"learner": who.state_dict()}, keep=9)
        return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "MANIFEST.json"}

    who = learner(mode=mode)
    who.update(related_groups(0))
    first = files(1)
    who = learner(mode=mode)
    _, payloads = checkpoint.load_newest(tmp_path)
    who.load_state_dict(payloads["learner"])
    assert files(2) == first
    who.update(related_groups(1))
    assert files(3) != first


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_temperature_of_the_samples_is_that_of_the_ratios(temperature):
    def ratios(of: Callable[[], Learner]) -> float:
        return abs(of().update(groups).ratio_mean - 1)

    who = learner(rank=4)
    who.temperature = temperature
    groups = on_policy(who, random_groups(0))
    assert ratios(lambda: who) < 1e-5
    assert ratios(learner) > 1e-2


def test_masters_of_wider_weights_are_as_wide():
    assert {m.dtype for m in wide_learner()._masters} == {torch.float64}
    half = learner(tiny_model(dtype=torch.bfloat16), mode="full")
    assert {m.dtype for m in half._masters} == {torch.float32}
