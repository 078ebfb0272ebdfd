"""Trials: prompts that are in no population yet, played by the weights of the moment on problems that the caller names.

Whoever has to know what a prompt is worth before it is born asks here: acceptance, pruning, guards. What is played is
counted and reported. It is never learnt from, never rated, and nobody reflects on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from espl_train.evolution.prompts import Principle
from espl_train.evolution.templates import TemplateSet
from espl_train.problems import Problems
from espl_train.records import Rollout, RolloutKey
from espl_train.rollout import Collector, Job

SPLIT = "trial"      # in the keys of rollouts: other randomness than training's, on the same problems


class Trials:
    """The trials of one iteration on one island: called as often as needed, several at once where that suits."""

    def __init__(
        self,
        step: int,
        policy: int,
        problems: Problems,
        templates: TemplateSet,
        collector: Callable[[Problems], Collector],
        expected: Callable[[RolloutKey], int],
        earlier: Sequence[Rollout] = (),
    ) -> None:
        """`problems` are those that a call means where it names no others; `policy` the version of the weights, which
        the engine has loaded; `expected` how long an episode is going to be; `earlier` what the step has played so far,
        for the share of episodes that may fault."""
        self._step, self._policy, self._problems, self._templates = step, policy, problems, templates
        self._collector, self._expected, self._earlier = collector, expected, list(earlier)
        self.played: list[Rollout] = []

    async def __call__(
        self,
        candidates: Mapping[str, tuple[Principle, ...]],
        tasks: Sequence[int],
        samples: int,
        /,
        problems: Problems | None = None,
    ) -> dict[str, dict[int, list[float]]]:
        """The rewards of every candidate on every task (an index into the split of `problems`), `samples` attempts
        each.

        What faulted is left out, so a list may be empty. A name names a candidate for the whole iteration: with the
        same name, task and weights the same episode is played again. Raises EsplError where too many episodes fault.
        """
        problems = problems or self._problems
        texts = {name: self._templates.system(principles) for name, principles in candidates.items()}
        split = SPLIT if problems is self._problems else f"{SPLIT}/{problems.env_id}/{problems.split}"
        keys = [
            RolloutKey(self._step, name, task, sample, split=split)
            for name in candidates
            for task in tasks
            for sample in range(samples)
        ]
        jobs = [Job(key, texts[key.prompt], self._expected(replace(key, split=problems.part))) for key in keys]
        played = await self._collector(problems).acollect(jobs, self._policy, earlier=self._earlier)
        self._earlier += played
        self.played += played
        table: dict[str, dict[int, list[float]]] = {name: {task: [] for task in tasks} for name in candidates}
        for rollout in played:
            if not rollout.faulted:
                table[rollout.key.prompt][rollout.key.task].append(rollout.reward)
        return table

    @property
    def tokens(self) -> int:
        """Sampled in all trials so far."""
        return sum(rollout.sampled_tokens for rollout in self.played)

    def metrics(self) -> dict[str, float]:
        """What they cost; nothing where none was played."""
        return {"trials/rollouts": len(self.played), "trials/tokens": self.tokens} if self.played else {}
