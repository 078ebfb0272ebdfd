"""Crossover: the best prompt, enriched with what made other prompts win single problems.

Compared is where prompts met: on the problems of the last iterations (`evolution.evidence_window`), because one batch
holds too few that any two of them differ on. One call sees the sets side by side under qualified ids ("B.G3") and
answers with operations on set A alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig
from espl_train.evolution.edits import Edited, Limits, Operation, apply, fingerprint, qualified, unqualify
from espl_train.evolution.encounters import Encounter
from espl_train.evolution.prompts import Child, Origin, Principle, SystemPrompt
from espl_train.evolution.reflection import Reflector
from espl_train.evolution.rejections import Reason, Rejection

LEAST_OPERATIONS = 8
MOST_SETS = 5               # side by side in one call, set A included
MOST_VICTORIES = 8          # shown per set, the surest first
GRID = (np.arange(2000) + 0.5) / 2000
QUALIFIED = re.compile(r"\b([A-Z])\.([A-Za-z]*\d{1,9})\b")


@dataclass(frozen=True, slots=True)
class Score:
    """How one set did on one problem."""

    name: str
    mean: float
    count: int


@dataclass(frozen=True, slots=True)
class Victory:
    """A problem that a set won, and how the sets that met there did on it."""

    question: str
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A prompt as the crossover template sees it: `name` "A", "B" …, principles under qualified ids.

    `mean` is its mean reward over the `problems` on which it met set A, `base` that of set A on the same problems.
    `wins` counts its victories; `victories` are the surest of them.
    """

    name: str
    prompt: str
    principles: tuple[Principle, ...]
    mean: float
    base: float
    problems: int
    wins: int
    victories: tuple[Victory, ...]

    @property
    def won(self) -> list[str]:
        """The questions of the victories."""
        return [victory.question for victory in self.victories]


@dataclass(frozen=True, slots=True)
class Win:
    """Who won an encounter, and how sure that is."""

    prompt: str
    encounter: Encounter
    chance: float


async def cross(
    best: SystemPrompt,
    others: Sequence[SystemPrompt],
    encounters: Sequence[Encounter],
    tasks: Mapping[int, Task],
    reflector: Reflector,
    config: EvolutionConfig,
    limits: Limits,
) -> Child | Rejection:
    """A child of `best` and of the other prompts that won a problem against it, or the reason why there is none."""
    if not encounters:
        return Rejection(Reason.NO_RIVAL, f"{best.id} met no other living prompt")
    sets = prompt_sets(best, others, encounters, config, tasks)
    if len(sets) < 2:
        return Rejection(
            Reason.NO_OTHER_WINNER, f"no prompt but {best.id} won any of the {len(encounters)} problems where they met"
        )
    foreign = {p.id.partition(".")[2] for s in sets[1:] for p in s.principles}

    def accept(operations: tuple[Operation, ...]) -> Edited | Rejection:
        own = unqualify(operations, "A", [p.id for p in best.principles], foreign)
        return own if isinstance(own, Rejection) else apply(best.principles, own, limits, best.last_id)

    values = {"sets": sets, "max_words": config.max_words, "max_tokens": config.max_prompt_tokens}
    count = max(config.max_operations, LEAST_OPERATIONS)
    edited = await reflector.plan("crossover", 0, values, accept, count, ("add", "modify", "remove"))
    if isinstance(edited, Rejection):
        return edited
    if edited.principles == best.principles:
        return Rejection(Reason.NO_CONTRAST, "the comparison gave nothing to change")
    texts = {p.id: p.text for p in edited.principles}
    origins = {i: credited(o, texts[i], sets[1:]) for i, o in qualified(edited.origins, best.id).items()}
    return Child(edited.principles, "crossover", tuple(s.prompt for s in sets), edited.last_id, origins)


def winners(encounters: Sequence[Encounter], best: str, config: EvolutionConfig) -> list[Win]:
    """Who won which encounter; nobody where it is undecided.

    `posterior`: another prompt wins where its success rate is higher than that of `best` with a probability of at least
    `winner_probability`, under uniform priors; several can, for prompts of one family tend to win together. `best` wins
    where it is the highest of all with that probability. `margin`: the one whose mean is ahead of every other one by
    more than `winner_margin` (the reference).
    """
    every = [r for e in encounters for values in e.rewards.values() for r in values]
    low, high = min([0.0, *every]), max([1.0, *every])
    found = []
    for encounter in encounters:
        if config.winner == "margin":
            found += _by_margin(encounter, config.winner_margin)
            continue
        scaled = {p: [(r - low) / (high - low) for r in values] for p, values in encounter.rewards.items()}
        duels = {p: probability_best([values, scaled[best]])[0] for p, values in scaled.items() if p != best}
        overall = probability_best([scaled[best], *(scaled[p] for p in duels)])[0]
        chances = duels if max(duels.values()) >= config.winner_probability else {best: overall}
        found += [Win(p, encounter, c) for p, c in chances.items() if c >= config.winner_probability]
    return found


