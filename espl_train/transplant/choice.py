"""From the words of the command to a plan: who takes part, and what is played."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.config import Config, EnvConfig
from espl_train.problems import Problems, ProblemSets, text_env
from espl_train.sandboxes import equipped
from espl_train.settings import ConfigError, load, override
from espl_train.snapshot import Snapshot
from espl_train.transplant.plan import BASE, NONE, Plan, Prompt, Weights, one_base

NAME = re.compile(r"[\w.+-]{1,40}")
MOST_TEXT = 1 << 20             # bytes of a file with a system prompt
FREE = (
    *("model.device", "model.threads", "engine.", "sandbox.", "rollout.concurrency", "rollout.deadline_s"),
    *("rollout.retries", "rollout.max_fault_fraction", "rollout.max_new_tokens", "rollout.max_total_tokens"),
    "rollout.max_turns",
)


def plan(chosen: Namespace, overrides: Mapping[str, Any]) -> Plan:
    """The plan of these words; `overrides` are further options as of espl-train. Raises EsplError for what is not
    there, or does not go together."""
    args, settings = _split_overrides(overrides)
    runs = [Snapshot.of(folder) for folder in _once(chosen.runs)]
    named = [_weights(spec) for spec in chosen.weights]
    everybody = [*runs, *(one.run for one in named if one.run)]
    if not everybody:
        raise EsplError("name at least one run, as in espl-train transplant runs/joint runs/rl")
    notes: list[str] = []
    weights = _rows(runs, named, notes)
    first = everybody[0]
    config = override(first.config, settings)
    played, env = _environment(first, chosen.env, args)
    prompts = _columns(runs, chosen.prompts, played, notes)
    one_base([*everybody, *(one.run for one in prompts if one.run)])
    _one_environment(everybody, played, chosen.env)
    problems = _problems(config, env, chosen.split)
    most = chosen.problems or getattr(config.evaluation, {"test": "test_problems"}.get(chosen.split, "problems"))
    temperature = 0.0 if chosen.greedy else chosen.temperature
    temperature = config.evaluation.temperature if temperature is None else temperature
    samples = chosen.samples or (config.evaluation.samples if temperature else 1)
    if samples > 1 and not temperature:
        raise EsplError(f"-k {samples} at temperature 0: greedy samples are all the same; leave -k or --greedy out")
    seed = first.config.seed if chosen.seed is None else chosen.seed
    return Plan(
        weights, prompts, config, problems, problems.sample(seed, most), samples, temperature, seed, tuple(notes)
    )


def _split_overrides(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the environment, and settings. Raises ConfigError for what changes nothing here."""
    args = {key: value for key, value in overrides.items() if key.startswith("env.args")}
    settings = {key: value for key, value in overrides.items() if key not in args}
    if other := [key for key in settings if not key.startswith(FREE)]:
        raise ConfigError(f"--{other[0]} changes nothing when weights and prompts are transplanted: leave it out.")
    return args, settings


def _once(folders: Sequence[Path]) -> list[Path]:
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (there := folder.resolve()) in seen:
            raise EsplError(f"the run {folder} is named twice")
        seen[there] = folder
    return list(seen.values())


def _weights(spec: str) -> Weights:
    name, _, source = _pair(spec, "--weights NAME=RUN")
    if name == BASE:
        raise EsplError(f"--weights {spec}: {BASE!r} are the weights that the runs began with, and always there")
    run = Snapshot.of(Path(source))
    if not run.trained:
        raise EsplError(f"--weights {spec}: that run trained no weights (mode {run.config.mode}): they are the base")
    return Weights(name, run)


def _pair(spec: str, form: str) -> tuple[str, str, str]:
    name, equals, source = spec.partition("=")
    if not equals or not source or not NAME.fullmatch(name):
        raise EsplError(f"{spec!r} is not of the form {form}, with a name of letters, digits, and . _ + -")
    return name, equals, source


def _rows(runs: Sequence[Snapshot], named: Sequence[Weights], notes: list[str]) -> list[Weights]:
    """Base, and those that are named; by default those of every run."""
    rows = [Weights(BASE), *named]
    for run in runs if not named else ():
        if run.trained:
            rows.append(Weights(_free_name(run, [row.name for row in rows]), run))
        else:
            notes.append(f"{run.folder} trained no weights (mode {run.config.mode}): its row would be that of the base")
    _distinct(rows, "--weights")
    return rows


def _columns(runs: Sequence[Snapshot], specs: Sequence[str], played: str, notes: list[str]) -> list[Prompt]:
    """No prompt, and those that are named; by default the root prompts where they say something, and every run's
    best."""
    columns = [Prompt(NONE)]
    if specs:
        columns += [_prompt(spec, played) for spec in specs if spec.partition("=")[2] != NONE]
    else:
        for found in _defaults(runs, played):
            same = next((one for one in columns if one.text == found.text), None)
            if same is None:
                taken = [one.name for one in columns]
                columns.append(found if found.name not in taken else Prompt(
                    _free_name(found.run, taken) if found.run else f"{found.name}-{len(taken)}",
                    found.text, found.origin, found.run,
                ))
            elif found.run:
                notes.append(f"the best prompt of {found.run.folder} is that of column {same.name!r}")
    _distinct(columns, "--prompts")
    return columns


