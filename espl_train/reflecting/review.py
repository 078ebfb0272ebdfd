"""Children that wait for a person, as files: `review/ID.toml`, written by the run, and `ID.decision.toml`, written by
whoever decides. Neither ever writes the other's, every file is whole or not there, and a decision is made once.

The id of a child is made of its content: a decision can never be about another text than the one that was read.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from espl_envs.core.errors import EsplError
from espl_train import disk
from espl_train.evolution.edits import last_id, tidy
from espl_train.evolution.prompts import Child, Origin, Principle

FOLDER, DECISION = "review", ".decision.toml"
WAITING = "waiting"
Verdict = Literal["accept", "reject"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A child before a person has decided. `before`: its first parent's principles. `evidence`: what speaks for it, in
    lines; `state` is "waiting", or what became of it."""

    id: str
    step: int
    island: str
    child: Child
    before: tuple[Principle, ...]
    evidence: tuple[str, ...]
    state: str = WAITING

    @classmethod
    def of(
        cls, child: Child, step: int, island: str, before: Sequence[Principle], evidence: Sequence[str]
    ) -> Candidate:
        """The candidate that a bred child is."""
        told = json.dumps([island, step, child.operator, child.parents, [[p.id, p.text] for p in child.principles]])
        name = f"{step:04d}-{child.operator}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"
        return cls(name, step, island, child, tuple(before), tuple(evidence))

    @property
    def changes(self) -> list[str]:
        """What is other than in the parent, line by line: "  " for what stays, "- " and "+ "."""
        old, new = ({p.id: p.text for p in side} for side in (self.before, self.child.principles))
        lines = []
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) == new.get(name):
                lines.append(f"  {name}: {old[name]}")
                continue
            lines += [f"{mark} {name}: {side[name]}" for mark, side in (("-", old), ("+", new)) if name in side]
        return lines

    def edited(self, texts: Sequence[tuple[str, str]]) -> Candidate:
        """With other principles: (id, text) pairs, where "" stands for a new one. Raises EsplError for an id twice."""
        number = last_id([Principle(name, "") for name, _ in texts], self.child.last_id)
        fresh = iter(range(number + 1, number + 1 + len(texts)))
        principles = tuple(Principle(name or f"G{next(fresh)}", tidy(text)) for name, text in texts)
        if len({p.id for p in principles}) < len(principles):
            raise EsplError("an id stands twice: give a new principle no id, it gets one")
        known = {p.id: p.text for p in self.child.principles}
        kept = {p.id: o for p in principles if (o := self.child.origins.get(p.id)) and known.get(p.id) == p.text}
        last = last_id(principles, self.child.last_id)
        return replace(self, child=replace(self.child, principles=principles, origins=kept, last_id=last))

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a checkpoint and for TOML."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """What `to_json` wrote down. Raises KeyError or TypeError for anything else."""
        child = data["child"]
        made = Child(
            _principles(child["principles"]), child["operator"], tuple(child["parents"]), child["last_id"],
            {name: Origin(**{**o, "sources": tuple(o["sources"])}) for name, o in child["origins"].items()},
        )  # fmt: skip
        return cls(
            data["id"], data["step"], data["island"], made, _principles(data["before"]), tuple(data["evidence"]),
            data["state"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person said: `principles` are those that are let in, () where the child is rejected."""

    verdict: Verdict
    principles: tuple[tuple[str, str], ...] = ()
    when: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file that should hold a decision and holds none: nothing is decided, and somebody has to decide again."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path} is no decision ({self.why})"


class Desk:
    """The folder. Reading and deciding is safe beside a run that goes on."""

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def write(self, candidate: Candidate) -> None:
        """Put a child on the desk, or say what became of it."""
        with disk.explained(self.folder):
            self.folder.mkdir(exist_ok=True)
        command = f"espl-train review {self.folder.parent} accept {candidate.id}"
        head = f"# {command}\n# (or: reject, edit, show; this file is only read)\n\n"
        shown = {"id": candidate.id, "state": candidate.state, "changes": "\n".join(["", *candidate.changes, ""])}
        text = head + tomli_w.dumps({**shown, **candidate.to_json()}, multiline_strings=True)
        disk.write(self._file(candidate.id), text.encode("utf-8", "replace"))

    def remove(self, name: str) -> None:
        """Take a child off the desk."""
        self._file(name).unlink(missing_ok=True)

    def all(self) -> Iterator[Candidate]:
        """Every child that ever lay here, oldest first; files that hold none are passed over."""
        return (found for _, found in self._files() if found is not None)

    def unreadable(self) -> list[Path]:
        """Files that should hold a child and hold none. The run knows its children and writes theirs anew."""
        return [path for path, found in self._files() if found is None]

    def _files(self) -> Iterator[tuple[Path, Candidate | None]]:
        for path in sorted(self.folder.glob("*.toml")):
            if path.name.startswith(".") or path.name.endswith(DECISION):
                continue
            try:
                yield path, Candidate.from_json(tomllib.loads(path.read_text("utf-8")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                yield path, None

    def decision(self, name: str) -> Decision | Damaged | None:
        """What was decided about a child, None while nothing was."""
        path = self._file(name, DECISION)
        try:
            raw = tomllib.loads(path.read_text("utf-8"))
            principles = tuple((_text(p["id"]), _text(p["text"])) for p in raw["principles"])
            if raw["verdict"] not in get_args(Verdict):
                raise ValueError(f"its verdict is {raw['verdict']!r}")
            if len({p for p, _ in principles if p}) < sum(1 for p, _ in principles if p):
                raise ValueError("an id stands twice")
            return Decision(raw["verdict"], principles, _text(raw["when"]), _text(raw["why"]))
        except FileNotFoundError:
            return None
        except KeyError as missing:
            return Damaged(path, f"it has no {missing.args[0]}")
        except OSError as problem:
            return Damaged(path, problem.strerror or str(problem))
        except (ValueError, TypeError) as problem:
            return Damaged(path, str(problem))

    def decide(self, name: str, decision: Decision) -> None:
        """Write a decision down; a damaged one makes room for it and stays beside it. Raises EsplError where there is
        one already: whoever comes first has decided."""
        principles = [{"id": p, "text": text} for p, text in decision.principles]
        raw = tomli_w.dumps({**asdict(decision), "principles": principles})
        if isinstance(known := self.decision(name), Damaged):
            with disk.explained(known.path):
                known.path.replace(known.path.with_name(f"{known.path.name}.damaged"))
        if not disk.write_once(self._file(name, DECISION), raw.encode("utf-8", "replace")):
            known = self.decision(name)
            raise EsplError(
                f"{name} is decided already: {known.verdict if isinstance(known, Decision) else 'see its file'}"
            )

    def _file(self, name: str, ending: str = ".toml") -> Path:
        return self.folder / f"{name}{ending}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where a text belongs")
    return value


def _principles(rows: Sequence[Mapping[str, str]]) -> tuple[Principle, ...]:
    return tuple(Principle(row["id"], row["text"]) for row in rows)
