"""Training from Python: what `espl-train` does between its arguments and its exit code.

    from espl_train.settings import load
    from espl_train.training import train

    summary = train(load(presets=["dapo"], overrides={"steps": 3, "out": "runs/mine"}))

Mistakes are EsplErrors, an interrupted run can be resumed. What a run leaves behind stands in docs/runs.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console

from espl_train import preflight
from espl_train.config import Config
from espl_train.learner.ranks import ALONE, Ranks
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory, continued, read_config
from espl_train.runs.summary import Summary

if TYPE_CHECKING:
    from espl_train.profiling import Profile


def train(config: Config, console: Console | None = None) -> Summary:
    """A new run from its first step to its last, in `config.out`. Without a `console` nothing is printed.

    Raises EsplError for what can be put right: before anything is written, where that can be known.
    """
    plan = preflight.inspect(config)
    return _shown(RunDirectory.create(preflight.settled(config)), console, plan)


def resume(folder: Path, overrides: Mapping[str, Any] | None = None, console: Console | None = None) -> Summary:
    """The run in `folder` from where it stands to its end; `overrides` as with `espl-train --resume`."""
    plan = preflight.inspect(continued(folder, read_config(folder), overrides or {}), folder)
    return _shown(RunDirectory.open(folder, overrides), console, plan)


def complete(
    run: RunDirectory, console: Console, ranks: Ranks = ALONE, profile: Profile | None = None,
    plan: preflight.Plan | None = None,
) -> Summary:
    """Train an open run to its end, leave its best prompts and its picture behind, and show what it came to."""
    from transformers.utils import logging

    from espl_train.loop import Trainer

    logging.disable_progress_bar()
    summary = Trainer(run.config, run, console, ranks, profile, plan.leaks if plan else None).train()
    for chosen in summary.chosen:
        run.write_text(f"best_prompt.{chosen.env}.txt" if chosen.env else "best_prompt.txt", chosen.text)
    summary = dataclasses.replace(summary, plot=_plot(run, console))
    console.summary(summary)
    return summary


def _shown(run: RunDirectory, console: Console | None, plan: preflight.Plan) -> Summary:
    """`complete`, after which the directory is given free; one in which nothing has happened goes."""
    try:
        with console or Console(quiet=True, rich=rich.console.Console(quiet=True)) as shown:
            run.warn = shown.warn
            return complete(run, shown, plan=plan)
    finally:
        run.abandon()


def _plot(run: RunDirectory, console: Console) -> Path | None:
    """The picture is a courtesy: without matplotlib, or with a full disk, the run is still done."""
    try:
        from espl_train.runs.plot import plot

        return plot(run.path)
    except (ImportError, OSError) as error:
        console.warn(f"no plot: {error}")
        return None
