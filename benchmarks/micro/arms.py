"""What the ablation compares: arms that differ by configuration only, the cells of the two dials, and who may see what.

An arm is presets and settings of `espl-train`, nothing else: every arm runs the same code. `SIZES` are common to all of
them, so budgets are equal in rollouts. What is tuned, and over which values, stands here too: `TRIALS` per trained arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from espl_envs.tasks.conventions import oracle_principles
from espl_train.config import Config
from espl_train.settings import load

DEVELOPMENT = range(300)       # worlds that settings may be chosen on
REPORT = 1000                  # worlds from here on are opened only for a report

SIZES: dict[str, Any] = {
    "steps": 12, "rollout.prompts": 3, "rollout.problems": 10, "rollout.samples": 4,
    "evaluation.every": 0, "evaluation.problems": 50, "evaluation.prompts": 3, "evaluation.temperature": 1.0,
    "evaluation.samples": 1, "tensorboard": False, "model.threads": 1,
}  # fmt: skip
RATES = (1e-3, 2e-3, 3e-3, 4e-3)
TRIALS = len(RATES)
BELIEFS = {"rating.kind": "item_response", "evolution.selection": "thompson", "evolution.juvenile_games": 1}


@dataclass(frozen=True)
class Cell:
    """Both dials of the environment."""

    declarative: float = 1.0
    procedural: float = 0.5

    def __str__(self) -> str:
        return f"declarative {self.declarative:g}, procedural {self.procedural:g}"


BOTH, NO_DECLARATIVE, NO_PROCEDURAL = Cell(), Cell(declarative=0.0), Cell(procedural=0.0)


@dataclass(frozen=True)
class Arm:
    """One side of the comparison. `trials` are the settings that are tried for it, `TRIALS` of them.

    `oracle`: the root prompt is the perfect one. `trained`: False where nothing is learnt at all.
    """

    name: str
    title: str
    presets: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Mapping[str, Any], ...] = tuple({"learner.learning_rate": rate} for rate in RATES)
    oracle: bool = False
    trained: bool = True

    def config(self, world: int, cell: Cell, chosen: Mapping[str, Any], out: str) -> Config:
        """The configuration of one run: presets, the arm's settings, sizes, what tuning chose, the world."""
        place = {
            "env.args.world": world, "env.args.declarative": cell.declarative, "env.args.procedural": cell.procedural,
            "seed": world, "out": out,
        }  # fmt: skip
        root = {"evolution.root": oracle_principles(world, cell.declarative)} if self.oracle else {}
        return load(self.presets, overrides={**SIZES, **self.settings, **chosen, **root, **place})


PROMPT_TRIALS: tuple[Mapping[str, Any], ...] = (
    {}, {"evolution.crossover_probability": 0.5}, {"evolution.max_operations": 4}, BELIEFS,
)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "base model", settings={"mode": "rl"}, trials=(), trained=False),
        Arm("oracle", "oracle prompt, frozen weights", settings={"mode": "rl"}, trials=(), oracle=True, trained=False),
        Arm("rl", "RL", settings={"mode": "rl"}),
        Arm("evolution", "evolution", settings={"mode": "evolution"}, trials=PROMPT_TRIALS),
        Arm("evolution_rl", "E-SPL (default)"),
        Arm("paper", "E-SPL (paper's settings)", presets=("paper",)),
        Arm("placebo", "placebo", presets=("placebo",)),
        Arm("shuffled_evidence", "shuffled evidence", presets=("shuffled_evidence",)),
        Arm("sequential", "prompt, then weights", presets=("sequential",)),
        Arm("rl_oracle", "RL under the oracle prompt", settings={"mode": "rl"}, oracle=True),
    )
}
