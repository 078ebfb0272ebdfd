"""ONE iteration of E-SPL, in the order of the method: select, play, advantages, reflect, update, rate, breed, persist.

This is the only module that knows engine, learner and evolution at once. On purpose it is synchronous and on-policy:
sampling and training take turns on the device; what runs concurrently runs inside the engine's queue. Nothing here
draws a random number: all of them are keyed by (seed, step, …), so a resumed run is the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_train import report
from espl_train.chat import Chat
from espl_train.completion import EngineCompleter
from espl_train.config import Config
from espl_train.engines.choice import engine_for
from espl_train.evaluation import Evaluation, metrics
from espl_train.evolution.breeding import Breeder, BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.templates import TemplateSet
from espl_train.learner.advantages import assign
from espl_train.learner.ranks import ALONE, Ranks
from espl_train.learner.shaping import Shaping
from espl_train.learner.update import Learner
from espl_train.problems import Deck, Problems, ProblemSets
from espl_train.records import Group, Rollout, RolloutKey, grouped
from espl_train.report import IterationReport, Totals
from espl_train.rollout import Collector, Job
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.summary import Score, Summary
from espl_train.sandboxes import Boxes, equipped, wanted


class Trainer:
    """One run, from where its directory stands to its last step.

    Raises EsplError for whatever the user can put right; an interrupted run goes on from its last checkpoint. `ranks`
    are the processes that learn with this one, the only one that runs the loop.
    """

    def __init__(self, config: Config, run: RunDirectory, console: Console, ranks: Ranks = ALONE) -> None:
        self.config, self.run, self.console = config, run, console
        self.sets = ProblemSets.of(equipped(config))
        parts = (self.sets.train, self.sets.validation, self.sets.test)
        self.boxes = Boxes(config.sandbox, wanted(problems.env for problems in parts))
        self.learner = Learner.of(config, ranks)
        self.policy = self.learner.policy
        self.engine = engine_for(config, self.policy)
        self.chat = Chat(self.policy.tokenizer)
        self.shaping = Shaping(config.learner, config.rollout, frozenset(self.chat.stop_ids))
        self.deck = Deck(self.sets.train, config.seed)
        self.templates = TemplateSet.load(config.model.templates or self.policy.templates)
        self.population = Population(config.evolution, config.rating, config.seed)
        self.breeder = Breeder(config.evolution, self.templates, config.seed, self.policy.tokenizer.all_special_tokens)
        self.collectors = {problems.part: self._collector(problems) for problems in parts}
        self.totals = Totals()
        self.step = 0
        self.begun = self._restore()

    def train(self) -> Summary:
        """Iterate until the last step, then choose the prompt, open the test split once, and sum up."""
        if self.step > self.config.steps:
            raise EsplError(f"{self.step} steps are done already: --steps {self.config.steps} would have to undo some")
        self.console.begin(self.step, self.config.steps)
        self.console.watch(self.boxes.standing)
        for warning in self.boxes.notes():
            self.console.warn(warning)
        try:
            if not self.begun:
                self._begin()
            while self.step < self.config.steps:
                self._persist(self.iterate())
            return self._finish()
        finally:
            for collector in self.collectors.values():
                collector.close()
            self.engine.close()
            self.boxes.close()

    def iterate(self) -> IterationReport:
        """One iteration. `self.step` counts the finished ones; this one is number `self.step + 1`."""
        started, config = time.perf_counter(), self.config
        self.step += 1
        players = self.population.select(self.step, config.rollout.prompts, config.rollout.samples)
        groups, batch = self._batch(players)
        completer = EngineCompleter(self.engine, self.chat, config.evolution, self.policy.version)
        bred = self._breed(groups, completer) if config.mode != "rl" else None
        update = self._update(groups) if config.mode != "evolution" else None
        match = self.population.rate(groups) if config.mode != "rl" else None
        born = self.population.add(bred.children, self.step) if bred else ()
        validation = self._validate(final=self.step == config.steps) if self._validates() else {}
        seconds = time.perf_counter() - started
        done = IterationReport(
            self.step, tuple(groups), update, match, bred, born, completer.tokens, validation,
            self._best(validation), seconds, batch,
        )
        self.totals = self.totals.plus(done.rollouts, completer.tokens, seconds)
        return done

    def evaluate(
        self, problems: Problems, prompts: Sequence[str], most: int, name: str, base: bool = False
    ) -> dict[str, Evaluation]:
        """The score of each prompt on the same problems, with the current weights or (`base`) those of the start."""
        if not prompts:
            return {}
        chosen = problems.sample(self.config.seed, most)
        players = dict.fromkeys(prompts, self.config.evaluation.samples)
        rollouts = self._play(problems, players, chosen, self.config.evaluation.temperature, name, base)
        return {prompt: Evaluation.of([r for r in rollouts if r.key.prompt == prompt]) for prompt in prompts}

    def text(self, prompt: str) -> str:
        """A system prompt as the model sees it: in training, in evaluation and in every export."""
        return self.templates.system(self.population[prompt].principles)

    def _batch(self, players: Mapping[str, int]) -> tuple[list[Group], dict[str, float]]:
        """The groups of one iteration with their advantages, and how they came about.

        With `rollout.dynamic_rounds`, problems without contrast are followed by others of the epoch until there are B
        with contrast, or the rounds or the epoch are used up. All that was played counts for ratings, reflection and
        reports: prompts compared only where some of them failed would be compared on problems picked by the outcome.
        """
        rollout, learner = self.config.rollout, self.config.learner
        groups: list[Group] = []
        played: list[Rollout] = []
        mixed: set[int] = set()
        rounds, indices = 0, self.deck.batch(rollout.problems)
        while indices:
            name = f"rollouts, round {rounds + 1}" if rounds else "rollouts"
            found = self._play(self.sets.train, players, indices, rollout.temperature, name, earlier=played)
            played += found
            groups += assign(grouped(found), learner.baseline, learner.divide_by_std, self.shaping)
            mixed |= {group.task for group in groups if group.contrast}
            rounds += 1
            indices = self.deck.more(rollout.problems - len(mixed)) if rounds <= rollout.dynamic_rounds else []
        problems = len({group.task for group in groups})
        counts = {"dynamic/rounds": rounds, "dynamic/problems": problems, "dynamic/contrast": len(mixed)}
        return groups, {**(counts if rollout.dynamic_rounds else {}), **self.shaping.metrics(played)}

    def _play(
        self, problems: Problems, players: Mapping[str, int], indices: Sequence[int], temperature: float, name: str,
        base: bool = False, earlier: Sequence[Rollout] = (),
    ) -> list[Rollout]:
        """Every player on every problem, as often as `players` says, all concurrently."""
        self.engine.load_policy(self.policy.version)
        jobs = [
            Job(RolloutKey(self.step, prompt, index, sample, split=problems.part), self.text(prompt))
            for prompt, samples in players.items()
            for index in indices
            for sample in range(samples)
        ]
        self.console.phase(name, len(jobs))
        policy = None if base else self.policy.version
        return self.collectors[problems.part].collect(
            jobs, policy, temperature, self.console.progress, earlier=earlier
        )

    def _breed(self, groups: Sequence[Group], completer: EngineCompleter) -> BreedingReport:
        self.console.phase("reflection")
        return background.run(
            self.breeder.breed(self.step, self.population, groups, self.sets.train.tasks, completer.complete)
        )

    def _update(self, groups: Sequence[Group]) -> report.UpdateReport:
        self.console.phase("update")
        return self.learner.update(groups)

    def _validates(self) -> bool:
        every = self.config.evaluation.every
        return self.step == self.config.steps or bool(every and self.step % every == 0)

    def _validate(self, final: bool) -> dict[str, float]:
        """The root and the best rated; at the end all that may be chosen."""
        root, top = self.population.root.id, self.population.top(self.config.evaluation.prompts if final else 1)
        prompts = list(dict.fromkeys([root, *top]))
        found = self.evaluate(self.sets.validation, prompts, self.config.evaluation.problems, "validation")
        return metrics(found, root, top[0])

    def _best(self, validation: Mapping[str, float]) -> str:
        """The prompt of the moment: the best rated; at the end the one that the configured choice names."""
        if self.step < self.config.steps:
            return self.population.elite.id
        scores = {m.prompt.id: validation.get(f"validation/{m.prompt.id}") for m in self.population.members}
        known = {prompt: score for prompt, score in scores.items() if score is not None and math.isfinite(score)}
        return self.population.best(self.config.evaluation.choice, known).id

    def _begin(self) -> None:
        """Where the run starts from: the root prompt on the base weights."""
        for part in (self.sets.train, self.sets.validation, self.sets.test):
            self.console.note(f"{part.part}: {part}")
        root = self.population.root.id
        found = self.evaluate(self.sets.validation, [root], self.config.evaluation.problems, "validation")
        self.run.log.metrics({"step": 0, **metrics(found, root, root), **self.boxes.metrics()})
        self._checkpoint()

    def _persist(self, done: IterationReport) -> None:
        record = {**done.metrics(self.population), **self.boxes.metrics()}
        self.run.write_rollouts(done.step, (r for group in done.groups for r in group.rollouts))
        for kind, details in done.events(self.population):
            self.run.log.event(done.step, kind, **details)
        self.run.log.metrics(record)
        if done.step % self.config.checkpoint_every == 0 or done.step == self.config.steps:
            self._checkpoint()
        self.console.step(record)
        for note in done.notes(self.population):
            self.console.note(note)

    def _checkpoint(self) -> None:
        """Everything that the next step depends on, in one transaction."""
        state = {
            "population": self.population.to_json(),
            "breeder": self.breeder.state(),
            "totals": self.totals.to_json(),
            "deck": self.deck.position,
        }
        self.run.write_population(state["population"])
        self.run.save(self.step, {"state": state, "learner": self.learner.state_dict()})

    def _restore(self) -> bool:
        """Go on from the newest checkpoint; False where there is none."""
        saved = self.run.restore()
        if saved is None:
            return False
        self.step, payloads = saved
        state = payloads["state"]
        self.learner.load_state_dict(payloads["learner"])
        config = self.config
        self.population = Population.from_json(state["population"], config.evolution, config.rating, config.seed)
        self.breeder.restore(state["breeder"])
        self.totals = Totals(**state["totals"])
        self.deck = Deck(self.sets.train, config.seed, state["deck"])
        return True

    def _finish(self) -> Summary:
        """Choose by validation, then test: the start, each half alone, and both together."""
        history = report.history(self.run.path)
        root, best = self.population.root.id, str(history[-1]["best"])
        prompts, most = list(dict.fromkeys([root, best])), self.config.evaluation.test_problems
        start = self.evaluate(self.sets.test, prompts, most, "test, base weights", base=True)
        after = self.evaluate(self.sets.test, prompts, most, "test") if self.config.mode != "evolution" else {}
        table = report.table(start, after, root, best)
        self.run.log.event(self.step, "test", scores={s.name: s.mean for s in table}, best=best)
        opened = report.opened(self.run.path, self.step)
        self.policy.save_adapter(self.run.path / "policy")
        scores = (*report.validation_table(history, root, best), *table)
        notes = report.notes(self.config.evaluation, self.totals, chosen=best != root)
        return self._summary(best, scores, history, (*self.boxes.notes(), *notes, *opened))

    def _summary(
        self, best: str, scores: tuple[Score, ...], history: Sequence[Mapping[str, object]], notes: tuple[str, ...]
    ) -> Summary:
        return Summary(
            run=self.run.path,
            steps=self.step,
            seconds=self.totals.seconds,
            tokens=self.totals.tokens,
            rollouts=self.totals.rollouts,
            faulted=self.totals.faulted,
            best=best,
            prompt=self.text(best),
            scores=scores,
            history=tuple(history),
            notes=notes,
        )

    def _collector(self, problems: Problems) -> Collector:
        rollout = self.boxes.limited(self.config.rollout)
        return Collector(problems.make, self.chat, self.engine, rollout, self.config.seed)
