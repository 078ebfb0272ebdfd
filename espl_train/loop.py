"""ONE iteration of E-SPL, in the order of the method: select, play, advantages, reflect, update, rate, breed, persist.

This is the only module that knows engine, learner and evolution at once. On purpose it is synchronous and on-policy:
what is learnt from was sampled by the weights that learn. What runs concurrently runs inside the engine's queue, but
for reflection, which needs nothing of the update and may run beside it. Nothing here draws a random number: all of them
are keyed by (seed, step, …), so a resumed run is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_train import archipelago, report, schedule
from espl_train.chat import Chat
from espl_train.config import Config
from espl_train.engines.choice import engine_for
from espl_train.evaluation import Evaluation, metrics, overall
from espl_train.evolution.breeding import BreedingReport
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import SystemPrompt
from espl_train.evolution.templates import TemplateSet
from espl_train.export.bundle import write_prompts
from espl_train.island import Batch, Island, Round, play
from espl_train.learner.ranks import ALONE, Ranks
from espl_train.learner.update import Learner
from espl_train.overlap import beside, overlaps, together
from espl_train.problems import Part, ProblemSets, shares
from espl_train.profiling import Phases, Profile, Spent
from espl_train.records import Rollout, grouped
from espl_train.reflecting.choice import client_for
from espl_train.reflecting.queue import Queue
from espl_train.report import IslandReport, IterationReport
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.islands import own, under
from espl_train.runs.summary import Chosen, Summary
from espl_train.sandboxes import Boxes, equipped
from espl_train.snapshot import Snapshot
from espl_train.totals import Totals
from espl_train.twins import examine

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
        sets = {name: ProblemSets.of(equipped(config, env)) for name, env in config.environments.items()}
        self.boxes = Boxes.of(config, {name: [problems.env for problems in parts] for name, parts in sets.items()})
        self.learner = Learner.of(config, ranks)
        self.policy = self.learner.policy
        self.engine = engine_for(config, self.policy)
        self.overlaps = overlaps(config, self.engine, self.policy.device.type)
        self.chat = Chat(self.policy.tokenizer)
        templates = TemplateSet.load(config.model.templates or self.policy.templates)
        self.islands = [
            Island(config, parts, self.boxes, self.chat, self.engine, templates, name, self._queue(name))
            for name, parts in sets.items()
        ]
        self.client = client_for(config, run.path, self.engine, self.chat, self.policy)
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
            if self.config.mode != "rl":
                self.client.open()
                archipelago.acquaint(self.islands)
            if not self.begun:
                self._begin()
            while not self._final():
                self._persist(self.iterate())
                self._stop_where_nobody_answers()
            return self._finish()
        finally:
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
        counts = self._play_out(batches)
        bred, update = self._reflect_and_learn(batches)
        with self.phases("rating"):
            settled = [b.island.settle(self.step, b.groups, brood) for b, brood in zip(batches, bred, strict=True)]
        tried = self._try_out(batches, [born for _, born in settled])
        final = self._final(len(tried) + sum(len(group.rollouts) for batch in batches for group in batch.groups))
        validation = self._validate(final) if self._validates(final) else {}
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
        budget = self.config.budget_rollouts
        return self.step >= self.config.steps or (budget is not None and self.totals.used + played >= budget)

    def _turn(self) -> None:
        """Where only weights learn from here on, choose who plays meanwhile, as it is done at the end of a run; where
        prompts breed again, let all of them play."""
        alone = self.config.mode == "evolution_rl" and schedule.phase(self.config, self.step) == schedule.WEIGHTS
        due = [i for i in self.islands if alone != (i.chosen is not None)]
        doubtful = any(len(i.population) > 1 for i in due) and self.config.evaluation.choice == "validation"
        found = self._validate(final=True) if alone and doubtful else {}
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
        played = self._play(rounds, self.config.evaluation.temperature, name, base) if rounds else []
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
        played = self._play(rounds, evaluation.temperature, "first scores") if rounds else []
        for (batch, _), rollouts in zip(newborn, played, strict=True):
            batch.tried += rollouts
            batch.island.population.score(self.step, grouped(rollouts))
        return [rollout for batch in batches for rollout in batch.tried]

    def _play_out(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Play all batches to their ends, all islands at once; what the engine counted meanwhile."""
        self.engine.counts()                         # of whatever came before
        while rounds := [due for batch in batches if (due := batch.due())]:
            again = max(batch.rounds for batch in batches)
            name = f"rollouts, round {again + 1}" if again else "rollouts"
            played = self._play(rounds, self.config.rollout.temperature, name)
            found = {round.island: rollouts for round, rollouts in zip(rounds, played, strict=True)}
            for batch in batches:
                if batch.island in found:
                    batch.take(found[batch.island])
        return dict(self.engine.counts())

    def _play(
        self, rounds: Sequence[Round], temperature: float, name: str, base: bool = False
    ) -> list[list[Rollout]]:
        """All rounds (of one part of the problems) at once; their rollouts, round by round."""
        with self.phases("sync"):
            self.engine.load_policy(self.policy.version)
        policy = None if base else self.policy.version
        part = rounds[0].problems.part
        with self._phase(PHASES[part], name, sum(map(len, rounds))) as spent:
            played = background.run_through(play(rounds, self.step, policy, temperature, self.console.progress))
            spent.tokens += sum(rollout.sampled_tokens for rollouts in played for rollout in rollouts)
        return played

    def _reflect_and_learn(
        self, batches: Sequence[Batch]
    ) -> tuple[Sequence[BreedingReport | None], report.UpdateReport | None]:
        """Both need the groups and nothing of each other: at once where that is faster, with the same results."""
        self.client.begin(self.step)
        now = schedule.phase(self.config, self.step)
        if now == schedule.BOTH and self.overlaps:
            with beside(self._breed(batches)) as breeding:
                update = self._update(batches, "update and reflection")
            return breeding.result(), update
        bred: Sequence[BreedingReport | None] = [None] * len(batches)
        if now.breeds:
            self.console.phase("reflection")
            bred = background.run_through(self._breed(batches))
        return bred, self._update(batches) if now.learns else None

    async def _breed(self, batches: Sequence[Batch]) -> Sequence[BreedingReport | None]:
        with self.phases("reflection") as spent:
            archipelago.announce(self.islands)
            bred = await together(batch.breed(self.step, self.policy.version, self.client) for batch in batches)
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
        with self._phase("update", shown) as spent:
            self.engine.pause()
            update = self.learner.update([group for batch in batches for group in batch.groups])
            self.engine.resume()
            spent.tokens += update.computed
            return update

    @contextmanager
    def _phase(self, name: str, shown: str = "", total: int | None = None) -> Iterator[Spent]:
        self.console.phase(shown or name, total)
        with self.phases(name) as spent:
            yield spent

    def _validates(self, final: bool) -> bool:
        every = self.config.evaluation.every
        return final or bool(every and self.step % every == 0)

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
        with self.phases("sync"):
            self.engine.load_policy(self.policy.version)
        with self._phase("validation", "twins") as spent:
            while checks := background.run_through(examine(island, self.step, island.candidates(most), trials)):
                for check in checks:
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
        populations = self._populations()
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

    def _queue(self, island: str) -> Queue | None:
        """Where children wait for a person."""
        return Queue(self.run.path, island) if self.config.reflection.review and self.config.mode != "rl" else None

    def _waiting(self) -> tuple[str, ...]:
        """How many children wait for a person, and what can be done about it."""
        waiting = sum(len(island.queue or ()) for island in self.islands)
        return (f"children that wait for a person: {waiting:,}; espl-train review {self.run.path}",) if waiting else ()

    def _populations(self) -> dict[str, Population]:
        return {island.name: island.population for island in self.islands}

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

    def _finish(self) -> Summary:
        """Choose by validation, then test: the start, each half alone, and both together."""
        history = report.history(self.run.path)
        histories = {island.name: [own(record, island.name) for record in history] for island in self.islands}
        best = {name: str(records[-1]["best"]) for name, records in histories.items()}
        roots = {island.name: island.population.root.id for island in self.islands}
        prompts = {name: list(dict.fromkeys([root, best[name]])) for name, root in roots.items()}
        most, opened = self.config.evaluation.test_problems, report.opened(self.run.path, self.step)
        start = self.evaluate("test", prompts, most, "test, base weights", base=True)
        after = self.evaluate("test", prompts, most, "test") if self.config.mode != "evolution" else {}
        tables = {}
        for name, root in roots.items():
            table = report.table(start.get(name, {}), after.get(name, {}), root, best[name])
            where = {"env": name} if name else {}
            self.run.log.event(self.step, "test", scores={s.name: s.mean for s in table}, best=best[name], **where)
            tables[name] = [*report.validation_table(histories[name], root, best[name]), *table]
        self.policy.save_adapter(self.run.path / "policy")
        write_prompts(Snapshot.of(self.run.path), self.run.path / "export", "best", "../policy")
        notes = (*report.notes(self.config.evaluation, chosen=best != roots), self.totals.note())
        self.run.log.event(self.step, "totals", **self.totals.to_json())
        return Summary(
            run=self.run.path,
            steps=self.step,
            seconds=self.totals.seconds,
            tokens=self.totals.tokens,
            rollouts=self.totals.rollouts,
            faulted=self.totals.faulted,
            chosen=tuple(Chosen(best[i.name], i.text(best[i.name]), i.name) for i in self.islands),
            scores=report.mixed(tables, self.config.shares),
            history=tuple(history),
            notes=(
                *self.boxes.notes(), *notes, *archipelago.notes(self.islands), *opened, *self.client.ledger.table(),
                *self._waiting(),
            ),
        )
