"""How often does a 95 % interval hold the true mean? Ours against percentile and BCa intervals of the usual bootstrap.

    python benchmarks/intervals.py [--rounds 400]

Each round draws tasks whose chance of success is Beta-distributed around a known mean, plays k samples of each, and
asks every method for an interval. Printed: the share of rounds in which it held the truth, and its mean width.
Everything is keyed, so the table is the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from espl_envs.evaluate.intervals import UNIT, from_draws, generator, replicates

DRAWS = 1000
WORLDS = [(mean, spread) for mean in (0.5, 0.9, 0.97) for spread in (1, 10)]     # Beta(mean × spread, …)
Interval = tuple[float, float]


def ours(values: np.ndarray, round_: int) -> Interval:
    """`espl_envs.evaluate.intervals`."""
    found = from_draws(values.mean(), replicates(values[:, None], UNIT, round_)[:, 0], len(values), UNIT)
    assert found.low is not None and found.high is not None
    return found.low, found.high


def percentile(values: np.ndarray, round_: int) -> Interval:
    """Efron's first interval."""
    low, high = np.quantile(_resampled(values, round_), (0.025, 0.975))
    return float(low), float(high)


def bca(values: np.ndarray, round_: int) -> Interval:
    """Bias-corrected and accelerated (Efron 1987)."""
    drawn, normal, mean = _resampled(values, round_), NormalDist(), values.mean()
    if not drawn.std():
        return float(mean), float(mean)
    below = (drawn < mean).mean() + (drawn == mean).mean() / 2
    bias = normal.inv_cdf(min(max(below, 1e-4), 1 - 1e-4))
    left_out = (values.sum() - values) / (len(values) - 1)
    gaps = left_out.mean() - left_out
    skew = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    shares = [normal.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-1.96, 1.96)]
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)


METHODS: dict[str, Callable[[np.ndarray, int], Interval]] = {"ours": ours, "percentile": percentile, "BCa": bca}


def coverage(tasks: int, samples: int, mean: float, spread: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Per method: share of rounds with the truth inside, mean width."""
    held, width = dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0.0)
    for round_ in range(rounds):
        random = generator("world", tasks, samples, mean, spread, round_)
        values = random.binomial(samples, random.beta(mean * spread, (1 - mean) * spread, tasks)) / samples
        for name, method in METHODS.items():
            low, high = method(values, round_)
            held[name] += low <= mean <= high
            width[name] += high - low
    return {name: (held[name] / rounds, width[name] / rounds) for name in METHODS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    rounds = parser.parse_args().rounds
    print(f"{'tasks':>5} {'k':>2} {'mean':>5} {'spread':>6}  " + "  ".join(f"{name:>16}" for name in METHODS))
    for tasks in (10, 30, 100):
        for samples in (1, 4):
            for mean, spread in WORLDS:
                found = coverage(tasks, samples, mean, spread, rounds)
                cells = "  ".join(f"{held:8.3f} {width:7.3f}" for held, width in found.values())
                print(f"{tasks:5} {samples:2} {mean:5} {spread:6}  {cells}", flush=True)


def _resampled(values: np.ndarray, round_: int) -> np.ndarray:
    chosen = generator("resample", round_).integers(0, len(values), (DRAWS, len(values)))
    return np.asarray(values[chosen].mean(axis=1))


if __name__ == "__main__":
    main()
