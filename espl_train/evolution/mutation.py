"""Mutation: one prompt, edited after looking at contrasts. Summary, critique, revision: stages a, b, c of the method.

Summaries are written once per attempt and kept with it. Each critique call proposes a few edits; the edits of all
critiques become candidates, and one revision call makes a list of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from espl_train.config import EvolutionConfig
from espl_train.evolution.edits import (
    Edited,
    Limits,
    Operation,
    apply,
    composed,
    fingerprint,
    last_id,
    qualified,
    refused_list,
)
from espl_train.evolution.evidence import Case, Contrast
from espl_train.evolution.prompts import Child, Origin, Principle, SystemPrompt
from espl_train.evolution.reflection import Reflector
from espl_train.evolution.rejections import Reason, Rejection

UNBOUNDED = 10**6
SUMMARY_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Candidate:
    """A principle on the way to the child's list. `support`: how many critiques asked for it."""

    id: str
    text: str
    source: Literal["current", "new", "modified"] = "current"
    support: int = 0
    origin: Origin | None = None        # of what is not current


async def mutate(
    parent: SystemPrompt,
    contrasts: Sequence[Contrast],
    reflector: Reflector,
    config: EvolutionConfig,
    limits: Limits,
    first: int = 0,
) -> Child | Rejection:
    """A child of `parent`, or the reason why there is none. May return a child that is equal to its parent.

    The attempts should have been summarised before, where the template set wants that (`summarise`). `first` is the
    index of the first call: two mutations of one step must not share any.
    """
    if not contrasts:
        return Rejection(Reason.NO_MIXED_PROBLEM, "no problem has right and wrong attempts")
    cases = [contrast.shown(config.answer_visibility, parent.id) for contrast in contrasts]
    plans = await _criticise(parent, cases, reflector, config, limits, first)
    copied = next((p for p in plans if isinstance(p, Rejection) and p.reason is Reason.CANARY), None)
    if copied is not None:
        return copied       # who copies evidence into one edit is not trusted with the others
    suggestions = pooled([operation for plan in plans if not isinstance(plan, Rejection) for operation in plan])
    if all(isinstance(plan, Rejection) for plan in plans):
        return Rejection(Reason.NO_SUGGESTION, f"none of {len(plans)} critiques could be used")
    if not suggestions:
        return Rejection(Reason.NO_CONTRAST, f"{len(plans)} critiques found nothing to change")
    edited = await _revise(parent, suggestions, reflector, config, limits, first)
    if isinstance(edited, Rejection):
        return edited
    origins = qualified(edited.origins, parent.id)
    return Child(edited.principles, "mutation", (parent.id,), edited.last_id, origins)


async def summarise(contrasts: Sequence[Contrast], reflector: Reflector, config: EvolutionConfig) -> None:
    """Stage a: a summary for every attempt that has none yet. Where it fails the attempt is shown in full."""
    if not reflector.templates.has("summary"):
        return
    jobs = [
        (contrast.question, trace, attempt)
        for contrast in contrasts
        for trace, attempt in zip(contrast.traces, contrast.attempts(config.answer_visibility, ""), strict=True)
        if trace.summary is None
    ]
    asked = (
        reflector.text("summary", index, {"question": question, "attempt": attempt})
        for index, (question, _, attempt) in enumerate(jobs)
    )
    for (_, trace, _), reply in zip(jobs, await asyncio.gather(*asked), strict=True):
        trace.summary = None if isinstance(reply, Rejection) else reply[:SUMMARY_CHARACTERS]


async def _criticise(
    parent: SystemPrompt,
    cases: Sequence[Case],
    reflector: Reflector,
    config: EvolutionConfig,
    limits: Limits,
    first: int,
) -> list[tuple[Operation, ...] | Rejection]:
    """Stage b: a plan per call, each valid on its own or rejected whole."""
    loose = replace(limits, max_principles=UNBOUNDED, max_tokens=0)      # of the final list, which is not made here

    def accept(operations: tuple[Operation, ...]) -> tuple[Operation, ...] | Rejection:
        edited = apply(parent.principles, operations, loose, parent.last_id)
        return edited if isinstance(edited, Rejection) else operations

    batches = [cases[i : i + config.cases] for i in range(0, len(cases), config.cases)]
    asked = (
        reflector.plan(
            "critique",
            index,
            {
                "cases": batch,
                "principles": list(parent.principles),
                "max_operations": config.max_operations,
                "max_words": config.max_words,
            },
            accept,
            config.max_operations,
            ("add", "modify", "remove"),
        )
        for index, batch in enumerate(batches, first)
    )
    return await asyncio.gather(*asked)


