"""What is evaluated on: from ids and arguments to environments with their tasks, before an agent is asked anything.

An `Arena` is one of them: its line in config.json, and instances to play in, made when needed and used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from espl_envs import registry
from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import ToolSpec
from espl_envs.core.tasks import Split
from espl_envs.core.wrappers import TextWrapper, awaitable
from espl_envs.evaluate.agents import ToolSyntax
from espl_envs.evaluate.config import EnvConfig
from espl_envs.tools.box import BoxSettings, box_settings

PREFERRED: tuple[Split, ...] = ("test", "validation", "train")


@dataclass(eq=False, slots=True)
class Arena:
    """One environment of an evaluation. `native`: its tools are offered by the agent's server."""

    config: EnvConfig
    native: bool
    idle: list[Any] = field(default_factory=list)

    def take(self) -> Any:
        """An instance that nobody plays in, awaited like a TextEnv."""
        return self.idle.pop() if self.idle else _made(self.config)

    def give(self, env: Any) -> None:
        """Back, to be reset by whoever takes it next."""
        self.idle.append(env)

    async def aclose(self) -> None:
        """Close what is idle."""
        while self.idle:
            await self.idle.pop().aclose()

    @property
    def example(self) -> Any:
        """One instance, unwrapped."""
        if not self.idle:
            self.idle.append(_made(self.config))
        return self.idle[-1].unwrapped

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """What the agent may call."""
        return tuple(getattr(self.example, "tools", ()))

    def boxes(self) -> tuple[BoxSettings, int] | None:
        """The sandboxes that an episode wants, and how many at once; None where it needs none."""
        family = getattr(self.example, "family", None)
        tools = box_settings(family.tools) if family is not None else None
        grading = getattr(self.example, "box", None)
        settings = tools or grading
        return (settings, int(tools is not None) + int(grading is not None)) if settings else None


def arena(
    env_id: str, arguments: Mapping[str, Any], split: str | None = None, limit: int | None = None,
    tool_syntax: ToolSyntax = "text",
) -> Arena:
    """The environment `env_id`, its data loaded. `split` None: test where it has one, else validation, else train.

    Raises EsplError: an unknown id (with the nearest names), argument or split, data that is not here.
    """
    if "split" in arguments:
        split, arguments = str(arguments["split"]), {name: v for name, v in arguments.items() if name != "split"}
    first: Any = registry.make(env_id, **arguments).unwrapped
    if not isinstance(first, TextEnv):
        raise EsplError(f"{env_id} is a {type(first).__name__}: espl-eval plays text environments (TextEnv)")
    chosen = split or next((name for name in PREFERRED if name in first.splits), first.split)
    if chosen not in first.splits:
        raise EsplError(f"{env_id} has no split {chosen!r}; it has {', '.join(first.splits)}")
    native = tool_syntax == "native" and bool(first.tools)
    kwargs = {**({"tool_syntax": "native"} if native else {}), **arguments}
    env: Any = registry.make(env_id, split=chosen, **kwargs)
    tasks = env.unwrapped.tasks
    config = EnvConfig(env_id, chosen, min(len(tasks), limit or len(tasks)), len(tasks), tasks.hash, kwargs)
    return Arena(config, kwargs.get("tool_syntax") == "native" and bool(first.tools), [_awaited(env)])


def splits() -> tuple[str, ...]:
    """The names that splits can have."""
    return get_args(Split)


def concurrency(arenas: Sequence[Arena], wanted: int) -> int:
    """Episodes at once: as many as wanted, but no more than the sandboxes that they need may be alive."""
    from espl_envs.sandbox.pool import shared_pool

    for one in arenas:
        if found := one.boxes():
            settings, each = found
            wanted = min(wanted, max(1, shared_pool(settings.provider).max_live // each))
    return wanted


async def probe(arenas: Sequence[Arena]) -> None:
    """See that the sandboxes that the environments need can be had. Raises SandboxUnavailable, with the remedy."""
    from espl_envs.sandbox.pool import shared_pool

    for provider in {found[0].provider for one in arenas if (found := one.boxes())}:
        await shared_pool(provider).provider.probe()


def _made(config: EnvConfig) -> Any:
    return _awaited(registry.make(config.id, split=config.split, **config.kwargs))


def _awaited(env: Any) -> Any:
    return awaitable(env) or TextWrapper(env)
