"""Policy-gradient losses and their normalisations: plain functions, chosen by name.

A loss takes the sampled tokens of one micro-batch and returns a sum in which every token has its weight, one over a
denominator that was counted over the whole update. So the sum over micro-batches is the loss of the update, however it
was split. rho is exp(logp - behaviour): how much likelier a token is now than when it was sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """K sampled tokens. Only `logp` carries a gradient."""

    logp: Tensor          # [K] log-probability now
    behaviour: Tensor     # [K] log-probability when it was sampled
    advantages: Tensor    # [K] the rollout's advantage, on each of its tokens
    weights: Tensor       # [K] one over the global denominator
    rows: Tensor          # [K] which sequence a token belongs to, 0, 1, …
    bounds: tuple[float, float] | None = None    # of rho; None = the loss's own


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """The loss to call `backward` on, and what happened to the ratios (without gradient)."""

    loss: Tensor          # []
    ratio: Tensor         # [K] rho, or the sequence's rho
    clipped: Tensor       # [K] bool: the bound cut this token's gradient


Loss = Callable[[LossInputs], LossOutputs]


def importance_sampling(x: LossInputs) -> LossOutputs:
    """-rho·A: unbiased while the sampling distribution is the one in `behaviour` (the paper's loss)."""
    ratio = torch.exp(x.logp - x.behaviour)
    return _output(x, -ratio * x.advantages, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def ppo(x: LossInputs) -> LossOutputs:
    """-min(rho·A, clip(rho)·A) (arXiv 1707.06347); by default the upper bound is the wider one, DAPO's clip-higher."""
    low, high = x.bounds or (0.8, 1.28)
    ratio = torch.exp(x.logp - x.behaviour)
    gain, bounded = ratio * x.advantages, ratio.clamp(low, high) * x.advantages
    return _output(x, -torch.minimum(gain, bounded), ratio, bounded < gain)


def cispo(x: LossInputs) -> LossOutputs:
    """-stopgrad(clip(rho))·A·logp: the bound limits a token's weight, never takes its gradient (arXiv 2506.13585)."""
    low, high = x.bounds or (0.0, 4.0)
    ratio = torch.exp(x.logp - x.behaviour).detach()
    bounded = ratio.clamp(low, high)
    return _output(x, -bounded * x.advantages * x.logp, ratio, bounded != ratio)


def gspo(x: LossInputs) -> LossOutputs:
    """`ppo` with one ratio per sequence, the geometric mean of its tokens: narrow bounds (arXiv 2507.18071).

    In the paper's token form: value and gradient are those of the sequence form while all tokens of a sequence weigh
    the same, and where a correction weighs them differently, each token's weight stays with its own gradient.
    """
    low, high = x.bounds or (1 - 3e-4, 1 + 4e-4)
    sequence = torch.exp(over_sequence(x.logp - x.behaviour, x.rows, mean=True)).detach()     # [K]
    ratio = sequence * torch.exp(x.logp - x.logp.detach())                                    # [K] = `sequence`
    gain, bounded = ratio * x.advantages, ratio.clamp(low, high) * x.advantages
    return _output(x, -torch.minimum(gain, bounded), ratio, bounded < gain)


def over_sequence(values: Tensor, rows: Tensor, mean: bool = False) -> Tensor:
    """Sum (or mean) of `values` [K] over the tokens of each sequence, on each of its tokens. [K]"""
    none = values.new_zeros(len(rows))       # [K]: how many sequences there are is not asked, a GPU would be waited for
    sums = none.index_add(0, rows, values)
    if mean:
        sums = sums / none.index_add(0, rows, torch.ones_like(values)).clamp(min=1)
    return sums[rows]


def _output(x: LossInputs, per_token: Tensor, ratio: Tensor, clipped: Tensor) -> LossOutputs:
    return LossOutputs((x.weights * per_token).sum(), ratio.detach(), clipped.detach())


LOSSES: dict[str, Loss] = {"importance_sampling": importance_sampling, "ppo": ppo, "cispo": cispo, "gspo": gspo}


def divergence(logp: Tensor, other: Tensor) -> Tensor:
    """Per token, the estimate exp(d) - d - 1, d = other - logp, of KL(policy of `logp` ‖ `other`) on its own samples.

    Never negative, unbiased, and of low variance where the two are close (Schulman's k3). [K]
    """
    gap = other - logp
    return torch.expm1(gap) - gap


def k1(x: LossInputs, reference: Tensor) -> Tensor:
    """rho·log(policy / reference): value and gradient are unbiased and noisy; it can be negative. [K]"""
    return torch.exp(x.logp - x.behaviour) * (x.logp - reference)


def k2(x: LossInputs, reference: Tensor) -> Tensor:
    """stopgrad(rho)·log(policy / reference)²/2: the gradient of k1 without the part that is only noise. [K]

    The gradient, rho·log(policy / reference)·∇logp, is an unbiased one of KL(policy ‖ reference); the value is not.
    """
    return torch.exp(x.logp - x.behaviour).detach() * (x.logp - reference).square() / 2


def k3(x: LossInputs, reference: Tensor) -> Tensor:
    """stopgrad(rho)·`divergence`, as GRPO has it: an unbiased value, but the gradient of KL(reference ‖ policy). [K]

    The two divergences agree to second order while policy and reference are close, and part ways later: this one keeps
    the policy from forgetting what the reference does, and hardly minds what it does that the reference never did.
    """
    return torch.exp(x.logp - x.behaviour).detach() * divergence(x.logp, reference)


Penalty = Callable[[LossInputs, Tensor], Tensor]

PENALTIES: dict[str, Penalty] = {"k1": k1, "k2": k2, "k3": k3}
"""What is added per token, times `learner.kl`, to stay near the reference [K]; see Tang & Munos, arXiv 2506.09477.

A token is judged by its own distribution: what it does to the divergence of later tokens is left out, as everywhere.
The penalty is over the tokens that are learnt from: groups without contrast pay none.
"""


class Measure(NamedTuple):
    """What a normalisation may know of a sequence."""

    tokens: int      # sampled ones
    prompt: str


Normalisation = Callable[[Sequence[Measure], int], list[float]]


def total(sequences: Sequence[Measure], _: int) -> list[float]:
    """The plain sum over tokens: large batches and long replies weigh more (the paper's)."""
    return [1.0 for _ in sequences]


def token_mean(sequences: Sequence[Measure], _: int) -> list[float]:
    """Every token of the update weighs the same (DAPO)."""
    tokens = sum(s.tokens for s in sequences)
    return [1 / tokens for _ in sequences]


def sequence_mean(sequences: Sequence[Measure], _: int) -> list[float]:
    """Every sequence weighs the same, whatever its length (GRPO)."""
    return [1 / (len(sequences) * s.tokens) for s in sequences]


def fixed(sequences: Sequence[Measure], constant: int) -> list[float]:
    """Sum over tokens / `constant`, mean over sequences: no bias by length (Dr. GRPO)."""
    return [1 / (len(sequences) * constant) for _ in sequences]


def prompt_balanced(sequences: Sequence[Measure], _: int) -> list[float]:
    """Every system prompt weighs the same, however many and however long its completions are."""
    tokens: Counter[str] = Counter()
    for s in sequences:
        tokens[s.prompt] += s.tokens
    return [1 / (len(tokens) * tokens[s.prompt]) for s in sequences]


NORMALISATIONS: dict[str, Normalisation] = {
    "sum": total,
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": fixed,
    "prompt_balanced": prompt_balanced,
}
"""Over the sequences that are learnt from. Groups without contrast have no gradient and count in no denominator, as
under dynamic sampling; GRPO, Dr. GRPO and CISPO as published count them, so that their steps shrink with the share of
such groups.
"""
