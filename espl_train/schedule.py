"""Which half of the method works in a step: prompts, weights, or both.

The default is both in every step. The others are baselines for it, made of the same parts: first one half and then the
other, or by turns. While only weights learn, one prompt plays and gets the samples of all, so that every step of every
schedule costs the same rollouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from espl_train.config import Config


@dataclass(frozen=True, slots=True)
class Phase:
    """What a step is for: prompts play against each other and `breeds`, weights `learns`."""

    breeds: bool
    learns: bool


BOTH, PROMPTS, WEIGHTS = Phase(True, True), Phase(True, False), Phase(False, True)
MODES = {"evolution": PROMPTS, "rl": WEIGHTS}


def phase(config: Config, step: int) -> Phase:
    """The phase of `step`, counted from 1."""
    if config.mode in MODES:
        return MODES[config.mode]
    if config.schedule == "joint":
        return BOTH
    if config.schedule == "alternating":
        return PROMPTS if (step - 1) // config.schedule_period % 2 == 0 else WEIGHTS
    first, second = (PROMPTS, WEIGHTS) if config.schedule == "sequential" else (WEIGHTS, PROMPTS)
    return first if step <= turn(config) else second


def turn(config: Config) -> int:
    """The last step of the first half."""
    return math.floor(config.schedule_share * config.steps + 0.5)


def counts(config: Config) -> tuple[int, int]:
    """How many steps of the run breed, and how many learn."""
    phases = [phase(config, step) for step in range(1, config.steps + 1)]
    return sum(p.breeds for p in phases), sum(p.learns for p in phases)
