"""Plays what of a plan is not there yet. A model is read once, and the weights of the runs follow each other on it;
only weights of another rank need it read again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train.chat import Chat
from espl_train.config import LearnerConfig
from espl_train.engines.base import Engine
from espl_train.engines.choice import engine_for
from espl_train.evaluation import Evaluation
from espl_train.learner.policy import Policy
from espl_train.records import RolloutKey
from espl_train.rollout import Collector, Job
from espl_train.runs.console import Console
from espl_train.sandboxes import Boxes, check, wanted
from espl_train.snapshot import Snapshot
from espl_train.transplant.plan import Plan, Prompt, Weights
from espl_train.transplant.store import Cell, Store

EVERYBODY = "transplant"        # in place of a prompt's id: the random draws of all cells are the same


def play(plan: Plan, store: Store, console: Console) -> None:
    """Play every cell that `store` does not have. Raises EsplError; what was finished before is kept."""
    cells = list(plan.cells)
    left = [(weights, prompt) for weights, prompt in cells if store.cell(weights.name, prompt.name) is None]
    console.begin(len(cells) - len(left), len(cells))
    left.sort(key=lambda cell: _fit(_learner(plan, cell[0])))
    boxes = Boxes(plan.config.sandbox, wanted([plan.problems.env]))
    try:
        if left and boxes.settings is not None:
            console.phase("trying the sandbox")
            list(check(boxes.settings, plan.config.sandbox, dry=False))
        adapters = {run.folder: _tensors(run) for run in plan.runs if run.trained and _is_adapter(run)} if left else {}
        for _, alike in groupby(left, key=lambda cell: _fit(_learner(plan, cell[0]))):
            _Stage(plan, boxes, adapters, list(alike)).play(store, console)
    finally:
        boxes.close()


class _Stage:
    """One model with its engine, for cells whose weights fit the same modules."""

    def __init__(
        self, plan: Plan, boxes: Boxes, adapters: Mapping[Any, Mapping[str, Any]],
        cells: Sequence[tuple[Weights, Prompt]],
    ) -> None:
        self._plan, self._boxes, self._adapters, self._cells = plan, boxes, adapters, cells

    def play(self, store: Store, console: Console) -> None:
        """Play the cells, row by row."""
        plan = self._plan
        console.phase("loading the model")
        config = plan.config.model_copy(update={"learner": _learner(plan, self._cells[0][0])})
        policy = Policy.load(config.model, config.learner, config.seed)
        chat = Chat(policy.tokenizer)
        engine = engine_for(config, policy)
        limits = self._boxes.limited(config.rollout)
        collector = Collector(plan.problems.make, chat, engine, limits, plan.seed)
        try:
            _room(plan, chat, engine)
            names = [weights.name for weights in plan.weights]
            for name, row in groupby(self._cells, key=lambda cell: cell[0].name):
                cells, version = list(row), names.index(name)
                run = cells[0][0].run
                if run is not None:
                    policy.load_state(self._adapters.get(run.folder) or _tensors(run), version)
                    engine.load_policy(version)
                for _, prompt in cells:
                    _cell(plan, collector, version if run else None, name, prompt, store, console)
        finally:
            collector.close()
            engine.close()


def _cell(
    plan: Plan, collector: Collector, policy: int | None, weights: str, prompt: Prompt, store: Store, console: Console
) -> None:
    started = time.monotonic()
    jobs = [
        Job(RolloutKey(0, EVERYBODY, task, sample, split=plan.problems.part), prompt.text)
        for task in plan.indices
        for sample in range(plan.samples)
    ]
    console.phase(f"{weights} × {prompt.name}", len(jobs))
    rollouts = collector.collect(jobs, policy, plan.temperature, console.progress)
    store.keep(Cell.of(weights, prompt.name, rollouts))
    found = {"step": store.there(), "reward/mean": Evaluation.of(rollouts).mean, "seconds": time.monotonic() - started}
    console.step(found)
    console.note(f"weights {weights}, prompt {prompt.name}")


def _learner(plan: Plan, weights: Weights) -> LearnerConfig:
    """What the model has to be read with for these weights. The base fits every one: the first that there is."""
    if weights.run is not None:
        return weights.run.config.learner
    return min((one.run.config.learner for one in plan.weights if one.run), key=_fit, default=plan.config.learner)


def _fit(learner: LearnerConfig) -> tuple[str, int, int]:
    """Weights with the same of this fit the same modules."""
    return (learner.mode, learner.rank, learner.alpha) if learner.mode == "lora" else (learner.mode, 0, 0)


def _is_adapter(run: Snapshot) -> bool:
    return run.config.learner.mode == "lora"


def _tensors(run: Snapshot) -> Mapping[str, Any]:
    tensors: Mapping[str, Any] = run.learner()["policy"]
    return tensors


def _room(plan: Plan, chat: Chat, engine: Engine) -> None:
    """Raises EsplError for a prompt that leaves no room for an answer, which would be scored as a wrong one."""
    for prompt in plan.prompts:
        tokens = len(chat.open(plan.problems.env.opening("?", prompt.text)))
        if tokens >= engine.context_length:
            raise EsplError(
                f"the prompt {prompt.name!r} ({prompt.origin}) has {tokens} tokens, and the model reads "
                f"{engine.context_length} in all"
            )
