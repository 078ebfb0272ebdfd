"""Writes episodes down in a thread of its own, as many at a time as have ended meanwhile.

A slow disk keeps nobody waiting but those whose episode it is, and hundreds that end together cost one hand-over
between threads. When `write` returns, the episode survives the death of the process (see `RunDirectory.append`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.records import Episode

Entry = tuple[Episode, "asyncio.Future[None]"]


class Scribe:
    """Keeps the records of one run, on one event loop."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, "espl-records")
        self._entries: list[Entry] = []
        self._work: asyncio.Task[None] | None = None

    async def write(self, episode: Episode) -> None:
        """Write it down. Raises RunError where the disk refuses."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entries.append((episode, done))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._write_all())
        await done

    async def aclose(self) -> None:
        """Wait for what is being written."""
        if self._work is not None:
            await self._work
        self._thread.shutdown()             # at once: it is idle

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._entries:
            entries, self._entries = self._entries, []
            try:
                await loop.run_in_executor(self._thread, self._append, [episode for episode, _ in entries])
            except Exception as problem:
                for _, done in entries:
                    if not done.done():
                        done.set_exception(problem)
            else:
                for _, done in entries:
                    if not done.done():
                        done.set_result(None)

    def _append(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            self._directory.append(episode)