async def _revise(
    parent: SystemPrompt,
    suggestions: Sequence[Operation],
    reflector: Reflector,
    config: EvolutionConfig,
    limits: Limits,
    index: int,
) -> Edited | Rejection:
    """Stage c: one list out of all candidates. Where no revision can be used, the candidates stand as far as the limits
    allow; a rejection where they allow none of them."""
    revised = reflector.templates.has("revision")
    pool, number = candidates(parent, suggestions, carry_out_removals=not revised)
    principles = tuple(Principle(c.id, c.text) for c in pool)
    origins = {c.id: c.origin for c in pool if c.origin is not None}

    def accept(operations: tuple[Operation, ...]) -> Edited | Rejection:
        edited = apply(principles, operations, limits, number)
        return edited if isinstance(edited, Rejection) else refused_list(edited.principles, limits) or edited

    if revised:
        values = {
            "principles": list(parent.principles),
            "suggestions": list(suggestions),
            "candidates": pool,
            "max_words": config.max_words,
            "max_principles": config.max_principles,
            "max_tokens": config.max_prompt_tokens,
        }
        edited = await reflector.plan("revision", index, values, accept, allowed=("modify", "remove", "merge"))
        if isinstance(edited, Edited):
            return replace(edited, origins=composed(origins, edited.origins))
    kept = fitted(parent, pool, limits)
    if isinstance(kept, Rejection):
        reflector.rejections[kept.reason] += 1
        return kept
    return Edited(kept, number, origins)


def pooled(operations: Sequence[Operation]) -> list[Operation]:
    """Equal suggestions counted as one with its support, the best supported first."""
    unique: dict[tuple[str, tuple[str, ...], str], Operation] = {}
    for operation in operations:
        key = (operation.op, operation.ids, fingerprint(operation.text))
        known = unique.get(key)
        unique[key] = replace(known, support=known.support + 1) if known else operation
    return sorted(unique.values(), key=lambda o: -o.support)


def candidates(
    parent: SystemPrompt, suggestions: Sequence[Operation], carry_out_removals: bool
) -> tuple[list[Candidate], int]:
    """The current principles with the suggestions worked in, and the highest id number given out.

    The best supported change of a principle takes its place, other changes of it stand beside it as new candidates. No
    text comes twice. Removals are left to the revision stage where there is one; otherwise they are carried out,
    except on a principle that somebody would rather change.
    """
    pool = {p.id: Candidate(p.id, p.text) for p in parent.principles}
    number = last_id(parent.principles, parent.last_id)
    for asked in suggestions:
        if asked.op == "remove" or fingerprint(asked.text) in {fingerprint(c.text) for c in pool.values()}:
            continue
        origin = Origin(asked.op, asked.ids, asked.evidence, asked.support)
        if asked.op == "modify" and pool[asked.id].source == "current":
            pool[asked.id] = Candidate(asked.id, asked.text, "modified", asked.support, origin)
        else:
            number += 1
            pool[f"G{number}"] = Candidate(f"G{number}", asked.text, "new", asked.support, origin)
    if carry_out_removals:
        for asked in suggestions:
            if asked.op == "remove" and pool[asked.id].source == "current":
                pool[asked.id] = replace(pool[asked.id], support=-1)
    return [c for c in pool.values() if c.support >= 0], number


def fitted(parent: SystemPrompt, pool: Sequence[Candidate], limits: Limits) -> tuple[Principle, ...] | Rejection:
    """As much of the pool as the limits allow: additions are left out and then changes undone, the least supported
    first. A rejection where nothing of it remains."""
    before = {p.id: p.text for p in parent.principles}
    texts = {c.id: c.text for c in pool}
    additions = [c.id for c in reversed(pool) if c.source == "new"]
    changes = [c.id for c in sorted(pool, key=lambda c: c.support) if c.source == "modified"]
    first = refused = refused_list(_listed(texts), limits)
    for given_up in (*additions, *changes):
        if refused is None:
            break
        if given_up in before:
            texts[given_up] = before[given_up]
        else:
            del texts[given_up]
        refused = refused_list(_listed(texts), limits)
    nothing = first is not None and (refused is not None or texts == before)
    return first if nothing and first is not None else _listed(texts)


def _listed(texts: Mapping[str, str]) -> tuple[Principle, ...]:
    return tuple(Principle(i, text) for i, text in texts.items())
