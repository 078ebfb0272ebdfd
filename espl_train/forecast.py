"""What a run is going to play and to ask for, from its settings and the sizes of its problem sets alone.

All of it are upper bounds, reached where every draw falls so, every problem has a contrast and every reply needs to be
repaired; what settings fix altogether (the rollouts of training, without dynamic sampling) is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from espl_train import schedule
from espl_train.config import Config
from espl_train.evolution.templates import TemplateSet
from espl_train.problems import Part

Sizes = Mapping[Part, int]      # problems of an environment


@dataclass(frozen=True)
class Forecast:
    """Of the run with these settings; `sizes` are those of its environments, in their order."""

    config: Config
    sizes: Sequence[Sizes]
    templates: TemplateSet

    @cached_property
    def step(self) -> int:
        """Rollouts of training in one iteration, the first round alone."""
        rollout = self.config.rollout
        return rollout.prompts * rollout.samples * min(rollout.problems, sum(size["train"] for size in self.sizes))

    @property
    def rounds(self) -> int:
        """Rounds of an iteration (`rollout.dynamic_rounds`)."""
        return 1 + self.config.rollout.dynamic_rounds

    @cached_property
    def steps(self) -> int:
        """Iterations: every one plays a first round at least, so a budget bounds them, too."""
        rollout, budget = self.config.rollout, self.config.budget_rollouts
        if budget is None:
            return self.config.steps
        problems = min(rollout.problems, *(size["train"] for size in self.sizes))
        return min(self.config.steps, math.ceil(budget / (rollout.prompts * rollout.samples * problems)))

    @cached_property
    def breeding(self) -> int:
        """Iterations in which prompts breed."""
        return min(schedule.counts(self.config)[0], self.steps)

    @property
    def training(self) -> int:
        """Rollouts of training in the whole run."""
        return self._within_budget(self.steps * self.step * self.rounds)

    @cached_property
    def trials(self) -> Mapping[str, int]:
        """Rollouts of trials in one iteration that breeds, by what they are for; empty where none are played."""
        config, evolution, rollout = self.config, self.config.evolution, self.config.rollout
        if not self.breeding:
            return {}
        found = {}
        problems = min(rollout.problems, sum(size["train"] for size in self.sizes)) * self.rounds
        if evolution.prune_probability:
            half = self.step * self.rounds // 2
            found["leaving principles out"] = self._shared(half, evolution.max_principles + 1) + self._shared(half, 2)
        if evolution.acceptance != "none":
            most = min(problems, (evolution.acceptance_problems or problems) * len(self.sizes))
            samples = evolution.acceptance_samples or rollout.prompts * rollout.samples
            found["acceptance"] = self._written * most * samples
        if evolution.pareto_scores == "validation":
            born = self._written + (evolution.prune_probability > 0)
            found["first scores"] = born * self._evaluated("validation", config.evaluation.problems)
        return found

    @property
    def tried(self) -> int:
        """Rollouts of trials in the whole run."""
        return self._within_budget(self.breeding * sum(self.trials.values()))

    @property
    def check(self) -> int:
        """Rollouts of comparing one prompt with twins (`evolution.twin_problems`)."""
        return 4 * self.config.evolution.twin_problems * self.config.rollout.samples

    @cached_property
    def validations(self) -> int:
        """How often the validation problems are played: at the start, on the way, at the end, and where the weights
        are to learn with one prompt alone."""
        every = self.config.evaluation.every
        return 2 + ((self.steps - 1) // every if every else 0) + self._turns

    @property
    def validation(self) -> int:
        """Rollouts of all validations, checks with twins aside."""
        evaluation = self.config.evaluation
        final = 1 + self._turns
        on_the_way, last = (1, 1) if self.config.mode == "rl" else (2, 1 + max(evaluation.prompts, 1))
        prompts = 1 + on_the_way * (self.validations - 1 - final) + last * final
        return prompts * self._evaluated("validation", evaluation.problems)

    @property
    def test(self) -> int:
        """Rollouts of the test at the end: base weights and trained ones, root prompt and best one."""
        prompts = 1 if self.config.mode == "rl" else 2
        weights = 1 if self.config.mode == "evolution" else 2
        return prompts * weights * self._evaluated("test", self.config.evaluation.test_problems)

    @property
    def rollouts(self) -> int:
        """Of the whole run, checks with twins aside."""
        played = self._within_budget(self.steps * self.step * self.rounds + self.breeding * sum(self.trials.values()))
        return played + self.validation + self.test

    @cached_property
    def calls(self) -> Mapping[str, int]:
        """Calls of reflection in one iteration that breeds, by stage, repairs included; empty where nobody is asked."""
        evolution = self.config.evolution
        if not self.breeding:
            return {}
        repaired = 1 + self.templates.has("repair")
        readers = evolution.mutate * evolution.mutations + (evolution.immigrant_probability > 0)
        met = self.config.rollout.problems * self.rounds * max(evolution.evidence_window, 1)
        shown = [min(evolution.cases * evolution.critiques, met, size["train"]) for size in self.sizes]
        critiques = sum(math.ceil(count / evolution.cases) for count in shown)
        found = {
            "summary": sum(shown) * evolution.attempts * (self.templates.has("summary") and readers > 0),
            "critique": critiques * readers * repaired,
            "revision": len(shown) * readers * repaired * self.templates.has("revision"),
            "crossover": len(shown) * repaired * (evolution.crossover_probability > 0),
        }
        return {stage: count for stage, count in found.items() if count}

    @property
    def asked(self) -> int:
        """Calls of reflection in the whole run."""
        calls, most = self.breeding * sum(self.calls.values()), self.config.reflection.max_calls
        return calls if most is None else min(calls, most)

    @property
    def tokens(self) -> int:
        """Sampled in the whole run, in episodes and in replies, checks with twins aside."""
        replies = self.asked * self.config.evolution.reflection_max_new_tokens
        return self.rollouts * self.config.rollout.max_total_tokens + replies

    @property
    def _written(self) -> int:
        """Children of one island in one iteration that nobody has played before they are written."""
        evolution = self.config.evolution
        migrants = len(self.sizes) > 1 and evolution.migration > 0
        rare = (evolution.crossover_probability > 0) + (evolution.immigrant_probability > 0) + migrants
        return evolution.mutate * evolution.mutations + rare

    @property
    def _turns(self) -> int:
        """How often the weights are handed over to one prompt that has to be chosen first."""
        asked = self.config.evaluation.choice == "validation" or self.config.evolution.twin_problems
        return schedule.handovers(self.config, self.steps) if asked else 0

    def _evaluated(self, part: Part, most: int) -> int:
        """Rollouts of one prompt on every environment's problems of `part`."""
        return sum(min(most, size[part]) for size in self.sizes) * self.config.evaluation.samples

    def _shared(self, rollouts: int, least: int) -> int:
        """`rollouts` divided among the islands, none of which plays fewer than `least`."""
        return max(rollouts, least) if len(self.sizes) == 1 else rollouts + len(self.sizes) * least

    def _within_budget(self, rollouts: int) -> int:
        """What a budget leaves of them: it ends the run after the step that reaches it."""
        if self.config.budget_rollouts is None:
            return rollouts
        step = self.step * self.rounds + sum(self.trials.values())
        return min(rollouts, self.config.budget_rollouts - 1 + step)


