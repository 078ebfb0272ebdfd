"""Edits of a list of principles: typed operations, applied as one transaction.

A plan is applied whole or not at all. Every operation names principles of the list as it was before the plan, so the
order of the operations cannot matter; ids of removed principles never come back.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from espl_train.evolution.prompts import Origin, Principle
from espl_train.evolution.rejections import Reason, Rejection, excerpt

Kind = Literal["add", "modify", "remove", "merge"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Check = Callable[[str], Rejection | None]
MAX_EVIDENCE = 400          # characters of a justification that are kept


@dataclass(frozen=True, slots=True)
class Operation:
    """One edit. `ids` are its targets: none for add, one for modify and remove, two or more for merge."""

    op: Kind
    text: str = ""
    ids: tuple[str, ...] = ()
    evidence: str = ""      # the model's own justification, kept for the log
    support: int = 1        # how many critiques asked for it

    @property
    def id(self) -> str:
        """The one target, or the empty string."""
        return self.ids[0] if len(self.ids) == 1 else ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a list of principles must obey. `check` is the guard's verdict on one new text.

    `tokens` counts the tokens of the list as the policy would read it; without it, or with `max_tokens` 0, there is no
    limit to them.
    """

    max_words: int = 32
    max_principles: int = 32
    check: Check | None = None
    max_tokens: int = 0
    tokens: Callable[[Sequence[Principle]], int] | None = None


@dataclass(frozen=True, slots=True)
class Edited:
    """A list after a plan, the highest id number that was ever given out in its lineage, and who wrote what is new."""

    principles: tuple[Principle, ...]
    last_id: int
    origins: Mapping[str, Origin] = field(default_factory=dict)


