"""What a person sees while an evaluation goes on: a live panel on a terminal, a line every 15 s elsewhere.

All of it goes to stderr. Sentences that quote an agent or a server are freed of control characters.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from espl_envs.core.errors import MissingExtra
from espl_envs.evaluate.records import Episode, Outcome, TurnUsage

EVERY_S = 15.0
SHOWN = 3               # sentences in the panel
TOLD = 5                # different sentences that are told elsewhere


@dataclass(slots=True)
class RunningMean:
    """The mean over environments of the mean over tasks of the mean over samples, kept up to date in O(1)."""

    _tasks: dict[tuple[str, int], tuple[float, int]] = field(default_factory=dict)
    _sums: dict[str, tuple[int, float, float]] = field(default_factory=dict)    # tasks, Σ mean, Σ mean²

    def add(self, episode: Episode) -> None:
        """One more episode; a fault has no score and changes nothing."""
        if episode.score is None:
            return
        env, task = episode.key.env, (episode.key.env, episode.key.task)
        total, count = self._tasks.get(task, (0.0, 0))
        before, after = total / count if count else 0.0, (total + episode.score) / (count + 1)
        self._tasks[task] = total + episode.score, count + 1
        tasks, first, second = self._sums.get(env, (0, 0.0, 0.0))
        self._sums[env] = tasks + (not count), first + after - before, second + after**2 - before**2

    def value(self) -> tuple[float, float] | None:
        """The mean and half the width of an approximate 95 % interval; None before the first score. Two imaginary
        half-tasks, one right and one wrong, keep the interval from being a point."""
        if not self._sums:
            return None
        mean = math.fsum(first / tasks for tasks, first, _ in self._sums.values()) / len(self._sums)
        variance = 0.0
        for tasks, first, second in self._sums.values():
            centre = (first + 0.5) / (tasks + 1)
            variance += max(0.0, (second + 0.5) / (tasks + 1) - centre**2) / (tasks + 1)
        return mean, 1.96 * math.sqrt(variance) / len(self._sums)


class Progress:
    """Shows how `total` episodes go, of which some are `there` already. Use as a context manager.

    `standing` tells how the agent gets on; `quiet` leaves warnings only. Raises MissingExtra without rich.
    """

    def __init__(
        self, total: int, there: Iterable[Episode], title: str, *, quiet: bool = False, console: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            from rich.console import Console
        except ImportError:
            raise MissingExtra("eval", "espl-eval") from None
        self.standing: Callable[[], str] = str
        self._out = console or Console(stderr=True, highlight=False)
        self._total, self._title, self._quiet, self._clock = total, title, quiet, clock
        self._mean, self._outcomes = RunningMean(), Counter[Outcome]()
        self._done = self._played = self._tokens = 0
        self._cost = 0.0
        self._sentences: Counter[str] = Counter()
        self._began = self._spoke = clock()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._live: Any = None
        for episode in there:
            self._count(episode)
            self._cost += episode.cost or 0.0

    def __enter__(self) -> Self:
        if self._out.is_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(get_renderable=self._panel, console=self._out, refresh_per_second=4, transient=True)
            self._live.start()
        elif not self._quiet:
            threading.Thread(target=self._heartbeat, name="espl-progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def paid(self, usage: TurnUsage) -> None:
        """A model call was made."""
        with self._lock:
            self._tokens += (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
            self._cost += usage.cost or 0.0

    def finished(self, episode: Episode) -> None:
        """An episode was written down."""
        with self._lock:
            self._count(episode)
            self._played += 1
            if not episode.error:
                return
            said = f"{episode.outcome}: {printable(episode.error)}"
            self._sentences[said] += 1
            new = self._sentences[said] == 1 and len(self._sentences) <= TOLD
        if new and self._live is None:
            self._say(f"  {said}")

    def warn(self, text: str) -> None:
        """Something that the user should know. Shown even when quiet."""
        self._out.print(f"warning: {printable(text)}", markup=False, soft_wrap=True)

    def line(self) -> str:
        """How it stands, in one line."""
        with self._lock:
            seconds = self._clock() - self._began
            parts = [f"{self._done:,}/{self._total:,} episodes", self._score()]
            if self._tokens:
                parts.append(f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s")
            if self._cost:
                parts.append(f"cost {self._cost:,.4g}")
            for outcome, word in ((Outcome.FAULT, "fault"), (Outcome.AGENT_ERROR, "agent error")):
                if count := self._outcomes[outcome]:
                    parts.append(f"{count:,} {word}{'s' if count > 1 else ''}")
            parts += [self.standing(), self._left(seconds)]
        return ", ".join(part for part in parts if part)

    def _count(self, episode: Episode) -> None:
        self._mean.add(episode)
        self._outcomes[episode.outcome] += 1
        self._done += 1

    def _score(self) -> str:
        value = self._mean.value()
        return "" if value is None else f"mean {value[0]:.3f} ± {value[1]:.3f}"

    def _left(self, seconds: float) -> str:
        if not self._played or self._done >= self._total:
            return ""
        return f"{duration(seconds / self._played * (self._total - self._done))} left"

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._spoke = self._clock()
            self._out.print(text, markup=False, soft_wrap=True)

    def _heartbeat(self) -> None:
        while not self._stop.wait(1.0):
            if self._clock() - self._spoke >= EVERY_S:
                self._say(self.line())

    def _panel(self) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = self.line()
        with self._lock:
            often = [f"{count:,} × {said}" if count > 1 else said for said, count in self._sentences.most_common(SHOWN)]
            bar = ProgressBar(total=self._total, completed=min(self._done, self._total))
        rows = Table.grid(expand=True)
        rows.add_row(bar)
        rows.add_row(Text(text))
        for said in often:
            rows.add_row(Text(said, "dim", no_wrap=True, overflow="ellipsis"))
        return Panel(rows, title=Text(self._title), title_align="left", border_style="dim")


def printable(text: str) -> str:
    """One line without control characters, also those that turn the direction of writing."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def duration(seconds: float) -> str:
    """A time for people, two units at most."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
