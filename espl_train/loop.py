"""ONE iteration of E-SPL, in the order of the method: select, play, advantages, reflect, update, rate, breed, persist.

This is the only module that knows engine, learner and evolution at once. On purpose it is synchronous and on-policy:
what is learnt from was sampled by the weights that learn. What runs concurrently runs inside the engine's queue, but
for reflection, which needs nothing of the update and may run beside it. Nothing here draws a random number: all of them
are keyed by (seed, step, …), so a resumed run is the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
from espl_train.lengths import Lengths
from espl_train.overlap import beside, overlaps
from espl_train.problems import Deck, Problems, ProblemSets
from espl_train.profiling import Phases, Profile, Spent
from espl_train.records import Group, Rollout, RolloutKey, grouped
from espl_train.report import IterationReport, Totals
from espl_train.rollout import Collector, Job
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.summary import Score, Summary
from espl_train.sandboxes import Boxes, equipped, wanted

PHASES = {"train": "rollouts", "validation": "validation", "test": "test"}


class Trainer:
    """One run, from where its directory stands to its last step.

    Raises EsplError for whatever the user can put right; an interrupted run goes on from its last checkpoint. `ranks`
    are the processes that learn with this one, the only one that runs the loop; `profile` is an open one.
    """

    def __init__(
        self, config: Config, run: RunDirectory, console: Console, ranks: Ranks = ALONE, profile: Profile | None = None
    ) -> None:
        self.config, self.run, self.console = config, run, console
        self.sets = ProblemSets.of(equipped(config))
        parts = (self.sets.train, self.sets.validation, self.sets.test)
        self.boxes = Boxes(config.sandbox, wanted(problems.env for problems in parts))
        self.learner = Learner.of(config, ranks)
        self.policy = self.learner.policy
        self.engine = engine_for(config, self.policy)
        self.overlaps = overlaps(config, self.engine, self.policy.device.type)
        self.chat = Chat(self.policy.tokenizer)
        self.shaping = Shaping(config.learner, config.rollout, frozenset(self.chat.stop_ids))
        self.deck = Deck(self.sets.train, config.seed)
        self.templates = TemplateSet.load(config.model.templates or self.policy.templates)
        self.population = Population(config.evolution, config.rating, config.seed)
        self.breeder = Breeder(config.evolution, self.templates, config.seed, self.policy.tokenizer.all_special_tokens)
        self.collectors = {problems.part: self._collector(problems) for problems in parts}
        self.lengths = Lengths()
        self.totals = Totals()
        self.profile = profile
        self.phases = profile.phases if profile else Phases()
        self.step = 0
        self.begun = self._restore()
        self.first = self.step + 1

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
        if self.profile:
            self.profile.begin(self.step, self.first, config.steps)
        with self.phases("select"):
            players = self.population.select(self.step, config.rollout.prompts, config.rollout.samples)
        groups, batch = self._batch(players)
        completer = EngineCompleter(self.engine, self.chat, config.evolution, self.policy.version)
        bred, update = self._reflect_and_learn(groups, completer)
        with self.phases("rating"):
            match = self.population.rate(groups) if config.mode != "rl" else None
            born = self.population.add(bred.children, self.step) if bred else ()
        validation = self._validate(final=self.step == config.steps) if self._validates() else {}
        seconds = time.perf_counter() - started
        done = IterationReport(
            self.step, tuple(groups), update, match, bred, born, completer.tokens, validation,
            self._best(validation), seconds, {**batch, **self.phases.take()},
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
        self.engine.counts()                         # of whatever came before
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
        rare = counts if rollout.dynamic_rounds else {}
        return groups, {**rare, **self.shaping.metrics(played), **self.engine.counts()}

    def _play(
        self, problems: Problems, players: Mapping[str, int], indices: Sequence[int], temperature: float, name: str,
        base: bool = False, earlier: Sequence[Rollout] = (),
    ) -> list[Rollout]:
        """Every player on every problem, as often as `players` says, all concurrently, long ones first."""
        with self.phases("sync"):
            self.engine.load_policy(self.policy.version)
        keys = [
            RolloutKey(self.step, prompt, index, sample, split=problems.part)
            for prompt, samples in players.items()
            for index in indices
            for sample in range(samples)
        ]
        jobs = [Job(key, self.text(key.prompt), self.lengths.expected(key)) for key in keys]
        policy = None if base else self.policy.version
        with self._phase(PHASES[problems.part], name, len(jobs)) as spent:
            played = self.collectors[problems.part].collect(
                jobs, policy, temperature, self.console.progress, earlier=earlier
            )
            spent.tokens += sum(rollout.sampled_tokens for rollout in played)
        self.lengths.learn(played)
        return played

    def _reflect_and_learn(
        self, groups: Sequence[Group], completer: EngineCompleter
    ) -> tuple[BreedingReport | None, report.UpdateReport | None]:
        """Both need the groups and nothing of each other: at once where that is faster, with the same results."""
        mode = self.config.mode
        if mode == "evolution_rl" and self.overlaps:
            with beside(self._breed(groups, completer)) as breeding:
                update = self._update(groups, "update and reflection")
            return breeding.result(), update
        bred = None
        if mode != "rl":
            self.console.phase("reflection")
            bred = background.run_through(self._breed(groups, completer))
        return bred, self._update(groups) if mode != "evolution" else None

    async def _breed(self, groups: Sequence[Group], completer: EngineCompleter) -> BreedingReport:
        with self.phases("reflection") as spent:
            tasks = self.sets.train.tasks
            bred = await self.breeder.breed(self.step, self.population, groups, tasks, completer.complete)
            spent.tokens += completer.tokens
            return bred

    def _update(self, groups: Sequence[Group], shown: str = "") -> report.UpdateReport:
        with self._phase("update", shown) as spent:
            self.engine.pause()
            update = self.learner.update(groups)
            self.engine.resume()
            spent.tokens += update.computed
            return update

    @contextmanager
    def _phase(self, name: str, shown: str = "", total: int | None = None) -> Iterator[Spent]:
        self.console.phase(shown or name, total)
        with self.phases(name) as spent:
            yield spent

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
        self.run.log.metrics({"step": 0, **metrics(found, root, root), **self.boxes.metrics(), **self.phases.take()})
        self._checkpoint()

    def _persist(self, done: IterationReport) -> None:
        record = {**done.metrics(self.population), **self.boxes.metrics()}
        self.run.write_rollouts(done.step, (r for group in done.groups for r in group.rollouts))
        for kind, details in done.events(self.population):
            self.run.log.event(done.step, kind, **details)
        self.run.log.metrics(record)
        if done.step % self.config.checkpoint_every == 0 or done.step == self.config.steps:
            self._checkpoint()
        if self.profile:
            self.profile.write()
        self.console.step(record)
        for note in done.notes(self.population):
            self.console.note(note)

    def _checkpoint(self) -> None:
        """Everything that the next step depends on, in one transaction."""
        with self.phases("checkpoint"):
            state = {
                "population": self.population.to_json(),
                "breeder": self.breeder.state(),
                "totals": self.totals.to_json(),
                "deck": self.deck.position,
                "lengths": self.lengths.to_json(),
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
        self.lengths = Lengths.from_json(state["lengths"])
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