def _by_margin(encounter: Encounter, margin: float) -> list[Win]:
    (first, winner), (second, _) = sorted(((fmean(v), p) for p, v in encounter.rewards.items()), reverse=True)[:2]
    return [Win(winner, encounter, 1.0)] if first - second > margin + 1e-9 else []


def probability_best(samples: Sequence[Sequence[float]]) -> list[float]:
    """For each list of rewards in [0, 1] the posterior probability that its mean is the highest; Beta(1, 1) priors."""
    densities = []
    for values in samples:
        good = math.fsum(values)
        log = good * np.log(GRID) + (len(values) - good) * np.log1p(-GRID)
        density = np.exp(log - log.max())
        densities.append(density / density.sum())
    below = [np.cumsum(d) - d / 2 for d in densities]
    chances = [
        float(np.sum(d * np.prod([b for j, b in enumerate(below) if j != i], axis=0))) for i, d in enumerate(densities)
    ]
    return [chance / math.fsum(chances) for chance in chances]


def prompt_sets(
    best: SystemPrompt,
    others: Sequence[SystemPrompt],
    encounters: Sequence[Encounter],
    config: EvolutionConfig,
    tasks: Mapping[int, Task],
) -> list[PromptSet]:
    """Set A is `best`; the others, as B, C …, are those that won a problem, most wins first.

    A prompt that won nothing beyond what sets before it won too is left out, and so is everybody after `MOST_SETS`.
    """
    wins: dict[str, list[Win]] = {}
    for win in winners(encounters, best.id, config):
        wins.setdefault(win.prompt, []).append(win)
    chosen, covered = [best], set[int]()
    rivals = {p.id: p for p in others if p.id in wins}
    while rivals and len(chosen) < MOST_SETS:
        news = {p: {w.encounter.problem for w in wins[p]} - covered for p in rivals}
        rival = min(rivals, key=lambda p: (-len(news[p]), p))
        if not news[rival]:
            break
        chosen.append(rivals.pop(rival))
        covered |= news[rival]
    names = {p.id: chr(ord("A") + i) for i, p in enumerate(chosen)}
    return [_set(p, best.id, names, encounters, wins.get(p.id, []), tasks) for p in chosen]


def _set(
    prompt: SystemPrompt,
    best: str,
    names: Mapping[str, str],
    encounters: Sequence[Encounter],
    wins: Sequence[Win],
    tasks: Mapping[int, Task],
) -> PromptSet:
    name = names[prompt.id]
    met = [e.rewards for e in encounters if prompt.id in e.rewards]
    surest = sorted(wins, key=lambda w: -w.chance)[:MOST_VICTORIES]
    return PromptSet(
        name,
        prompt.id,
        tuple(replace(p, id=f"{name}.{p.id}") for p in prompt.principles),
        fmean([fmean(rewards[prompt.id]) for rewards in met]),
        fmean([fmean(rewards[best]) for rewards in met]),
        len(met),
        len(wins),
        tuple(Victory(tasks[w.encounter.problem].question, _scores(w.encounter, names)) for w in surest),
    )


def _scores(encounter: Encounter, names: Mapping[str, str]) -> tuple[Score, ...]:
    met = ((name, encounter.rewards[p]) for p, name in names.items() if p in encounter.rewards)
    return tuple(Score(name, fmean(rewards), len(rewards)) for name, rewards in met)


def credited(origin: Origin, text: str, donors: Sequence[PromptSet]) -> Origin:
    """The origin with the donors' principles among its sources: those that say the same, and those that the model
    names in its justification ("B.G3")."""
    named = {f"{name}.{bare}" for name, bare in QUALIFIED.findall(origin.evidence)}
    same = fingerprint(text)
    given = [
        f"{donor.prompt}.{p.id.partition('.')[2]}"
        for donor in donors
        for p in donor.principles
        if p.id in named or fingerprint(p.text) == same
    ]
    return replace(origin, sources=tuple(dict.fromkeys([*origin.sources, *given])))
