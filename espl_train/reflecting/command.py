"""`espl-train review RUN`: read the children that wait, and let them in, let them in with other words, or not.

Works beside a run that goes on (it looks at its next iteration) and on one that stands still (it looks when it is
continued). What a model wrote is shown without control characters.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from espl_envs.core.errors import EsplError
from espl_train.evolution.prompts import WORDS
from espl_train.reflecting.review import WAITING, Candidate, Damaged, Decision, Desk
from espl_train.runs.console import clean
from espl_train.runs.directory import read_config
from espl_train.settings.subcommands import Parser

NAMED = re.compile(r"(G\d{1,9})\s*:\s*(.*)", re.DOTALL)
ACTIONS = ("list", "show", "accept", "reject", "edit")
SHEET = """\
# {id}, by {operator} of {parents}. One principle a line; "G3: text" keeps its id, a line without one is new, a line
# that is taken away is gone. Lines that begin with # do not count. Nothing left: nothing is decided.
"""


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    chosen = _parser().parse_args(list(words))
    config = read_config(chosen.run)
    desk = Desk(chosen.run)
    found = list(desk.all())
    if chosen.action in ("list", "show"):
        wanted = [_find(found, name) for name in chosen.ids] or found
        parts = [_shown(candidate, desk, chosen.action == "show") for candidate in wanted]
        print("\n\n".join([*parts, _count(found, desk)]) if found else _nothing(config.reflection.review))
        for path in desk.unreadable():
            print(f"{path} cannot be read: the run writes it anew when it goes on")
        return 0
    if not chosen.ids:
        raise EsplError(f"{chosen.action} needs the id of a child: espl-train review {chosen.run} lists them")
    if chosen.action == "edit" and len(chosen.ids) > 1:
        raise EsplError("one child is edited at a time")
    for candidate in [_find(found, name) for name in chosen.ids]:
        _decide(candidate, desk, chosen.action, chosen.file, chosen.why, config.evolution.max_words)
    return 0


def _parser() -> Parser:
    made = Parser(
        "review",
        "Decide about the children of a run with --review: they are in no population until a person lets them in. The "
        "run takes decisions up at its next iteration.",
        "Ids may be shortened. A decision is final; a text of your own passes the same guards as a model's.",
    )
    made.add_run()
    made.add_argument("action", nargs="?", choices=ACTIONS, default="list", help="default: list")
    made.add_argument("ids", nargs="*", metavar="ID", default=[], help="of children")
    made.add_argument("--file", metavar="FILE", type=Path, help="edit: take the principles from here, one a line, and "
                      "open no editor")
    made.add_argument("--why", metavar="TEXT", default="", help="a word on the decision, for the log")
    return made


def _decide(
    candidate: Candidate, desk: Desk, action: str, file: Path | None, why: str, most_words: int
) -> None:
    if candidate.state != WAITING:
        raise EsplError(f"{candidate.id} is decided already: {clean(candidate.state)}")
    texts: tuple[tuple[str, str], ...] = ()
    if action == "accept":
        texts = tuple((p.id, p.text) for p in candidate.child.principles)
    elif action == "edit":
        text = _given(file) if file else _in_editor(_sheet(candidate))
        texts = tuple(_read(text, most_words))
        candidate.edited(texts)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    desk.decide(candidate.id, Decision("reject" if action == "reject" else "accept", texts, when, why))
    done = {"accept": "accepted", "reject": "rejected", "edit": "accepted with your words"}[action]
    print(f"{candidate.id} {done}")


def _read(text: str, most_words: int) -> Iterator[tuple[str, str]]:
    """(id, text) pairs of an edited sheet. Raises EsplError for one that is empty or too long."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise EsplError("no principle is left, so nothing is decided: reject the child instead")
    for line in lines:
        named = NAMED.fullmatch(line)
        name, said = (named[1], named[2]) if named else ("", line)
        if not 0 < len(said.split()) <= most_words:
            raise EsplError(f"{line[:60]!r} has {len(said.split())} words, evolution.max_words is {most_words}")
        yield name, said


def _given(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise EsplError(f"--file {file} cannot be read, so nothing is decided: {problem}") from None


def _in_editor(text: str) -> str:
    """What a person makes of `text` in their editor."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor or not sys.stdin.isatty():
        raise EsplError("there is no editor here: set EDITOR and use a terminal, or give the text with --file FILE")
    with tempfile.TemporaryDirectory(prefix="espl-review-") as folder:
        path = Path(folder) / "principles.txt"
        path.write_text(text, "utf-8")
        if subprocess.run([*shlex.split(editor), str(path)], check=False).returncode:
            raise EsplError(f"the editor {editor} ended with an error, so nothing is decided")
        return path.read_text("utf-8")


def _sheet(candidate: Candidate) -> str:
    child = candidate.child
    head = SHEET.format(id=candidate.id, operator=WORDS[child.operator], parents=" and ".join(child.parents))
    return head + "".join(f"{p.id}: {p.text}\n" for p in child.principles)


def _find(found: Sequence[Candidate], name: str) -> Candidate:
    fitting = [c for c in found if c.id == name] or [c for c in found if c.id.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    some = ", ".join(c.id for c in (fitting or [c for c in found if c.state == WAITING])[:8]) or "none"
    raise EsplError(f"{name!r} is {'more than one child' if fitting else 'no child of this run'}: there are {some}")


def _shown(candidate: Candidate, desk: Desk, whole: bool) -> str:
    child = candidate.child
    where = f" on {candidate.island}" if candidate.island else ""
    how = f"{WORDS[child.operator]} of {' and '.join(child.parents)}"
    head = f"{candidate.id}  {how}{where}: {_standing(candidate, desk)}"
    if not whole and candidate.state != WAITING:
        return clean(head)
    lines = [head, *(f"  {line}" for line in candidate.changes)]
    if whole:
        lines += ["  why:", *(f"    {line}" for line in candidate.evidence or ["nothing is known"])]
    return clean("\n".join(lines))


def _standing(candidate: Candidate, desk: Desk) -> str:
    """Waiting, decided and not yet taken up, or what became of it."""
    decision = desk.decision(candidate.id) if candidate.state == WAITING else None
    if isinstance(decision, Damaged):
        return f"{candidate.state}; {decision}: decide again"
    return f"{decision.verdict}ed, taken up at the next iteration" if decision else candidate.state


def _count(found: Sequence[Candidate], desk: Desk) -> str:
    decided = (c.state != WAITING or isinstance(desk.decision(c.id), Decision) for c in found)
    counts = Counter("decided" if done else WAITING for done in decided)
    return f"{counts[WAITING]} waiting, {counts['decided']} decided"


def _nothing(review: bool) -> str:
    return "no child has come yet" if review else "this run takes its children in unseen (--review asks for a review)"
