"""The command line as data: `parse(argv)` → `Request`, and `--help` generated from the schema.

Every option of the schema is `--section.key VALUE` or `--section.key=VALUE`; the common ones have short forms.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espl_train.settings import environments
from espl_train.settings.layers import preset_descriptions
from espl_train.settings.options import (
    ConfigError,
    Option,
    hint,
    nearest,
    nearest_option,
    options,
    read_loose,
    sections,
)
from espl_train.settings.root import read_root
from espl_train.settings.subcommands import COMMANDS

SHORT = {
    "env": "env.id", "model": "model.path", "engine": "engine.kind", "test-env": "env.test_id",
    "review": "reflection.review",
}  # fmt: skip
VALUES = ("config", "preset", "resume", "root")
TOOLS, ROOT = "env.args.tools", "evolution.root"
PRESETS = {
    "": "Presets (--preset NAME)", "Baseline": "Baselines (presets, too)", "Control": "Controls (presets, too)",
}  # fmt: skip
FLAGS = ("dry-run", "quiet", "help", "version")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

USAGE = """\
espl-train trains a language model's weights and its system prompt together (E-SPL).

  espl-train                                      the embedded default: micro world, bundled model, two CPU cores
  espl-train --env espl/GSM8K-v0 --model PATH     your environment, your model
  espl-train --env espl/GSM8K-v0 --tools python   the model may run Python in a box
  espl-train --preset aimo_beyondaime             an experiment of the paper
  espl-train --resume runs/NAME                   continue a run where it stopped
