"""Records of a run with several environments: what belongs to one of them stands under `envs/<name>/`, by the names
that it would have in a run of its own. What stands beside it is of the whole run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
KEY = re.compile(r"envs/([^/]+)/(.+)")


def under(name: str, record: Record) -> dict[str, Any]:
    """The record of the environment `name` as a part of the run's; of the only one, which has no name, as it is."""
    return {f"envs/{name}/{key}" if name else key: value for key, value in record.items()}


def names(records: Sequence[Record]) -> list[str]:
    """The environments that these records tell of; the only one has no name."""
    found = dict.fromkeys(match[1] for record in records for key in record if (match := KEY.fullmatch(key)))
    return list(found) or [""]


def own(record: Record, name: str) -> dict[str, Any]:
    """What the record of a run says of the environment `name` alone."""
    if not name:
        return dict(record)
    inside = {m[2]: value for key, value in record.items() if (m := KEY.fullmatch(key)) and m[1] == name}
    return {**({"step": record["step"]} if "step" in record else {}), **inside}
