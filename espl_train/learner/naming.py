"""Choosing a function by the name that stands in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from espl_envs.core.errors import EsplError

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """`table[name]`. Raises EsplError that names the configuration key, a near name and all names."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=1)
    meant = f"did you mean '{near[0]}'? " if near else ""
    raise EsplError(f"{key} is '{name}'; {meant}there are: {', '.join(table)}".replace("? there", "? There"))
