"""The population: system prompts with their ratings, from the root on.

Members are kept in order of birth. The root is never dropped, nor is the elite (the best lower bound among those that
have played) where the configuration has an elite slot. All randomness is keyed by (seed, step): nothing to save.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution import beliefs, ratings, selection
from espl_train.evolution.frontier import Frontier
from espl_train.evolution.lineage import Lineage
from espl_train.evolution.prompts import Child, Principle, Rating, SystemPrompt
from espl_train.randomness import generator
from espl_train.records import Group

FIRST = "p0000"      # the root; in a run with several populations after the name of its own, as in "math:p0000"


@dataclass(frozen=True, slots=True)
class Member:
    """A prompt of the population. `games` counts the matches that it played against somebody."""

    prompt: SystemPrompt
    rating: Rating
    games: int = 0


class Population:
    """All living prompts, and the `lineage` of all there were. Grows by `add`, learns by `rate`, plays by `select`."""

    def __init__(self, evolution: EvolutionConfig, rating: RatingConfig, seed: int, name: str = "") -> None:
        self._evolution, self._rating, self._seed = evolution, rating, seed
        principles = tuple(Principle(f"G{i}", text) for i, text in enumerate(evolution.root, 1))
        root = SystemPrompt(f"{name}:{FIRST}" if name else FIRST, principles, last_id=len(principles))
        self._prompts: dict[str, SystemPrompt] = {root.id: root}
        self.lineage = Lineage()
        self.lineage.add(root, {})
        self._games: dict[str, int] = {root.id: 0}
        self._beliefs = beliefs.start(rating, root.id)
        self._frontier = Frontier(evolution.pareto_window if evolution.pareto_scores == "batch" else math.inf)
        self._born = 1
        self._aside: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._prompts

    def __getitem__(self, prompt: str) -> SystemPrompt:
        return self._prompts[prompt]

    @property
    def members(self) -> tuple[Member, ...]:
        """Everybody, oldest first."""
        return tuple(Member(p, self.rating(i), self._games[i]) for i, p in self._prompts.items())

    @property
    def root(self) -> SystemPrompt:
        """The prompt that everything descends from."""
        return next(iter(self._prompts.values()))

    @property
    def elite(self) -> SystemPrompt:
        """The best lower bound among those that have played; the root while nobody has."""
        return self[self.top(1)[0]]

    @property
    def aside(self) -> Mapping[str, str]:
        """Who is set aside, and why: living prompts that neither play nor are elite, best or parent."""
        return dict(self._aside)

    def set_aside(self, prompt: str, why: str) -> None:
        """Take a living prompt out of the game; it keeps its rating. The root always plays."""
        if prompt in self and prompt != self.root.id:
            self._aside[prompt] = why

    def readmit(self, prompt: str) -> None:
        """Let a prompt that was set aside play again."""
        self._aside.pop(prompt, None)

    def rating(self, prompt: str) -> Rating:
        """The current rating of a living prompt."""
        return self._beliefs.rating(prompt)

    def games(self, prompt: str) -> int:
        """How many matches a living prompt has played."""
        return self._games[prompt]

    def crowded(self, match: ratings.Match) -> bool:
        """Whether, once `match` is counted, so many children wait for their first games that none should be born."""
        enough = max(self._evolution.juvenile_games, 1)
        played = match.ranks if len(match.ranks) > 1 else ()
        out = {self.root.id, *self._aside}
        young = sum(games + (p in played) < enough for p, games in self._games.items() if p not in out)
        return 0 < self._evolution.nursery <= young

    @property
    def room(self) -> int:
        """How many children can be born at once so that none of them has to make room for another."""
        return self._evolution.capacity - 1 - self._evolution.elite

    def top(self, count: int) -> list[str]:
        """The best `count` ids, best first, newer before older: by lower bound among those that have played others.

        Where all are scored on the same validation problems (`pareto_scores`), the mean there decides. Where nobody has
        played anybody, and who was accepted has beaten its parent in a trial, the newest are the best.
        """
        active = [m for m in reversed(self.members) if m.prompt.id not in self._aside]
        means = self._frontier.means() if self._evolution.pareto_scores == "validation" else {}
        if known := [m.prompt.id for m in active if m.prompt.id in means]:
            return sorted(known, key=lambda p: means[p], reverse=True)[:count]
        played = [m for m in active if m.games]
        if not played and self._evolution.acceptance == "minibatch":
            return [m.prompt.id for m in active[:count]]
        ranked = sorted(played or active[-1:], key=lambda m: m.rating.lower(), reverse=True)
        return [m.prompt.id for m in ranked[:count]]

    def best(
        self, choice: Literal["validation", "lower_bound", "latest"], scores: Mapping[str, float] | None = None
    ) -> SystemPrompt:
        """Which prompt is "the" prompt. `scores` are mean validation scores; without any the lower bound decides."""
        if choice == "latest":
            return [m for m in self.members if m.prompt.id not in self._aside][-1].prompt
        known = {p: s for p, s in (scores or {}).items() if p in self and p not in self._aside}
        if choice == "lower_bound" or not known:
            return self.elite
        return self[max(known, key=lambda p: (known[p], self.rating(p).lower(), p))]

    def select(self, step: int, places: int, samples: int) -> dict[str, int]:
        """Who plays in `step`: prompt → samples per problem, `places` × `samples` in all."""
        ids = list(self._prompts)
        skills = self._beliefs.draw(ids, generator(self._seed, "skills", step))
        wins = self._frontier.wins([i for i in ids if i not in self._aside])
        contenders = [
            selection.Contender(i, self.rating(i), self._games[i], skill, wins[i])
            for i, skill in zip(ids, skills.tolist(), strict=True)
            if i in wins
        ]
        random = generator(self._seed, "select", step)
        chosen = selection.select(contenders, self.root.id, self.elite.id, places, self._evolution, random)
        return selection.allocate(chosen, places, samples)

    def preview(self, groups: Sequence[Group]) -> tuple[ratings.Match, dict[str, Rating]]:
        """The match that a batch is, and everybody's rating once it is counted. Changes nothing."""
        match, after = self._count(groups)
        return match, {prompt: after.rating(prompt) for prompt in self._prompts}

    def rate(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Count a batch. Returns what happened, for the log: values, ranks, and the ratings of the players."""
        match, self._beliefs = self._count(groups)
        if self._evolution.pareto_scores == "batch":
            self._frontier.record(match.step, match.rewards)
        self.lineage.observe(match.rewards)
        contested = len(match.ranks) > 1
        for prompt in match.ranks if contested else ():
            self._games[prompt] += 1
        return {
            "values": dict(match.values),
            "ranks": dict(match.ranks) if contested else {},
            "ratings": {p: asdict(self.rating(p)) for p in match.values},
            **self._beliefs.details(),
        }

    def _count(self, groups: Sequence[Group]) -> tuple[ratings.Match, ratings.Beliefs]:
        match = ratings.match([g for g in groups if g.prompt in self], self._rating)
        return match, self._beliefs.after(match)

    def score(self, step: int, groups: Sequence[Group]) -> None:
        """Take in how prompts did on the validation problems, for a frontier that is made of them."""
        if self._evolution.pareto_scores == "validation":
            self._frontier.record(step, ratings.scores(groups))

    def add(self, children: Sequence[Child], step: int) -> tuple[SystemPrompt, ...]:
        """Insert children in the given order; what is believed of them comes from the parents as they are now."""
        born = tuple(self._insert(child, step) for child in children)
        while len(self) > self._evolution.capacity:
            safe = {self.root.id, self.elite.id if self._evolution.elite else self.root.id}
            oldest = next((i for i in self._prompts if i not in safe), None)
            if oldest is None:
                break
            self._drop(oldest)
        return born

    def _insert(self, child: Child, step: int) -> SystemPrompt:
        own = f"{self.root.id.removesuffix(FIRST)}p{self._born:04d}"
        prompt = SystemPrompt(own, child.principles, child.operator, child.parents, born=step, last_id=child.last_id)
        self._born += 1
        self._prompts[prompt.id], self._games[prompt.id] = prompt, 0
        living = [parent for parent in child.parents if parent in self]
        self._beliefs = self._beliefs.born(prompt.id, () if child.operator == "immigrant" else living)
        self.lineage.add(prompt, child.origins)
        return prompt

    def _drop(self, prompt: str) -> None:
        del self._prompts[prompt], self._games[prompt]
        self.readmit(prompt)
        self._frontier.forget(prompt)
        self._beliefs = self._beliefs.without(prompt)

    def to_json(self) -> dict[str, Any]:
        """Plain data; floats survive `json` exactly."""
        return {
            "born": self._born,
            "members": [asdict(m) for m in self.members],
            "beliefs": beliefs.save(self._beliefs, self._rating),
            "frontier": self._frontier.to_json(),
            "lineage": self.lineage.to_json(),
            "aside": dict(self._aside),
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], evolution: EvolutionConfig, rating: RatingConfig, seed: int
    ) -> Population:
        """The population that `to_json` wrote down. Raises EsplError where its ratings are of another kind."""
        population = cls(evolution, rating, seed)
        members = [_member(m) for m in data["members"]]
        population._born = data["born"]
        population._prompts = {m.prompt.id: m.prompt for m in members}
        population._games = {m.prompt.id: m.games for m in members}
        known = {m.prompt.id: m.rating for m in members}
        population._beliefs = beliefs.restore(data.get("beliefs"), known, rating, population.root.id)
        population._frontier = Frontier.from_json(data.get("frontier", ()), population._frontier.window)
        population.lineage = Lineage.from_json(data["lineage"])
        population._aside = dict(data.get("aside", {}))
        return population


def _member(data: Mapping[str, Any]) -> Member:
    prompt = dict(data["prompt"])
    prompt["principles"] = tuple(Principle(**p) for p in prompt["principles"])
    prompt["parents"] = tuple(prompt["parents"])
    return Member(SystemPrompt(**prompt), Rating(**data["rating"]), data["games"])
