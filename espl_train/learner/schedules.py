"""How the learning rate moves over a run: a warm-up, then a shape that falls from 1 to a floor.

There are two clocks. The warm-up counts optimiser steps that were made: it lasts until Adam's moments mean something,
and an update without contrast moves no moment. The shape counts iterations, skipped ones too: it has to arrive when the
run ends. Both counts are part of the learner's state, so a resumed run goes on where it stood; one that is given more
steps follows the shape of the longer run from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from espl_train.config import LearnerConfig
from espl_train.learner.naming import choose

Shape = Callable[[float], float]      # progress in [0, 1) -> share of the way from the floor to the peak


def constant(_: float) -> float:
    """The peak until the end."""
    return 1.0


def linear(progress: float) -> float:
    """A straight line down to the floor."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Half a cosine wave down to the floor (Loshchilov & Hutter 2017, without restarts)."""
    return (1.0 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Shape] = {"constant": constant, "linear": linear, "cosine": cosine}


def rate(config: LearnerConfig, updates: int, made: int, skipped: int) -> float:
    """The learning rate of the next step, after `made` steps and `skipped` updates out of `updates` in the whole run.

    The first step has 1/warmup of the peak, not 0; the floor is where the shape would be one step after the last.
    """
    progress = (made + skipped - config.warmup) / max(1, updates - config.warmup)
    height = choose(SCHEDULES, config.schedule, "learner.schedule")(min(max(progress, 0.0), 1.0))
    warm = min(1.0, (made + 1) / max(1, config.warmup))
    return config.learning_rate * warm * (config.schedule_floor + (1.0 - config.schedule_floor) * height)
