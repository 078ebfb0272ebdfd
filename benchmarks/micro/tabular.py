"""The tabular tier: a policy of softmax tables in place of the language model, everything of evolution as it is.

The problems are those of `espl/Conventions`. Per step of a chain the policy chooses a rule, from a row of logits that
depends on the operator and on what the system prompt says of it, and then carries it out carefully or not, from a logit
per rule. Two gaps, as in the real thing: rows without a principle are flat for hidden operators, rows with one follow
it; care starts low and grows with practice alone. The gradient is the policy gradient of these tables, with one thing
of networks in it: part of what is learnt of one operator is taken to hold for all. Without that a rate can be raised
until one success is enough to know an operator, and nothing is ever dear to find by gradient.

Population, selection, ratings, evidence, guard, templates, operators, advantages are those of `espl_train`; only the
policy and the reflecting model are replaced. The latter answers the dialect of the template set `micro` as the bundled
model was taught to, without a mistake. Numpy alone; a run takes a fraction of a second.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from benchmarks.micro.arms import BOTH, Cell
from espl_envs.core.messages import Message
from espl_envs.core.tasks import Split, Task
from espl_envs.tasks.conventions import CONVENTIONAL, RULES, ConventionTasks, oracle_principles, world_rules
from espl_train import schedule
from espl_train.config import Config
from espl_train.evolution.breeding import Breeder
from espl_train.evolution.population import Population
from espl_train.evolution.templates import TemplateSet
from espl_train.learner.advantages import assign
from espl_train.randomness import generator
from espl_train.records import Group, Rollout, RolloutKey, StopReason, grouped
from espl_train.settings import load

SIZES: dict[str, Any] = {
    "steps": 12, "rollout.prompts": 3, "rollout.problems": 10, "rollout.samples": 4, "evaluation.prompts": 3,
    "evolution.critiques": 3, "evolution.attempts": 4,
}  # fmt: skip
TRAIN, VALIDATION, TEST = 200, 50, 100      # problems of each split
FOLLOWS, KNOWS = 4.0, 6.0                   # logits above the others: a stated rule, the rule of a known operator
CARELESS = 0.5                              # share of careless steps at the start, with the procedural dial at 1
INTERFERENCE = 0.5                          # share of what is learnt of one operator that is taken to hold for all
RATE = 0.5                                  # of gradient ascent
NAMES = tuple(RULES)
Texts = tuple[str, ...]


class Policy:
    """Logits: `meaning` [operator, stated, rule] with `stated` 0 for no principle, and `care` [rule]."""

    def __init__(self, world: int, cell: Cell, rate: float = RATE) -> None:
        rules = world_rules(world, cell.declarative)
        self.operators = {symbol: i for i, symbol in enumerate(rules)}
        self.meaning = np.zeros((len(rules), 1 + len(NAMES), len(NAMES)))
        self.meaning[:, range(1, 1 + len(NAMES)), range(len(NAMES))] = FOLLOWS
        for symbol, rule in rules.items():
            if symbol in CONVENTIONAL:
                self.meaning[self.operators[symbol], 0, NAMES.index(rule)] = KNOWS
        careless = min(CARELESS * cell.procedural, 0.98) or 0.02
        self.care = np.full(len(NAMES), np.log(1 / careless - 1))
        self.rate = rate

    def act(self, told: np.ndarray, asked: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rules chosen, and whether carried out with care. `told` (stated) and `asked` (operator) are [episodes, steps]
        with -1 beyond the end of a chain."""
        logits = self.meaning[asked, told]
        rules = (logits + random.gumbel(size=logits.shape)).argmax(-1)
        return rules, random.random(rules.shape) < 1 / (1 + np.exp(-self.care[rules]))

    def learn(self, plays: Sequence[Play], advantages: Sequence[float]) -> None:
        """One step up the policy gradient, shared with the other operators (and rules, for care) by `INTERFERENCE`."""
        meaning, care = np.zeros_like(self.meaning), np.zeros_like(self.care)
        for play, advantage in zip(plays, advantages, strict=True):
            if advantage:
                rows = self.meaning[play.asked, play.told]
                odds = np.exp(rows - rows.max(-1, keepdims=True))
                pull = -advantage * odds / odds.sum(-1, keepdims=True)
                pull[range(len(play.rules)), play.rules] += advantage
                np.add.at(meaning, (play.asked, play.told), pull)
                np.add.at(care, play.rules, advantage * (play.careful - 1 / (1 + np.exp(-self.care[play.rules]))))
        for table, slope in ((self.meaning, meaning), (self.care, care)):
            table += self.rate * ((1 - INTERFERENCE) * slope + INTERFERENCE * slope.sum(axis=0))


