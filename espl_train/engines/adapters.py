"""Adapters on their way from the learner to a sampler that reads files: one directory per publication, never reused.

A directory is written aside, fsynced and renamed, so that whoever finds it finds all of it. Names and ids are never
given twice: samplers compare adapters by name, and one that knew the name already would go on serving what it has.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from espl_train import disk
from espl_train.engines.scratch import LOCK, Scratch

PREFIX = "espl-adapters-"
MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One published set of weights. `id` counts publications from 1; `version` is the learner's."""

    version: int
    id: int
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


class AdapterStore:
    """The directories of one engine, below `root` (default: in memory where there is room for a few adapters of `size`
    bytes, else where temporary files go). They go with the engine; what a killed one left is removed by the next.
    """

    def __init__(self, root: Path | None = None, size: int = 0) -> None:
        self._scratch = Scratch(PREFIX, root or _fastest(size))
        self.folder = self._scratch.folder
        self._count = 0

    def publish(self, version: int, save: Callable[[Path], None]) -> Adapter:
        """`save(folder)` writes the files; returns the adapter once all of it is there under its own new name."""
        self._count += 1
        final = self.folder / f"policy-{version:06d}-{self._count:06d}"
        aside = self.folder / f".{final.name}"
        try:
            aside.mkdir()
            save(aside)
            disk.sync_all(aside)
            aside.rename(final)
            disk.sync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return Adapter(version, self._count, final)

    def keep(self, *adapters: Adapter) -> None:
        """Remove every directory but those of `adapters`."""
        names = {LOCK, *(adapter.name for adapter in adapters)}
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove everything. May be repeated."""
        self._scratch.close()


def _fastest(size: int) -> Path:
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > 4 * size:
        return MEMORY
    return Path(tempfile.gettempdir())
