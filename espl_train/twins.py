"""Twins: before a prompt may become the best one, it plays problems that it has seen and others that it cannot know.

The others are renumbered twins where the environment makes such, else problems of the train split that no iteration has
dealt yet. Where there are none left either, nothing can be checked, and the run says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from espl_train.config import LEAST_TWINS
from espl_train.evolution.guards.quarantine import Finding, ancestry, compare
from espl_train.island import Island
from espl_train.trials import Trials


@dataclass(frozen=True, slots=True)
class Check:
    """One prompt's check; without a `finding` there was nothing to compare."""

    prompt: str
    finding: Finding | None
    held: bool
    before: bool      # it was in quarantine already

    def facts(self) -> dict[str, Any]:
        """For the log."""
        found = asdict(self.finding) if self.finding else {"finding": None}
        return {"prompt": self.prompt, "held": self.held, **found}

    def note(self) -> str:
        """What a person should hear; nothing of a prompt that is above suspicion."""
        if self.finding is None:
            return f"{self.prompt} could not be checked for answers learnt by heart: too few problems, or none unseen"
        if self.held:
            return f"{self.prompt} is in quarantine: {self.finding}"
        return f"{self.prompt} leaves quarantine: {self.finding}" if self.before else ""


async def examine(island: Island, step: int, most: int, trials: Trials) -> list[Check]:
    """Check whoever is about to be among the `most` best, those that move up included, and those in quarantine; set
    them aside or readmit them.

    Costs 4 × `twin_problems` × `rollout.samples` rollouts for every prompt; nobody is checked twice in a step.
    """
    people, checks = island.population, list[Check]()
    alive = [m.prompt.id for m in people.members]
    while due := island.quarantine.due([p for p in island.candidates(most) if p != people.root.id], alive, step):
        checks += [await _check(island, prompt, trials) for prompt in due]
    return checks


async def _check(island: Island, prompt: str, trials: Trials) -> Check:
    people, quarantine = island.population, island.quarantine
    before = prompt in quarantine.held
    finding = await _compare(island, prompt, trials)
    held = quarantine.judge(prompt, finding) if finding else before
    if finding and held:
        people.set_aside(prompt, f"quarantine: {finding}")
    elif finding and before:
        people.readmit(prompt)
    return Check(prompt, finding, held, before)


async def _compare(island: Island, prompt: str, trials: Trials) -> Finding | None:
    count, samples = island.config.evolution.twin_problems, island.config.rollout.samples
    seen = island.breeder.shown(ancestry(prompt, island.population.lineage))[:count]
    twins = island.sets.train.twins
    others = seen if twins else island.deck.untouched(count)
    if min(len(seen), len(others)) < LEAST_TWINS:
        return None
    root = island.population.root
    pair = {prompt: island.population[prompt].principles, root.id: root.principles}
    shown = await trials(pair, seen, samples)
    fresh = await trials(pair, others, samples, problems=twins)
    return compare((shown[prompt], shown[root.id]), (fresh[prompt], fresh[root.id]), twins is not None)
