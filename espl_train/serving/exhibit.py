"""What is served: a model from the hub or a folder, or what a run has trained and the prompt that it chose.

A run is read as its newest checkpoint left it, also while it goes on; nothing in its directory changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.chat import Chat
from espl_train.config import Config
from espl_train.engines.base import Engine
from espl_train.runs import checkpoint
from espl_train.runs.directory import CONFIG, read_config
from espl_train.runs.metrics import read_lines
from espl_train.serving.server import Offer
from espl_train.settings import ConfigError, load, override

CHECKPOINTS = "checkpoints"
FREE = ("model.device", "model.threads", "engine.")     # what may be changed of a run that is served
OWN = ("model.dtype", "model.revision", *FREE)          # … and chosen for a model


@dataclass(frozen=True)
class Exhibit:
    """kind: "run" or "model". prompt: the id of the system prompt, "" without one. step: of the checkpoint. weights: a
    hash of what was trained. Nothing is loaded yet."""

    kind: str
    offer: Offer
    config: Config
    prompt: str = ""
    step: int | None = None
    weights: str = ""
    folder: Path = field(default_factory=Path)

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
        config = override(read_config(folder), {"engine.deterministic": False, **overrides})
        step, payloads = checkpoint.read_newest(folder / CHECKPOINTS, ("state",))
        chosen, text = _system_prompt(folder, config, step, payloads["state"]["islands"][""]["population"], prompt)
        offer = Offer(
            name=folder.resolve().name,
            policy=0,                                       # known once the weights are loaded
            system_prompt=text,
            temperature=config.evaluation.temperature,
            max_tokens=min(config.rollout.max_new_tokens, config.rollout.max_total_tokens),
            seed=config.seed,
        )
        manifest = (folder / CHECKPOINTS / f"step-{step:06d}" / checkpoint.MANIFEST).read_bytes()
        return cls("run", offer, config, chosen, step, hashlib.sha256(manifest).hexdigest()[:16], folder)

    def to_json(self) -> dict[str, Any]:
        """What somebody needs to know who is going to ask for replies."""
        tools = self.config.env.args.get("tool_syntax", "text") if self.kind == "run" else "native"
        return {
            "kind": self.kind, "name": self.offer.name, "model": self.config.model.path, "prompt": self.prompt,
            "system_prompt": self.offer.system_prompt if self.prompt else None, "step": self.step,
            "weights": self.weights, "temperature": self.offer.temperature, "max_tokens": self.offer.max_tokens,
            "tool_syntax": tools, "engine": self.config.engine.kind,
        }  # fmt: skip

    def load(self) -> tuple[Engine, Chat, Offer]:
        """The engine with its weights, proven where it can prove them. Raises EsplError."""
        from espl_train.engines.choice import engine_for
        from espl_train.learner.policy import Policy

        config = self.config
        policy = Policy.load(config.model, config.learner, config.seed)
        if self.kind == "model":
            return engine_for(config, policy), Chat(policy.tokenizer), self.offer
        step, payloads = checkpoint.read_newest(self.folder / CHECKPOINTS, ("learner",))
        if step != self.step:
            raise EsplError(f"the run {self.folder} went on to step {step} meanwhile: start again")
        policy.load_state(payloads["learner"]["policy"], payloads["learner"]["version"])
        engine = engine_for(config, policy)
        engine.load_policy(policy.version)
        return engine, Chat(policy.tokenizer), replace(self.offer, policy=policy.version)


def _system_prompt(
    folder: Path, config: Config, step: int, population: Mapping[str, Any], choice: str
) -> tuple[str, str]:
    """The id and the text of the prompt that `choice` names."""
    from espl_train.evolution.population import Population
    from espl_train.evolution.templates import TemplateSet

    if choice == "none":
        return "", ""
    members = Population.from_json(population, config.evolution, config.rating, config.seed)
    rows = {row.get("step"): row for row in read_lines(folder / "metrics.jsonl")}
    best = str(rows.get(step, {}).get("best") or members.elite.id)
    chosen = {"root": members.root.id, "best": best}.get(choice, choice)
    if chosen not in members:
        known = ", ".join(member.prompt.id for member in members.members[-8:])
        raise EsplError(f"the run {folder} has no prompt {chosen!r}; choose best, root, none or an id such as {known}")
    principles = members[chosen].principles
    return chosen, TemplateSet.load(_templates(config)).system(principles) if principles else ""


def _templates(config: Config) -> str:
    """The template set of the run."""
    if config.model.templates is not None:
        return config.model.templates
    from transformers import AutoConfig

    from espl_train.learner.loading import locate, template_set

    settings = AutoConfig.from_pretrained(locate(config.model.path), revision=config.model.revision)
    return template_set(config.model, settings)
