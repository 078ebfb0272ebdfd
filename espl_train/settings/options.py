"""The option table, read off the schema: one `Option` per leaf of `Config`, by its dotted key.

Also here: how a text from the command line becomes a value, which name a misspelt one probably meant, and how a
pydantic error reads as a sentence about an option.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from espl_envs.core.errors import EsplError
from espl_train.config import Config

NONE_WORDS = ("none", "null", "")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class ConfigError(EsplError):
    """An option, a preset or a configuration file that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Option:
    """One setting. `key` is its dotted name, `kind` its type without None, `optional` whether None is a value too."""

    key: str
    kind: Any
    optional: bool
    default: Any
    description: str
    bounds: tuple[str, ...]

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, where they are a closed list."""
        return tuple(str(a) for a in get_args(self.kind)) if get_origin(self.kind) is Literal else ()

    @property
    def is_table(self) -> bool:
        return (get_origin(self.kind) or self.kind) is dict

    @property
    def takes(self) -> str:
        """What kind of value it takes, in words."""
        if self.choices:
            return "|".join(self.choices)
        origin = get_origin(self.kind) or self.kind
        if origin is tuple:
            inner = [a for a in get_args(self.kind) if a is not Ellipsis]
            more = ", …" if Ellipsis in get_args(self.kind) else ""
            return f"list '[{', '.join(_word(a) for a in inner)}{more}]'"
        return _word(origin)

    def read(self, text: str) -> Any:
        """A command-line text as a value; what pydantic converts itself is left as text. Raises ConfigError."""
        if self.optional and text.lower() in NONE_WORDS:
            return None
        origin = get_origin(self.kind) or self.kind
        if origin is dict:
            return _read_table(self.key, text)
        if origin is tuple:
            return _read_list(text)
        return text.replace("_", "") if origin in (int, float) else text


def _word(kind: Any) -> str:
    words = {int: "whole number", float: "number", bool: "true|false", str: "text", dict: "table"}
    return words.get(kind, str(kind))


def read_loose(text: str) -> Any:
    """A value of no known type (an argument of an environment): JSON or TOML where it parses, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _read_table(key: str, text: str) -> dict[str, Any]:
    value = read_loose(text)
    if not isinstance(value, dict):
        raise ConfigError(
            f"--{key} takes a table such as '{{\"name\": 1}}', not {text!r}; single entries go by --{key}.NAME VALUE"
        )
    return value


def _read_list(text: str) -> list[Any]:
    value = read_loose(text)
    if isinstance(value, list):
        return value
    return [part.strip() for part in text.split(",")] if text else []


@cache
def options() -> Mapping[str, Option]:
    """Every option by its dotted key, in the order of the schema (options without a section first)."""
    table = dict(_walk(Config, "", Config()))
    return dict(sorted(table.items(), key=lambda item: "." in item[0]))


@cache
def sections() -> tuple[str, ...]:
    return tuple(dict.fromkeys(option.section for option in options().values() if option.section))


def _walk(model: type[BaseModel], prefix: str, defaults: BaseModel) -> Iterable[tuple[str, Option]]:
    for name, info in model.model_fields.items():
        default = getattr(defaults, name)
        if isinstance(default, BaseModel):
            yield from _walk(type(default), f"{prefix}{name}.", default)
        else:
            yield f"{prefix}{name}", _option(f"{prefix}{name}", info, default)


def _option(key: str, info: FieldInfo, default: Any) -> Option:
    kind, optional = info.annotation, False
    if get_origin(kind) in (Union, types.UnionType):
        inner = [a for a in get_args(kind) if a is not types.NoneType]
        kind, optional = inner[0], len(inner) < len(get_args(kind))
    rules = list(info.metadata)
    if get_origin(kind) is Annotated:      # a bounded number that may be None
        kind, *more = get_args(kind)
        rules += [rule for part in more for rule in getattr(part, "metadata", [part])]
    bounds = tuple(
        f"{words} {getattr(rule, name):g}"
        for rule in rules
        for name, words in BOUNDS.items()
        if getattr(rule, name, None) is not None
    )
    return Option(key, kind, optional, default, info.description or "", bounds)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that `name` probably meant (by likeness, else as its beginning), or None."""
    by_fold = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_fold, 1, cutoff)
    found = found or [k for k in by_fold if len(name) > 2 and k.startswith(name.lower())]
    return by_fold[found[0]] if found else None


SYNONYMS = {"lr": "learning_rate", "rate": "learning_rate", "lora_rank": "rank", "lora_alpha": "alpha"}


def nearest_option(key: str) -> str | None:
    """The option that a misspelt key probably meant: by its full name, else by its last part in any section."""
    known = options()
    leaf = key.rpartition(".")[2]
    leaf = SYNONYMS.get(leaf, leaf)
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    if same_leaf:
        return nearest(key, same_leaf, 0.0)
    if full := nearest(key, known, 0.7):
        return full
    close = nearest(leaf, {k.rpartition(".")[2] for k in known}, 0.7)
    return nearest(key, [k for k in known if k.rpartition(".")[2] == close], 0.0) if close else None


def hint(name: str | None, prefix: str = "") -> str:
    return f" Did you mean {prefix}{name}?" if name else ""


def unfit(option: Option, value: Any, origin: str = "") -> str | None:
    """What pydantic would let pass and no option means: true and false as numbers, numbers that are not finite, null
    characters."""
    where = f" ({origin})" if origin else ""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, bool) and option.kind is not bool and not option.is_table:
            return f"{option.key} is {str(item).lower()}{where}; it takes a {option.takes}."
        if isinstance(item, str) and "\0" in item:
            return f"{option.key} is {item!r}{where}: a text must not hold a null character."
        if _is_number(option) and str(item).lower().strip("+-") in ("nan", "inf", "infinity"):
            return f"{option.key} is {item}{where}; it takes a finite number."
    return None


def _is_number(option: Option) -> bool:
    return option.kind in (int, float) or float in get_args(option.kind)


def explain(error: Mapping[str, Any], origin: str = "") -> str:
    """One pydantic error as a sentence. `origin` says where the value was written, e.g. "command line"."""
    parts = [str(p) for p in error["loc"]]
    shown = ""
    if parts[0] == "envs" and len(parts) > 2:            # an environment of several: an option as of the only one
        shown, parts = ".".join(parts[:3]), ["env", *parts[2:]]
    key = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in options()), None)
    where = f" ({origin})" if origin else ""
    if key is None:
        return f"{'.'.join(parts)}{where}: {error['msg']}."
    option, value, key = options()[key], error["input"], shown or key
    if option.choices:
        close = nearest(str(value), option.choices)
        return f"{key} is {value!r}{where}; it takes one of {', '.join(option.choices)}.{hint(close)}"
    rule = next(
        (f"must be {words} {error['ctx'][name]:g}" for name, words in BOUNDS.items() if name in error.get("ctx", {})),
        None,
    )
    if rule is None:
        rule = f"takes a {option.takes}" if "|" not in option.takes else f"takes {option.takes.replace('|', ' or ')}"
        rule += f" ({', '.join(option.bounds)})" if option.bounds else ""
    return f"{key} is {value!r}{where}; it {rule}."
