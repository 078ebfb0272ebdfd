"""The seal on a run's test split: who has opened it, on record in `test_opened.jsonl` as long as there is the run.

A test split that was looked at before a decision is no test any more. Nothing here forbids a look; every one is
counted, and whoever takes a further one is told of the earlier ones.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.runs.metrics import read_lines

FILE = "test_opened.jsonl"


@dataclass(frozen=True, slots=True)
class Opening:
    """One look at the test split: with the weights and prompts of `step`, by the run itself or by a later command."""

    step: int
    by: str = "run"

    def __str__(self) -> str:
        return f"at step {self.step}" + (f" by {self.by}" if self.by != "run" else "")


def openings(run: Path) -> tuple[Opening, ...]:
    """All looks so far, the first one first. Raises EsplError where the record is damaged."""
    try:
        return tuple(Opening(int(row["step"]), str(row["by"])) for row in read_lines(run / FILE))
    except (KeyError, TypeError, ValueError):
        raise EsplError(f"{run / FILE} is damaged: it says who has opened the test split, so restore it") from None


def open_seal(run: Path, opening: Opening) -> tuple[Opening, ...]:
    """Note a look, before it is taken; the very same one again (what was interrupted goes on) is none of its own.

    Returns the other ones before it. Raises EsplError where it cannot be noted: then it must not be taken.
    """
    before = openings(run)
    if opening not in before:
        _append(run / FILE, {"step": opening.step, "by": opening.by})
    return tuple(other for other in before if other != opening)


def told(before: tuple[Opening, ...], run: Path | None = None) -> tuple[str, ...]:
    """What has to be said beside the scores of a look that had others `before` it; nothing for a first one."""
    if not before:
        return ()
    whose = f" of {run}" if run else ""
    return (f"the test split{whose} was opened before, {', '.join(map(str, before))}: no first look",)


def _append(path: Path, row: dict[str, Any]) -> None:
    """One write to a file in append mode: two commands at once lose nothing."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(row).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise EsplError(
            f"{path} cannot be written ({problem.strerror}), and the test split is opened only where that is noted: "
            "make the run writable, or play the validation split"
        ) from None