@dataclass(frozen=True)
class Play:
    """What an episode decided, step by step: arrays of equal length."""

    asked: np.ndarray
    told: np.ndarray
    rules: np.ndarray
    careful: np.ndarray


@dataclass
class Stage:
    """A world with its problems, and how they are played by tables."""

    world: int
    cell: Cell
    seed: int = 0
    tasks: dict[str, dict[int, Task]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks = {split: problems(self.world, split, self.cell) for split in ("train", "validation", "test")}

    def play(
        self, policy: Policy, prompts: Mapping[str, Texts], players: Mapping[str, int], indices: Sequence[int],
        split: Split, step: int,
    ) -> tuple[list[Rollout], list[Play]]:
        """Every player on every problem: rollouts that evolution can read, and what the gradient needs."""
        keys = [RolloutKey(step, p, i, j, split=split) for p, n in players.items() for i in indices for j in range(n)]
        said = {prompt: stated(policy.operators, prompts[prompt]) for prompt in players}
        chains = [self.tasks[split][key.task].data["steps"] for key in keys]
        length = max(map(len, chains))
        asked = np.array([padded([policy.operators[s] for s, _ in chain], length) for chain in chains])
        told = np.array([said[key.prompt] for key in keys])[np.arange(len(keys))[:, None], asked]
        random = generator(self.seed, "tabular", self.world, step, split)
        rules, careful = policy.act(told, asked, random)
        truth = np.array([NAMES.index(rule) for rule in self._rules(policy)])[asked]
        right = ((rules == truth) & careful | (asked < 0)).all(axis=1)
        rollouts, plays = [], []
        for n, (key, chain) in enumerate(zip(keys, chains, strict=True)):
            many = len(chain)
            plays.append(Play(asked[n, :many], told[n, :many], rules[n, :many], careful[n, :many]))
            rollouts.append(self._rollout(key, rules[n].tolist(), careful[n].tolist(), float(right[n])))
        return rollouts, plays

    def score(self, policy: Policy, prompts: Mapping[str, Texts], split: Split, step: int) -> dict[str, float]:
        """The mean reward of each prompt on the same problems."""
        indices = list(self.tasks[split])
        played, _ = self.play(policy, prompts, dict.fromkeys(prompts, 1), indices, split, step)
        return {p: float(np.mean([r.reward for r in played if r.key.prompt == p])) for p in prompts}

    def _rules(self, policy: Policy) -> list[str]:
        rules = world_rules(self.world, self.cell.declarative)
        return [rules[symbol] for symbol in policy.operators]

    def _rollout(self, key: RolloutKey, rules: Sequence[int], careful: Sequence[bool], reward: float) -> Rollout:
        task = self.tasks[key.split][key.task]
        parts = [
            f"({k}) {symbol} {NAMES[rule]}: {'carried out' if care else 'guessed'}."
            for k, ((symbol, _), rule, care) in enumerate(zip(task.data["steps"], rules, careful, strict=False), 1)
        ]
        messages = (Message("user", task.question), Message("assistant", " ".join(parts)))
        return Rollout(key, task.id, (), messages, reward, StopReason.ANSWER, key.step)


@cache
def problems(world: int, split: Split, cell: Cell) -> dict[int, Task]:
    """The first problems of a split, by index."""
    source = ConventionTasks(world, split, cell.declarative, cell.procedural)
    count = {"train": TRAIN, "validation": VALIDATION, "test": TEST}[split]
    return {i: source[i] for i in range(count)}


def padded(values: Sequence[int], length: int) -> list[int]:
    return [*values, *[-1] * (length - len(values))]


def stated(operators: Mapping[str, int], texts: Sequence[str]) -> np.ndarray:
    """Per operator the number of the rule that the prompt states, 0 for none; of two, the first one counts."""
    found = np.zeros(len(operators) + 1, int)        # the last entry is of the padding
    for text in texts:
        symbol, _, rule = text.partition(" ")
        if symbol in operators and rule in RULES and not found[operators[symbol]]:
            found[operators[symbol]] = 1 + NAMES.index(rule)
    return found


async def reflect(messages: Sequence[Message], seed: int) -> str:
    """The reflecting model, in the dialect of the template set `micro`: it trusts what right attempts quoted."""
    del seed
    lines = messages[-1].content.splitlines()
    return json.dumps(revised(lines) if lines[0] == "revise" else criticised(lines), ensure_ascii=False)


def criticised(lines: Sequence[str]) -> list[dict[str, str]]:
    """Per operator the first rule that a right attempt quoted, as an operation, if the prompt does not say so yet."""
    left = int(lines[0].split()[-1].rstrip("."))
    now = {w[1]: (w[2].rstrip(":"), w[4].rstrip(",")) for w in map(str.split, lines) if w[0] == "now"}
    right: dict[str, str] = {}
    for word, symbol, rule, *_ in (line.rstrip(".").split() for line in lines if line.startswith("right ")):
        del word
        right.setdefault(symbol, rule)
    plan = []
    for symbol, rule in right.items():
        text = f"{symbol} {rule}"
        if symbol not in now:
            plan.append({"op": "add", "text": text})
        elif now[symbol][1] != rule:
            plan.append({"op": "modify", "id": now[symbol][0], "text": text})
    return plan[:left]


def revised(lines: Sequence[str]) -> list[dict[str, str]]:
    """Of several candidates for one operator the first one stays."""
    seen, plan = set(), []
    for _, name, symbol, *_ in (line.split() for line in lines[1:] if len(line.split()) > 3):
        if symbol in seen:
            plan.append({"op": "remove", "id": name.rstrip(":")})
        seen.add(symbol)
    return plan


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: presets and settings as on the command line."""

    presets: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    oracle: bool = False

    def config(self, world: int, cell: Cell) -> Config:
        """All of `espl_train`'s settings, of which the tables use those of evolution and of the baseline."""
        root = {"evolution.root": oracle_principles(world, cell.declarative)} if self.oracle else {}
        return load(self.presets, overrides={**self.settings, **SIZES, **root})


ARMS = {
    "rl": Arm(settings={"mode": "rl"}),
    "evolution": Arm(settings={"mode": "evolution"}),
    "evolution_rl": Arm(),
    "paper": Arm(("paper",)),
    "placebo": Arm(("placebo",)),
    "shuffled_evidence": Arm(("shuffled_evidence",)),
    "sequential": Arm(("sequential",)),
    "rl_oracle": Arm(settings={"mode": "rl"}, oracle=True),
}
Complete = Callable[[Sequence[Message], int], Any]


def run(arm: Arm, world: int, cell: Cell = BOTH, rate: float = RATE, complete: Complete = reflect) -> dict[str, Any]:
    """One run, a pure function of its arguments: test accuracy under the chosen prompt, and what was learnt."""
    config, stage, policy = arm.config(world, cell), Stage(world, cell), Policy(world, cell, rate)
    population = Population(config.evolution, config.rating, world)
    breeder = Breeder(config.evolution, TemplateSet.load("micro"), world)
    alone: str | None = None
    for step in range(1, config.steps + 1):
        now, rollout = schedule.phase(config, step), config.rollout
        if now == schedule.WEIGHTS and not alone:
            alone = chosen(config, stage, policy, population, step)
        players = population.select(step, rollout.prompts, rollout.samples)
        players = {alone: rollout.prompts * rollout.samples} if alone else players
        deal = generator(world, "deal", step).choice(TRAIN, rollout.problems, replace=False)
        prompts = {m.prompt.id: m.prompt.texts for m in population.members}
        rollouts, plays = stage.play(policy, prompts, players, [int(i) for i in deal], "train", step)
        groups = assign(grouped(rollouts), config.learner.baseline, config.learner.divide_by_std)
        if now.breeds:
            bred = asyncio.run(breeder.breed(step, population, groups, stage.tasks["train"], complete))
        if now.learns:
            policy.learn(plays, flat(groups, rollouts))
        if now.breeds:
            population.rate(groups)
            population.add(bred.children, step)
    best = alone or chosen(config, stage, policy, population, config.steps + 1)
    texts = population[best].texts
    test = stage.score(policy, {best: texts}, "test", config.steps + 1)[best]
    return {"test": test, "principles": list(texts), "care": float(np.mean(1 / (1 + np.exp(-policy.care))))}


def chosen(config: Config, stage: Stage, policy: Policy, population: Population, step: int) -> str:
    """Among the root and the best rated, whoever does best on validation."""
    finalists = dict.fromkeys([population.root.id, *population.top(config.evaluation.prompts)])
    prompts = {p: population[p].texts for p in finalists}
    return population.best("validation", stage.score(policy, prompts, "validation", step)).id


def flat(groups: Sequence[Group], rollouts: Sequence[Rollout]) -> list[float]:
    """The advantages in the order of the rollouts."""
    found = {r.key: a or 0.0 for g in groups for r, a in zip(g.rollouts, g.advantages, strict=True)}
    return [found[r.key] for r in rollouts]
