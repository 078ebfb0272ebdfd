"""Which ratings and which choice of players find good prompts while the policy improves under them.

A synthetic run of hidden truth: a prompt succeeds on a problem with probability logistic(skill + ability - difficulty
+ interaction); the ability rises, problems are dealt from epochs, and in every iteration a child is born around the
parent that the run itself would choose. Selection, ratings, parents and the choice at the end are those of
`espl_train`; only model and environment are replaced. The figure is the hidden skill of the prompt chosen at the end,
in logits above the root's, as mean over keyed runs with a 95 % interval; differences are paired, run by run.

Three worlds differ in how good an average child is. The figures are those of every machine, whatever else it does.

    python benchmarks/evolution/drift.py [--runs 100] [--loss 0.15 0.6 1.0] [--only NAME] [--write]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from espl_train.config import Config, EvolutionConfig, RatingConfig
from espl_train.evolution.breeding import champion
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child
from espl_train.evolution.ratings import Match
from espl_train.randomness import derive, generator
from espl_train.records import Group, Rollout, RolloutKey, StopReason
from espl_train.settings import load

RESULTS = Path(__file__).parents[1] / "results" / "drift.json"


@dataclass(frozen=True)
class World:
    """The hidden truth, in logits, and the shape of a run."""

    steps: int = 40
    prompts: int = 3
    problems: int = 10
    samples: int = 5
    train: int = 100               # problems in an epoch
    ability: float = -1.0          # of the policy at the start
    drift: float = 0.06            # how much it gains per iteration on average
    wobble: float = 0.05           # and how unevenly
    difficulty: float = 1.5        # spread of problems
    interaction: float = 0.5       # spread of what a prompt does to a problem beyond its skill
    novelty: float = 0.6           # spread of children around their parents
    loss: float = 0.6              # by which an average child is worse than its parent: one in six is better


@dataclass(frozen=True)
class Arm:
    """What is compared: settings that differ from the defaults."""

    rating: RatingConfig
    evolution: EvolutionConfig


@dataclass(frozen=True)
class Outcome:
    """One run: skills in logits above the root's, and how many prompts were ever compared with another."""

    chosen: float
    best: float
    born: int
    played: int


def arm(preset: str = "", **settings: Any) -> Arm:
    """An arm from settings by their names on the command line."""
    config: Config = load([preset] if preset else [], overrides=settings)
    return Arm(config.rating, config.evolution)


