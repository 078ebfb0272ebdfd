"""Template sets: how principles, attempts and reflection prompts are written down for a model.

A set is a folder with `set.toml` and one jinja file per stage. Templates run in a sandbox, and values are only ever
data: nothing that a model wrote is rendered as a template.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_train.evolution.prompts import Principle

BUILT_IN = Path(__file__).parent / "templates"
Stage = Literal["summary", "critique", "revision", "crossover", "repair"]
OPTIONAL = ("summary", "revision", "repair")


@dataclass(frozen=True)
class TemplateSet:
    """One way of writing. The switches say which stages a set has at all (`set.toml`)."""

    folder: Path
    summary: bool = True
    revision: bool = True
    repair: bool = True
    description: str = ""

    @classmethod
    def load(cls, name: str) -> TemplateSet:
        """A built-in set by name, or a folder by path. Raises EsplError with the nearest name, or the missing file."""
        folder = BUILT_IN / name if (BUILT_IN / name / "set.toml").is_file() else Path(name)
        if not (folder / "set.toml").is_file():
            raise EsplError(f"there is no template set '{name}'{_nearest(name, available())}")
        settings = tomllib.loads((folder / "set.toml").read_text(encoding="utf-8"))
        known = {f.name: f.type for f in fields(cls) if f.name != "folder"}
        for key, value in settings.items():
            if key not in known:
                raise EsplError(f"{folder / 'set.toml'}: unknown key '{key}'{_nearest(key, known)}")
            if (known[key] == "bool") != isinstance(value, bool) or not isinstance(value, bool | str):
                raise EsplError(f"{folder / 'set.toml'}: '{key}' should be of type {known[key]}, not {value!r}")
        loaded = cls(folder, **settings)
        for stage in ("system", *get_args(Stage)):
            if loaded.has(stage) and not (folder / f"{stage}.jinja").is_file():
                raise EsplError(f"template set '{name}' has no {stage}.jinja")
        return loaded

    def has(self, stage: str) -> bool:
        """Whether the set has this stage."""
        return bool(getattr(self, stage)) if stage in OPTIONAL else True

    def system(self, principles: Sequence[Principle]) -> str:
        """The text of the system message. No principles, no text: then there is no system message at all."""
        return self._render("system", {"principles": list(principles)}).strip() if principles else ""

    def placebo(self) -> tuple[str, ...]:
        """The sentences that stand in for principles under `evolution.writer = "placebo"`: the lines of `placebo.txt`.

        Raises EsplError for a set that has none.
        """
        file = self.folder / "placebo.txt"
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        if not (texts := tuple(line.strip() for line in lines if line.strip())):
            raise EsplError(f"evolution.writer is 'placebo', but there are no sentences in {file}: one a line")
        return texts

    def messages(self, stage: Stage, values: Mapping[str, Any]) -> tuple[Message, ...]:
        """The reflection prompt of a stage: one user message."""
        return (Message("user", self._render(stage, values)),)

    def _render(self, stage: str, values: Mapping[str, Any]) -> str:
        try:
            return self._environment.get_template(f"{stage}.jinja").render(values)
        except jinja2.TemplateError as error:
            raise EsplError(f"template {self.folder / stage}.jinja: {error}") from error

    @cached_property
    def _environment(self) -> jinja2.Environment:
        return ImmutableSandboxedEnvironment(
            loader=jinja2.FileSystemLoader(self.folder),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            autoescape=False,
        )


def available() -> list[str]:
    """The names of the built-in sets."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/set.toml"))


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(known)}"