"""
COMMAND_OPTIONS = (
    ("--env ID", "environment to train on (env.id); python -m espl_envs list has all ids"),
    ("--env ID=WEIGHT --env …", "several at once; options of an environment (--env.args.NAME) follow its --env"),
    ("--tools NAME,…", "tools of the environment, as in --tools python (env.args.tools); may be given several times"),
    ("--test-env ID", "environment of the final test (env.test_id)"),
    ("--model PATH", "'micro', a folder or a hub id (model.path)"),
    ("--engine NAME", "who samples: local or vllm (engine.kind)"),
    ("--preset NAME", "settings by name, see below; may be given several times"),
    ("--config FILE", "a TOML file; wins over presets, loses to the command line"),
    ("--root FILE", "root prompt, one principle a line (evolution.root)"),
    ("--review", "children wait for a person, who decides with espl-train review RUN (reflection.review)"),
    ("--resume RUN", "continue the run in this directory, with its own settings"),
    ("--dry-run", "print the settings and what would happen, then stop"),
    ("--quiet", "print the summary only"),
    ("--profile[=STEP,…]", "where time goes, into RUN/profile: a table of phases, traces of these steps [the second]"),
    ("--version", "print the version"),
    ("-h, --help", "this page"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for. `overrides` are dotted keys → values, not yet validated."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = ()
    config: Path | None = None
    resume: Path | None = None
    flags: frozenset[str] = frozenset()
    profile: tuple[int, ...] | None = None     # steps to trace; none given: the profile chooses

    @property
    def dry_run(self) -> bool:
        return "dry-run" in self.flags

    @property
    def quiet(self) -> bool:
        return "quiet" in self.flags


def parse(argv: Sequence[str]) -> Request:
    """Read the arguments. Raises ConfigError at the first that cannot be understood."""
    others: dict[str, Any] = {}
    scopes: list[dict[str, Any]] = []          # one per --env: the options of environments go to the last
    presets: list[str] = []
    paths: dict[str, Path] = {}
    flags: set[str] = set()
    profile: tuple[int, ...] | None = None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("-h", "--help"):
            flags.add("help")
        elif not word.startswith("--") or not name:
            raise ConfigError(
                f"Unexpected argument {word!r}: the commands are {', '.join(COMMANDS)}, all else starts with --, as in "
                f"--env ID.{_meant(word)}"
            )
        elif name in FLAGS:
            if equals:
                raise ConfigError(f"--{name} takes no value, but {value!r} was given.")
            flags.add(name)
        elif name == "profile":
            profile = _steps(value) if equals else ()
        elif name == "tools":
            given = value if equals else _next(rest, name)
            scope = scopes[-1] if scopes else others
            scope[TOOLS] = [*scope.get(TOOLS, ()), *(t.strip() for t in given.split(",") if t.strip())]
        elif name in VALUES:
            text = value if equals else _next(rest, name)
            if name == "preset":
                presets += [part for part in text.split(",") if part]
            else:
                paths[name] = Path(text)
        else:
            key, option = _find(name)
            if key == "env.id":
                scopes.append(environments.weighted(value if equals else _next(rest, name)))
                continue
            scope = scopes[-1] if scopes and key.startswith(environments.ENV) else others
            if option is not None and option.kind is bool and not equals and not _is_bool(rest):
                scope[key] = True
                continue
            text = value if equals else _next(rest, name)
            scope[key] = option.read(text) if option is not None else read_loose(text)
    if "root" in paths:
        if ROOT in others:
            raise ConfigError(f"--root and --{ROOT} are both given: use one of the two.")
        others[ROOT] = read_root(paths["root"])
    overrides = environments.scoped(others, scopes)
    request = Request(overrides, tuple(presets), paths.get("config"), paths.get("resume"), frozenset(flags), profile)
    if request.resume and (request.presets or request.config):
        raise ConfigError("--resume continues a run with its own settings: leave --preset and --config out.")
    return request


def _steps(text: str) -> tuple[int, ...]:
    steps = [part.strip() for part in text.split(",")]
    if not all(step.isascii() and step.isdigit() and int(step) for step in steps):
        raise ConfigError(f"--profile={text} names no steps: numbers from 1 on, as in --profile=2 or --profile=2,10.")
    return tuple(int(step) for step in steps)


def _next(rest: list[str], name: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"--{name} needs a value.")
    return rest.pop(0)


def _is_bool(rest: Sequence[str]) -> bool:
    return bool(rest) and rest[0].lower() in TRUE + FALSE


def _find(name: str) -> tuple[str, Option | None]:
    """The key a name stands for and its option; None for an entry of a table (`--env.args.world`)."""
    key = SHORT.get(name) or (name if name in options() else name.replace("-", "_"))
    if key in options():
        return key, options()[key]
    if name.startswith("envs."):
        return name, environments.option(name)
    table = options().get(name.rpartition(".")[0].replace("-", "_"))
    if table is not None and table.is_table:
        return f"{table.key}.{name.rpartition('.')[2]}", None
    if key in sections():
        inside = ", ".join(o.rpartition(".")[2] for o in options() if o.startswith(f"{key}."))
        raise ConfigError(f"--{name} is a section; its options are --{key}.NAME with NAME one of {inside}.")
    words = (*SHORT, *VALUES, *FLAGS, "profile")
    close = nearest(name, (*words, "tools"), 0.75) or nearest_option(key) or nearest(name, words)
    raise ConfigError(f"There is no option --{name}.{hint(close, '--')} espl-train --help lists all of them.")


def _meant(word: str) -> str:
    if command := nearest(word, COMMANDS, 0.7):
        return hint(command)
    close = nearest(word.lstrip("-"), (*SHORT, *VALUES, *FLAGS, "profile", *options()), 0.8)
    return hint(close, "--")


def help_text(width: int | None = None) -> str:
    """The whole help page as plain text, grouped by section."""
    width = min(width or shutil.get_terminal_size().columns, 120)
    commands = [_row(f"espl-train {c.usage}", c.about, width) for c in COMMANDS.values()]
    parts = [USAGE, "Commands beside training (each has a --help)", *commands, ""]
    parts += ["Command", *(_row(left, right, width) for left, right in COMMAND_OPTIONS), ""]
    for heading, rows in _presets().items():
        parts += [heading, *(_row(name, text, width) for name, text in rows), ""]
    parts += ["Run", *_rows("", width)]
    for section in sections():
        parts += ["", f"{section.capitalize()} ({section_doc(section)})", *_rows(section, width)]
    return "\n".join(parts) + "\n"


def _presets() -> dict[str, list[tuple[str, str]]]:
    """Heading → presets. What a description begins with says where it belongs."""
    groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in PRESETS.values()}
    for name, text in preset_descriptions().items():
        kind = next((kind for kind in PRESETS if kind and text.startswith(f"{kind}: ")), "")
        groups[PRESETS[kind]].append((name, text.removeprefix(f"{kind}: ")))
    return groups


def section_doc(section: str) -> str:
    """The first line of the section's docstring, without the full stop."""
    from espl_train.config import Config

    kind = Config.model_fields[section].annotation
    doc = (kind.__doc__ or section).strip().partition("\n")[0].rstrip(".")
    return doc[:1].lower() + doc[1:] if not doc[:2].isupper() and not doc.startswith("TrueSkill") else doc


def _rows(section: str, width: int) -> list[str]:
    return [_row(f"--{o.key}", _describe(o), width) for o in options().values() if o.section == section]


def _describe(option: Option) -> str:
    default = {True: "true", False: "false", None: "none"}.get(option.default) if _plain(option) else None
    shown = default if default is not None else (option.default if option.default != "" else "''")
    shown = list(shown) if isinstance(shown, tuple) else shown
    shown = f"{shown:.6g}" if isinstance(shown, float) else shown
    bounds = f", {', '.join(option.bounds)}" if option.bounds else ""
    text = f"{option.description} " if option.description else ""
    return f"{text}[{option.takes}{bounds}; default {shown}]"


def _plain(option: Option) -> bool:
    return option.default is None or isinstance(option.default, bool)


def _row(left: str, right: str, width: int, column: int = 34) -> str:
    indent = " " * column
    lines = textwrap.wrap(right, max(width - column, 30), break_long_words=False) or [""]
    head = f"  {left}"
    if len(head) + 2 > column:
        return "\n".join([head, *(indent + line for line in lines)])
    return "\n".join([head.ljust(column) + lines[0], *(indent + line for line in lines[1:])])