def run(number: int, arm: Arm, world: World, seed: int = 0) -> Outcome:
    """One run, a pure function of its arguments. Equal `number` and `seed` give equal problems, abilities and children
    of equal luck to every arm."""
    key = derive(seed, "drift", number)
    people = Population(arm.evolution, arm.rating, key)
    random = generator(key, "world")
    skills = {people.root.id: 0.0}
    difficulty = world.difficulty * random.standard_normal(world.train)
    ability = world.ability + np.cumsum(world.drift + world.wobble * random.standard_normal(world.steps))
    luck = world.novelty * random.standard_normal(world.steps) - world.loss
    epochs = -(-world.steps * world.problems // world.train)
    deck = np.concatenate([random.permutation(world.train) for _ in range(epochs)])
    odds: dict[str, np.ndarray] = {}         # of a prompt on every problem, but for the ability
    for step in range(1, world.steps + 1):
        players = people.select(step, world.prompts, world.samples)
        tasks = deck[(step - 1) * world.problems : step * world.problems].tolist()
        groups: list[Group] = []
        for prompt, samples in players.items():
            if prompt not in odds:
                fit = world.interaction * generator(key, "fit", prompt).standard_normal(world.train)
                odds[prompt] = skills[prompt] - difficulty + fit
            hits = generator(key, "rewards", step, prompt).random((world.problems, samples))
            chance = 1 / (1 + np.exp(-odds[prompt][tasks] - ability[step - 1]))
            groups += played(step, prompt, tasks, hits < chance[:, None])
        report = people.rate(groups)
        match = Match((), report["values"], report["ranks"])
        if people.crowded(Match((), {}, {})):
            continue
        parent = champion(match, {p: people.rating(p) for p in match.values}, arm.evolution)
        (born,) = people.add([Child((), "mutation", (parent,))], step)
        skills[born.id] = skills[parent] + luck[step - 1]
    chosen = people.best("lower_bound").id
    known = sum(m.games > 0 for m in people.members[1:])
    return Outcome(float(skills[chosen]), float(max(skills.values())), len(skills) - 1, known)


def played(step: int, prompt: str, tasks: Sequence[int], hits: np.ndarray) -> list[Group]:
    """A prompt's groups of one batch. `hits` [problems, samples]: which attempts succeeded."""
    bad, good = (
        Rollout(RolloutKey(step, prompt, 0, 0), "", (), (), reward, StopReason.ANSWER, 0) for reward in (0.0, 1.0)
    )
    return [
        Group(prompt, task, str(task), tuple(good if hit else bad for hit in row))
        for task, row in zip(tasks, hits.tolist(), strict=True)
    ]


def outcomes(arm: Arm, runs: int, world: World, pool: ProcessPoolExecutor | None = None) -> list[Outcome]:
    """`runs` runs of an arm, in order, in the processes of `pool` if there is one."""
    one = partial(run, arm=arm, world=world)
    return list(pool.map(one, range(runs), chunksize=8) if pool else map(one, range(runs)))


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and the normal 95 % interval of a mean over many runs."""
    mean, error = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return {"mean": mean, "low": mean - error, "high": mean + error}


CODE = {"evolution.selection": "uniform", "evolution.window": 5}       # where it differs from what the paper states
KINDS = ("trueskill", "openskill", "item_response")
RULES = ("uniform", "lucb", "ucb", "softmax", "ucb_uniform", "thompson", "pareto")
SLOTS: Mapping[str, Mapping[str, Any]] = {
    "juveniles 1": {"evolution.juvenile_games": 1},
    "juveniles 2": {"evolution.juvenile_games": 2},
    "juveniles 2, nursery 1": {"evolution.juvenile_games": 2, "evolution.nursery": 1},
    "juveniles 2, nursery 2": {"evolution.juvenile_games": 2, "evolution.nursery": 2},
    "juveniles 3, nursery 1": {"evolution.juvenile_games": 3, "evolution.nursery": 1},
    "juveniles 4, nursery 2": {"evolution.juvenile_games": 4, "evolution.nursery": 2},
    "nursery 1": {"evolution.nursery": 1},
    "no newest": {"evolution.newest": False},
    "no root anchor": {"evolution.root_anchor": False},
    "no root anchor, juveniles 2": {"evolution.root_anchor": False, "evolution.juvenile_games": 2},
}  # fmt: skip


def arms() -> dict[str, Arm]:
    """Every comparison by name: the defaults and the paper, kinds × rules, and the slots."""
    found = {"default": arm(), "paper": arm("paper"), "paper, released code": arm("paper", **CODE)}
    for kind in KINDS:
        for rule in RULES:
            found[f"{kind} × {rule}"] = arm(**{"rating.kind": kind, "evolution.selection": rule})
    for kind, rule in (("trueskill", "lucb"), ("item_response", "thompson")):
        for name, settings in SLOTS.items():
            found[f"{kind} × {rule}, {name}"] = arm(**{"rating.kind": kind, "evolution.selection": rule, **settings})
    return found


def measured(
    arms: Mapping[str, Arm], runs: int, world: World, pool: ProcessPoolExecutor, against: str = "default"
) -> dict[str, Any]:
    """Skill of the chosen prompt per arm, and its paired difference from the arm `against`."""
    found = {name: outcomes(each, runs, world, pool) for name, each in arms.items()}
    base = [o.chosen for o in found[against]]
    return {
        name: {
            "skill": interval([o.chosen for o in rows]),
            f"minus {against}": interval([o.chosen - b for o, b in zip(rows, base, strict=True)]),
            "best born": float(np.mean([o.best for o in rows])),
            "born": float(np.mean([o.born for o in rows])),
            "played": float(np.mean([o.played for o in rows])),
        }
        for name, rows in found.items()
    }


def show(figures: Mapping[str, Any]) -> None:
    """The table of one world, best first."""
    print(f"{'':<44}{'skill':>12}{'minus default':>24}{'best born':>11}{'played/born':>13}")
    for name, row in sorted(figures.items(), key=lambda item: -item[1]["skill"]["mean"]):
        skill, gain = row["skill"], row["minus default"]
        print(
            f"{name:<44}{skill['mean']:6.2f} ± {skill['high'] - skill['mean']:.2f}"
            f"{gain['mean']:+9.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]{row['best born']:10.2f}"
            f"{row['played']:8.1f}/{row['born']:.1f}"
        )


def main() -> None:
    """Measure all arms in each world, print the tables, keep the figures with --write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--loss", type=float, nargs="+", default=[0.15, 0.6, 1.0], help="one world each")
    parser.add_argument("--only", default="", help="arms whose names contain this, beside default and paper")
    parser.add_argument("--write", action="store_true", help=f"keep the figures as {RESULTS.name}")
    options = parser.parse_args()
    chosen = {n: a for n, a in arms().items() if options.only in n or n in ("default", "paper")}
    worlds = []
    with ProcessPoolExecutor() as pool:
        for loss in options.loss:
            world = World(loss=loss)
            figures = measured(chosen, options.runs, world, pool)
            worlds.append({"world": asdict(world), "arms": figures})
            print(f"\nchildren are {loss:g} ± {world.novelty:g} logits worse than their parents, {options.runs} runs")
            show(figures)
    if options.write:
        RESULTS.write_text(json.dumps({"runs": options.runs, "worlds": worlds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