def _defaults(runs: Sequence[Snapshot], played: str) -> Iterator[Prompt]:
    for run in runs:
        root = run.populations[_island(run, played)].root
        yield Prompt("root", run.text(root.principles), f"root prompt of {run.name}")
    for run in runs:
        yield _of_run(run.name, run, "best", played)


def _of_run(name: str, run: Snapshot, which: str, played: str) -> Prompt:
    if "/" not in which and (own := _island(run, played)):
        which = f"{own}/{which}"
    island, prompt = run.find_one(which)
    evolved = prompt.id != run.populations[island].root.id
    return Prompt(
        _label(name), run.text(prompt.principles), f"{prompt.id} of {run.name}, step {run.step}",
        run if evolved else None,
    )


def _prompt(spec: str, played: str) -> Prompt:
    """NAME=RUN, NAME=RUN:ID, or NAME=FILE with the text, or with the JSON of an export."""
    name, _, source = _pair(spec, "--prompts NAME=RUN, NAME=RUN:ID, NAME=FILE or none")
    if name == NONE:
        raise EsplError(f"--prompts {spec}: {NONE!r} is the column without a prompt; choose another name")
    if Path(source).is_dir():
        return _of_run(name, Snapshot.of(Path(source)), "best", played)
    colons = (place for place, character in enumerate(source) if character == ":")
    if place := next((place for place in colons if Path(source[:place]).is_dir()), 0):      # ids may have colons, too
        return _of_run(name, Snapshot.of(Path(source[:place])), source[place + 1 :], played)
    if not Path(source).is_file():
        raise EsplError(f"--prompts {spec}: there is no run and no file {source}")
    return Prompt(name, _read(Path(source)), f"file {source}")


def _read(file: Path) -> str:
    """The system prompt in a file: the whole text, or `prompt.text` of an export's prompt.json."""
    try:
        if file.stat().st_size > MOST_TEXT:
            raise EsplError(f"{file} has {file.stat().st_size:,} bytes: that is no system prompt")
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise EsplError(f"{file} cannot be read: {problem}") from None
    if file.suffix == ".json":
        try:
            found = json.loads(text)["prompt"]["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        if not isinstance(found, str):
            raise EsplError(f"{file} is no prompt.json of espl-train export: it has no prompt.text")
        text = found
    if not text.strip():
        raise EsplError(f"{file} holds an empty prompt: that is the column {NONE!r}, which is always there")
    return text.strip()


def _label(name: str) -> str:
    return "".join(c if NAME.fullmatch(c) else "-" for c in name)[:40]


def _free_name(run: Snapshot, taken: Sequence[str]) -> str:
    """What a run is called, with its parent folder where that is taken, with a number where this is, too."""
    short = _label(run.name)
    long = _label(f"{run.folder.resolve().parent.name}-{run.name}")
    numbered = (f"{short[:36]}-{n}" for n in range(2, 1000))
    return next(name for name in (short, long, *numbered) if name not in (*taken, BASE, NONE))


def _distinct(named: Sequence[Weights] | Sequence[Prompt], option: str) -> None:
    names = [one.name for one in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EsplError(f"{option}: the name {twice!r} is given twice")


def _island(run: Snapshot, played: str) -> str:
    """The environment of a run whose prompts are meant: its only one, or the one that is played."""
    environments = run.config.environments
    if len(environments) == 1 or played in environments:
        return played if played in environments else next(iter(environments))
    fitting = [name for name, env in environments.items() if played in (env.id, env.test_id)]
    if len(fitting) != 1:
        raise EsplError(
            f"{run.folder} has prompts for several environments ({', '.join(environments)}): name one, as in "
            f"--prompts NAME={run.folder}:{next(iter(environments))}/best"
        )
    return fitting[0]


def _environment(first: Snapshot, asked: str | None, args: Mapping[str, Any]) -> tuple[str, EnvConfig]:
    """What is played, by the name or id that prompts are looked up by, and the environment: the run's own unless one
    is asked for (by its id, or by its name in a run that has several)."""
    own = first.config.environments
    if asked is None or asked in own:
        if asked is None and len(own) > 1:
            raise EsplError(f"{first.folder} has several environments: choose one with --env {' or '.join(own)}")
        env = own[asked] if asked is not None else next(iter(own.values()))
        if args:
            raise ConfigError(f"--{next(iter(args))} belongs to an environment that is named: add --env ID.")
        return asked or env.id, env
    env = load((), None, {"env.id": asked, **args}).env
    splits = text_env(env.id, env.args).splits
    tested = {"test_id": env.id, "test_args": env.args} if "test" in splits else {}
    return env.id, env.model_copy(update=tested)


def _one_environment(runs: Sequence[Snapshot], played: str, asked: str | None) -> None:
    """Raises EsplError where runs were trained on different things and nobody said which of them is played."""
    first = runs[0].config.environments
    for other in runs[1:]:
        if asked is None and other.config.environments != first:
            theirs = other.config
            raise EsplError(
                f"{runs[0].folder} was trained on {_told(runs[0].config)}, {other.folder} on {_told(theirs)}: say what "
                f"is played, as in --env {played}"
            )


def _told(config: Config) -> str:
    return " and ".join(f"{env.id}{f' {env.args}' if env.args else ''}" for env in config.environments.values())


def _problems(config: Config, env: EnvConfig, split: str) -> Problems:
    sets = ProblemSets.of(equipped(config.model_copy(update={"env": env})))
    return {"test": sets.test, "validation": sets.validation}[split]
