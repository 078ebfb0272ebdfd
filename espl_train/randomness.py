"""Keyed randomness: every draw is a pure function of what it is for, so there is no random state to save.

`derive` turns a key (run seed, step, prompt, problem, sample, turn …) into a seed; `generator` into a numpy generator;
`uniforms` is the counter-based stream that engines draw tokens from: one number per (request seed, token position).
"""

from __future__ import annotations

import numpy as np

from espl_envs.core.randomness import Part, derive

__all__ = ["Part", "derive", "generator", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def generator(*parts: Part) -> np.random.Generator:
    """A numpy generator for the key `parts`; equal keys give equal streams, on every machine."""
    return np.random.Generator(np.random.Philox(key=derive(*parts)))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in the open interval (0, 1) for broadcast (seed, position) pairs, 48 bits each, float64.

    splitmix64 as a counter: number `p` of stream `s` is computed directly, so a row's draws depend neither on the
    batch it is decoded in nor on how often it was interrupted. (Steele, Lea, Flood 2014.)
    """
    start = _mix(seeds.astype(np.uint64))
    bits = _mix(start + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
