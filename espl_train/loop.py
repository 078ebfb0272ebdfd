"""ONE iteration of E-SPL, in the order of the method: select, play, advantages, reflect, update, rate, breed, persist.

This is the only module that knows engine, learner and evolution at once. On purpose it is synchronous and on-policy:
what is learnt from was sampled by the weights that learn. What runs concurrently runs inside the engine's queue, but
for reflection, which needs nothing of the update and may run beside it. Nothing here draws a random number: all of them
are keyed by (seed, step, …), so a resumed run is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_train import archipelago, report, schedule
from espl_train.chat import Chat
from espl_train.config import Config
from espl_train.ending import finish
from espl_train.engines.choice import engine_for
from espl_train.evaluation import Evaluation, metrics, overall
from espl_train.evolution.breeding import BreedingReport
from espl_train.evolution.guards import Leaks
from espl_train.evolution.prompts import SystemPrompt
from espl_train.evolution.templates import TemplateSet
from espl_train.island import Batch, Island
from espl_train.learner.ranks import ALONE, Ranks
from espl_train.learner.update import Learner
from espl_train.overlap import beside, overlaps, together
from espl_train.problems import Part, ProblemSets, shares
from espl_train.profiling import Phases, Profile
from espl_train.records import Rollout, grouped
from espl_train.reflecting.choice import client_for, queue_for
from espl_train.report import IslandReport, IterationReport
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.islands import under
from espl_train.runs.summary import Summary
from espl_train.sandboxes import Boxes, equipped
from espl_train.stage import Stage
from espl_train.totals import Totals
from espl_train.twins import examine


class Trainer:
    """One run, from where its directory stands to its last step.

    Raises EsplError for whatever the user can put right; an interrupted run goes on from its last checkpoint. `ranks`
    are the processes that learn with this one, the only one that runs the loop; `profile` is an open one; `leaks` is
    what a look ahead has learnt of each environment's training problems.
    """

    def __init__(
        self, config: Config, run: RunDirectory, console: Console, ranks: Ranks = ALONE, profile: Profile | None = None,
        leaks: Mapping[str, Leaks] | None = None,
    ) -> None:
        self.config, self.run, self.console = config, run, console
        sets = {name: ProblemSets.of(equipped(config, env)) for name, env in config.environments.items()}
        self.boxes = Boxes.of(config, {name: [problems.env for problems in parts] for name, parts in sets.items()})
        self.learner = Learner.of(config, ranks)
        self.policy = self.learner.policy
        self.engine = engine_for(config, self.policy)
        self.overlaps = overlaps(config, self.engine, self.policy.device.type)
        self.chat = Chat(self.policy.tokenizer)
        templates = TemplateSet.load(config.model.templates or self.policy.templates)
        queues = {name: queue_for(config, run.path, name) for name in sets}
        self.islands = [
            Island(
                config, parts, self.boxes, self.chat, self.engine, templates, name, queues[name],
                (leaks or {}).get(name),
            )
            for name, parts in sets.items()
        ]
        self.client = client_for(config, run.path, self.engine, self.chat, self.policy)
        self.totals = Totals()
        self.profile = profile
        self.phases = profile.phases if profile else Phases()
        self.stage = Stage(self.engine, self.policy, console, self.phases)
        self.step = 0
        self.begun = self._restore()
        self.first = self.step + 1

    def train(self) -> Summary:
        """Iterate until the last step, then choose the prompt, open the test split once, and sum up."""
        self.console.begin(self.step, self.config.steps)
        self.console.watch(self.boxes.standing)
        for warning in self.boxes.notes():
            self.console.warn(warning)
        try:
            if self.config.mode != "rl":
                self.client.open()
                archipelago.acquaint(self.islands)
            if not self.begun:
                self._begin()
            while not self._final():
                self._persist(self.iterate())
                self._stop_where_nobody_answers()
            self.policy.save_adapter(self.run.path / "policy")
            warnings, books = self.boxes.notes(), self.client.ledger.table()
            return finish(self.run, self.islands, self.step, self.totals, self.evaluate, warnings, books)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of environments, reflection, engine and boxes. Again is fine."""
        for island in self.islands:
            island.close()
        self.client.close()
        self.engine.close()
        self.boxes.close()

    def iterate(self) -> IterationReport:
        """One iteration. `self.step` counts the finished ones; this one is number `self.step + 1`."""
        started, config, before = time.perf_counter(), self.config, self.totals
        self.step += 1
        if self.profile:
            self.profile.begin(self.step, self.first, config.steps)
        self._turn()
        with self.phases("select"):
            for island in self.islands:
                island.admit(self.step)
            weights = [env.weight for env in config.environments.values()]
            sizes = shares(weights, config.rollout.problems, self.step)
            batches = [Batch.of(island, self.step, size) for island, size in zip(self.islands, sizes, strict=True)]
        counts = self.stage.play_out(batches, self.step, config.rollout.temperature)
        bred, update = self._reflect_and_learn(batches)
        with self.phases("rating"):
            settled = [b.island.settle(self.step, b.groups, brood) for b, brood in zip(batches, bred, strict=True)]
        tried = self._try_out(batches, [born for _, born in settled])
        final = self._final(len(tried) + sum(len(group.rollouts) for batch in batches for group in batch.groups))
        every = config.evaluation.every
        validation = self._validate(final) if final or (every and self.step % every == 0) else {}
        parts = {}
        for batch, brood, (match, born) in zip(batches, bred, settled, strict=True):
            island, found = batch.island, validation.get(batch.island.name, {})
            parts[island.name] = IslandReport(
                tuple(batch.groups), match, brood, born, self.client.ledger.sampled(island.name), found,
                island.best(found, final), batch.metrics(), tuple(island.reviewed),
            )
        seconds = time.perf_counter() - started
        watched = self.totals.validation_since(before)
        common = {**overall(validation, config.shares), **watched, **counts, **self.phases.take()}
        won = archipelago.victories(self.step, self.islands)
        done = IterationReport(self.step, parts, update, seconds, won, common)
        self.totals = self.totals.plus(done.rollouts, done.reflection_tokens, seconds, tried)
        return done

    def _final(self, played: int = 0) -> bool:
        """Whether the run is over, or will be once `played` more rollouts are counted."""
        return self.step >= self.config.steps or self.totals.exhausts(self.config.budget_rollouts, played)

    def _turn(self) -> None:
        """Where only weights learn from here on, choose who plays meanwhile, as it is done at the end of a run; where
        prompts breed again, let all of them play."""
        alone = self.config.mode == "evolution_rl" and schedule.phase(self.config, self.step) == schedule.WEIGHTS
        due = [i for i in self.islands if alone != (i.chosen is not None)]
        asked = self.config.evaluation.choice == "validation" or self.config.evolution.twin_problems
        found = self._validate(final=True) if alone and asked and any(len(i.population) > 1 for i in due) else {}
        for island in due:
            island.chosen = island.best(found.get(island.name, {}), final=True) if alone else None
            if island.chosen and len(island.population) > 1:
                self.console.note(f"the weights learn with {island.chosen} alone from here on")
                self.run.log.event(self.step, "chosen", prompt=island.chosen, scores=found.get(island.name, {}))

    def evaluate(
        self, part: Part, prompts: Mapping[str, Sequence[str]], most: int, name: str, base: bool = False
    ) -> dict[str, dict[str, Evaluation]]:
        """By island, the score of each prompt on the island's same problems of `part`, at most `most`, with the current
        weights or (`base`) those of the start."""
        rounds = [i.evaluation(part, prompts[i.name], most) for i in self.islands if prompts.get(i.name)]
        played = self.stage.play(rounds, self.step, self.config.evaluation.temperature, name, base)
        if part == "validation":
            self.totals = self.totals.validated([rollout for rollouts in played for rollout in rollouts])
            for round, rollouts in zip(rounds, played, strict=True):
                round.island.population.score(self.step, grouped(rollouts))
        return {
            r.island.name: {p: Evaluation.of([x for x in rollouts if x.key.prompt == p]) for p in r.players}
            for r, rollouts in zip(rounds, played, strict=True)
        }

    def _try_out(self, batches: Sequence[Batch], born: Sequence[Sequence[SystemPrompt]]) -> list[Rollout]:
        """The trials of the iteration. Where the frontier is one of the validation problems, all who were just born
        play them now: that decides who breeds, so it counts as a trial."""
        evaluation, newborn = self.config.evaluation, []
        if self.config.evolution.pareto_scores == "validation":
            newborn = [(batch, [child.id for child in ours]) for batch, ours in zip(batches, born, strict=True) if ours]
        rounds = [batch.island.evaluation("validation", ids, evaluation.problems) for batch, ids in newborn]
        played = self.stage.play(rounds, self.step, evaluation.temperature, "first scores")
        for (batch, _), rollouts in zip(newborn, played, strict=True):
            batch.tried += rollouts
            batch.island.population.score(self.step, grouped(rollouts))
        return [rollout for batch in batches for rollout in batch.tried]

    def _reflect_and_learn(
        self, batches: Sequence[Batch]
    ) -> tuple[Sequence[BreedingReport | None], report.UpdateReport | None]:
        """Both need the groups and nothing of each other: at once where that is faster, with the same results."""
        self.client.begin(self.step)
        now, version = schedule.phase(self.config, self.step), self.policy.version
        if now == schedule.BOTH and self.overlaps:
            with beside(self._breed(batches, version)) as breeding:
                update = self._update(batches, "update and reflection")
            return breeding.result(), update
        bred: Sequence[BreedingReport | None] = [None] * len(batches)
        if now.breeds:
            self.console.phase("reflection")
            bred = background.run_through(self._breed(batches, version))
        return bred, self._update(batches) if now.learns else None

    async def _breed(self, batches: Sequence[Batch], version: int) -> Sequence[BreedingReport | None]:
        """Children of all batches, which the weights of this `version` have played; an update may bring newer ones."""
        with self.phases("reflection") as spent:
            archipelago.announce(self.islands)
            bred = await together(batch.breed(self.step, version, self.client) for batch in batches)
            self.client.end()
            spent.tokens += self.client.spent.completion_tokens
            return bred

    def _stop_where_nobody_answers(self) -> None:
        """Raises EsplError, with everything saved, when reflection has been failing for too long."""
        if failing := self.client.failing():
            self._checkpoint()
            raise EsplError(failing)

    def _update(self, batches: Sequence[Batch], shown: str = "") -> report.UpdateReport:
        """One step of the optimiser, over the groups of all islands."""
        with self.stage.phase("update", shown) as spent:
            self.engine.pause()
            update = self.learner.update([group for batch in batches for group in batch.groups])
            self.engine.resume()
            spent.tokens += update.computed
            return update

    def _validate(self, final: bool) -> dict[str, dict[str, float]]:
        """By island: the root and the best rated; at the end all that may be chosen."""
        evaluation = self.config.evaluation
        most = evaluation.prompts if final else 1
        examined = {i.name: self._examine(i, most) for i in self.islands}
        prompts = {i.name: i.candidates(most) for i in self.islands}
        found = self.evaluate("validation", prompts, evaluation.problems, "validation")
        scores = {i.name: metrics(found[i.name], i.population.root.id, i.leader) for i in self.islands}
        return {name: {**record, **examined[name]} for name, record in scores.items()}

    def _examine(self, island: Island, most: int) -> dict[str, float]:
        """Set aside whoever would be among the best for what it has learnt by heart (`evolution.twin_problems`); what
        that cost."""
        if not self.config.evolution.twin_problems or island.chosen:
            return {}
        trials = island.trials(self.step, self.policy.version, ())
        self.stage.sync()
        with self.stage.phase("validation", "twins") as spent:
            for check in background.run_through(examine(island, self.step, most, trials)):
                where = {"env": island.name} if island.name else {}
                self.run.log.event(self.step, "twins", **check.facts(), **where)
                if note := check.note():
                    self.console.warn(note)
            spent.tokens += trials.tokens
        self.totals = self.totals.validated(trials.played)
        return {f"twins/{name.partition('/')[2]}": count for name, count in trials.metrics().items()}

    def _begin(self) -> None:
        """Where the run starts from: the root prompts on the base weights."""
        for island in self.islands:
            for problems in island.sets:
                self.console.note(f"{island.name} {problems.part}: {problems}".lstrip())
                where = {"env": island.name} if island.name else {}
                self.run.log.event(0, "problems", **problems.facts(), **where)
        roots = {island.name: island.population.root.id for island in self.islands}
        prompts = {name: [root] for name, root in roots.items()}
        found = self.evaluate("validation", prompts, self.config.evaluation.problems, "validation")
        start = {name: metrics(found[name], root, root) for name, root in roots.items()}
        record = {key: value for name, own in start.items() for key, value in under(name, own).items()}
        record |= {**overall(start, self.config.shares), **self.boxes.metrics(), **self.phases.take()}
        self.run.log.metrics({"step": 0, **record})
        self._checkpoint()

    def _persist(self, done: IterationReport) -> None:
        populations = {island.name: island.population for island in self.islands}
        record = {**done.metrics(populations), **self.boxes.metrics(), **self.client.ledger.metrics()}
        self.run.write_rollouts(done.step, done.rollouts)
        for kind, details in done.events(populations):
            self.run.log.event(done.step, kind, **details)
        for row in self.client.ledger.events():
            self.run.log.event(done.step, "reflection", by=self.client.source.name, **row)
        self.run.log.metrics(record)
        if done.step % self.config.checkpoint_every == 0 or self._final():
            self._checkpoint()
        if self.profile:
            self.profile.write()
        self.console.step(record)
        for note in (*done.notes(populations), *self.client.notes()):
            self.console.note(note)

    def _checkpoint(self) -> None:
        """Everything that the next step depends on, in one transaction."""
        with self.phases("checkpoint"):
            islands = {island.name: island.state() for island in self.islands}
            for name, island in islands.items():
                self.run.write_population(island["population"], name)
            state = {"islands": islands, "client": self.client.state(), "totals": self.totals.to_json()}
            self.run.save(self.step, {"state": state, "learner": self.learner.state_dict()})

    def _restore(self) -> bool:
        """Go on from the newest checkpoint; False where there is none."""
        saved = self.run.restore()
        if saved is None:
            return False
        self.step, payloads = saved
        self.learner.load_state_dict(payloads["learner"])
        for island in self.islands:
            island.restore(payloads["state"]["islands"][island.name])
        self.client.restore(payloads["state"]["client"])
        self.totals = Totals(**payloads["state"]["totals"])
        return True
