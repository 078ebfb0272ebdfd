"""Who answers under a configuration, put together for the loop; and what can be known of it before a run begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espl_envs.core import background
from espl_train.config import Config
from espl_train.reflecting.cache import Cache
from espl_train.reflecting.client import Client
from espl_train.reflecting.endpoint import EndpointSource, check
from espl_train.reflecting.ledger import Ledger
from espl_train.reflecting.queue import Queue
from espl_train.reflecting.source import Source

if TYPE_CHECKING:
    from espl_train.chat import Chat
    from espl_train.engines.base import Engine
    from espl_train.learner.policy import Policy

FOLDER = "reflections"


def client_for(config: Config, run: Path, engine: Engine, chat: Chat, policy: Policy) -> Client:
    """The client of the run in `run`. Raises EsplError for settings that cannot be used."""
    source: Source
    if config.evolution.reflector == "endpoint":
        source = EndpointSource(config)
    else:
        from espl_train.reflecting.engine import EngineSource

        named = partial(weights, config, policy)
        source = EngineSource(engine, chat, config, lambda: policy.version, named)
    ledger = Ledger(config.reflection, run if source.paid else None)
    return Client(source, config, ledger, _cache(config, run / FOLDER))


def queue_for(config: Config, run: Path, island: str) -> Queue | None:
    """Where children of an environment wait for a person; None where nobody is asked."""
    return Queue(run, island) if config.reflection.review and config.mode != "rl" else None


def inspect(config: Config) -> Iterator[tuple[str, str]]:
    """Rows of the plan: who is asked, from what is replayed, within which budget. Raises EsplError where a server does
    not answer, or there is nothing to replay: nothing is written yet."""
    asked = config.reflection
    replays = asked.cache == "replay_only"
    if replays:
        _cache(config, Path())
    if config.evolution.reflector == "endpoint":
        yield "reflection", "only what was recorded" if replays else background.run_through(check(config))
    if asked.cache != "off":
        yield "  replies", f"{asked.cache.replace('_', ' ')}: {asked.cache_dir or f'{FOLDER}/ in the run directory'}"
    limits = {name: getattr(asked, f"max_{name}") for name in ("calls", "tokens", "seconds", "cost")}
    if kept := [f"{limit:,g} {asked.currency if name == 'cost' else name}" for name, limit in limits.items() if limit]:
        yield "  budget", f"at most {', '.join(kept)}"
    if asked.review:
        yield "  review", "children wait for a person: espl-train review RUN"


def weights(config: Config, policy: Policy, learnt: bool) -> Mapping[str, Any]:
    """Which weights answer: a commit or the fingerprint of the base model, and a hash of what was trained."""
    from espl_train.learner.loading import identity

    base = identity(config.model)
    named = {"model": base["fingerprint"] or base["commit"] or base["path"], "dtype": base["dtype"]}
    return {**named, "learnt": _digest(policy)} if learnt else named


def _digest(policy: Policy) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _cache(config: Config, default: Path) -> Cache | None:
    asked = config.reflection
    if asked.cache == "off":
        return None
    return Cache(Path(asked.cache_dir) if asked.cache_dir else default, only=asked.cache == "replay_only")
