"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere.

The loop tells what happens (`phase`, `progress`, `step`, `note`, `warn`) and never asks how it is shown. Text that a
model wrote is stripped of control characters and never read as markup.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from espl_train.runs.islands import names, own
from espl_train.runs.summary import Chosen, Summary, curves, duration, sparkline

EVERY_S = 15.0
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
    re.DOTALL,
)
PROMPT_KEY = re.compile(r"reward/((?:[\w-]+:)?p\d+)")


def clean(text: str) -> str:
    """Model text without ANSI sequences, control and direction-changing characters; newlines and tabs stay."""
    return CONTROL.sub("", text.replace("\r\n", "\n"))


@dataclass
class _State:
    """What the panel shows; changed by the loop, read by the drawing thread."""

    phase: str = "starting"
    total: int | None = None
    done: int = 0
    tokens: int = 0
    phase_start: float = 0.0
    record: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    rewards: list[float] = field(default_factory=list)
    messages: deque[Text] = field(default_factory=lambda: deque(maxlen=3))
    validation: dict[str, float] = field(default_factory=dict)


class _Terminal(RichConsole):
    """Rich, which would end the process where nobody reads its output; whoever called decides."""

    def on_broken_pipe(self) -> None:
        raise                                  # the BrokenPipeError that rich has caught


