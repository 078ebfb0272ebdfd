"""A run as one of its checkpoints left it, for those who only read: serving, export, transplant.

Nothing in its directory changes, and the run may go on meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.config import Config
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Principle, SystemPrompt
from espl_train.evolution.templates import TemplateSet
from espl_train.runs import checkpoint
from espl_train.runs.directory import read_config
from espl_train.runs.islands import own
from espl_train.runs.metrics import read_lines
from espl_train.totals import Totals

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Snapshot:
    """`weights` is a hash of what was trained; `populations` are those of the run's environments, by their names there
    (one, without a name, in most runs); `alone` are the prompts that play alone while only weights learn, by the same
    names; `finished`: whether this is the end of the run."""

    folder: Path
    config: Config
    step: int
    weights: str
    populations: Mapping[str, Population]
    alone: Mapping[str, str]
    finished: bool

    @classmethod
    def of(cls, folder: Path, step: int | None = None) -> Snapshot:
        """The run in `folder` at its newest checkpoint, or at that of `step`. Raises EsplError, in one sentence, where
        there is no run, no checkpoint, or none that this version reads."""
        config, checkpoints = read_config(folder), folder / CHECKPOINTS
        if step is None:
            step, payloads = checkpoint.read_newest(checkpoints, ("state",))
        else:
            payloads = checkpoint.read_step(checkpoints, step, ("state",))
        try:
            manifest = (checkpoints / f"step-{step:06d}" / checkpoint.MANIFEST).read_bytes()
        except FileNotFoundError:
            raise checkpoint.CheckpointError(f"The run {folder} went on while it was read: try again.") from None
        state = payloads["state"]
        islands = state["islands"]
        populations = {
            name: Population.from_json(island["population"], config.evolution, config.rating, config.seed)
            for name, island in islands.items()
        }
        alone = {name: island["chosen"] for name, island in islands.items() if island["chosen"]}
        over = step >= config.steps or Totals(**state["totals"]).exhausts(config.budget_rollouts)
        return cls(folder, config, step, hashlib.sha256(manifest).hexdigest()[:16], populations, alone, over)

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.resolve().name

    @property
    def trained(self) -> bool:
        """Whether the run trains weights at all."""
        return self.config.mode != "evolution"

    @cached_property
    def records(self) -> tuple[Mapping[str, Any], ...]:
        """metrics.jsonl up to this step."""
        return tuple(row for row in read_lines(self.folder / "metrics.jsonl", "step") if row["step"] <= self.step)

    @cached_property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        """events.jsonl up to this step."""
        rows = read_lines(self.folder / "events.jsonl", "step", "kind")
        return tuple(row for row in rows if row["step"] <= self.step)

    @cached_property
    def templates(self) -> TemplateSet:
        """How the run's model is written to."""
        named = self.config.model.templates
        return TemplateSet.load(_template_set(self.config) if named is None else named)

    def best(self, island: str = "") -> SystemPrompt:
        """The prompt that the run names as its best: at its end the chosen one, before that the best rated."""
        population = self.populations[island]
        last = [row for row in self.records if row.get("step") == self.step][-1:]
        named = str(own(last[0], island).get("best")) if last else ""
        return population[named if named in population else population.elite.id]

    def find(self, which: str) -> list[tuple[str, SystemPrompt]]:
        """The prompts that `which` names, by environment: best, root or an id, in every environment of the run; or in
        one, as NAME/best. Raises EsplError with what there is."""
        island, slash, rest = which.rpartition("/")
        if slash and island not in self.populations:
            known = ", ".join(name for name in self.populations if name) or "one, without a name"
            raise EsplError(f"the run {self.folder} has no environment {island!r}; it has: {known}")
        homes = [island] if slash else [name for name, members in self.populations.items() if which in members]
        return [(name, self.prompt(rest, name)) for name in homes or self.populations]

    def find_one(self, which: str) -> tuple[str, SystemPrompt]:
        """The same, where it is one. Raises EsplError where the run has several environments and none is named."""
        found = self.find(which)
        if len(found) > 1:
            raise EsplError(
                f"the run {self.folder} has several environments: say which is meant, as in {found[0][0]}/{which}"
            )
        return found[0]

    def prompt(self, which: str, island: str = "") -> SystemPrompt:
        """The prompt that `which` names in one environment. Raises EsplError with what there is."""
        population = self.populations[island]
        if which == "best":
            return self.best(island)
        if which == "root":
            return population.root
        if which not in population:
            known = ", ".join(member.prompt.id for member in population.members[-8:])
            raise EsplError(
                f"the run {self.folder} has no prompt {which!r}; choose best, root, or an id such as {known}"
            )
        return population[which]

    def text(self, principles: tuple[Principle, ...]) -> str:
        """A system prompt as the model sees it, in training and everywhere else; empty without principles."""
        return self.templates.system(principles)

    def learner(self) -> Mapping[str, Any]:
        """What was trained: `policy` (the tensors) and `version` among others. Raises EsplError where the checkpoint is
        gone by now: a run that goes on keeps the newest only."""
        payloads = checkpoint.read_step(self.folder / CHECKPOINTS, self.step, ("learner",))
        learner: Mapping[str, Any] = payloads["learner"]
        return learner


def _template_set(config: Config) -> str:
    from transformers import AutoConfig

    from espl_train.learner.loading import locate, template_set

    settings = AutoConfig.from_pretrained(locate(config.model.path), revision=config.model.revision)
    return template_set(config.model, settings)