def tidy(text: str) -> str:
    """One line, single spaces, composed unicode: the form in which principles are stored."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def fingerprint(text: str) -> str:
    """Equal for texts that differ only in case, spacing or final punctuation."""
    return tidy(text).casefold().rstrip(" .!;,")


def fingerprints(principles: Sequence[Principle]) -> frozenset[str]:
    """What makes two prompts the same prompt: their texts, in any order, whatever the ids are."""
    return frozenset(fingerprint(p.text) for p in principles)


def last_id(principles: Sequence[Principle], floor: int = 0) -> int:
    """The highest number among the ids ("G7" → 7), at least `floor`."""
    return max([floor, *(int(m[1]) for p in principles if (m := re.fullmatch(r"[A-Za-z]*(\d{1,9})", p.id)))])


def apply(
    principles: Sequence[Principle], operations: Sequence[Operation], limits: Limits, floor: int = 0
) -> Edited | Rejection:
    """The list after all of `operations`, or the reason why none was applied.

    `floor` is the highest id number used before in this lineage: new ids start above it. Modified principles keep id
    and place, a merge takes the place of its first principle, additions go to the end.
    """
    refused = _refused_targets(principles, operations)
    if refused is not None:
        return refused
    replaced: dict[str, Principle | None] = {}
    added: list[Principle] = []
    origins: dict[str, Origin] = {}
    number = last_id(principles, floor)
    for operation in operations:
        text = tidy(operation.text)
        if operation.op != "remove" and (refused := refused_text(text, limits)) is not None:
            return refused
        if operation.op in ("add", "merge"):
            number += 1
            fresh = Principle(f"G{number}", text)
        if operation.op != "remove":
            written = operation.ids[0] if operation.op == "modify" else fresh.id
            origins[written] = Origin(operation.op, operation.ids, operation.evidence, operation.support)
        if operation.op == "add":
            added.append(fresh)
        elif operation.op == "modify":
            replaced[operation.ids[0]] = Principle(operation.ids[0], text)
        else:
            replaced.update(dict.fromkeys(operation.ids))
            if operation.op == "merge":
                replaced[next(p.id for p in principles if p.id in operation.ids)] = fresh
    kept = (replaced.get(p.id, p) for p in principles)
    result = (*(p for p in kept if p is not None), *added)
    return refused_list(result, limits, touched=bool(operations)) or Edited(result, number, origins)


def composed(first: Mapping[str, Origin], second: Mapping[str, Origin]) -> dict[str, Origin]:
    """The origins after two edits in a row, told in ids of the list before the first."""
    origins = dict(first)
    for written, origin in second.items():
        behind = [first[source] for source in origin.sources if source in first]
        sources = [s for source in origin.sources for s in (first[source].sources if source in first else (source,))]
        evidence = [origin.evidence] if origin.evidence else [o.evidence for o in behind if o.evidence]
        origins[written] = Origin(
            origin.op if sources else "add",            # whatever became of additions alone is an addition
            tuple(dict.fromkeys(sources)),
            excerpt(" · ".join(evidence), MAX_EVIDENCE),
            max(sum(o.support for o in behind), origin.support),
        )
    return origins


def qualified(origins: Mapping[str, Origin], prompt: str) -> dict[str, Origin]:
    """The origins with the name of the prompt that was edited before every source."""
    return {i: replace(o, sources=tuple(f"{prompt}.{s}" for s in o.sources)) for i, o in origins.items()}


def refused_text(text: str, limits: Limits) -> Rejection | None:
    """Why `text` cannot be a principle, or None."""
    if not text:
        return Rejection(Reason.BAD_OPERATION, "the text of a principle is empty")
    words = len(text.split())
    if words > limits.max_words:
        return Rejection(
            Reason.TOO_MANY_WORDS, f"{words} words, at most {limits.max_words} are allowed: {excerpt(text)}"
        )
    return limits.check(text) if limits.check is not None else None


def refused_list(principles: Sequence[Principle], limits: Limits, touched: bool = True) -> Rejection | None:
    """Why these cannot stand together as one list, or None. An untouched list is never refused."""
    if not touched:
        return None
    if len(principles) > limits.max_principles:
        return Rejection(
            Reason.TOO_MANY_PRINCIPLES, f"{len(principles)} principles, at most {limits.max_principles} are allowed"
        )
    if limits.max_tokens and limits.tokens is not None and (tokens := limits.tokens(principles)) > limits.max_tokens:
        detail = f"all principles together are {tokens} tokens long, at most {limits.max_tokens} are allowed"
        return Rejection(Reason.TOO_MANY_TOKENS, detail)
    seen: dict[str, str] = {}
    for principle in principles:
        other = seen.setdefault(fingerprint(principle.text), principle.id)
        if other != principle.id:
            return Rejection(
                Reason.DUPLICATE_PRINCIPLE, f"{principle.id} says the same as {other}: {excerpt(principle.text)}"
            )
    return None


def _refused_targets(principles: Sequence[Principle], operations: Sequence[Operation]) -> Rejection | None:
    known = {p.id for p in principles}
    taken: set[str] = set()
    for operation in operations:
        for target in operation.ids:
            if "." in target:
                detail = f"{excerpt(target, 40)} belongs to another set and cannot be a target"
                return Rejection(Reason.FOREIGN_ID, detail)
            if target not in known:
                return _unknown(target, known)
            if target in taken:
                return Rejection(Reason.CONFLICT, f"{target} is the target of more than one operation")
            taken.add(target)
    return None


def _unknown(target: str, known: Collection[str]) -> Rejection:
    listed = ", ".join(sorted(known, key=lambda i: (len(i), i))) or "none"
    return Rejection(Reason.UNKNOWN_ID, f"there is no principle {excerpt(target, 40)!r}; there are: {listed}")


def unqualify(
    operations: Sequence[Operation], own: str, known: Collection[str], foreign: Collection[str]
) -> tuple[Operation, ...] | Rejection:
    """Operations on qualified ids ("A.G1") as operations on set `own`, which has the bare ids `known`.

    An id of another set is refused, never applied by accident; so is a bare id that another set has too (`foreign`
    holds the other sets' bare ids).
    """
    out = []
    for operation in operations:
        ids = []
        for target in operation.ids:
            name, dot, bare = target.partition(".") if "." in target else (own, "", target)
            if name != own:
                detail = f"{excerpt(target, 40)} is not in set {own}: only set {own} can be edited"
                return Rejection(Reason.FOREIGN_ID, detail)
            if not dot and bare in foreign:
                detail = f"{bare} is ambiguous, several sets have one: write {own}.{bare}"
                return Rejection(Reason.FOREIGN_ID, detail)
            if bare not in known:
                return _unknown(target, [f"{own}.{i}" for i in known])
            ids.append(bare)
        out.append(replace(operation, ids=tuple(ids)))
    return tuple(out)
