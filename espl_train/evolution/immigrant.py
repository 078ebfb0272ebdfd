"""Immigrants: prompts that are written from the evidence alone, so that a population does not become one family.

An immigrant starts from the root, whose principles are the user's own, and learns in one go from the attempts of
everybody. What the prompts in between have come to believe it never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from espl_train.config import EvolutionConfig
from espl_train.evolution.edits import Limits
from espl_train.evolution.evidence import Contrast
from espl_train.evolution.mutation import mutate
from espl_train.evolution.prompts import Child, SystemPrompt
from espl_train.evolution.reflection import Reflector, purpose
from espl_train.evolution.rejections import Rejection

FIRST = 1000        # index of its first call: mutation's calls are numbered from 0, and no two calls share a seed


async def immigrate(
    root: SystemPrompt, contrasts: Sequence[Contrast], reflector: Reflector, config: EvolutionConfig, limits: Limits
) -> Child | Rejection:
    """A child of the root and of the evidence, or the reason why there is none."""
    with purpose(prompt=root.id):
        child = await mutate(root, contrasts, reflector, config, limits, FIRST)
    return child if isinstance(child, Rejection) else replace(child, operator="immigrant")