def rows(config: Config, sizes: Sequence[Sizes], templates: TemplateSet) -> Iterator[tuple[str, str]]:
    """What a run is going to cost, for the plan."""
    known, rollout = Forecast(config, sizes, templates), config.rollout
    shape = f"{rollout.prompts} prompts x {rollout.problems} problems x {rollout.samples} samples"
    if config.mode == "rl":
        shape = f"the root prompt x {rollout.problems} problems x {rollout.prompts * rollout.samples} samples"
    yield "mode", config.mode
    if config.schedule != "joint":
        breed, learn = schedule.counts(config)
        yield "schedule", f"{config.schedule}: {breed} steps for prompts, {learn} for weights with one prompt alone"
    tokens = known.step * rollout.max_total_tokens
    yield "each step", f"{known.step:,} rollouts: {shape}, at most {tokens:,} sampled tokens"
    if known.rounds > 1:
        yield "", f"up to {known.rounds} rounds, each for the problems that had no contrast before"
    if known.trials:
        yield "  trials", f"at most {_told('rollouts', known.trials)}, {known.tried:,} in all"
    if known.calls:
        each = f"each of at most {config.evolution.reflection_max_new_tokens:,} sampled tokens"
        yield "  reflection", f"at most {_told('calls', known.calls)}, {known.asked:,} in all, {each}"
    exact = known.rounds == 1 and config.budget_rollouts is None
    few = "" if config.budget_rollouts is None else "at most "
    training = f"{'' if exact else 'at most '}{known.training:,} rollouts"
    tokens = known.training * rollout.max_total_tokens
    yield "all", f"{few}{known.steps:,} steps, {training}, at most {tokens:,} tokens"
    if config.budget_rollouts is not None:
        yield "  budget", f"ends after the step that brings training and trials to {config.budget_rollouts:,} rollouts"
    times = f"{few}{known.validations} times, at most {config.evaluation.problems} problems"
    yield "validation", f"{times}: at most {known.validation:,} rollouts"
    if config.evolution.twin_problems:
        yield "  twins", (
            f"{known.check:,} rollouts more for every prompt that is checked: whoever may become the best one, once, "
            "and at every validation while it is in quarantine"
        )
    yield "final test", f"once, at the end: at most {known.test:,} rollouts"
    besides = ", checks with twins aside" if config.evolution.twin_problems else ""
    yield "in all", f"at most {known.rollouts:,} rollouts and {known.tokens:,} sampled tokens{besides}"


def _told(noun: str, parts: Mapping[str, int]) -> str:
    """As in: 83 calls a step (64 summary, 19 critique)."""
    return f"{sum(parts.values()):,} {noun} a step ({', '.join(f'{count:,} {name}' for name, count in parts.items())})"
