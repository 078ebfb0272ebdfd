"""The boxes of a run: which environments want some, whether they can be had here, and the pool that lends them.

What cannot work (no daemon, an unknown image) ends before there is a run directory. The pool is the process's own; it
is empty again when the run is over, however it ends.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from espl_envs import registry
from espl_envs.core import background
from espl_envs.core.env import TextEnv
from espl_envs.sandbox.base import Provider, SandboxSpec
from espl_envs.tools.box import BoxSettings, box_settings
from espl_train.config import Config, EnvConfig, RolloutConfig, SandboxConfig

LIFETIME_S = 1800.0
OWN = ("max_live", "warm")      # settings of the pool; all others are the environments' (see tools/box.py)
UNSAFE = "unsafe_local"
STAMP = "UNSAFE: what the model wrote ran on this machine without a box (sandbox.provider = unsafe_local)"


def parameters(env_id: str) -> frozenset[str] | None:
    """The keyword arguments that an environment's class and its bases take; None where that cannot be known."""
    entry_point, _ = registry.lookup(env_id)
    module, _, name = entry_point.partition(":")
    family = getattr(importlib.import_module(module), name, None)
    if not isinstance(family, type):
        return None
    kinds = [kind for kind in family.__mro__ if "__init__" in vars(kind)]
    known = {parameter for kind in kinds for parameter in signature(vars(kind)["__init__"]).parameters}
    return frozenset(known - {"self", "family", "args", "kwargs", "settings", "split"})


def equipped(config: Config, env: EnvConfig | None = None) -> EnvConfig:
    """An environment of the run (by default its only one), with the section `sandbox` among the arguments where it has
    tools for it.

    Single settings in its own argument `sandbox` win. A box outlives twice the longest episode, because half of its
    life may be over when it is lent.
    """
    given = config.sandbox.model_dump(exclude=set(OWN))
    given["lifetime_s"] = max(LIFETIME_S, 3 * config.rollout.deadline_s)

    def with_boxes(env_id: str, args: Mapping[str, Any]) -> dict[str, Any]:
        if "sandbox" not in (parameters(env_id) or ()):
            return dict(args)
        own = args.get("sandbox") or {}
        return {**args, "sandbox": {**given, **own} if isinstance(own, Mapping) else own}

    env = env or config.env
    changed: dict[str, Any] = {"args": with_boxes(env.id, env.args)}
    if env.test_id is not None:
        changed["test_args"] = with_boxes(env.test_id, env.test_args)
    return env.model_copy(update=changed)


def wanted(environments: Iterable[TextEnv]) -> BoxSettings | None:
    """The boxes that the tools of these environments need; None where none do."""
    return next((found for env in environments if (found := box_settings(env.family.tools))), None)


def check(settings: BoxSettings, config: SandboxConfig, dry: bool) -> Iterator[tuple[str, str]]:
    """Rows for the plan. Raises SandboxUnavailable where the provider cannot work, EsplError for an unknown image and
    SandboxFault for a box that does not start or is weaker than asked for: one is started as the proof, and its image
    is built where it is not yet. A dry run does neither."""
    from espl_envs.sandbox import providers

    name = settings.provider or config.provider
    provider = providers.provider(name)
    try:
        facts = background.run(provider.probe())
        image = f", image {_image(settings.spec.image, dry)}" if name == "docker" else ""
        if not dry:
            background.run(_proof(provider, settings.spec))
    finally:
        background.run(provider.aclose())
    version = f" {facts['engine']}" if facts.get("engine") else ""
    yield "sandbox", f"{name}{version}{image}"
    yield "  boxes", (
        f"at most {config.max_live} at once, and so as many episodes; {config.warm} kept warm; "
        f"{settings.spec.memory_mb} MB, "
        f"{settings.spec.call_timeout:g} s per call"
    )
    if name == UNSAFE:
        yield "  warning", STAMP


async def _proof(provider: Provider, spec: SandboxSpec) -> None:
    await (await provider.start(spec)).close()


def _image(name: str, dry: bool) -> str:
    from espl_envs.sandbox import engine, images

    if dry:
        built = images.state(engine.client(), name)
        return built.reference + ("" if built.present else " (would be built first)")
    return images.build(name, say=lambda text: print(f"espl-train: sandbox image {text}", file=sys.stderr, flush=True))


class Boxes:
    """The pool of one run. Without a need for boxes it is a pool of none, and nothing is ever started.

    `users` is the share of the run that its environments with boxes have.
    """

    def __init__(self, config: SandboxConfig, settings: BoxSettings | None, users: float = 1.0) -> None:
        self.settings, self._config, self._users = settings, config, users
        self.provider = (settings.provider or config.provider) if settings else ""
        if settings:
            from espl_envs.sandbox import pool

            pool.configure(provider=self.provider, max_live=config.max_live, warm=config.warm)

    @classmethod
    def of(cls, config: Config, environments: Mapping[str, Sequence[TextEnv]]) -> Boxes:
        """The pool for the environments of a run, by the names that they have in `config`."""
        needs = {name: found for name, envs in environments.items() if (found := wanted(envs)) is not None}
        users = sum(config.shares[name] for name in needs)
        return cls(config.sandbox, next(iter(needs.values()), None), users or 1.0)

    def standing(self) -> str:
        """How many there are at this moment, in words; empty where the run needs none."""
        if not self.settings:
            return ""
        from espl_envs.sandbox.pool import shared_pool

        pool = shared_pool(self.provider)
        return f"{pool.live} live, {pool.warm} warm, {pool.waiting} waiting"

    def limited(self, rollout: RolloutConfig, share: float = 1.0, boxed: bool = True) -> RolloutConfig:
        """The limits of an environment that has `share` of the run, and of its boxes if it is `boxed`.

        No more episodes at once than boxes: an episode in line for a box would be waited for by the engine, and so by
        those who have the boxes.
        """
        places = max(int(rollout.concurrency * share), 1)
        if self.settings and boxed:
            places = min(places, max(int(self._config.max_live * share / self._users), 1))
        return rollout if places == rollout.concurrency else rollout.model_copy(update={"concurrency": places})

    def metrics(self) -> dict[str, float]:
        """What every record of the run must say."""
        return {"sandbox/unsafe": float(self.provider == UNSAFE)} if self.settings else {}

    def notes(self) -> tuple[str, ...]:
        """What the summary must say."""
        return (STAMP,) if self.provider == UNSAFE else ()

    def close(self) -> None:
        """Remove every box. Again is fine."""
        if self.settings:
            from espl_envs.sandbox.pool import close_shared

            close_shared()
