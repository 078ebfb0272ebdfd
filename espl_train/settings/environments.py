"""Several environments in one run: from `--env A=2 --env B` and tables `[envs.NAME]` to one table of them by name.

Whoever names environments anew (with their ids) replaces those of the layers below, `[env]` included; single options
(`--envs.NAME.weight 3`) change what is there. On the command line, options of `env` belong to the `--env` before them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from espl_train.settings.options import ConfigError, Option, hint, nearest, options, unfit

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
ENV, ENVS = "env.", "envs"
Tables = dict[str, dict[str, Any]]      # by name, as yet unchecked


def option(key: str) -> Option | None:
    """The option behind `envs.NAME.OPTION`; None for an entry of its tables, as in `envs.NAME.args.world`. Raises
    ConfigError where there is none."""
    _, name, *rest = key.split(".")
    found = options().get(ENV + rest[0]) if rest else None
    if found is None or len(rest) > 1 + found.is_table:
        raise ConfigError(f"There is no option --{key}.{_known(name, rest[0] if rest else '')}")
    return dataclasses.replace(found, key=key) if len(rest) == 1 else None


def _known(name: str, leaf: str) -> str:
    leaves = [key.removeprefix(ENV) for key in options() if key.startswith(ENV)]
    close = hint(nearest(leaf, leaves), f"--envs.{name}.") if leaf else ""
    return close or f" Environments have --envs.NAME.OPTION with OPTION one of {', '.join(leaves)}."


def scoped(before: Mapping[str, Any], scopes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a command line that names an environment per scope; `before` are all others.

    One environment has the options of `env` wherever they stand. Several are named after their ids. Raises ConfigError
    for an option of `env` that stands before all of them, which it could belong to.
    """
    if len(scopes) < 2:
        return {**before, **(scopes[0] if scopes else {})}
    if early := [key for key in before if key.startswith(ENV)]:
        raise ConfigError(
            f"--{early[0]} stands before the first --env: with several environments, an option belongs to the --env "
            "that it follows."
        )
    names = _names(scope[ENV + "id"] for scope in scopes)
    given = {
        f"{ENVS}.{name}.{key.removeprefix(ENV)}": value
        for name, scope in zip(names, scopes, strict=True)
        for key, value in scope.items()
    }
    return {**given, **before}


def weighted(text: str) -> dict[str, Any]:
    """`--env ID` or `--env ID=WEIGHT`. Raises ConfigError for a weight that is none."""
    env_id, equals, weight = text.rpartition("=")
    if not equals:
        return {ENV + "id": text}
    try:
        return {ENV + "id": env_id, ENV + "weight": float(weight)}
    except ValueError:
        raise ConfigError(f"--env {text}: {weight!r} is no weight; write a number, as in --env {env_id}=2.") from None


def _names(ids: Iterable[str]) -> Iterator[str]:
    """conventions, countdown, conventions-2: what environments are called that nobody gave a name."""
    taken: set[str] = set()
    for env_id in ids:
        short = re.sub(r"-v\d+$", "", env_id.rpartition("/")[2]).lower()
        name = re.sub(r"[^a-z0-9_-]+", "-", short).strip("-_")[:24] or "env"
        name = next(n for k in range(1, 1000) if (n := f"{name}-{k}" if k > 1 else name) not in taken)
        taken.add(name)
        yield name


def merged(below: Tables, given: Mapping[str, Any], origin: str) -> Tables:
    """The environments after a layer with the values `given`. Raises ConfigError for what cannot be meant."""
    tables = _tables(given, origin)
    if not tables:
        return {} if ENV + "id" in given else below
    if single := next((k for k in given if k.startswith(ENV) and (k not in options() or _set(k, given))), None):
        raise ConfigError(
            f"{single} and envs.{next(iter(tables))} are both given ({origin}): [env] describes one environment, "
            "[envs.NAME] one of several; use one of the two."
        )
    anew = any("id" in table for table in tables.values())
    result = {} if anew else {name: dict(table) for name, table in below.items()}
    for name, table in tables.items():
        if "id" not in table and name not in result:
            close = hint(nearest(name, [*result, *(n for n, t in tables.items() if "id" in t)]), "envs.")
            raise ConfigError(f"envs.{name} has no id ({origin}): say which environment it is.{close}")
        old = result.setdefault(name, {})
        for leaf, value in table.items():
            head, _, entry = leaf.partition(".")
            old[head] = {**old.get(head, {}), entry: value} if entry else value
    return result


def _set(key: str, given: Mapping[str, Any]) -> bool:
    return bool(given[key] != options()[key].default)


def _tables(given: Mapping[str, Any], origin: str) -> Tables:
    """The environments that a layer speaks of; entries of their tables under dotted names."""
    tables: Tables = {}
    whole = given.get(ENVS, {})
    for name, table in whole.items() if isinstance(whole, Mapping) else [("", whole)]:
        if not isinstance(table, Mapping):
            raise ConfigError(f"envs{name and '.'}{name} is {table!r} ({origin}); it takes a table with an id.")
        tables[name] = {key: None if value == "none" else value for key, value in table.items()}
    for key, value in given.items():
        if key.startswith(f"{ENVS}."):
            name, _, leaf = key.removeprefix(f"{ENVS}.").partition(".")
            tables.setdefault(name, {})[leaf] = value
    for name, table in tables.items():
        if not NAME.fullmatch(name):
            raise ConfigError(f"envs.{name} ({origin}): a name is made of letters, digits, - and _.")
        if name == "all":
            raise ConfigError(f"envs.all ({origin}): tables call all environments together so; take another name.")
        for leaf, value in table.items():
            found = option(f"{ENVS}.{name}.{leaf}")
            if found is not None and (wrong := unfit(found, value, origin)):
                raise ConfigError(wrong)
    return tables


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """All values, with `envs` where there are several and `env` where there is one."""
    envs = values[ENVS]
    if not envs:
        return dict(values)
    fresh = {key: found.default for key, found in options().items() if key.startswith(ENV)}
    if len(envs) > 1:
        return {**values, **fresh}
    (alone,) = envs.values()
    return {**values, **fresh, **{ENV + leaf: value for leaf, value in alone.items()}, ENVS: {}}
