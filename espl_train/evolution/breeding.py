"""Breeding: one step of evolution from the rollouts of a batch to children, with every decision on record.

This is what the loop talks to. It keeps the evidence buffer and the guard; the population is only read, and read before
the first call goes out, so a breeding may run while the weights learn and the ratings move.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig
from espl_train.evolution.acceptance import decide
from espl_train.evolution.edits import Limits, fingerprints, refused_list, refused_text
from espl_train.evolution.encounters import Encounters
from espl_train.evolution.evidence import Evidence, shuffled
from espl_train.evolution.guards import Canary, Duplicates, Guard, Leaks
from espl_train.evolution.migration import Harbour
from espl_train.evolution.mutation import summarise
from espl_train.evolution.operators import OPERATORS, Scene
from espl_train.evolution.placebo import placebo
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import WORDS, Child, Operator, Rating, SystemPrompt
from espl_train.evolution.prune import Trial
from espl_train.evolution.ratings import Match, scores
from espl_train.evolution.reflection import Completer, Reflector, purpose
from espl_train.evolution.rejections import Reason, Rejection, excerpt
from espl_train.evolution.templates import TemplateSet
from espl_train.randomness import generator
from espl_train.records import Group

DIGITS = 6      # of a rating: beyond them two draws differ by rounding only
Result = tuple[Operator, Child | Rejection]      # what an operator brought


@dataclass(frozen=True, slots=True)
class BreedingReport:
    """What a step of breeding brought: children in the order of insertion, and why.

    `rejections` counts refused replies, plans and texts by reason; `events` are plain data for the log. `retired` are
    prompts that say and do what an older one says and does: younger → older.
    """

    children: tuple[Child, ...]
    events: list[dict[str, Any]]
    calls: int
    rejections: dict[str, int]
    repaired: int
    retired: Mapping[str, str] = field(default_factory=dict)


class Breeder:
    """Writes children. `state` and `restore` carry what was seen over a resume; there is no random state.

    `tokens` counts those of a text as the policy reads it, for `evolution.max_prompt_tokens`; `leaks` is what a guard
    knows of the training problems already.
    """

    def __init__(
        self,
        config: EvolutionConfig,
        templates: TemplateSet,
        seed: int,
        special_tokens: Sequence[str] = (),
        tokens: Callable[[str], int] | None = None,
        leaks: Leaks | None = None,
    ) -> None:
        self._config, self._templates, self._seed = config, templates, seed
        self._pool = templates.placebo() if config.writer == "placebo" else ()
        self._evidence = Evidence(config)
        self._encounters = Encounters(config.evidence_window)
        self._canary = Canary.of(seed) if config.canary else Canary()
        self._guard = Guard(config.max_words, special_tokens, self._canary, leaks)
        self._duplicates = Duplicates(config.duplicate_similarity)
        self._shown: dict[int, list[int]] = {}      # step → problems that reflection looked at
        self.harbour = Harbour()            # what is known of principles that win on other islands
        count = (lambda principles: tokens(templates.system(principles))) if tokens else None
        limit = config.max_prompt_tokens
        self._limits = Limits(config.max_words, config.max_principles, self._guard.check, limit, count)

    async def breed(
        self,
        step: int,
        population: Population,
        groups: Sequence[Group],
        tasks: Mapping[int, Task],
        complete: Completer,
        trial: Trial | None = None,
        closed: Rejection | None = None,
    ) -> BreedingReport:
        """Children of the prompts that played `groups`, before the population has counted that batch.

        `tasks` holds at least the problems of the batch, by their index in the split; whatever else it holds is
        guarded too, so the whole training split is best. `trial` plays prompts that are in no population yet. `closed`:
        why nobody may be asked, where that is known; then the batch is remembered, and nothing is bred.
        """
        self._guard.learn(tasks)
        shown = shuffled(groups, self._seed, step) if self._config.evidence == "shuffled" else groups
        self._evidence.record(step, shown, tasks)
        self._encounters.record(step, shown)
        self._duplicates.observe(m.prompt for m in population.members)
        match, after = population.preview(groups)
        reflector = Reflector(self._templates, complete, self._seed, step, self._canary.text)
        if not match.values:
            refused = Rejection(Reason.NO_MIXED_PROBLEM, "no problem that all prompts played")
            return self._report(step, None, _all(refused), reflector, [])
        best = population[champion(match, after, self._config)]
        if population.crowded(match):
            refused = Rejection(Reason.CROWDED, "children wait for their first games (evolution.nursery)")
            return self._report(step, best, _all(refused), reflector, [])
        if closed is not None:
            reflector.rejections[closed.reason] += 1
            return self._report(step, best, _all(closed), reflector, [])
        active = [m.prompt for m in population.members if m.prompt.id not in population.aside]
        others = tuple(p for p in active if p.id != best.id)
        taken = {fingerprints(m.prompt.principles): m.prompt.id for m in population.members}
        scene = Scene(
            step, self._seed, best, population.root, others, self._evidence.contrasts(step, best.id),
            self._encounters.of(best.id, {p.id for p in others}), tasks, sum(len(g.rollouts) for g in groups), taken,
            self._config, self._limits, reflector, trial, self.harbour, [],
        )  # fmt: skip
        self._shown[step] = [contrast.task for contrast in scene.contrasts]
        with purpose(prompt=best.id):
            results = await self._results(scene)
        if self._pool:
            results = [
                self._placebo(step, number, population, result)
                for (_, number), result in zip(_numbered(results), results, strict=True)
            ]
        results = self._sifted(results, taken, reflector)
        results = await self._accepted(scene, results, groups, match.problems)
        report = self._report(step, best, results, reflector, scene.events)
        return replace(report, retired=self._retired(active))

    async def _results(self, scene: Scene) -> list[Result]:
        """What every operator brought: a child, or why not. None of them waits for another one's calls."""
        config, refused = scene.config, dict[Operator, Rejection]()
        for name, way in OPERATORS.items():
            if not way.chance(config):
                refused[name] = Rejection(Reason.SWITCHED_OFF)
            elif generator(self._seed, name, scene.step).random() >= way.chance(config):
                refused[name] = Rejection(Reason.NOT_DRAWN)
        if any(way.reads for name, way in OPERATORS.items() if name not in refused):
            await summarise(scene.contrasts, scene.reflector, config)
        drawn = [
            (name, OPERATORS[name].breed(scene.again(number)))
            for name in OPERATORS
            if name not in refused
            for number in range(config.mutations if name == "mutation" else 1)
        ]
        bred = await asyncio.gather(*(breeding for _, breeding in drawn))
        found = [*refused.items(), *((name, child) for (name, _), child in zip(drawn, bred, strict=True))]
        return sorted(found, key=lambda result: list(OPERATORS).index(result[0]))

    def _placebo(self, step: int, number: int, population: Population, result: Result) -> Result:
        operator, child = result
        if isinstance(child, Rejection):
            return result
        random = generator(self._seed, "placebo", step, operator, number)
        return operator, placebo(child, population[child.parents[0]], self._pool, random)

    def _sifted(
        self, results: Sequence[Result], taken: Mapping[frozenset[str], str], reflector: Reflector
    ) -> list[Result]:
        """Let through the children that are new, in order, and that the guard has nothing against."""
        sifted, children, taken = list[Result](), list[Child](), dict(taken)
        for operator, result in results:
            if isinstance(result, Child):
                result = self._admitted(_novel(result, taken), children)
                if isinstance(result, Rejection):
                    reflector.rejections[result.reason] += 1
                else:
                    children.append(result)
                    taken[fingerprints(result.principles)] = f"the {WORDS[operator]} child"
            sifted.append((operator, result))
        return sifted

    async def _accepted(
        self, scene: Scene, results: Sequence[Result], groups: Sequence[Group], problems: Sequence[int]
    ) -> list[Result]:
        """Let through those that hold their own in a trial, where one is asked for."""
        names = [f"{operator} {number}" for operator, number in _numbered(results)]
        children = {n: child for n, (_, child) in zip(names, results, strict=True) if isinstance(child, Child)}
        if self._config.acceptance == "none" or scene.trial is None:
            return list(results)
        random = generator(self._seed, "acceptance", scene.step)
        decisions = await decide(children, scores(groups), problems, scene.trial, self._config, random)
        accepted = list(results)
        for number, (name, (operator, result)) in enumerate(zip(names, results, strict=True)):
            if (decision := decisions.get(name)) is None:
                continue
            details = {key: value for key, value in asdict(decision).items() if key != "refused"}
            scene.events.append({"event": "trial", "operator": operator, "accepted": not decision.refused, **details})
            if decision.refused:
                scene.reflector.rejections[decision.refused.reason] += 1
                known = f"a {WORDS[operator]} child of step {scene.step}, which was no better"
                self._duplicates.forbid(known, [p.text for p in children[name].principles])
            accepted[number] = operator, decision.refused or result
        return accepted

    def _admitted(self, child: Child | Rejection, siblings: Sequence[Child]) -> Child | Rejection:
        """The child, or why the guard or its likeness to a known prompt keeps it out."""
        if isinstance(child, Rejection):
            return child
        texts = [p.text for p in child.principles]
        refused = self._guard.check_prompt(texts, [text for text in texts if text not in self._duplicates.texts])
        if refused is not None:
            return refused
        if self._config.duplicate_similarity < 1:
            born = {f"the {WORDS[s.operator]} child": [p.text for p in s.principles] for s in siblings}
            known = self._duplicates.like(texts, born)
            if known is not None:
                return Rejection(Reason.DUPLICATE_PROMPT, f"these principles say what those of {known} say")
        return child

    def _retired(self, prompts: Sequence[SystemPrompt]) -> dict[str, str]:
        """Who says nearly what an older prompt says, and did as well wherever both played."""
        if self._config.duplicate_similarity == 1:
            return {}
        return self._duplicates.retired(prompts, self._encounters.pairs([p.id for p in prompts]))

    @property
    def guard(self) -> Guard:
        """What judges every new text."""
        return self._guard

    def examine(self, child: Child, population: Population, tasks: Mapping[int, Task]) -> Rejection | None:
        """Why a child that a person let in, perhaps with other words, must stay outside: the same guards hold."""
        self._guard.learn(tasks)
        known = {text for member in population.members for text in member.prompt.texts}
        new = [p.text for p in child.principles if p.text not in known]
        refused = next((r for text in new if (r := refused_text(text, self._limits)) is not None), None)
        taken = {fingerprints(m.prompt.principles): m.prompt.id for m in population.members}
        found = refused or refused_list(child.principles, self._limits) or self._admitted(_novel(child, taken), ())
        return found if isinstance(found, Rejection) else None

    def shown(self, steps: Sequence[int]) -> list[int]:
        """The problems that reflection looked at in these steps, each once, in their order."""
        return list(dict.fromkeys(problem for step in steps for problem in self._shown.get(step, ())))

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "evidence": self._evidence.to_json(),
            "encounters": self._encounters.to_json(),
            "duplicates": self._duplicates.state(),
            "harbour": self.harbour.to_json(),
            "shown": {str(step): problems for step, problems in self._shown.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` wrote down."""
        self._evidence = Evidence.from_json(state["evidence"], self._config)
        self._encounters = Encounters.from_json(state["encounters"], self._config.evidence_window)
        self._duplicates.restore(state["duplicates"])
        self._shown = {int(step): list(problems) for step, problems in state["shown"].items()}
        self.harbour = Harbour.from_json(state["harbour"])

    def _report(
        self,
        step: int,
        best: SystemPrompt | None,
        results: Sequence[Result],
        reflector: Reflector,
        noted: Sequence[dict[str, Any]],
    ) -> BreedingReport:
        """The children in order, and in writing what happened to the others."""
        children, outcomes = [], []
        for operator, result in results:
            event: dict[str, Any] = {"event": operator, "step": step, "parent": best.id if best else None}
            if isinstance(result, Rejection):
                event |= {"outcome": result.reason.value, "detail": excerpt(result.detail, 400)}
            else:
                children.append(result)
                event |= {"outcome": "child", "parents": list(result.parents)}
                event["principles"] = {p.id: p.text for p in result.principles}
            outcomes.append(event)
        calls = sorted(reflector.events, key=_place)
        counts = {reason.value: count for reason, count in sorted(reflector.rejections.items())}
        events = [{"step": step, **event} for event in (*calls, *noted)] + outcomes
        return BreedingReport(tuple(children), events, reflector.calls, counts, reflector.repaired)


def _place(event: Mapping[str, Any]) -> tuple[str, int, str]:
    """Where an event of a call stands, whichever call came back first."""
    return event["stage"], event["index"], json.dumps(event, sort_keys=True)


def _numbered(results: Sequence[Result]) -> Iterator[tuple[Operator, int]]:
    """Every result by its operator and a number among that operator's: draws that are keyed by it know of no others."""
    seen: Counter[Operator] = Counter()
    for operator, _ in results:
        yield operator, seen[operator]
        seen[operator] += 1


def _all(refused: Rejection) -> list[Result]:
    return [(operator, refused) for operator in OPERATORS]


def champion(match: Match, after: Mapping[str, Rating], config: EvolutionConfig) -> str:
    """Who becomes a parent: the best mean skill once this batch is counted, or the best mean reward of the batch.

    The posterior remembers earlier batches; it is the mean and not the lower bound that counts, because the root plays
    most and would otherwise stay the parent for ever by being certain. Ties go to the better batch, then to the newer.
    """
    skill = {p: round(after[p].mu, DIGITS) for p in match.values}
    if config.parent == "batch":
        return max(skill, key=lambda p: (match.values[p], skill[p], p))
    return max(skill, key=lambda p: (skill[p], match.values[p], p))


def _novel(child: Child, taken: Mapping[frozenset[str], str]) -> Child | Rejection:
    known = taken.get(fingerprints(child.principles))
    if known is None:
        return child
    if known in child.parents[:1]:
        return Rejection(Reason.UNCHANGED, "the edits leave the principles as they were")
    return Rejection(Reason.DUPLICATE_PROMPT, f"these principles are those of {known}")
