"""Importance correction where sampler and learner disagree: plain functions, chosen by name.

Two programs that run the same weights (a sampling engine in bf16, the learner in fp32) give a token slightly different
probabilities, so what was sampled came from mu and not from the policy pi. A correction weighs each token by pi / mu,
bounded so that no token or sequence gets to decide an update alone. `none` leaves it to the loss, whose ratio is then
measured against mu itself: `importance_sampling` is the exact correction per token, without a bound, and `ppo` clips
around mu. It is the default: the local engine agrees to 1e-6, where every other choice would do the same or less.
With an engine in low precision choose `token_truncate`, and look at `update/mismatch_mean`.

With a correction the ratio inside the loss is measured against the learner's own log-probabilities at the version that
sampled. One optimiser step per iteration makes that the version in training: old = stopgrad(logp). Its value is then 1,
nothing is clipped, and a bound of the loss is never mistaken for a disagreement of engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from espl_train.learner.losses import LossInputs, over_sequence
from espl_train.learner.naming import choose

Bounds = tuple[float, float]


def truncate(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio, not beyond its bounds: a little bias for a bounded variance."""
    return ratio.clamp(low, high)


def mask(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio, and 0 beyond its bounds: what the engines disagree about is not learnt from."""
    return torch.where((low <= ratio) & (ratio <= high), ratio, torch.zeros_like(ratio))


class Correction(NamedTuple):
    """One way to weigh tokens."""

    rule: Callable[[Tensor, float, float], Tensor]
    per_sequence: bool       # one ratio for all tokens of a sequence, the product of theirs
    bounds: Bounds


CORRECTIONS: dict[str, Correction | None] = {
    "none": None,
    "token_truncate": Correction(truncate, False, (0.0, 2.0)),       # TIS: Yao et al. 2025
    "token_mask": Correction(mask, False, (0.5, 5.0)),               # IcePop: arXiv 2510.18855
    "sequence_truncate": Correction(truncate, True, (0.0, 2.0)),
    "sequence_mask": Correction(mask, True, (0.0, 2.0)),             # MIS: Liu et al. 2025
}
"""Per token, pi / mu of what came before a token is left out: biased, and the bias does not grow with the length. Per
sequence it is the whole ratio, unbiased but for the bounds, which a long sequence passes after a few hundred tokens."""


class Corrected(NamedTuple):
    """What to give to the loss, and what was done (without gradient)."""

    inputs: LossInputs
    weights: Tensor          # [K] how much a token counts because another program sampled it
    bounded: Tensor          # [K] bool: a bound of the correction was passed


def apply(x: LossInputs, correction: str = "none", bounds: Bounds | None = None) -> Corrected:
    """Weigh the tokens of `x` for the disagreement of sampler (`x.behaviour`) and learner (`x.logp`).

    The denominators stay those of all tokens, masked ones included. A log-probability that is not a finite number gives
    a weight of nan, which stops the step: no bound may hide a broken engine.
    """
    log_ratio = (x.logp - x.behaviour).detach()                                  # [K]
    chosen = choose(CORRECTIONS, correction, "learner.correction")
    if chosen is None:
        return Corrected(x, torch.exp(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool))
    ratio = torch.exp(over_sequence(log_ratio, x.rows) if chosen.per_sequence else log_ratio)
    weights = chosen.rule(ratio, *(bounds or chosen.bounds))
    weights = torch.where(torch.isfinite(log_ratio), weights, torch.full_like(weights, torch.nan))
    inputs = replace(x, behaviour=x.logp.detach(), weights=x.weights * weights)
    return Corrected(inputs, weights, weights != ratio)
