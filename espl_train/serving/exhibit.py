"""What is served: a model from the hub or a folder, or what a run has trained and the prompt that it chose.

A run is read as its newest checkpoint left it, also while it goes on; nothing in its directory changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.chat import Chat
from espl_train.config import Config
from espl_train.engines.base import Engine
from espl_train.runs.directory import CONFIG
from espl_train.serving.identity import weights_of
from espl_train.serving.server import Offer
from espl_train.settings import ConfigError, load, override
from espl_train.snapshot import Snapshot

SHARED = ("model.device", "model.threads", "engine.")
FREE = ("rollout.max_total_tokens", *SHARED)            # what may be changed of a run that is served
OWN = ("model.dtype", "model.revision", *SHARED)        # … and chosen for a model


@dataclass(frozen=True)
class Exhibit:
    """kind: "run" or "model". prompt: the id of the system prompt, "" without one. island: the environment of the run
    that the prompt was bred on, by its name there. Nothing is loaded yet."""

    kind: str
    offer: Offer
    config: Config
    prompt: str = ""
    run: Snapshot | None = None
    island: str = ""

    @classmethod
    def of(cls, target: str, prompt: str | None, overrides: Mapping[str, Any]) -> Exhibit:
        """The run or the model at `target`; `prompt` is best, root, none or an id. Raises EsplError, in one sentence,
        for whatever is not there."""
        is_run = (Path(target) / CONFIG).is_file()
        allowed = FREE if is_run else OWN
        if other := [key for key in overrides if not key.startswith(allowed)]:
            what = "a run" if is_run else "a model"
            raise ConfigError(f"--{other[0]} changes nothing when {what} is served: leave it out.")
        if is_run:
            return cls._run(Path(target), prompt or "best", overrides)
        if prompt not in (None, "none"):
            raise EsplError(f"--prompt {prompt} chooses among the prompts of a run; {target} is none (no {CONFIG})")
        return cls._model(target, overrides)

    @classmethod
    def _model(cls, target: str, overrides: Mapping[str, Any]) -> Exhibit:
        from espl_train.learner.loading import locate

        locate(target)
        config = load((), None, {"model.path": target, "learner.rank": 1, "engine.deterministic": False, **overrides})
        name = Path(target).resolve().name if Path(target).is_dir() else target
        return cls("model", Offer(name), config)

    @classmethod
    def _run(cls, folder: Path, prompt: str, overrides: Mapping[str, Any]) -> Exhibit:
        run = Snapshot.of(folder)
        config = override(run.config, {"engine.deterministic": False, **overrides})
        island, chosen = (next(iter(run.populations)), None) if prompt == "none" else run.find_one(prompt)
        offer = Offer(
            name=run.name,
            policy=0,                                       # known once the weights are loaded
            system_prompt=run.text(chosen.principles) if chosen else "",
            temperature=config.evaluation.temperature,
            max_tokens=min(config.rollout.max_new_tokens, config.rollout.max_total_tokens),
            max_total=config.rollout.max_total_tokens,
            seed=config.seed,
        )
        return cls("run", offer, config, chosen.id if chosen else "", run, island)

    def to_json(self) -> dict[str, Any]:
        """What somebody needs to know who is going to ask for replies."""
        trained = self.config.environments[self.island].args
        tools = trained.get("tool_syntax", "text") if self.kind == "run" else "native"
        return {
            "kind": self.kind, "name": self.offer.name, "model": self.config.model.path, "prompt": self.prompt,
            "system_prompt": self.offer.system_prompt if self.prompt else None,
            "step": self.run.step if self.run else None, "weights": self.run.weights if self.run else "",
            "base": weights_of(self.config.model.path, self.config.model.revision),
            "temperature": self.offer.temperature, "max_tokens": self.offer.max_tokens,
            "max_total_tokens": self.offer.max_total, "tool_syntax": tools, "engine": self.config.engine.kind,
        }  # fmt: skip

    def load(self) -> tuple[Engine, Chat, Offer]:
        """The engine with its weights, proven where it can prove them. Raises EsplError."""
        from espl_train.engines.choice import engine_for
        from espl_train.learner.policy import Policy

        config = self.config
        policy = Policy.load(config.model, config.learner, config.seed)
        if self.run is None:
            return engine_for(config, policy), Chat(policy.tokenizer), self.offer
        learner = self.run.learner()
        policy.load_state(learner["policy"], learner["version"])
        engine = engine_for(config, policy)
        engine.load_policy(policy.version)
        return engine, Chat(policy.tokenizer), replace(self.offer, policy=policy.version)
