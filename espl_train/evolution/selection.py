"""Which prompts play in an iteration, and with how many samples each.

A rule is a plain function of the contenders, oldest first; `RULES` names them all. Around the rule stand the slots,
each a setting: the root anchor, juveniles, the elite among the candidates, the newest. Ties go to the newer prompt:
less is known about it. No prompt ever plays twice in one iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from espl_train.config import EvolutionConfig
from espl_train.evolution.prompts import Rating

HARDLY = 1e-300      # a weight that any win outdoes


@dataclass(frozen=True, slots=True)
class Contender:
    """A prompt that may play.

    `skill` is its part of one joint draw from the posterior of all skills, `wins` the problems on which it is the best
    of late.
    """

    id: str
    rating: Rating
    games: int = 0
    skill: float = 0.0
    wins: int = 0


Rule = Callable[[Sequence[Contender], int, EvolutionConfig, np.random.Generator], list[str]]


def select(
    members: Sequence[Contender],
    root: str,
    elite: str,
    places: int,
    config: EvolutionConfig,
    random: np.random.Generator,
) -> list[str]:
    """The ids of at most `places` different prompts, from all members of the population, oldest first.

    The root anchor takes the first place in every batch that has more than one. Juveniles come next, the oldest first;
    one of the places that are left stays with the rule, unless it is the only one. The rule fills the others from the
    newest `window` prompts and the elite slot.
    """
    anchored = [root] if config.root_anchor and (places > 1 or len(members) == 1) else []
    free = places - len(anchored)
    young = [m.id for m in juveniles(members, config) if m.id not in anchored][: max(free - 1, 1)] if free else []
    sure = anchored + young
    pool = candidates([m for m in members if m.id not in sure], config.window, elite if config.elite else None)
    left = places - len(sure)
    chosen = RULES[config.selection](pool, left, config, random) if pool and left else []
    return sure + chosen


def juveniles(members: Sequence[Contender], config: EvolutionConfig) -> list[Contender]:
    """Who is sure of a place: children that have played fewer than `juvenile_games` games, the oldest first.

    `members` is the whole population: its first member is the root, which was never a child.
    """
    return [m for m in members[1:] if m.games < config.juvenile_games]


def candidates(members: Sequence[Contender], window: int, elite: str | None) -> list[Contender]:
    """The newest `window` members, and the elite however old it is."""
    newest = members[-window:]
    return [m for m in members if m in newest or m.id == elite]


def allocate(ids: Sequence[str], places: int, samples: int) -> dict[str, int]:
    """Samples per problem for each prompt: `places` × `samples` in all, shared out evenly, the first ones get the rest.

    With fewer prompts than places the spare samples go to those that are there.
    """
    each, rest = divmod(places * samples, len(ids))
    return {prompt: each + (i < rest) for i, prompt in enumerate(ids)}


def uniform(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """The newest, and the others uniformly."""
    if not _newest_plays(config):
        return _draw(contenders, places, random)
    *others, newest = contenders
    return [newest.id, *_draw(others, places - 1, random)]


def lucb(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """The champion by lower bound, challengers by upper bound; the newest takes the last place if absent."""
    del random
    champion = _ranked(contenders, lambda c: c.rating.lower())[0]
    challengers = _ranked([c for c in contenders if c != champion], lambda c: c.rating.upper(config.explore))
    return _with_newest([champion, *challengers][:places], contenders, config)


def ucb(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """The highest upper bounds; the newest takes the last place if absent."""
    del random
    return _with_newest(_ranked(contenders, lambda c: c.rating.upper(config.explore))[:places], contenders, config)


def softmax(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """Draws without replacement, p ∝ exp((mu + lambda·sigma) / T), by the Gumbel-top-k identity: nothing underflows."""
    logits = np.array([c.rating.upper(config.explore) for c in contenders]) / config.temperature
    return _gumbel(contenders, logits, places, random)


def ucb_uniform(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """The single highest upper bound, the others uniformly."""
    first = _ranked(contenders, lambda c: c.rating.upper(config.explore))[0]
    return [first.id, *_draw([c for c in contenders if c != first], places - 1, random)]


def thompson(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """The best of one joint draw from the posterior: each set of players as often as it is believed to be the best
    (Thompson 1933)."""
    del config, random
    return [c.id for c in _ranked(contenders, lambda c: c.skill)[:places]]


def pareto(
    contenders: Sequence[Contender], places: int, config: EvolutionConfig, random: np.random.Generator
) -> list[str]:
    """Draws without replacement, p ∝ the problems that a prompt is best on; who is best on none comes after those, all
    alike; the newest takes the last place if absent (nobody wins without having played)."""
    logits = np.log([max(c.wins, HARDLY) for c in contenders])
    known = {c.id: c for c in contenders}
    return _with_newest([known[i] for i in _gumbel(contenders, logits, places, random)], contenders, config)


RULES: dict[str, Rule] = {
    "uniform": uniform, "lucb": lucb, "ucb": ucb, "softmax": softmax, "ucb_uniform": ucb_uniform, "thompson": thompson,
    "pareto": pareto,
}  # fmt: skip


def _ranked(contenders: Sequence[Contender], score: Callable[[Contender], float]) -> list[Contender]:
    newest_first = contenders[::-1]
    return sorted(newest_first, key=score, reverse=True)


def _draw(contenders: Sequence[Contender], count: int, random: np.random.Generator) -> list[str]:
    order = random.permutation(len(contenders))[: max(count, 0)]
    return [contenders[int(i)].id for i in order]


def _gumbel(
    contenders: Sequence[Contender], logits: np.ndarray, places: int, random: np.random.Generator
) -> list[str]:
    """Draws without replacement, p ∝ exp(logit)."""
    order = np.argsort(-(logits + random.gumbel(size=len(logits))), kind="stable")
    return [contenders[int(i)].id for i in order[:places]]


def _newest_plays(config: EvolutionConfig) -> bool:
    """Juveniles have places of their own: with them the newest needs no other."""
    return config.newest and not config.juvenile_games


def _with_newest(
    chosen: Sequence[Contender], contenders: Sequence[Contender], config: EvolutionConfig
) -> list[str]:
    """The newest takes the last place. With two places only (the root anchor has the third) it does so until it has
    played; after that it must be worth it, or no challenger would ever play."""
    newest = contenders[-1]
    waits = _newest_plays(config) and (len(chosen) > 2 or not newest.games)
    kept = [*chosen[:-1], newest] if waits and newest not in chosen else chosen
    return [c.id for c in kept]
