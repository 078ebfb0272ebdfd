"""Which door: from what the command line says to the `Door` that leads to the agent."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from espl_envs.core.errors import EsplError
from espl_envs.evaluate import builtin
from espl_envs.evaluate.agents import Door
from espl_envs.evaluate.builtin import BuiltinDoor
from espl_envs.evaluate.callables import CallableDoor
from espl_envs.evaluate.config import Prices
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.endpoint import EndpointDoor, Limits, Sampling
from espl_envs.evaluate.proxy import Budget

WAYS = "--agent package.module:name, --base-url URL --model NAME, --command '…', --run RUN or --model FOLDER"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The part of the command line that concerns the agent. `concurrency` None: what suits the door; `budget`: of one
    episode of a command; `out`: the run directory."""

    agent: str | None = None
    base_url: str | None = None
    model: str | None = None
    command: str | None = None
    run: str | None = None
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    secret: Secret = field(default_factory=Secret)
    prices: Prices | None = None
    timeout: float = 600.0
    retry: float = 300.0
    concurrency: int | None = None
    budget: Budget = field(default_factory=Budget)
    out: Path | None = None

    @property
    def limits(self) -> Limits:
        """Of requests to a server."""
        limits = Limits(self.timeout, self.retry)
        return limits if self.concurrency is None else replace(limits, concurrency=self.concurrency)


def choose(wanted: Wanted) -> Door:
    """The door to the agent that is wanted. Raises EsplError where that is none, or more than one."""
    ways = {"--agent": wanted.agent, "--command": wanted.command, "--run": wanted.run}
    named = [name for name, value in ways.items() if value is not None]
    if len(named) > 1 or (named in (["--agent"], ["--run"]) and (wanted.base_url or wanted.model)):
        others = [*named, *(["--base-url"] if wanted.base_url else []), *(["--model"] if wanted.model else [])]
        raise EsplError(f"{' and '.join(others)} name more than one agent: choose one")
    if wanted.prompt is not None and wanted.run is None:
        raise EsplError("--prompt chooses among the prompts of --run RUN; a prompt of your own is --system-prompt FILE")
    if wanted.command is None and wanted.budget.to_dict():
        raise EsplError("--episode-calls, --episode-tokens and --episode-cost are for --command: other agents make one "
                        "call per turn, which the environment limits")
    if wanted.agent is not None:
        _without_sampling(wanted)
        return _in_python(wanted.agent, wanted)
    if wanted.command is not None:
        from espl_envs.evaluate.blackbox import CommandDoor

        return CommandDoor(wanted)
    if wanted.base_url is not None:
        if wanted.model is None:
            raise EsplError("--base-url needs --model NAME: the model that the server is asked for")
        return EndpointDoor(
            wanted.base_url, wanted.model, wanted.secret, wanted.sampling, wanted.limits, wanted.prices
        )
    if wanted.run is not None or wanted.model is not None:
        from espl_envs.evaluate.served import ServedDoor

        return ServedDoor(wanted)
    raise EsplError(f"who is to be evaluated? Name the agent: {WAYS}, or --agent {' | '.join(builtin.NAMES)}")


def _in_python(name: str, wanted: Wanted) -> Door:
    if name in builtin.NAMES:
        return BuiltinDoor(name)
    if ":" not in name:
        near = difflib.get_close_matches(name, builtin.NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected package.module:name, or {', '.join(builtin.NAMES)}"
        if name.endswith(".py"):
            hint = f"expected the name of what is called in that file, too, as in {name}:agent"
        raise EsplError(f"there is no built-in agent {name!r}; {hint}")
    return CallableDoor(name, wanted.timeout, wanted.concurrency or CallableDoor.concurrency)


def _without_sampling(wanted: Wanted) -> None:
    """What only a server is asked for must not seem to work on anything else."""
    sampling = wanted.sampling
    given: Mapping[str, object] = {
        "--temperature": sampling.temperature, "--max-tokens": sampling.max_tokens, "--request": sampling.more or None,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None:
            raise EsplError(f"{name} is for models behind a server; an agent in Python decides that itself")
