"""The directory of an export, written aside and put into place when it is whole.

    prompt.md  prompt.json  request.json      (in envs/NAME/, where a run has several environments)
    adapter/                                  (model/ where every weight was trained, or with --merge)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train import disk
from espl_train.export import markdown
from espl_train.export.document import document
from espl_train.export.request import ADAPTER, MODEL, REQUEST, commands, request
from espl_train.snapshot import Snapshot

PROMPT, PAGE, ENVS = "prompt.json", "prompt.md", "envs"
OURS = {PROMPT, PAGE, REQUEST, ENVS, ADAPTER, MODEL}


def export(run: Snapshot, out: Path, which: str = "best", merge: bool = False) -> Path:
    """Write everything about the prompt that `which` names, and the weights, into `out`; returns it.

    An older export there is replaced. Raises EsplError where `out` holds something else, or there is no such prompt.
    """
    refuse_foreign(out)
    full = run.config.learner.mode == "full"
    with _replacing(out) as folder:
        write_prompts(run, folder, which, MODEL if full else ADAPTER)
        if run.trained and not full:
            _write_adapter(run, folder / ADAPTER)
        if run.trained and (full or merge):
            _write_model(run, folder / MODEL)
    return out


def write_prompts(run: Snapshot, folder: Path, which: str, weights: str) -> None:
    """The page, the record and the request; where a run has several environments, in a folder `envs/NAME` for each.
    `weights` is where those that were trained lie, from `folder`."""
    asked = which.rpartition("/")[2] != "best"
    for island, prompt in run.find(which):
        target = folder / ENVS / island if island else folder
        with disk.explained(target):
            target.mkdir(parents=True, exist_ok=True)
        place = f"../../{weights}" if island else weights
        name = f"{island}/{prompt.id}" if island else prompt.id
        record = document(run, prompt, island, asked)
        text = markdown.page(record, tuple(commands(run, name, place if run.trained else None)))
        disk.write(target / PAGE, text.encode("utf-8", "backslashreplace"))
        disk.write(target / PROMPT, _json(record))
        disk.write(target / REQUEST, _json(request(run, prompt, island)))


def refuse_foreign(out: Path) -> None:
    """Raises EsplError unless `out` is free, empty, or an export and nothing else: all of it will be replaced."""
    if out.exists() and not out.is_dir():
        raise EsplError(f"{out} is a file: choose another --out")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if there and not ({PROMPT, ENVS} & there):
        raise EsplError(f"{out} is not empty and is no export (it has no {PROMPT}): choose another --out")
    if other := sorted(there - OURS):
        raise EsplError(f"{out} holds more than an export ({other[0]}), and would be replaced: choose another --out")


def _write_adapter(run: Snapshot, folder: Path) -> None:
    from espl_train.learner.adapter import write_adapter

    folder.mkdir()
    write_adapter(folder, run.learner()["policy"], run.config.learner, run.config.model.path)


def _write_model(run: Snapshot, folder: Path) -> None:
    """All weights in one: this reads the base model."""
    from espl_train.learner.policy import Policy

    policy = Policy.load(run.config.model, run.config.learner, run.config.seed)
    learner = run.learner()
    policy.load_state(learner["policy"], learner["version"])
    policy.save_merged(folder)


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when the block has ended well, and is gone when it has not."""
    aside, old = (out.with_name(f".{kind}-{out.name}") for kind in ("writing", "replaced"))
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            out.rename(old)
        aside.rename(out)
    except OSError as problem:
        raise EsplError(f"{out} cannot be written: {problem.strerror or problem}") from problem
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
