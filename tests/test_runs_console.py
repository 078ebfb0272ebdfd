"""The console: plain lines off a terminal, a panel on one, and model text that cannot escape from either."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from espl_train.runs.console import Console, clean, step_line
from espl_train.runs.summary import Chosen, Score, Summary, duration, sparkline, wilson

RECORD = {
    "step": 3, "seconds": 12.34, "reward/mean": 0.4567, "reward/p0000": 0.4, "reward/p0002": 0.51,
    "rating/p0000/mu": 24.0, "rating/p0000/sigma": 2.0, "rating/p0002/mu": 27.5, "rating/p0002/sigma": 1.5,
    "validation/root": 0.4, "validation/best": 0.55, "update/loss": -0.125, "evolution/children": 2,
    "rollouts/faulted": 1,
}  # fmt: skip
HOSTILE = "a\x1b[31mred\x1b]0;title\x07 [bold]b[/bold] \u202e\x00\x9b2J[link=x]c"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(terminal: bool = False, quiet: bool = False, width: int = 88) -> tuple[Console, RichConsole, Clock]:
    clock = Clock()
    out = RichConsole(
        file=io.StringIO(), force_terminal=terminal, width=width, record=True, color_system=None, highlight=False
    )
    return Console(10, "espl/Conventions-v0 · micro", quiet, out, clock), out, clock


def written(out: RichConsole) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_step_is_one_plain_line() -> None:
    assert step_line(RECORD, 10, 86.4) == (
        "step  3/10  reward 0.457  validation root 0.400  best 0.550  loss -0.125  2 new prompts  1 faulted  "
        "12.3 s  1 min 26 s left"
    )
    assert step_line({"step": 1, "reward/mean": float("nan")}, 10, None) == "step  1/10"


def test_off_a_terminal_there_are_plain_lines_one_per_step() -> None:
    console, out, clock = make()
    console.begin(2, 10)
    console.phase("rollouts", 240)
    clock.now += 10
    console.progress(100, tokens=5000)
    clock.now += 10
    console.progress(120, tokens=8000)
    clock.now += 1
    console.progress(125)
    console.step(RECORD)
    console.note("p0004 born")
    console.warn("the disk is slow")
    assert written(out).splitlines() == [
        "  … step 3, rollouts 120/240, 20 s, 400 tokens/s",
        "step  3/10  reward 0.457  validation root 0.400  best 0.550  loss -0.125  2 new prompts  1 faulted  "
        "12.3 s  2 min 27 s left",
        "  p0004 born",
        "warning: the disk is slow",
    ]


def test_a_long_line_is_not_broken_and_has_no_escapes() -> None:
    console, out, _ = make(width=40)
    console.step(RECORD)
    assert len(written(out).splitlines()) == 1 and "\x1b" not in written(out)


def test_a_phase_without_progress_still_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out, clock = make()
    monkeypatch.setattr(
        console._stop, "wait", lambda _: len(written(out).splitlines()) >= 2 or setattr(clock, "now", clock.now + 5)
    )
    console.phase("loading the model")
    console._heartbeat()
    assert written(out).splitlines() == ["  … step 1, loading the model, 15 s", "  … step 1, loading the model, 30 s"]


def test_on_a_terminal_there_is_a_panel() -> None:
    console, out, clock = make(terminal=True)
    console.begin(2, 10)
    console.step(RECORD)
    console.phase("rollouts", 240)
    clock.now += 4
    console.progress(60, tokens=2000)
    console.note("p0004 born by mutation of p0002")
    out.print(console._panel())
    panel = out.export_text()
    for part in (
        "espl/Conventions-v0 · micro", "step 3/10", "28 s left", "rollouts", "60/240", "500 tokens/s", "4 s",
        "root prompt 0.400   best prompt 0.550", "p0004 born by mutation of p0002",
    ):  # fmt: skip
        assert part in panel, part
    rows = [line.split() for line in panel.splitlines() if "p000" in line and "·" in line]
    assert [row[1:3] + row[-3:-1] for row in rows] == [
        ["p0002", "0.510", "27.5", "3.0"],
        ["p0000", "0.400", "24.0", "4.0"],
    ]


def test_the_panel_draws_while_the_loop_talks() -> None:
    """The drawing thread and the loop take two locks; a wrong order would hang here."""
    console, out, _ = make(terminal=True)
    with console:
        assert console._live is not None
        for step in range(200):
            console.phase("rollouts", 3)
            console.progress(1, tokens=step)
            console.step({**RECORD, "step": step, "reward/p0002": float("nan"), "rating/p0002/mu": None})
            console.note("note")
            console._live.refresh()
        console.warn("careful")
    assert "warning: careful" in written(out)


def summary(**changes: object) -> Summary:
    fields: dict[str, object] = {
        "run": Path("runs/x"), "steps": 10, "seconds": 125.0, "tokens": 123456, "rollouts": 2400, "faulted": 0,
        "chosen": (Chosen("p0002", "⊕ multiplies.\n" + HOSTILE),),
        "scores": (Score("test, start", 0.25, 200, 0.19, 0.31), Score("test, best prompt", 0.75)),
        "history": tuple({"step": s, "reward/mean": s / 10} for s in range(10)),
        "plot": Path("runs/x/plot.png"),
    }  # fmt: skip
    return Summary(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_summary_shows_curves_scores_and_the_best_prompt(terminal: bool) -> None:
    console, out, _ = make(terminal)
    console.summary(summary())
    text = out.export_text()
    for part in (
        "10 steps in 2 min 05 s, 2,400 rollouts, 123,456 sampled tokens", "▁▁▂▃▄▅▆▇██",
        "0.250 [0.190, 0.310] (n = 200)", "best system prompt: p0002", "⊕ multiplies.", "plot: runs/x/plot.png",
    ):  # fmt: skip
        assert part in text, part
    assert ("╭" in text) is terminal


def test_an_empty_prompt_is_said_to_be_empty() -> None:
    console, out, _ = make()
    console.summary(summary(chosen=(Chosen("p0002", " \n"),)))
    assert "(the empty system prompt)" in out.export_text()


def test_quiet_prints_warnings_and_the_summary_only() -> None:
    console, out, clock = make(quiet=True)
    with console:
        console.phase("rollouts", 3)
        clock.now += 60
        console.progress(1)
        console.step(RECORD)
        console.note("nothing")
        assert written(out) == ""
        console.summary(summary())
    assert "best system prompt: p0002" in written(out) and "rollouts 1/3" not in written(out)


def test_model_text_brings_no_escapes_and_no_markup() -> None:
    assert clean(HOSTILE) == "ared [bold]b[/bold] 2J[link=x]c"
    assert clean("tab\tand\nline\r\nstay") == "tab\tand\nline\nstay"
    console, out, _ = make()
    console.note(HOSTILE)
    console.warn(HOSTILE)
    console.summary(summary())
    text = written(out)
    assert "[bold]b[/bold]" in text and not any(c in text for c in "\x1b\x00\x07\x9b\u202e")


def test_sparklines_durations_intervals() -> None:
    assert sparkline([]) == "" and sparkline([1, 1, 1]) == "▅▅▅" and sparkline([0, 1]) == "▁█"
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 7260)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 01 min",
    ]
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson(1.0, 10)[1] == 1.0 and 0.7 < wilson(1.0, 10)[0] < 0.73


@pytest.mark.parametrize("terminal", [False, True])
def test_paths_and_rows_of_a_table_stay_in_one_piece_on_a_narrow_terminal(terminal: bool) -> None:
    console, out, _ = make(terminal, width=40)
    row = "reflection  242  0  0  40,518  7,001  47.4  and more"
    prose = "rollouts and tokens, told in a long sentence of words"
    folder = Path("/somewhere/with/a/long/name/that/nobody/can/copy/in/two/pieces")
    console.summary(summary(run=folder, notes=(row, prose)))
    lines = out.export_text().splitlines()
    assert row in lines and f"run: {folder}" in lines
    assert not any(prose in line for line in lines)
