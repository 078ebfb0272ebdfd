"""Layers of settings and the `Config` they make: defaults <- model's preset <- presets <- TOML file <- command line.

A layer is flat (dotted key → value) and knows where it was written, so that a mistake can be reported at its place.
`to_toml` and `from_toml` are exact inverses: the `config.toml` of a run is the whole configuration, defaults included.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from espl_train.config import Config
from espl_train.settings import environments
from espl_train.settings.checks import check
from espl_train.settings.options import ConfigError, explain, hint, nearest, nearest_option, options, sections, unfit

MODEL, BUNDLED = "model.path", "micro"      # the bundled model comes with the preset of its name
BELONGS_TO = {"env.id": ("env.args", "env.holdout_from"), "env.test_id": ("env.test_args",)}


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings from one place. `origin` names it in messages; `presets` are those the place asks for."""

    origin: str
    values: Mapping[str, Any]
    presets: tuple[str, ...] = ()


def load(presets: Sequence[str] = (), file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The checked configuration. Raises ConfigError with one sentence per mistake."""
    top = [read_file(file)] if file is not None else []
    names = [*(name for layer in top for name in layer.presets), *presets]
    layers = [*_with_parents(names), *top, Layer("command line", dict(overrides or {}))]
    model = next((layer.values[MODEL] for layer in reversed(layers) if MODEL in layer.values), options()[MODEL].default)
    return build([*_with_parents([model] if model == BUNDLED else []), *layers])


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with some options changed, checked again."""
    return build([Layer("run", flatten(config)), Layer("command line", dict(overrides))])


def build(layers: Sequence[Layer]) -> Config:
    """Merge the layers in order, validate, check."""
    values, origins = _merge(layers)
    values = environments.settled(values)
    if problems := [p for key, value in values.items() if (p := unfit(options()[key], value, origins.get(key, "")))]:
        raise ConfigError("\n".join(problems))
    try:
        config = Config.model_validate(_nest(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, origins))) from None
    check(config)
    return config


def _merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Later layers win. A layer that changes an environment's id leaves the arguments of the old one behind."""
    values: dict[str, Any] = {key: option.default for key, option in options().items()}
    origins: dict[str, str] = {}
    for layer in layers:
        for key, dependents in BELONGS_TO.items():
            if key in layer.values and layer.values[key] != values[key]:
                values.update({d: options()[d].default for d in dependents})
        values[environments.ENVS] = environments.merged(values[environments.ENVS], layer.values, layer.origin)
        for key, value in layer.values.items():
            table, _, entry = key.rpartition(".")
            if key.partition(".")[0] == environments.ENVS:
                origins[environments.ENVS] = layer.origin
                continue
            if key in options():
                values[key] = value
            elif table in options() and options()[table].is_table:
                values[table] = {**values[table], entry: value}
            else:
                raise ConfigError(f"There is no option {key}.{hint(nearest_option(key))}")
            origins[key if key in options() else table] = layer.origin
    return values, origins


def _sentences(error: ValidationError, origins: Mapping[str, str]) -> Iterable[str]:
    seen = set()
    for item in error.errors():
        key = ".".join(str(p) for p in item["loc"])
        origin = next((o for k, o in origins.items() if key == k or key.startswith(k + ".")), "")
        sentence = explain(dict(item), origin)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def flatten(config: Config) -> dict[str, Any]:
    """The configuration as dotted key → value."""
    tree = config.model_dump()
    out: dict[str, Any] = {}
    for key in options():
        node: Any = tree
        for part in key.split("."):
            node = node[part]
        out[key] = node
    return out


def differences(a: Config, b: Config, ignore: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Options in which two configurations differ: key → (value in a, value in b)."""
    left, right, skip = flatten(a), flatten(b), set(ignore)
    return {key: (left[key], right[key]) for key in left if key not in skip and left[key] != right[key]}


def read_file(path: Path) -> Layer:
    """A TOML file as a layer. Unknown keys are errors with the nearest name."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"The configuration file {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from None
    return _layer(text, str(path))


def from_toml(text: str, origin: str = "toml") -> Config:
    """The configuration that a TOML text (with the defaults below it) describes."""
    layer = _layer(text, origin)
    return build([*_with_parents(layer.presets), layer])


def _layer(text: str, origin: str) -> Layer:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{origin} is not valid TOML: it is nested too deeply.") from None
    presets = tree.pop("preset", [])
    names = [presets] if isinstance(presets, str) else presets
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"preset is {presets!r} ({origin}); it takes a name, or a list of names.")
    values: dict[str, Any] = {}
    problems = list(_flatten_tree(tree, "", values, origin))
    if problems:
        raise ConfigError("\n".join(problems))
    return Layer(origin, values, tuple(names))


def _flatten_tree(tree: Mapping[str, Any], prefix: str, out: dict[str, Any], origin: str) -> Iterable[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in options():
            option = options()[key]
            out[key] = None if option.optional and value == "none" else value
        elif key in sections():
            if isinstance(value, dict):
                yield from _flatten_tree(value, f"{key}.", out, origin)
            else:
                yield f"{key} is a section ({origin}); write [{key}] with its options below it."
        else:
            section = nearest(key, sections()) if isinstance(value, dict) else None
            yield f"There is no option {key} ({origin}).{hint(section or nearest_option(key))}"


def to_toml(config: Config) -> str:
    """The whole configuration as TOML; `from_toml` reads exactly the same configuration back."""
    values: dict[str, Any] = {}
    for key, value in flatten(config).items():
        if value is None and options()[key].default is None:
            continue
        values[key] = "none" if value is None else value
    values[environments.ENVS] = {n: _known(table) for n, table in values[environments.ENVS].items()}
    try:
        return tomli_w.dumps(_nest(values))
    except TypeError as error:
        raise ConfigError(f"The configuration cannot be written as TOML: {error}.") from None


def _known(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _preset_files() -> dict[str, str]:
    folder = resources.files("espl_train") / "presets"
    return {f.name.removesuffix(".toml"): f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".toml")}


def preset_descriptions() -> dict[str, str]:
    """Name → first comment line of every preset."""
    return {name: text.partition("\n")[0].lstrip("# ") for name, text in sorted(_preset_files().items())}


def _with_parents(names: Iterable[str]) -> list[Layer]:
    """The named presets in order, each preceded by the presets it builds on."""
    files, out = _preset_files(), []
    for name in names:
        found = name.replace("-", "_")
        if found not in files:
            raise ConfigError(
                f"There is no preset {name!r}; there are {', '.join(sorted(files))}.{hint(nearest(found, files))}"
            )
        layer = _layer(files[found], f"preset {found}")
        out += [*_with_parents(layer.presets), layer]
    return out
