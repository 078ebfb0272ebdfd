"""Reading a model's reply as operations: the last JSON list in it, and never anything else.

Tolerant about form (prose before the list, code fences, trailing commas, one object instead of a list, "operation" for
"op", an id in the brackets that prompts have around it, the same operation twice), strict about content: an id that is
a number may be a place in the list or part of a name, and of two values under one key nobody knows which is meant.
Nothing is evaluated; a reply that cannot be read is a named rejection, and never "no operations".
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from espl_train.evolution.edits import KINDS, Kind, Operation, tidy
from espl_train.evolution.rejections import Reason, Rejection, excerpt

MAX_REPLY = 20_000          # characters read, from the end
AROUND = " \t\r\n[]:"      # an id, where it was copied from a prompt
MAX_BROKEN = 50             # places that look like JSON and are not, before the reply is given up
TARGETS: dict[Kind, tuple[int, int]] = {"add": (0, 0), "modify": (1, 1), "remove": (1, 1), "merge": (2, 64)}
OPENING = re.compile(r'\[(?=\s*[{\]])|\{(?=\s*")')                    # where a list of objects or an object may begin
PLAN = re.compile(r"\[?\s*\{\s*[\"']?op(?:eration)?\b")                # what was surely meant as operations
TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*(?:"|\\?\Z))|,(?=\s*[\]}])', re.DOTALL)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none with a key twice; its "operation" as "op"."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    if "op" not in found and isinstance(found.get("operation"), str):
        found["op"] = found.pop("operation")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_operations(
    reply: str, max_operations: int = 64, allowed: Collection[Kind] = KINDS
) -> tuple[Operation, ...] | Rejection:
    """The operations in `reply`; the empty tuple only for an explicit `[]`. Never raises, whatever the text is."""
    if not reply.strip():
        return Rejection(Reason.EMPTY_REPLY, "the reply is empty")
    found = _last_list(reply[-MAX_REPLY:], whole=len(reply) <= MAX_REPLY)
    if isinstance(found, Rejection):
        return found
    if len(found) > max_operations:
        return Rejection(
            Reason.TOO_MANY_OPERATIONS, f"{len(found)} operations, at most {max_operations} are allowed"
        )
    operations = []
    for item in found:
        operation = _operation(item, allowed)
        if isinstance(operation, Rejection):
            return operation
        operations.append(operation)
    return tuple(dict.fromkeys(operations))


def _last_list(text: str, whole: bool) -> list[dict[str, Any]] | Rejection:
    """The last list of objects in `text`; where there is no list at all, the lone objects that have an "op".

    In the end of a reply that is not `whole` a lone object may be what is left of a list: there only lists count.
    """
    best: list[dict[str, Any]] | None = None
    lone: list[dict[str, Any]] = []
    broken, tries, at = False, 0, 0
    while (match := OPENING.search(text, at)) is not None:
        parsed = _parse(text, match.start())
        if parsed is None:
            broken = broken or PLAN.match(text, match.start()) is not None
            tries, at = tries + 1, match.start() + 1
            if tries > MAX_BROKEN:
                return Rejection(Reason.INVALID_JSON, "the reply is full of broken brackets")
            continue
        value, at = parsed
        if isinstance(value, dict):
            lone, at = ([*lone, value], at) if "op" in value else (lone, match.start() + 1)
        elif value and all(isinstance(item, dict) for item in value):
            best, broken = value, False
        elif not value and not broken:
            best = []
    if broken:
        return Rejection(Reason.INVALID_JSON, f"the operations are not valid JSON: {excerpt(text[-160:])}")
    if best is None and not (lone and whole):
        return Rejection(Reason.NO_JSON, f"no JSON list in the reply: {excerpt(text)}")
    return lone if best is None else best


def _parse(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value at `start` and where it ends; a second try without trailing commas; None where it is broken."""
    for candidate in (text[start:], TRAILING_COMMA.sub(lambda m: m[1] or " ", text[start:])):
        try:
            value, end = DECODER.raw_decode(candidate)
        except (ValueError, RecursionError):
            continue
        return value, start + end       # a comma became a blank: both texts have the same positions
    return None


def _operation(item: dict[str, Any], allowed: Collection[Kind]) -> Operation | Rejection:
    kind = item.get("op")
    kind = kind.strip().lower() if isinstance(kind, str) else kind
    if kind not in KINDS:
        return Rejection(Reason.UNKNOWN_OPERATION, f"\"op\" is {excerpt(repr(kind), 40)}, expected {_or(KINDS)}")
    if kind not in allowed:
        return Rejection(Reason.UNKNOWN_OPERATION, f"{kind} is not possible here, only {_or(allowed)}")
    ids = _ids(item) if kind != "add" else ()       # models like to propose an id for a new principle: it is ours
    if ids is None:
        return Rejection(Reason.BAD_OPERATION, f"the ids of {kind} are not texts such as \"G3\"")
    low, high = TARGETS[kind]
    if not low <= len(ids) <= high:
        wanted = {"add": "no id", "merge": "at least two different ids"}.get(kind, "exactly one id")
        return Rejection(Reason.BAD_OPERATION, f"{kind} takes {wanted}, not {len(ids)}")
    text = item.get("text", "")
    if not isinstance(text, str) or (kind != "remove" and not text.strip()):
        return Rejection(Reason.BAD_OPERATION, f"{kind} needs a \"text\"")
    evidence = item.get("evidence", "")
    return Operation(kind, "" if kind == "remove" else tidy(text), ids, excerpt(str(evidence), 400))


def _ids(item: dict[str, Any]) -> tuple[str, ...] | None:
    """The targets, from "id" or "ids", each once; None where they are of the wrong type."""
    raw = item.get("ids", item.get("id", []))
    ids = raw if isinstance(raw, list) else [raw]
    if not all(isinstance(i, str) and i.strip(AROUND) for i in ids):
        return None
    return tuple(dict.fromkeys(i.strip(AROUND) for i in ids))


def _or(names: Collection[str]) -> str:
    *first, last = (f'"{n}"' for n in names)
    return f"{', '.join(first)} or {last}" if first else last
