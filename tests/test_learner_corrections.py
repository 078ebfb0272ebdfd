"""Corrections: what each does to the expected gradient, by enumeration; what is reported; that nothing is hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_kit import random_groups, tiny_policy

from espl_envs.core.errors import EsplError
from espl_train.config import LearnerConfig
from espl_train.learner import corrections, update
from espl_train.learner.corrections import CORRECTIONS, Corrected, apply
from espl_train.learner.losses import LOSSES, LossInputs
from espl_train.learner.update import Learner

UNBOUNDED, BLIND = (0.0, math.inf), (1.0, 1.0)      # the whole ratio; no correction at all: every token weighs the same
REAL = [name for name in CORRECTIONS if name != "none"]

WORDS, LENGTH = 3, 2
PAIRS = list(product(range(WORDS), repeat=LENGTH))                                # all replies of two tokens
THETA = torch.tensor([[0.2, -0.5, 0.9], [1.0, 0.1, -0.8], [-0.3, 0.4, 0.6], [0.7, -1.2, 0.1]], dtype=torch.float64)
OTHER = torch.tensor([[0.9, -0.2, -0.3], [0.0, 1.1, -0.1], [0.5, -0.9, 0.2], [-0.4, 0.3, 0.8]], dtype=torch.float64)
SCORES = torch.tensor([1.0, -0.5, 0.25, -1.0, 2.0, 0.0, 0.75, -1.5, 0.5], dtype=torch.float64)     # of the replies


def token_logprobs(theta: torch.Tensor) -> torch.Tensor:
    """Of every reply under a model with logits theta[0] first and theta[1 + first token] second. [replies · 2]"""
    table = torch.log_softmax(theta, -1)
    return torch.stack([p for a, b in PAIRS for p in (table[0, a], table[1 + a, b])])


def expectation(weigh: Callable[[LossInputs], LossInputs], loss: str = "importance_sampling") -> torch.Tensor:
    """The gradient that a correction expects over all replies of the sampler `OTHER`, in the logits of `THETA`."""
    theta = THETA.clone().requires_grad_()
    logp, behaviour = token_logprobs(theta), token_logprobs(OTHER)
    rows = torch.arange(len(PAIRS)).repeat_interleave(LENGTH)
    often = behaviour.view(-1, LENGTH).sum(1).exp()                               # how often the sampler says each
    x = weigh(LossInputs(logp, behaviour, SCORES[rows], often[rows], rows))
    return torch.autograd.grad(LOSSES[loss](x).loss, theta)[0]


def corrected(name: str, bounds: tuple[float, float] | None = None) -> Callable[[LossInputs], LossInputs]:
    return lambda x: apply(x, name, bounds).inputs


def weighted(weight: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> torch.Tensor:
    """-Σ_y weight(y)·score(y)·∇log π(y_t | y_<t): `weight` per token, from both models' probabilities. [replies, 2]"""
    theta = THETA.clone().requires_grad_()
    logp = token_logprobs(theta)
    probabilities = (t.detach().exp().view(-1, LENGTH).numpy() for t in (logp, token_logprobs(OTHER)))
    coefficients = torch.tensor(weight(*probabilities)).flatten() * SCORES.repeat_interleave(LENGTH)
    return torch.autograd.grad(-(coefficients * logp).sum(), theta)[0]


def whole(p: np.ndarray) -> np.ndarray:
    """Probability of the reply, on each of its tokens."""
    return p.prod(1, keepdims=True).repeat(LENGTH, 1)


POLICY_GRADIENT = weighted(lambda pi, _: whole(pi))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_sequence_ratio_is_unbiased_whatever_the_loss(loss):
    """Inside the loss the ratio is 1: no loss clips a disagreement of engines."""
    assert far(expectation(corrected("sequence_truncate", UNBOUNDED), loss), POLICY_GRADIENT) < 1e-12
    assert far(expectation(corrected("sequence_mask", UNBOUNDED), loss), POLICY_GRADIENT) < 1e-12


