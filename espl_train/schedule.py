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
    first, steps = phase(config, 1), config.steps
    if config.mode in MODES or config.schedule == "joint":
        return steps * first.breeds, steps * first.learns
    if config.schedule == "alternating":
        whole, rest = divmod(steps, 2 * config.schedule_period)
        breed = whole * config.schedule_period + min(rest, config.schedule_period)
    else:
        breed = turn(config) if config.schedule == "sequential" else steps - turn(config)
    return breed, steps - breed


def handovers(config: Config, steps: int) -> int:
    """How often in so many steps the weights begin to learn with one prompt, after prompts have bred."""
    if config.mode in MODES or config.schedule in ("joint", "weights_then_prompts"):
        return 0
    if config.schedule == "sequential":
        return int(0 < turn(config) < steps)
    return ((steps - 1) // config.schedule_period + 1) // 2
