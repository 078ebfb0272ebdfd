"""Ladders: independent Gaussian ratings that learn from ranks alone, by TrueSkill or by OpenSkill.

TrueSkill (Herbrich, Minka, Graepel 2006; the `trueskill` package) and OpenSkill (Weng and Lin, JMLR 12, 2011; the
`openskill` package) share their scale and the meaning of mu, sigma, beta and tau.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from espl_envs.core.errors import MissingExtra
from espl_train.config import RatingConfig
from espl_train.evolution.prompts import Rating
from espl_train.evolution.ratings import Match

if TYPE_CHECKING:
    import trueskill
    from openskill.models import BradleyTerryFull

LEAST_DRAW, MOST_DRAW = 1e-3, 0.999     # TrueSkill has no finite answer at 0 and 1
FARTHEST = 300.0                        # betas: OpenSkill takes exponentials of differences

Update = Callable[[Sequence[Rating], Sequence[int], RatingConfig], list[Rating]]


@dataclass(frozen=True)
class Ladder:
    """`Beliefs` that are one rating per prompt, each independent of the others."""

    config: RatingConfig
    ratings: Mapping[str, Rating]

    def rating(self, prompt: str) -> Rating:
        """As it stands."""
        return self.ratings[prompt]

    def after(self, match: Match) -> Ladder:
        """Whoever did not play, and everybody where there was no opponent, stays as they were."""
        return replace(self, ratings=update(self.ratings, match, self.config))

    def born(self, child: str, parents: Sequence[str]) -> Ladder:
        """With the child's inherited rating."""
        rating = inherit([self.ratings[p] for p in parents], self.config)
        return replace(self, ratings={**self.ratings, child: rating})

    def without(self, prompt: str) -> Ladder:
        """The others do not mind."""
        return replace(self, ratings={p: r for p, r in self.ratings.items() if p != prompt})

    def draw(self, prompts: Sequence[str], random: np.random.Generator) -> np.ndarray:
        """One draw from each rating. [len(prompts)]"""
        known = [self.ratings[p] for p in prompts]
        return np.array([r.mu for r in known]) + np.array([r.sigma for r in known]) * random.standard_normal(len(known))

    def details(self) -> dict[str, Any]:
        """Nothing beside the ratings."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """The ratings say it all."""
        return {}


def update(ratings: Mapping[str, Rating], result: Match, config: RatingConfig) -> dict[str, Rating]:
    """The ratings after a match, by the update of `config.kind`."""
    players = list(result.ranks)
    if len(players) < 2:
        return dict(ratings)
    after = UPDATES[config.kind]([ratings[p] for p in players], [result.ranks[p] for p in players], config)
    return {**ratings, **dict(zip(players, after, strict=True))}


def by_trueskill(ratings: Sequence[Rating], ranks: Sequence[int], config: RatingConfig) -> list[Rating]:
    """A free-for-all by the `trueskill` package."""
    trueskill = _trueskill()
    after = rate_teams([(trueskill.Rating(r.mu, r.sigma),) for r in ratings], ranks, config)
    return [Rating(float(team[0].mu), float(team[0].sigma)) for team in after]


def by_openskill(ratings: Sequence[Rating], ranks: Sequence[int], config: RatingConfig) -> list[Rating]:
    """A free-for-all by the `openskill` package: Weng and Lin's Bradley-Terry model over all pairs.

    The update knows differences of means only. It is computed from the best one down, differences beyond `FARTHEST`
    betas as if they were that, so that no exponential overflows.
    """
    model = openskill_model(config)
    top = max(r.mu for r in ratings)
    means = [max(r.mu - top, -FARTHEST * config.beta) for r in ratings]
    teams = [[model.rating(mu, r.sigma)] for mu, r in zip(means, ratings, strict=True)]
    after = model.rate(teams, ranks=[float(rank) for rank in ranks])
    return [
        Rating(r.mu + float(team[0].mu - mu), float(team[0].sigma))
        for r, mu, team in zip(ratings, means, after, strict=True)
    ]


UPDATES: dict[str, Update] = {"trueskill": by_trueskill, "openskill": by_openskill}


def inherit(parents: Sequence[Rating], config: RatingConfig) -> Rating:
    """The rating of a child: the parents' precision-weighted mean, and an uncertainty. Without parents a newcomer's.

    With one parent (mutation) sigma² = sigma_p² + delta². With several (crossover) the parents' part is 1/Σ(1/sigma²)
    as `reference`, which treats their errors as independent; `conservative` treats them as one and the same error (they
    played the same games), so that no child is born more certain than its most certain parent.
    """
    if not parents:
        return Rating(config.mu, config.sigma)
    first, weights = parents[0], [1 / p.sigma**2 for p in parents]
    total = math.fsum(weights)
    mu = first.mu + math.fsum(w * (p.mu - first.mu) for w, p in zip(weights, parents, strict=True)) / total
    sigma = first.sigma + math.fsum(w * (p.sigma - first.sigma) for w, p in zip(weights, parents, strict=True)) / total
    variance = 1 / total if config.inheritance == "reference" else sigma**2
    return Rating(mu, math.sqrt(variance + config.delta_sigma**2))


def rate_teams(
    teams: Sequence[tuple[trueskill.Rating, ...]], ranks: Sequence[int] | None, config: RatingConfig, **options: Any
) -> list[tuple[trueskill.Rating, ...]]:
    """`trueskill`'s update; a result too surprising for doubles is computed once more with many digits."""
    try:
        return environment(config).rate(list(teams), ranks, **options)
    except (FloatingPointError, ZeroDivisionError, OverflowError):
        return environment(config, "mpmath").rate(list(teams), ranks, **options)


def environment(config: RatingConfig, backend: str | None = None) -> trueskill.TrueSkill:
    """The TrueSkill environment of a configuration."""
    draw = min(max(config.draw_probability, LEAST_DRAW), MOST_DRAW)
    return _environment(config.mu, config.sigma, config.beta, config.tau, draw, backend)


@lru_cache(maxsize=16)
def _environment(
    mu: float, sigma: float, beta: float, tau: float, draw: float, backend: str | None
) -> trueskill.TrueSkill:
    return _trueskill().TrueSkill(mu, sigma, beta, tau, draw, backend)


def openskill_model(config: RatingConfig) -> BradleyTerryFull:
    """The OpenSkill model of a configuration."""
    return _openskill_model(config.mu, config.sigma, config.beta, config.tau)


@lru_cache(maxsize=16)
def _openskill_model(mu: float, sigma: float, beta: float, tau: float) -> BradleyTerryFull:
    return _openskill().BradleyTerryFull(mu=mu, sigma=sigma, beta=beta, tau=tau)


def _trueskill() -> Any:
    try:
        import trueskill
    except ImportError:
        raise MissingExtra("train", "rating.kind trueskill") from None
    return trueskill


def _openskill() -> Any:
    try:
        import openskill.models
    except ImportError:
        raise MissingExtra("openskill", "rating.kind openskill") from None
    return openskill.models


PACKAGES: dict[str, Callable[[], Any]] = {"trueskill": _trueskill, "openskill": _openskill}