def test_a_token_ratio_misses_exactly_what_came_before_the_token():
    """π(y_t) / μ(y_t) instead of π(y_≤t) / μ(y_≤t), and what follows the token is as the sampler has it."""
    known = weighted(lambda pi, mu: whole(mu) * pi / mu)
    for name in ("token_truncate", "token_mask"):
        assert far(expectation(corrected(name, UNBOUNDED)), known) < 1e-12
    assert far(expectation(corrected("none")), known) < 1e-12       # the loss's own ratio is the same, unbounded
    assert far(known, POLICY_GRADIENT) > 0.01


def test_without_correction_the_gradient_is_that_of_what_the_sampler_likes():
    known = weighted(lambda _, mu: whole(mu))
    for name in REAL:
        if CORRECTIONS[name].rule is corrections.truncate:
            assert far(expectation(corrected(name, BLIND)), known) < 1e-12
    assert far(known, POLICY_GRADIENT) > 0.1


@pytest.mark.parametrize("bounds", [(0.6, 1.7), (0.9, 1.1), None])
def test_bounds_bias_by_exactly_what_they_cut(bounds):
    for name in REAL:
        low, high = bounds or CORRECTIONS[name].bounds

        def weight(pi, mu, name=name, low=low, high=high):
            ratio = whole(pi) / whole(mu) if "sequence" in name else pi / mu
            kept = np.clip(ratio, low, high) if "truncate" in name else ratio * ((ratio >= low) & (ratio <= high))
            return whole(mu) * kept

        assert far(expectation(corrected(name, bounds)), weighted(weight)) < 1e-12


def upside_down(x: LossInputs) -> LossInputs:
    swapped = replace(x, logp=x.behaviour, behaviour=x.logp.detach())
    return replace(x, behaviour=x.logp.detach(), weights=apply(swapped, "sequence_truncate", UNBOUNDED).inputs.weights)


def counted_twice(x: LossInputs) -> LossInputs:
    """Weighs, but leaves the loss to measure its ratio against the sampler too."""
    return replace(apply(x, "sequence_truncate", UNBOUNDED).inputs, behaviour=x.behaviour)


@pytest.mark.parametrize("mutant", [upside_down, counted_twice])
def test_the_enumeration_finds_a_wrong_correction(mutant):
    assert far(expectation(mutant), POLICY_GRADIENT) > 0.05


def inputs(log_ratios: list[float], rows: list[int]) -> LossInputs:
    logp = torch.full((len(rows),), -2.0, requires_grad=True)
    ones = torch.ones(len(rows))
    return LossInputs(logp, logp.detach() - torch.tensor(log_ratios), ones, ones, torch.tensor(rows))


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.sampled_from(REAL), st.floats(0, 1),
    st.floats(1, 4),
)
def test_weights_stay_within_their_bounds_and_only_what_passes_them_is_touched(gaps, name, low, high):
    x = inputs(gaps, sorted(i % 2 for i in range(len(gaps))))
    out = apply(x, name, (low, high))
    low, high = np.float32(low).item(), np.float32(high).item()
    if CORRECTIONS[name].rule is corrections.truncate:
        assert all(low <= w <= high for w in out.weights.tolist())
    else:
        assert all(w == 0 or low <= w <= high for w in out.weights.tolist())
    if not CORRECTIONS[name].per_sequence:
        untouched = out.weights[~out.bounded]
        torch.testing.assert_close(untouched, torch.exp(x.logp - x.behaviour).detach()[~out.bounded])
    assert torch.equal(out.inputs.weights, x.weights * out.weights)
    assert torch.equal(out.inputs.behaviour, x.logp.detach()) and out.inputs.logp is x.logp
    assert not any(t.requires_grad for t in (out.weights, out.inputs.weights, out.inputs.behaviour))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("token_truncate", [0.02, 0.49, 0.51, 1.99, 2.0, 2.0, 2.0]),
        ("token_mask", [0.0, 0.0, 0.51, 1.99, 2.01, 4.99, 0.0]),
        ("sequence_truncate", [0.02, 0.49, 0.51, 1.99, 2.0, 2.0, 2.0]),
        ("sequence_mask", [0.02, 0.49, 0.51, 1.99, 0.0, 0.0, 0.0]),
    ],
)
def test_the_bounds_are_those_of_the_papers_where_none_are_configured(name, weights):
    ratios = [0.02, 0.49, 0.51, 1.99, 2.01, 4.99, 5.01]
    assert apply(inputs([math.log(r) for r in ratios], list(range(7))), name).weights.tolist() == pytest.approx(weights)


