"""Losses: values by hand, by documented formulas and by other programs; gradients by differences and by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig
from espl_train.learner.losses import (
    LOSSES,
    NORMALISATIONS,
    PENALTIES,
    LossInputs,
    Measure,
    divergence,
    over_sequence,
)
from espl_train.learner.naming import choose


def inputs(ratios, advantages, rows=None, weights=None, bounds=None) -> LossInputs:
    """Tokens whose ratio is given; the log-probability now is always -1."""
    logp = torch.full((len(ratios),), -1.0, dtype=torch.float64, requires_grad=True)
    behaviour = -1.0 - torch.tensor(ratios, dtype=torch.float64).log()
    return LossInputs(
        logp,
        behaviour,
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(weights or [1.0] * len(ratios), dtype=torch.float64),
        torch.tensor(rows or [0] * len(ratios)),
        bounds,
    )


def gradient(name: str, x: LossInputs) -> list[float]:
    LOSSES[name](x).loss.backward()
    return x.logp.grad.tolist()


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_gradient_is_minus_advantage_times_gradient_of_logp(name):
    x = inputs([1.0] * 4, [2.0, 2.0, -1.0, -1.0], rows=[0, 0, 1, 1])
    assert gradient(name, x) == pytest.approx([-2.0, -2.0, 1.0, 1.0])


def test_importance_sampling_by_hand():
    x = inputs([2.0, 0.5, 1.0], [1.0, -3.0, 0.0], weights=[1.0, 0.5, 1.0])
    assert LOSSES["importance_sampling"](x).loss.item() == pytest.approx(-2.0 + 0.75)
    assert gradient("importance_sampling", x) == pytest.approx([-2.0, 0.75, 0.0])


def test_ppo_cuts_only_what_goes_too_far_in_the_direction_of_the_advantage():
    x = inputs([2.0, 2.0, 0.5, 0.5, 1.25, 0.9], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    out = LOSSES["ppo"](x)
    assert out.loss.item() == pytest.approx(-1.28 + 2.0 - 0.5 + 0.8 - 1.25 + 0.9)
    assert out.clipped.tolist() == [True, False, False, True, False, False]
    assert gradient("ppo", x) == pytest.approx([0.0, 2.0, -0.5, 0.0, -1.25, 0.9])


def test_ppo_takes_its_bounds_from_the_configuration():
    x = inputs([2.0], [1.0], bounds=(0.5, 3.0))
    assert gradient("ppo", x) == pytest.approx([-2.0])


def test_cispo_bounds_the_weight_but_keeps_the_gradient():
    x = inputs([8.0, 0.5, 0.01], [1.0, -1.0, 1.0])
    out = LOSSES["cispo"](x)
    assert out.loss.item() == pytest.approx(4.0 * 1.0 * 1.0 - 0.5 + 0.01)      # logp is -1
    assert out.clipped.tolist() == [True, False, False]
    assert gradient("cispo", x) == pytest.approx([-4.0, 0.5, -0.01])


def test_gspo_uses_the_geometric_mean_of_the_sequence():
    x = inputs([1.0002, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], rows=[0, 0, 1, 1])
    out = LOSSES["gspo"](x)
    mean = math.sqrt(1.0002)
    assert out.ratio.tolist() == pytest.approx([mean, mean, 2.0, 2.0])
    assert out.clipped.tolist() == [False, False, True, True]
    assert out.loss.item() == pytest.approx(-2 * mean - 2 * 1.0004)
    assert gradient("gspo", x) == pytest.approx([-mean, -mean, 0.0, 0.0])
    low = inputs([0.99975, 0.9996, 0.9996], [-1.0, -1.0, 1.0], rows=[0, 1, 2])          # of one token each
    assert LOSSES["gspo"](low).ratio.tolist() == pytest.approx([0.99975, 0.9996, 0.9996], abs=1e-9)
    assert gradient("gspo", low) == pytest.approx([0.99975, 0.0, -0.9996])


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_without_weight_or_advantage_has_no_gradient(name):
    x = inputs([1.0, 1.0], [1.0, 0.0], rows=[0, 1], weights=[0.0, 1.0])
    assert gradient(name, x) == [0.0, 0.0]


ROWS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
BOUNDS = {"importance_sampling": None, "ppo": (0.8, 1.2), "cispo": (0.8, 1.2), "gspo": (0.97, 1.04)}


def sampled(seed: int, spread: float = 0.3) -> LossInputs:
    """Three sequences; every token of a sequence has its advantage and weight, no ratio is within 1e-3 of a bound."""
    random = np.random.default_rng(seed)
    logp = -random.exponential(1.5, len(ROWS))
    arrays = logp, logp - random.normal(0, spread, len(ROWS)), random.normal(size=3)[ROWS], random.random(3)[ROWS]
    return LossInputs(*(torch.tensor(a) for a in arrays), torch.tensor(ROWS))


def surrogate(name: str, x: LossInputs) -> Callable[[np.ndarray], float]:
    """The loss as its source documents it, as a function of the log-probabilities, in numpy; x gives all the rest.

    What a formula puts under a stop-gradient is held at its value in x.
    """
    here, old, advantages, weights = (t.numpy() for t in (x.logp, x.behaviour, x.advantages, x.weights))

    def loss(logp: np.ndarray) -> float:
        ratio = np.exp(logp - old)
        if name == "gspo":      # (π(y)/π_old(y))^(1/|y|), one per sequence: equation 7 of the paper
            ratio = np.array([np.prod(ratio[same]) ** (1 / same.sum()) for same in (row == ROWS for row in ROWS)])
        if name == "importance_sampling":
            return -(weights * ratio * advantages).sum()
        if name == "cispo":
            return -(weights * np.clip(np.exp(here - old), *BOUNDS[name]) * logp * advantages).sum()
        return -(weights * np.minimum(ratio * advantages, np.clip(ratio, *BOUNDS[name]) * advantages)).sum()

    return loss


def differences(f: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    moves = step * np.eye(len(at))
    return np.array([(f(at + move) - f(at - move)) / (2 * step) for move in moves])


def disagreement(loss: Callable[[LossInputs], torch.Tensor], reference: Callable, x: LossInputs) -> float:
    """How far a loss is from a formula, in value and in gradient."""
    x = replace(x, logp=x.logp.clone().requires_grad_())
    value = loss(x)
    value.backward()
    at = x.logp.detach().numpy()
    slope = np.abs(x.logp.grad.numpy() - differences(reference, at)).max()
    return max(abs(value.item() - reference(at)), slope)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_documented_formula(name, seed):
    """Tinker's importance_sampling, ppo and cispo (sums over tokens), GSPO's paper: independent, by differences."""
    x = replace(sampled(seed), bounds=BOUNDS[name])
    assert disagreement(lambda x: LOSSES[name](x).loss, surrogate(name, x), x) < 1e-7


def rho(x: LossInputs) -> torch.Tensor:
    return torch.exp(x.logp - x.behaviour)


MUTANTS = {
    "importance_sampling": lambda x: x.advantages / rho(x),                              # upside down
    "ppo": lambda x: x.advantages * rho(x).clamp(0.8, 1.2),                              # no minimum
    "cispo": lambda x: x.advantages * rho(x).clamp(0.8, 1.2) * x.logp,                   # no stop-gradient
    "gspo": lambda x: x.advantages * over_sequence(rho(x), x.rows, mean=True).clamp(0.97, 1.04),     # arithmetic mean
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_formulas_find_a_wrong_loss(name):
    def mutant(x: LossInputs) -> torch.Tensor:
        return -(x.weights * MUTANTS[name](x)).sum()

    batches = [sampled(seed) for seed in range(4)]
    assert max(disagreement(mutant, surrogate(name, x), x) for x in batches) > 1e-2


def test_where_tokens_weigh_differently_gspo_leaves_each_weight_with_its_own_token():
    x = inputs([1.0] * 4, [1.0] * 4, rows=[0, 0, 1, 1], weights=[0.0, 2.0, 1.0, 1.0])
    assert gradient("gspo", x) == pytest.approx([0.0, -2.0, -1.0, -1.0])
    spread = inputs([1.0] * 4, [1.0] * 4, rows=[0, 0, 1, 1], weights=[0.0, 2.0, 1.0, 1.0])
    sequence = over_sequence(spread.logp - spread.behaviour, spread.rows, mean=True).exp()
    (-spread.weights * sequence * spread.advantages).sum().backward()
    assert spread.logp.grad.tolist() == pytest.approx([-1.0, -1.0, -1.0, -1.0])      # a masked token learns


@given(st.integers(0, 10**6), st.sampled_from(list(LOSSES)))
def test_no_loss_depends_on_the_order_of_tokens_or_on_what_else_is_in_the_batch(seed, name):
    x, order = sampled(seed), np.random.default_rng(seed).permutation(len(ROWS))
    whole = LOSSES[name](x).loss.item()
    moved = LossInputs(*(getattr(x, f)[order] for f in ("logp", "behaviour", "advantages", "weights", "rows")))
    parts = []
    for row in range(3):
        mine = torch.tensor(row == ROWS)
        alone = [getattr(x, f)[mine] for f in ("logp", "behaviour", "advantages", "weights")]
        parts.append(LOSSES[name](LossInputs(*alone, torch.zeros(int(mine.sum()), dtype=torch.long))).loss.item())
    assert LOSSES[name](moved).loss.item() == pytest.approx(whole, abs=1e-12)
    assert sum(parts) == pytest.approx(whole, abs=1e-12)


def test_divergence_is_zero_at_home_never_negative_and_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    estimate = divergence(p.log(), q.log())
    assert bool((estimate >= 0).all())
    assert float((p * estimate).sum()) == pytest.approx(float((p * (p / q).log()).sum()))
    assert divergence(p.log(), p.log()).tolist() == [0.0, 0.0, 0.0]


THETA = torch.tensor([0.4, -1.0, 0.3, 1.1, -0.2], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([1.0, 0.5, -0.7, 0.2, 0.9], dtype=torch.float64), -1)
SAMPLER = torch.log_softmax(torch.tensor([-0.3, 0.8, 0.1, 0.5, 0.0], dtype=torch.float64), -1)


def slope(value: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, list[float]]:
    """Of a function of the policy's log-probabilities over the whole vocabulary: its value, its slope in the logits."""
    theta = THETA.clone().requires_grad_()
    found = value(torch.log_softmax(theta, -1))
    return found.item(), torch.autograd.grad(found, theta)[0].tolist()


