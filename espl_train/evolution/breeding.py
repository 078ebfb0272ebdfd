"""Breeding: one step of evolution from the rollouts of a batch to children, with every decision on record.

This is what the loop talks to. It keeps the evidence buffer and the guard; the population is only read, and read before
the first call goes out, so a breeding may run while the weights learn and the ratings move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig
from espl_train.evolution.crossover import Rewards, cross
from espl_train.evolution.edits import Limits, fingerprints
from espl_train.evolution.evidence import Evidence, shuffled
from espl_train.evolution.guards import Guard
from espl_train.evolution.mutation import mutate
from espl_train.evolution.placebo import placebo
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Rating, SystemPrompt
from espl_train.evolution.ratings import Match, scores
from espl_train.evolution.reflection import Completer, Reflector
from espl_train.evolution.rejections import Reason, Rejection, excerpt
from espl_train.evolution.templates import TemplateSet
from espl_train.randomness import generator
from espl_train.records import Group

DIGITS = 6      # of a rating: beyond them two draws differ by rounding only


@dataclass(frozen=True, slots=True)
class BreedingReport:
    """What a step of breeding brought: children in the order of insertion (crossover first), and why.

    `rejections` counts refused replies, plans and texts by reason; `events` are plain data for the log.
    """

    children: tuple[Child, ...]
    events: list[dict[str, Any]]
    calls: int
    rejections: dict[str, int]
    repaired: int


class Breeder:
    """Writes children. `state` and `restore` carry the evidence over a resume; there is no random state."""

    def __init__(
        self, config: EvolutionConfig, templates: TemplateSet, seed: int, special_tokens: Sequence[str] = ()
    ) -> None:
        self._config, self._templates, self._seed = config, templates, seed
        self._evidence = Evidence(config)
        self._pool = templates.placebo() if config.writer == "placebo" else ()
        self._guard = Guard(config.max_words, special_tokens)
        self._limits = Limits(config.max_words, config.max_principles, self._guard.check)

    async def breed(
        self, step: int, population: Population, groups: Sequence[Group], tasks: Mapping[int, Task], complete: Completer
    ) -> BreedingReport:
        """Children of the prompts that played `groups`, before the population has counted that batch.

        `tasks` holds at least the problems of the batch, by their index in the split; whatever else it holds is
        guarded too, so the whole training split is best.
        """
        self._guard.learn(tasks)
        shown = shuffled(groups, self._seed, step) if self._config.evidence == "shuffled" else groups
        self._evidence.record(step, shown, tasks)
        match, after = population.preview(groups)
        reflector = Reflector(self._templates, complete, self._seed, step)
        if not match.values:
            refused = Rejection(Reason.NO_MIXED_PROBLEM, "no problem that all prompts played")
            return self._report(step, None, {"mutation": refused, "crossover": refused}, {}, reflector)
        best = population[champion(match, after, self._config)]
        if population.crowded(match):
            refused = Rejection(Reason.CROWDED, "children wait for their first games (evolution.nursery)")
            return self._report(step, best, {"mutation": refused, "crossover": refused}, {}, reflector)
        taken = {fingerprints(m.prompt.principles): m.prompt.id for m in population.members}
        others = [population[p] for p in match.values if p != best.id]
        table = scores(shown)
        rewards = {p: {q: table[p][q] for q in match.problems} for p in match.values}
        crossed, mutated = await asyncio.gather(
            self._cross(step, best, others, rewards, tasks, reflector), self._mutate(step, best, reflector)
        )
        results = {"crossover": crossed, "mutation": mutated}
        if self._pool:
            results = {operator: self._placebo(step, operator, best, result) for operator, result in results.items()}
        return self._report(step, best, results, taken, reflector)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"evidence": self._evidence.to_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down."""
        self._evidence = Evidence.from_json(state["evidence"], self._config)

    async def _mutate(self, step: int, best: SystemPrompt, reflector: Reflector) -> Child | Rejection:
        if not self._config.mutate:
            return Rejection(Reason.SWITCHED_OFF)
        contrasts = self._evidence.contrasts(step, best.id)
        return await mutate(best, contrasts, reflector, self._config, self._limits)

    async def _cross(
        self,
        step: int,
        best: SystemPrompt,
        others: Sequence[SystemPrompt],
        rewards: Rewards,
        tasks: Mapping[int, Task],
        reflector: Reflector,
    ) -> Child | Rejection:
        if not self._config.crossover_probability:
            return Rejection(Reason.SWITCHED_OFF)
        if generator(self._seed, "crossover", step).random() >= self._config.crossover_probability:
            return Rejection(Reason.NOT_DRAWN)
        return await cross(best, others, rewards, tasks, reflector, self._config, self._limits)

    def _placebo(
        self, step: int, operator: str, best: SystemPrompt, result: Child | Rejection
    ) -> Child | Rejection:
        if isinstance(result, Rejection):
            return result
        return placebo(result, best, self._pool, generator(self._seed, "placebo", step, operator))

    def _report(
        self,
        step: int,
        best: SystemPrompt | None,
        results: Mapping[str, Child | Rejection],
        taken: dict[frozenset[str], str],
        reflector: Reflector,
    ) -> BreedingReport:
        """Let through the children that are new, in order, and write down what happened to the others."""
        children, outcomes = [], []
        for operator, result in results.items():
            event: dict[str, Any] = {"event": operator, "step": step, "parent": best.id if best else None}
            if isinstance(result, Child) and best is not None:
                result = _novel(result, best, taken)
                if isinstance(result, Rejection):
                    reflector.rejections[result.reason] += 1
            if isinstance(result, Rejection):
                event |= {"outcome": result.reason.value, "detail": excerpt(result.detail, 400)}
            else:
                children.append(result)
                taken[fingerprints(result.principles)] = f"the {operator} child"
                event |= {"outcome": "child", "parents": list(result.parents)}
                event["principles"] = {p.id: p.text for p in result.principles}
            outcomes.append(event)
        calls = sorted(reflector.events, key=lambda e: (e["stage"], e["index"], e["event"]))
        counts = {reason.value: count for reason, count in sorted(reflector.rejections.items())}
        events = [{"step": step, **event} for event in calls] + outcomes
        return BreedingReport(tuple(children), events, reflector.calls, counts, reflector.repaired)


def champion(match: Match, after: Mapping[str, Rating], config: EvolutionConfig) -> str:
    """Who becomes a parent: the best mean skill once this batch is counted, or the best mean reward of the batch.

    The posterior remembers earlier batches; it is the mean and not the lower bound that counts, because the root plays
    most and would otherwise stay the parent for ever by being certain. Ties go to the better batch, then to the newer.
    """
    skill = {p: round(after[p].mu, DIGITS) for p in match.values}
    if config.parent == "batch":
        return max(skill, key=lambda p: (match.values[p], skill[p], p))
    return max(skill, key=lambda p: (skill[p], match.values[p], p))


def _novel(child: Child, best: SystemPrompt, taken: Mapping[frozenset[str], str]) -> Child | Rejection:
    texts = fingerprints(child.principles)
    if texts == fingerprints(best.principles):
        return Rejection(Reason.UNCHANGED, "the edits leave the principles as they were")
    if texts in taken:
        return Rejection(Reason.DUPLICATE_PROMPT, f"these principles are those of {taken[texts]}")
    return child
