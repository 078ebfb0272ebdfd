"""The commands beside training, `espl-train NAME …`: one table, one way to read words, one look of the help.

A command is a function from its words to an exit code; it is imported when it is called.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from espl_train.settings.options import ConfigError, hint, nearest

COLUMN, WIDEST = 34, 120        # as the main help page


@dataclass(frozen=True, slots=True)
class Command:
    """`run` is "module:function"; `usage` and `about` are its line on the main help page."""

    run: str
    usage: str
    about: str

    def __call__(self, words: Sequence[str]) -> int:
        module, _, name = self.run.partition(":")
        function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
        return function(words)


COMMANDS: dict[str, Command] = {
    "serve": Command(
        "espl_train.serving.command:main", "serve RUN|MODEL", "answer OpenAI's protocol with what a run has trained"
    ),
    "review": Command(
        "espl_train.reflecting.command:main", "review RUN", "read the children of a run with --review, and decide"
    ),
    "export": Command(
        "espl_train.export.command:main", "export RUN", "best prompt with its provenance, adapter, a ready request"
    ),
    "lineage": Command(
        "espl_train.genealogy:main", "lineage RUN [WHICH]", "who wrote each principle, from what, why, and how it did"
    ),
    "transplant": Command(
        "espl_train.transplant.command:main", "transplant RUN …", "whose weights need whose prompt: a matrix of scores"
    ),
}


class Parser(argparse.ArgumentParser):
    """Reads the words of one command. What is wrong is a ConfigError of one sentence, with the nearest option; the help
    looks like the main page. No abbreviations."""

    def __init__(self, name: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"espl-train {name}", description=description, epilog=epilog, allow_abbrev=False, formatter_class=_Page
        )

    def add_run(self, step: bool = False) -> None:
        """The argument RUN; with `step` also the option --step, for those who read one of its checkpoints."""
        self.add_argument("run", metavar="RUN", type=Path, help="a run directory")
        if step:
            self.add_argument("--step", metavar="N", type=int, help="of which checkpoint; default: the newest")

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        known = [name for action in self._actions for name in action.option_strings]
        unknown = message.partition("unrecognized arguments: ")[2].split()
        close = nearest(unknown[0].partition("=")[0], known) if unknown else None
        raise ConfigError(f"{message}.{hint(close)} {self.prog} --help lists all options.")


class _Page(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=COLUMN, width=min(shutil.get_terminal_size().columns, WIDEST))