def expected(penalty, sampler: torch.Tensor | None) -> tuple[float, list[float]]:
    """Mean value and mean gradient of a penalty over all samples of `sampler` (None = the policy itself)."""

    def mean(logp: torch.Tensor) -> torch.Tensor:
        behaviour = logp.detach() if sampler is None else sampler
        ones = torch.ones_like(logp)
        return (behaviour.exp() * penalty(LossInputs(logp, behaviour, ones, ones, ones.long()), REFERENCE)).sum()

    return slope(mean)


TO_REFERENCE, REVERSED = (
    slope(lambda logp: (logp.exp() * (logp - REFERENCE)).sum()),
    slope(lambda logp: (REFERENCE.exp() * (REFERENCE - logp)).sum()),
)


@pytest.mark.parametrize("sampler", [None, SAMPLER], ids=["on policy", "off policy"])
def test_what_the_penalties_are_on_average(sampler):
    """Whoever sampled: k1 has value and gradient of KL(policy ‖ reference), k2 its gradient, k3 its value."""
    value, towards = TO_REFERENCE
    assert expected(PENALTIES["k1"], sampler) == (pytest.approx(value), pytest.approx(towards))
    assert expected(PENALTIES["k2"], sampler)[1] == pytest.approx(towards)
    assert expected(PENALTIES["k2"], sampler)[0] != pytest.approx(value, rel=1e-2)
    assert expected(PENALTIES["k3"], sampler) == (pytest.approx(value), pytest.approx(REVERSED[1]))
    assert REVERSED[1] != pytest.approx(towards, rel=0.1)