class Console:
    """Shows one run of `steps` steps (or whatever its `noun` is). A context manager; outside of it nothing is live."""

    def __init__(
        self,
        steps: int = 0,
        title: str = "espl-train",
        quiet: bool = False,
        rich: RichConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
        noun: str = "step",
    ) -> None:
        self._out, self._noun = rich or _Terminal(highlight=False), noun
        self._steps, self._title, self._quiet, self._clock = steps, clean(title), quiet, clock
        self._state = _State(phase_start=clock())
        self._began: tuple[int, float] | None = None
        self._spoke = clock()
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._stop = threading.Event()
        self._boxes: Callable[[], str] = str

    @property
    def live(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._out.is_terminal and not self._quiet

    def __enter__(self) -> Console:
        if self.live:
            self._live = Live(get_renderable=self._panel, console=self._out, refresh_per_second=4, transient=True)
            self._live.start()
        elif not self._quiet:
            threading.Thread(target=self._heartbeat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, step: int, steps: int) -> None:
        """The run goes from `step` finished steps to `steps`; remaining time is reckoned from here."""
        with self._lock:
            self._steps, self._state.step = steps, step
            self._began = (step, self._clock())

    def watch(self, boxes: Callable[[], str]) -> None:
        """`boxes` says how many sandboxes there are at the moment; the empty text where there are none to speak of."""
        self._boxes = boxes

    def phase(self, name: str, total: int | None = None) -> None:
        """A new phase of the step begins: `total` things are to be done in it, if that is known."""
        with self._lock:
            state = self._state
            state.phase, state.total, state.done, state.tokens = name, total, 0, 0
            state.phase_start = self._spoke = self._clock()

    def progress(self, done: int, tokens: int | None = None) -> None:
        """So many things of the phase are done; `tokens` were sampled in it so far."""
        with self._lock:
            self._state.done = done
            self._state.tokens = self._state.tokens if tokens is None else tokens
        self._tick()

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is finished; `record` is what metrics.jsonl gets."""
        with self._lock:
            state = self._state
            state.record, state.step = record, int(record.get("step", state.step + 1))
            if (mean := _number(record, "reward/mean")) is not None:
                state.rewards.append(mean)
            for name in ("root", "best"):
                if (value := _number(record, f"validation/{name}")) is not None:
                    state.validation[name] = value
            if self._began is None:
                self._began = (state.step - 1, self._clock() - (_number(record, "seconds") or 0.0))
            line = step_line(record, self._steps, self._remaining(), self._noun)
        if self._live is None:
            self._say(Text(line))

    def note(self, text: str) -> None:
        """Something worth knowing happened. The panel shows the last few; the run's events.jsonl has all."""
        if self._live is None:
            self._say(Text(f"  {clean(text)}"))
        with self._lock:
            shown = Text(clean(text), "dim")
            if shown not in self._state.messages:
                self._state.messages.append(shown)

    def warn(self, text: str) -> None:
        """Something went wrong, the run goes on. Shown even when quiet."""
        self._say(Text.assemble(("warning: ", "bold yellow"), clean(text)), always=True)

    def summary(self, summary: Summary) -> None:
        """The end of the run, with its best system prompt. Shown even when quiet."""
        self.__exit__()
        self._out.print(summary_view(summary, self._out.is_terminal), crop=False)

    def show(self, text: str) -> None:
        """Something that was asked for. Shown even when quiet."""
        self._say(Text(f"\n{clean(text)}"), always=True)

    def _say(self, text: Text, always: bool = False) -> None:
        """Print a line. Never with `_lock` held: the drawing thread takes rich's lock first and then ours."""
        if self._quiet and not always:
            return
        self._spoke = self._clock()
        self._out.print(text, soft_wrap=True)

    def _heartbeat(self) -> None:
        with contextlib.suppress(BrokenPipeError):      # the loop will find out by itself
            while not self._stop.wait(1.0):
                self._tick()

    def _tick(self) -> None:
        """Without a terminal, a long phase says every 15 s that it is still at work."""
        if self.live or self._quiet or self._clock() - self._spoke < EVERY_S:
            return
        state = self._state
        of = f" {state.done}/{state.total}" if state.total else ""
        elapsed = duration(self._clock() - state.phase_start)
        boxes = f", boxes: {said}" if (said := self._boxes()) else ""
        step = min(state.step + 1, self._steps)
        self._say(Text(f"  … {self._noun} {step}, {state.phase}{of}, {elapsed}{self._speed(', ')}{boxes}"))

    def _speed(self, before: str = "") -> str:
        seconds = self._clock() - self._state.phase_start
        return f"{before}{self._state.tokens / seconds:,.0f} tokens/s" if self._state.tokens and seconds > 0 else ""

    def _remaining(self) -> float | None:
        """Seconds to the end at the pace so far."""
        if self._began is None or self._state.step <= self._began[0]:
            return None
        pace = (self._clock() - self._began[1]) / (self._state.step - self._began[0])
        return pace * max(self._steps - self._state.step, 0)

    def _panel(self) -> RenderableType:
        with self._lock:
            state = self._state
            head = Table.grid(padding=(0, 2), expand=True)
            head.add_column(width=18, no_wrap=True)
            head.add_column(ratio=1)
            head.add_column(justify="right", no_wrap=True)
            left = self._remaining()
            eta = f"{duration(left)} left" if left is not None else ""
            at = Text(f"{self._noun} {state.step}/{self._steps}", "bold")
            head.add_row(at, _bar(state.step, self._steps), Text(eta, "dim"))
            of = f"{state.done:,}/{state.total:,}  " if state.total else ""
            elapsed = duration(self._clock() - state.phase_start)
            work = Text(f"{of}{self._speed()}  {elapsed}".strip(), "dim")
            head.add_row(Text(state.phase, "cyan"), _bar(state.done, state.total), work)
            if boxes := self._boxes():
                head.add_row(Text("boxes", "cyan"), Text(boxes, "dim"), Text())
            parts: list[RenderableType] = [head]
            if state.rewards:
                parts += [
                    Text(),
                    Text.assemble(("reward  ", "dim"), sparkline(state.rewards, 40), f"  {state.rewards[-1]:.3f}"),
                ]
            if state.validation:
                shown = "   ".join(f"{name} prompt {value:.3f}" for name, value in state.validation.items())
                parts.append(Text.assemble(("validation  ", "dim"), shown))
            played = {k: v for n in names([state.record]) for k, v in own(state.record, n).items()}
            if any(map(PROMPT_KEY.fullmatch, played)):
                parts += [Text(), prompts_table(played)]
            if state.messages:
                parts += [Text(), *state.messages]
            return Panel(Group(*parts), title=Text(self._title), title_align="left", border_style="dim")


def _bar(done: int, total: int | None) -> RenderableType:
    return ProgressBar(total=total, completed=min(done, total)) if total else Text()


def prompts_table(record: Mapping[str, Any]) -> Table:
    """The prompts that played in a step: reward and rating, best rating first."""
    table = _table(("prompt", "left"), ("reward", "right"), ("", "left"), ("rating", "right"), ("± 2σ", "right"))
    ids = [match[1] for key in record if (match := PROMPT_KEY.fullmatch(key))]
    for name in sorted(ids, key=lambda p: -(_number(record, f"rating/{p}/mu") or 0.0)):
        reward, mu = _number(record, f"reward/{name}"), _number(record, f"rating/{name}/mu")
        sigma = _number(record, f"rating/{name}/sigma")
        blocks = "█" * round(20 * min(max(reward or 0.0, 0.0), 1.0))
        bar = Text(blocks.ljust(20, "·"), "green")
        table.add_row(Text(name), _shown(reward, ".3f"), bar, _shown(mu, ".1f"), _shown(sigma and 2 * sigma, ".1f"))
    return table


def _table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def _shown(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a record; a mean over nothing (NaN) counts as not there."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def step_line(record: Mapping[str, Any], steps: int, remaining: float | None, noun: str = "step") -> str:
    """One step as one line of plain text."""
    parts = [f"{noun} {int(_number(record, 'step') or 0):>{len(str(steps))}}/{steps}"]
    for key, words in (("reward/mean", "reward"), ("validation/root", "validation root"), ("validation/best", "best")):
        if (value := _number(record, key)) is not None:
            parts.append(f"{words} {value:.3f}{_apart(record, key) if key == 'reward/mean' else ''}")
    if (loss := _number(record, "update/loss")) is not None:
        parts.append(f"loss {loss:+.3g}")
    if children := int(_number(record, "evolution/children") or 0):
        parts.append(f"{children} new prompt{'s' if children > 1 else ''}")
    if faulted := int(_number(record, "rollouts/faulted") or 0):
        parts.append(f"{faulted} faulted")
    if (seconds := _number(record, "seconds")) is not None:
        parts.append(f"{seconds:.1f} s")
    if remaining:
        parts.append(f"{duration(remaining)} left")
    return "  ".join(parts)


def _apart(record: Mapping[str, Any], key: str) -> str:
    """What a number comes to in each of several environments."""
    known = {name: _number(own(record, name), key) for name in names([record]) if name}
    shown = ", ".join(f"{clean(name)} {value:.3f}" for name, value in known.items() if value is not None)
    return f" ({shown})" if shown else ""


def summary_view(summary: Summary, framed: bool) -> RenderableType:
    """The end of a run: curves, scores, the best system prompt, where everything lies."""
    curve = _table(("", "left"), ("first", "right"), ("", "left"), ("last", "right"))
    for row in curves(summary.history):
        curve.add_row(*row)
    scores = Table.grid(padding=(0, 2))
    scores.add_column(no_wrap=True)
    scores.add_column(no_wrap=True)
    for score in summary.scores:
        scores.add_row(Text(clean(score.name)), Text(str(score), "bold"))
    work = (
        f"{summary.steps} steps in {duration(summary.seconds)}, {summary.rollouts:,} rollouts, "
        f"{summary.tokens:,} sampled tokens" + (f", {summary.faulted} faulted" if summary.faulted else "")
    )
    files = _whole(f"run: {summary.run}" + (f"\nplot: {summary.plot}" if summary.plot else ""))
    parts: list[RenderableType] = [Text(), Text(work)]
    parts += [curve] if curve.row_count else []
    parts += [Text(), scores] if summary.scores else []
    parts += [_whole(note) if "  " in note else Text(clean(note), "dim") for note in summary.notes]
    for chosen in summary.chosen:
        parts += [Text(), _prompt(chosen, framed)]
    return Group(*parts, Text(), files)


def _whole(text: str) -> Text:
    """Lines that are never broken, however narrow the terminal is: paths, rows of a table."""
    return Text(clean(text), "dim", no_wrap=True, overflow="ignore")


def _prompt(chosen: Chosen, framed: bool) -> RenderableType:
    text = Text(clean(chosen.text).strip() or "(the empty system prompt)")
    of = f" of {clean(chosen.env)}" if chosen.env else ""
    title = Text(f"best system prompt{of}: {clean(chosen.prompt)}", "bold")
    return Panel(text, title=title, title_align="left", border_style="green") if framed else Group(title, text)
