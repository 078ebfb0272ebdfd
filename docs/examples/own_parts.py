"""A loss and an operator of one's own, on the whole command line of espl-train:

    python own_parts.py --learner.loss reinforce --steps 3
"""

from __future__ import annotations

import sys

import torch

from espl_train.cli import main
from espl_train.evolution.edits import refused_list
from espl_train.evolution.operators import OPERATORS, Scene, Way
from espl_train.evolution.prompts import Child, Origin, Principle
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.learner.losses import LOSSES, LossInputs, LossOutputs
from espl_train.randomness import generator


def reinforce(x: LossInputs) -> LossOutputs:
    """-A·logp: the policy gradient without a ratio, so without a correction for samples of older weights."""
    ratio = torch.exp(x.logp - x.behaviour).detach()
    loss = -(x.weights * x.advantages * x.logp).sum()
    return LossOutputs(loss, ratio, torch.zeros_like(ratio, dtype=torch.bool))


async def splice(scene: Scene) -> Child | Rejection:
    """The best prompt with one principle of another one, drawn by lot: crossover that asks no model."""
    offers = [(p.id, o.text) for p in scene.others for o in p.principles if o.text not in scene.best.texts]
    if not offers:
        return Rejection(Reason.NO_OTHER_WINNER, "nobody else knows anything that the best prompt does not")
    donor, text = offers[generator(scene.seed, "splice", scene.step).integers(len(offers))]
    new = Principle(f"G{scene.best.last_id + 1}", text)
    principles = (*scene.best.principles, new)
    if refused := refused_list(principles, scene.limits):
        return refused
    origins = {new.id: Origin("add", (donor,))}
    return Child(principles, "splice", (scene.best.id, donor), scene.best.last_id + 1, origins)


LOSSES["reinforce"] = reinforce
OPERATORS["splice"] = Way(chance=lambda config: config.crossover_probability, breed=splice)

if __name__ == "__main__":
    sys.exit(main())