def test_a_penalty_without_its_ratio_is_found_out():
    bare = {"k1": lambda x, ref: x.logp - ref, "k2": lambda x, ref: (x.logp - ref).square() / 2}
    assert expected(bare["k1"], None)[1] == pytest.approx([0.0] * 5, abs=1e-12)     # differentiated, it does nothing
    assert expected(bare["k2"], SAMPLER)[1] != pytest.approx(TO_REFERENCE[1], rel=1e-2)

    def through(x, ref):
        return torch.exp(x.logp - x.behaviour) * (x.logp - ref).square() / 2

    assert expected(through, None)[1] != pytest.approx(TO_REFERENCE[1], rel=1e-2)


def test_k2_is_less_noisy_than_k1():
    def spread(name: str) -> float:
        logp = torch.log_softmax(THETA, -1).requires_grad_()
        x = LossInputs(logp, logp.detach(), *(torch.ones(5),) * 2, torch.zeros(5, dtype=torch.long))
        slopes = torch.autograd.grad(PENALTIES[name](x, REFERENCE).sum(), logp)[0]     # of each sample's own logp
        return float((logp.detach().exp() * slopes.square()).sum())

    assert spread("k2") < spread("k1")


def test_the_configuration_offers_what_there_is():
    assert get_args(LearnerConfig.model_fields["kl_estimator"].annotation) == tuple(PENALTIES)


SEQUENCES = [Measure(2, "a"), Measure(6, "a"), Measure(4, "b")]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("sum", [1.0, 1.0, 1.0]),
        ("token_mean", [1 / 12] * 3),
        ("sequence_mean", [1 / 6, 1 / 18, 1 / 12]),
        ("constant", [1 / 30] * 3),
        ("prompt_balanced", [1 / 16, 1 / 16, 1 / 8]),
    ],
)
def test_normalisations_by_hand(name, weights):
    assert NORMALISATIONS[name](SEQUENCES, 10) == pytest.approx(weights)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "prompt_balanced"])
def test_means_weigh_one_in_all(name):
    weights = NORMALISATIONS[name](SEQUENCES, 1)
    assert sum(w * s.tokens for w, s in zip(weights, SEQUENCES, strict=True)) == pytest.approx(1)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(EsplError, match=r"learner.loss is 'gpso'; did you mean 'gspo'\?"):
        choose(LOSSES, "gpso", "learner.loss")