def test_none_hands_the_very_same_inputs_on():
    x = inputs([0.0, 0.7], [0, 0])
    out = apply(x)
    assert out.inputs is x and not out.bounded.any()
    assert out.weights.tolist() == pytest.approx([1.0, math.exp(0.7)])


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_no_bound_hides_a_log_probability_that_is_no_number(name, poison):
    x = inputs([0.1, poison, 0.2], [0, 0, 1])
    assert not math.isfinite(LOSSES["ppo"](apply(x, name).inputs).loss.item())


def learner(**settings) -> Learner:
    settings = {"rank": 4, "alpha": 8, **settings}
    return Learner(tiny_policy(0.1, **settings), LearnerConfig(**settings))


def test_a_sampler_that_gives_no_number_stops_the_step():
    groups = random_groups(0)
    first = groups[0].rollouts[0]
    turn = replace(first.turns[0], logprobs=(-math.inf, *first.turns[0].logprobs[1:]))
    groups[0] = replace(groups[0], rollouts=(replace(first, turns=(turn, *first.turns[1:])), *groups[0].rollouts[1:]))
    assert learner(correction="token_mask").update(groups).skipped == "gradient not finite"


@pytest.mark.parametrize(("name", "bounds"), [("token_mask", (0.3, 1.5)), ("sequence_truncate", (1e-3, 1.0))])
def test_neither_gradient_nor_report_depends_on_the_split(name, bounds):
    groups, reports, norms = random_groups(2), [], []
    for budget in (100_000, 40, 1):
        settings = {"correction": name, "correction_bounds": bounds, "normalise": "token_mean", "kl": 0.5}
        report = learner(micro_batch_tokens=budget, **settings).update(groups)
        norms.append(report.grad_norm)
        reports.append([report.mismatch_mean, report.mismatch_max, report.corrected, report.effective, report.loss])
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-5)
    assert reports[1:] == [pytest.approx(reports[0], rel=1e-4)] * 2
    assert 0 < reports[0][2] < 1 and 0 < reports[0][3] < 1


def test_the_report_says_how_far_apart_sampler_and_learner_were(monkeypatch):
    """Against numbers counted over all tokens at once."""
    seen: list[tuple[LossInputs, Corrected]] = []

    def spy(x: LossInputs, *settings) -> Corrected:
        seen.append((x, apply(x, *settings)))
        return seen[-1][1]

    monkeypatch.setattr(update.corrections, "apply", spy)
    report = learner(correction="token_truncate", micro_batch_tokens=40).update(random_groups(3))
    gaps = torch.cat([(x.logp - x.behaviour).detach().abs() for x, _ in seen]).double().numpy()
    weights = np.concatenate([out.weights.double().numpy() for _, out in seen])
    assert len(seen) > 1 and len(weights) == report.tokens
    assert report.mismatch_mean == pytest.approx(gaps.mean(), rel=1e-6)
    assert report.mismatch_max == pytest.approx(gaps.max())
    assert report.corrected == pytest.approx((weights == 2.0).mean())
    assert report.effective == pytest.approx(weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-5)


def test_names_and_configuration_agree_and_an_unknown_one_names_the_nearest():
    assert get_args(LearnerConfig.model_fields["correction"].annotation) == tuple(CORRECTIONS)
    with pytest.raises(EsplError, match=r"learner.correction is 'token_msk'; did you mean 'token_mask'\?"):
        apply(inputs([0.0], [0]), "token_msk")
