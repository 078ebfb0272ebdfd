"""One environment of a run and all that lives on it: its problems, its population, what reflection remembers.

A run has one island, mostly. Several share the weights, the engine and the limits of an episode, and nothing else.
What an island does in an iteration is a `Batch`; what is played at once, there or in an evaluation, are `Round`s. When
each of this happens is the loop's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from espl_train.chat import Chat, count_tokens
from espl_train.config import Config
from espl_train.engines.base import Engine
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.guards import Leaks
from espl_train.evolution.guards.quarantine import Quarantine
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import SystemPrompt
from espl_train.evolution.reflection import purpose
from espl_train.evolution.templates import TemplateSet
from espl_train.learner.advantages import assign
from espl_train.learner.shaping import Shaping
from espl_train.lengths import Lengths
from espl_train.overlap import together
from espl_train.problems import Deck, Part, Problems, ProblemSets
from espl_train.randomness import derive
from espl_train.records import Group, Rollout, RolloutKey, grouped
from espl_train.reflecting.client import Client
from espl_train.reflecting.queue import Queue, evidence
from espl_train.rollout import Collector, Job, Progress
from espl_train.sandboxes import Boxes, wanted
from espl_train.trials import Trials


class Island:
    """A population on its environment. `name` is empty where a run has no other island."""

    def __init__(
        self, config: Config, sets: ProblemSets, boxes: Boxes, chat: Chat, engine: Engine, templates: TemplateSet,
        name: str = "", queue: Queue | None = None, leaks: Leaks | None = None,
    ) -> None:
        self.name, self.config, self.sets, self.templates = name, config, sets, templates
        self.seed = derive(config.seed, "island", name) if name else config.seed
        self.deck = Deck(sets.train, self.seed)
        self.population = Population(config.evolution, config.rating, self.seed, name)
        self.breeder = Breeder(
            config.evolution, templates, self.seed, chat.tokenizer.all_special_tokens,
            partial(count_tokens, chat.tokenizer), leaks,
        )  # fmt: skip
        self.shaping = Shaping(config.learner, config.rollout, frozenset(chat.stop_ids))
        self.quarantine = Quarantine(config.evolution.twin_margin)
        self.lengths = Lengths()
        self.chosen: str | None = None      # who plays alone, while only weights learn
        self.queue = queue                  # of children that wait for a person, where one is asked
        self._parked: dict[str, Any] | None = None      # the queue of a run that is continued without asking
        self.admitted: tuple[SystemPrompt, ...] = ()        # in this step, by a person
        self.reviewed: list[dict[str, Any]] = []            # what a review came to in this step, for the log
        self._others: list[tuple[Problems, Collector]] = []
        limits = boxes.limited(config.rollout, config.shares[name], wanted(p.env for p in sets) is not None)
        self.collectors = {
            problems.part: Collector(problems.make, chat, engine, limits, self.seed) for problems in sets
        }

    @property
    def leader(self) -> str:
        """The prompt of the moment: the chosen one while only weights learn, else the best rated."""
        return self.chosen or self.population.elite.id

    def players(self, step: int) -> dict[str, int]:
        """Who plays in `step`: prompt → samples per problem, the same number in all whoever plays."""
        rollout = self.config.rollout
        if self.chosen:
            return {self.chosen: rollout.prompts * rollout.samples}
        return self.population.select(step, rollout.prompts, rollout.samples)

    def admit(self, step: int) -> None:
        """Let in whom a person has let in since the last step; nobody while only weights learn."""
        self.admitted, self.reviewed = (), []
        if self.queue is not None and not self.chosen:
            examine = partial(self.breeder.examine, population=self.population, tasks=self.sets.train.tasks)
            self.admitted, self.reviewed = self.queue.admit(step, self.population, examine)

    def collector(self, problems: Problems) -> Collector:
        """Who plays `problems`, those of the run or others; the same one every time."""
        if self.sets[problems.part] is problems:
            return self.collectors[problems.part]
        known = next((collector for other, collector in self._others if other is problems), None)
        if known is None:
            like = self.collectors["train"]
            known = Collector(problems.make, like.chat, like.engine, like.config, like.seed)
            self._others.append((problems, known))
        return known

    def trials(self, step: int, policy: int, earlier: Sequence[Rollout]) -> Trials:
        """Where prompts that are in no population yet are played in `step`, after the rollouts `earlier`."""
        expected = self.lengths.expected
        return Trials(step, policy, self.sets.train, self.templates, self.collector, expected, earlier)

    def text(self, prompt: str) -> str:
        """A system prompt as the model sees it: in training, in evaluation and in every export."""
        return self.templates.system(self.population[prompt].principles)

    def evaluation(self, part: Part, prompts: Sequence[str], most: int) -> Round:
        """The same at most `most` problems for each of the prompts, in every evaluation of the run."""
        players = dict.fromkeys(prompts, self.config.evaluation.samples)
        return Round(self, self.sets[part], players, self.sets[part].sample(self.seed, most))

    async def breed(self, step: int, groups: Sequence[Group], client: Client, trials: Trials) -> BreedingReport | None:
        """Children of those that played `groups`; the population is only read. None where nobody played."""
        if not groups:
            return None
        tasks = self.sets.train.tasks
        with purpose(island=self.name):
            return await self.breeder.breed(
                step, self.population, groups, tasks, client.complete, trials, client.closed()
            )

    def settle(
        self, step: int, groups: Sequence[Group], bred: BreedingReport | None
    ) -> tuple[Mapping[str, Any] | None, tuple[SystemPrompt, ...]]:
        """Where prompts breed, rate who played, then take in the children: what the match came to, and who was born."""
        if bred is None:
            return None, self.admitted
        match, children = self.population.rate(groups), bred.children
        for younger, older in bred.retired.items():
            self.population.set_aside(younger, f"says and does what {older} says and does")
        if self.queue is not None:
            shown = partial(evidence, groups, question=lambda task: self.sets.train.tasks[task].question)
            self.reviewed += self.queue.put(children, step, self.population, shown)
            children = ()
        return match, (*self.admitted, *self.population.add(children, step))

    def candidates(self, most: int) -> list[str]:
        """The root prompt, and the chosen one or the `most` best rated."""
        best = [self.chosen] if self.chosen else self.population.top(most)
        return list(dict.fromkeys([self.population.root.id, *best]))

    def best(self, validation: Mapping[str, float], final: bool) -> str:
        """The prompt of the moment: the leader; at the end the one that the configured choice names."""
        if self.chosen or not final:
            return self.leader
        scores = {m.prompt.id: validation.get(f"validation/{m.prompt.id}") for m in self.population.members}
        known = {prompt: score for prompt, score in scores.items() if score is not None and math.isfinite(score)}
        return self.population.best(self.config.evaluation.choice, known).id

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint: everything that the next step depends on."""
        return {
            "population": self.population.to_json(),
            "breeder": self.breeder.state(),
            "deck": self.deck.position,
            "lengths": self.lengths.to_json(),
            "chosen": self.chosen,
            "quarantine": self.quarantine.state(),
            "queue": self.queue.state() if self.queue is not None else self._parked,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down."""
        config = self.config
        self.population = Population.from_json(state["population"], config.evolution, config.rating, self.seed)
        self.breeder.restore(state["breeder"])
        self.quarantine.restore(state["quarantine"])
        self.deck = Deck(self.sets.train, self.seed, state["deck"])
        self.lengths = Lengths.from_json(state["lengths"])
        self.chosen = state["chosen"]
        self._parked = state["queue"]
        if self.queue is not None and self._parked is not None:
            self.queue.restore(self._parked)

    def close(self) -> None:
        """Close all environments. Again is fine."""
        for collector in (*self.collectors.values(), *(collector for _, collector in self._others)):
            collector.close()


@dataclass(frozen=True)
class Round:
    """Every player (prompt → samples per problem) on every problem of one island, `earlier` ones of the same iteration
    aside."""

    island: Island
    problems: Problems
    players: Mapping[str, int]
    indices: Sequence[int]
    earlier: Sequence[Rollout] = ()

    def __len__(self) -> int:
        return sum(self.players.values()) * len(self.indices)

    def jobs(self, step: int) -> list[Job]:
        """Its episodes, in the order of their rollouts."""
        keys = [
            RolloutKey(step, prompt, index, sample, split=self.problems.part)
            for prompt, samples in self.players.items()
            for index in self.indices
            for sample in range(samples)
        ]
        return [Job(key, self.island.text(key.prompt), self.island.lengths.expected(key)) for key in keys]

    async def play(self, step: int, policy: int | None, temperature: float, progress: Progress) -> list[Rollout]:
        """All episodes at once, the long ones first."""
        collector = self.island.collector(self.problems)
        return await collector.acollect(self.jobs(step), policy, temperature, progress, earlier=self.earlier)


async def play(
    rounds: Sequence[Round], step: int, policy: int | None, temperature: float, progress: Progress
) -> list[list[Rollout]]:
    """Play all `rounds` at once, on however many islands; the rollouts come round by round.

    `progress` is told the sums. What fails ends all of them, and is raised alone.
    """
    told: dict[int, tuple[int, int]] = {}

    def part(number: int) -> Progress:
        def tell(done: int, tokens: int) -> None:
            told[number] = done, tokens
            progress(sum(d for d, _ in told.values()), sum(t for _, t in told.values()))

        return tell

    played = await together(
        round.play(step, policy, temperature, part(number)) for number, round in enumerate(rounds)
    )
    for round, rollouts in zip(rounds, played, strict=True):
        round.island.lengths.learn(rollouts)
    return played


@dataclass
class Batch:
    """What an island plays in one iteration: `size` problems by the players that were selected, round by round.

    With `rollout.dynamic_rounds`, problems without contrast are followed by others of the epoch until there are `size`
    with contrast, or the rounds or the epoch are used up. All that was played counts for ratings, reflection and
    reports: prompts compared only where some of them failed would be compared on problems picked by the outcome.
    """

    island: Island
    players: Mapping[str, int]
    size: int
    groups: list[Group] = field(default_factory=list)
    rounds: int = 0
    tried: list[Rollout] = field(default_factory=list)      # in trials: of its children before and at their birth

    def __post_init__(self) -> None:
        self._indices = self.island.deck.batch(self.size)
        self._played: list[Rollout] = []

    @classmethod
    def of(cls, island: Island, step: int, size: int) -> Batch:
        """The batch of `step`: who plays, and on what."""
        return cls(island, island.players(step), size)

    def due(self) -> Round | None:
        """What has to be played next; None when the batch is complete."""
        if not self._indices:
            return None
        return Round(self.island, self.island.sets.train, self.players, self._indices, tuple(self._played))

    def take(self, rollouts: Sequence[Rollout]) -> None:
        """What `due` came to: its groups with their advantages, and what is due after it."""
        island, learner = self.island, self.island.config.learner
        self._played += rollouts
        self.groups += assign(grouped(rollouts), learner.baseline, learner.divide_by_std, island.shaping)
        self.rounds += 1
        again = self.rounds <= island.config.rollout.dynamic_rounds
        self._indices = island.deck.more(self.size - len(self._mixed())) if again else []

    async def breed(self, step: int, policy: int, client: Client) -> BreedingReport | None:
        """Children of its players; `policy` is the version of the weights that played."""
        trials = self.island.trials(step, policy, self._played)
        bred = await self.island.breed(step, self.groups, client, trials)
        self.tried += trials.played
        return bred

    def metrics(self) -> dict[str, float]:
        """How the groups came about (rounds, where there may be several; what shaping did), and what trials cost."""
        counts = {
            "dynamic/rounds": self.rounds,
            "dynamic/problems": len({group.task for group in self.groups}),
            "dynamic/contrast": len(self._mixed()),
        }
        rare = counts if self.island.config.rollout.dynamic_rounds else {}
        tokens = sum(rollout.sampled_tokens for rollout in self.tried)
        tried = {"trials/rollouts": len(self.tried), "trials/tokens": tokens} if self.tried else {}
        return {**rare, **self.island.shaping.metrics(self._played), **tried}

    def _mixed(self) -> set[int]:
        return {group.task for group in self.groups if group.contrast}
