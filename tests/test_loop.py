"""One run as the method says it goes: what happens in which order, with whose weights, on which problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evolution_cases import Scripted, plan
from hub_model import hub_model
from loop_kit import Theatre, breed_simply, by_turns, config, deal, keys, resume, run

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_train.engines.base import Request, Sample
from espl_train.engines.local import LocalEngine
from espl_train.learner.advantages import assign
from espl_train.learner.policy import Policy
from espl_train.loop import Trainer
from espl_train.problems import Deck
from espl_train.records import RolloutKey
from espl_train.reflecting.client import Client
from espl_train.runs import seal
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.metrics import read_lines
from espl_train.runs.summary import Summary

BEGIN = ["play validation", "metrics", "save"]
END = ["rollouts", "metrics", "save", "show"]
STEPS = {
    "evolution_rl": ["select", "play train", "advantages", "reflection", "update", "rate", "insert"],
    "rl": ["select", "play train", "advantages", "update"],
    "evolution": ["select", "play train", "advantages", "reflection", "rate", "insert"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    breed_simply(monkeypatch)
    return deal(monkeypatch)


@pytest.mark.parametrize("mode", STEPS)
def test_a_run_goes_in_the_order_of_the_method(mode: str, model: Path, out: Path, theatre: Theatre) -> None:
    """Method §3. The test split is opened after everything else, by both kinds of weights where they differ."""
    run(config(model, out, mode=mode))
    looks = ["play test"] if mode == "evolution" else ["play test", "play test"]
    assert theatre.journal == [*BEGIN, *STEPS[mode], *END, *STEPS[mode], "play validation", *END, *looks]


@pytest.mark.parametrize("learning", [{"baseline": "marginal", "divide_by_std": True}, {"overlong": "filter"}])
def test_what_is_configured_of_learning_reaches_the_learner(
    learning: dict[str, Any], model: Path, out: Path, theatre: Theatre
) -> None:
    """What is learnt from (replies that are dealt end without a stop token, as if they were cut off), the temperature
    of the samples, the length of the run."""
    settings = {f"learner.{key}": value for key, value in {**learning, "schedule": "linear"}.items()}
    trainer, _ = run(config(model, out, **settings, **{"rollout.temperature": 0.7}))
    assert len({group.prompt for group in theatre.updates[1]}) > 1
    for groups in theatre.updates:
        if "overlong" in learning:
            assert {a for group in groups for a in group.advantages} == {None}
        else:
            expected = assign(groups, "marginal", divide_by_std=True)
            assert [g.advantages for g in groups] == [g.advantages for g in expected]
    assert trainer.learner.temperature == 0.7 and trainer.learner._rate() == 0


def test_the_engine_gives_its_memory_back_for_the_update(
    model: Path, out: Path, theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pause", "resume"):
        monkeypatch.setattr(LocalEngine, name, lambda _, name=name: theatre.journal.append(name))
    run(config(model, out))
    done = [word for word in theatre.journal if word in ("pause", "update", "resume", "play train")]
    assert done == ["play train", "pause", "update", "resume"] * 2


def test_validation_comes_every_so_many_steps_and_at_start_and_end(model: Path, out: Path, theatre: Theatre) -> None:
    run(config(model, out, steps=5, **{"evaluation.every": 2}))
    played = [int(play.jobs[0].key.step) for play in theatre.of("validation")]
    assert played == [0, 2, 4, 5] and len(theatre.of("train")) == 5


def test_the_test_split_is_played_only_after_the_last_step(model: Path, out: Path, theatre: Theatre) -> None:
    """Method §11 item 3."""
    run(config(model, out, steps=3, **{"evaluation.every": 1}))
    looks = [i for i, play in enumerate(theatre.plays) if play.split == "test" or keys([play])[0].split == "test"]
    assert looks == [len(theatre.plays) - 2, len(theatre.plays) - 1]
    assert "save" not in theatre.journal[theatre.journal.index("play test") :]
    assert all(key.step == 3 for key in keys(theatre.of("test")))


def test_every_part_plays_its_own_problems_and_no_others(model: Path, out: Path, theatre: Theatre) -> None:
    trainer, _ = run(config(model, out, steps=3, **{"evaluation.every": 1, "env.holdout_from": "train"}))
    for problems in trainer.islands[0].sets:
        played = [play for play in theatre.plays if keys([play])[0].split == problems.part]
        assert played and {key.task for key in keys(played)} <= set(problems.indices)
    assert len({key.split for key in keys(theatre.plays)}) == 3


TWICE = {"evaluation.samples": 2, "evaluation.temperature": 0.5}


def test_validation_and_test_play_the_same_problems_every_time(model: Path, out: Path, theatre: Theatre) -> None:
    trainer, _ = run(config(model, out, **{"evaluation.every": 1, **TWICE}))
    sets = trainer.islands[0].sets
    for split, problems, size in (("validation", sets.validation, 3), ("test", sets.test, 4)):
        for play in theatre.of(split):
            assert play.tasks == problems.sample(0, size) and play.temperature == 0.5
            assert [key.split for key in keys([play])] == [split] * (2 * size * len(play.prompts))
    assert all(play.temperature == 1.0 for play in theatre.of("train"))


def test_every_step_trains_on_the_next_problems(model: Path, out: Path, theatre: Theatre) -> None:
    trainer, _ = run(config(model, out, steps=5, **{"rollout.problems": 4}))
    tasks = [play.tasks for play in theatre.of("train")]
    deck = Deck(trainer.islands[0].sets.train, 0)
    assert tasks == [deck.batch(4) for _ in range(5)]
    assert sorted(task for batch in tasks for task in batch) == list(range(20))      # an epoch: every problem once


def test_all_players_of_a_step_play_the_same_problems_equally_often(model: Path, out: Path, theatre: Theatre) -> None:
    run(config(model, out, steps=3))
    assert [play.prompts for play in theatre.of("train")] == [
        ["p0000"], ["p0000", "p0001"], ["p0000", "p0001", "p0002"]
    ]  # fmt: skip
    for step, play in enumerate(theatre.of("train"), 1):
        played = keys([play])
        assert len(set(played)) == len(played) == 3 * 2 * 2       # M·N·B, with fewer prompts than places too
        assert {key.step for key in played} == {step}
    last = keys([theatre.of("train")[2]])
    assert all(sum((k.prompt, k.task) == (p, t) for k in last) == 2 for p in ("p0000", "p0001", "p0002")
               for t in {k.task for k in last})


def test_prompts_are_shown_as_the_text_of_their_principles(model: Path, out: Path, theatre: Theatre) -> None:
    trainer, _ = run(config(model, out))
    for job in (job for play in theatre.plays for job in play.jobs):
        assert job.system_prompt == trainer.islands[0].text(job.key.prompt)
        assert ("Rule of step 1" in job.system_prompt) == (job.key.prompt == "p0001")


def test_the_start_row_is_played_by_the_base_weights_and_the_rest_by_those_in_training(
    model: Path, out: Path, theatre: Theatre
) -> None:
    trainer, _ = run(config(model, out))
    assert trainer.policy.version == 2
    assert [play.policy for play in theatre.of("test")] == [None, 2]
    assert [play.policy for play in theatre.of("train")] == [0, 1]
    assert [play.policy for play in theatre.of("validation")] == [0, 2]


def test_the_table_holds_the_scores_of_these_plays(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell has a reward of its own: split, prompt and weights decide it."""

    def reward(key: RolloutKey, policy: int | None) -> float:
        if key.split == "train":
            return by_turns(key, policy)
        better = 0.1 * (key.prompt == "p0001")
        return {"validation": 0.2, "test": 0.5}[key.split] + better + (0.2 if policy else 0.0)

    breed_simply(monkeypatch)
    deal(monkeypatch, reward)
    _, summary = run(config(model, out))
    assert summary.chosen[0].prompt == "p0001"
    assert [score.mean for score in summary.scores] == pytest.approx([0.2, 0.4, 0.5, 0.5, 0.6, 0.7, 0.8])
    assert [score.count for score in summary.scores] == [3, 3, 3, 4, 4, 4, 4]
    (event,) = [e for e in read_lines(out / "events.jsonl") if e["kind"] == "test"]
    assert event["best"] == "p0001" and list(event["scores"].values()) == pytest.approx([0.5, 0.6, 0.7, 0.8])


def favouring(prompt: str) -> Any:
    """Validation likes one prompt, the test every other one."""
    return lambda key, policy: {
        "train": by_turns(key, policy), "validation": float(key.prompt == prompt), "test": float(key.prompt != prompt)
    }[key.split]  # fmt: skip


@pytest.mark.parametrize("favourite", ["p0000", "p0001", "p0002", "p0003"])
def test_the_chosen_prompt_is_the_best_validated_among_the_top_rated(
    favourite: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p0003 is not among them. The test, which likes every other prompt, is not asked (method §9)."""
    breed_simply(monkeypatch)
    theatre = deal(monkeypatch, favouring(favourite))
    trainer, summary = run(config(model, out, steps=3, **{"evaluation.prompts": 2}))
    assert set(trainer.islands[0].population.top(2)) == {"p0001", "p0002"} and len(trainer.islands[0].population) == 4
    assert theatre.of("validation")[-1].prompts == ["p0000", *trainer.islands[0].population.top(2)]
    if favourite == "p0003":
        assert summary.chosen[0].prompt in ("p0000", "p0001", "p0002")
    else:
        assert summary.chosen[0].prompt == favourite
    assert summary.chosen[0].text == trainer.islands[0].text(summary.chosen[0].prompt)
    assert all(play.prompts == list(dict.fromkeys(["p0000", summary.chosen[0].prompt])) for play in theatre.of("test"))
    assert list(read_lines(out / "metrics.jsonl"))[-1]["best"] == summary.chosen[0].prompt


def test_a_child_that_was_never_played_is_not_in_question(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many may be validated, and even if validation would like it best (method §11 item 4)."""
    breed_simply(monkeypatch)
    theatre = deal(monkeypatch, favouring("p0003"))
    _, summary = run(config(model, out, steps=3, **{"evaluation.prompts": 9}))
    assert sorted(theatre.of("validation")[-1].prompts) == ["p0000", "p0001", "p0002"]
    assert summary.chosen[0].prompt != "p0003"


@pytest.mark.parametrize(("choice", "best"), [("latest", "p0003"), ("lower_bound", None)])
def test_another_choice_does_not_ask_validation(
    choice: str, best: str | None, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breed_simply(monkeypatch)
    deal(monkeypatch, favouring("p0000"))
    trainer, summary = run(config(model, out, steps=3, **{"evaluation.choice": choice}))
    assert summary.chosen[0].prompt == (best or trainer.islands[0].population.elite.id) != "p0000"


def test_the_crossover_child_is_inserted_before_the_mutation_child(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reward(key: RolloutKey, policy: int | None) -> float:
        """Each prompt wins a problem of its own; every other attempt of the winner is wrong."""
        del policy
        wins = key.task % 2 == int(key.prompt[1:]) % 2
        return float(wins and key.sample % 8 != 0)

    theatre = deal(monkeypatch, reward)
    words = ["apples", "bears", "cars", "doors", "eggs", "foxes", "goats", "hats", "inks", "jars", "keys", "lamps"]
    script = Scripted(
        critique=[plan({"op": "add", "text": f"Count the {word}."}) for word in words],
        crossover=plan({"op": "add", "text": "Take the best of both."}),
    )  # fmt: skip

    async def complete(self: object, messages: Sequence[Message], seed: int) -> str:
        del self
        return await script(messages, seed)

    monkeypatch.setattr(Client, "complete", complete)
    changes = {"evolution.crossover_probability": 1.0, "rollout.samples": 16, "rollout.problems": 10}
    trainer, _ = run(config(model, out, mode="evolution", steps=2, **changes))
    operators = [member.prompt.operator for member in trainer.islands[0].population.members]
    assert operators == ["root", "mutation", "crossover", "mutation"], script.stages
    assert theatre.journal.count("insert") == 2


def test_rl_plays_one_group_of_all_samples_per_problem_under_the_root(
    model: Path, out: Path, theatre: Theatre
) -> None:
    """Method §3: in mode rl the M·N samples of a problem form one group of the root prompt."""
    trainer, summary = run(config(model, out, mode="rl", **{"rollout.samples": 4, "rollout.problems": 5}))
    for groups, play in zip(theatre.updates, theatre.of("train"), strict=True):
        assert [(g.prompt, len(g.rollouts)) for g in groups] == [("p0000", 12)] * 5
        assert [g.task for g in groups] == play.tasks
        assert [r for g in groups for r in g.rollouts] == list(play.rollouts)
        assert all(set(g.advantages) == {-0.5, 0.5} for g in groups)
    assert {key.prompt for key in keys(theatre.plays)} == {"p0000"} and len(trainer.islands[0].population) == 1
    assert summary.chosen[0].prompt == "p0000"


@pytest.mark.parametrize(("mode", "moves"), [("evolution", False), ("rl", True), ("evolution_rl", True)])
def test_evolution_leaves_every_weight_as_it_is(
    mode: str, moves: bool, model: Path, out: Path, theatre: Theatre
) -> None:
    settings = config(model, out, mode=mode)
    before = Policy.load(settings.model, settings.learner, settings.seed).state()
    trainer, _ = run(settings)
    after = trainer.policy.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before) != moves
    assert ("update" in theatre.journal) == moves and (trainer.policy.version > 0) == moves


def test_the_summary_counts_what_was_played_in_training(model: Path, out: Path, theatre: Theatre) -> None:
    _, summary = run(config(model, out))
    assert (summary.steps, summary.rollouts, summary.tokens, summary.faulted) == (2, 24, 48, 0)
    records = list(read_lines(out / "metrics.jsonl"))
    assert sum(r.get("rollouts/count", 0) for r in records) == sum(len(p.rollouts) for p in theatre.of("train")) == 24
    assert summary.seconds == pytest.approx(sum(r.get("seconds", 0.0) for r in records))


def test_fewer_steps_than_are_done_are_refused(model: Path, out: Path, theatre: Theatre) -> None:
    run(config(model, out))
    played = len(theatre.plays)
    with pytest.raises(EsplError, match=r"2 steps are done already in .*: --steps 1"):
        resume(out, steps=1)
    assert len(theatre.plays) == played


def looks(summary: Summary) -> list[str]:
    return [note for note in summary.notes if "opened before" in note]


def test_a_finished_run_that_goes_on_says_that_it_had_seen_the_test(model: Path, out: Path, theatre: Theatre) -> None:
    _, first = run(config(model, out))
    _, again = resume(out)                      # nothing left to do: the same look at the same weights
    _, second = resume(out, steps=3)
    assert looks(first) == looks(again) == [] and len(theatre.of("train")) == 3
    assert len(looks(second)) == 1 and "at step 2" in looks(second)[0] and second.rollouts == 36
    assert [opening.step for opening in seal.openings(out)] == [2, 3]


@pytest.mark.parametrize(("reflector", "reflects"), [("reference", {None}), ("current", {0, 1})])
def test_the_engine_is_asked_for_the_weights_that_a_request_is_about(
    reflector: str, reflects: set[int | None], model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played for real but for the sampler, which answers one token: even or odd seeds make the contrast."""
    asked: list[Request] = []

    async def sample(self: LocalEngine, request: Request) -> Sample:
        del self
        asked.append(request)
        token = 30 + request.seed % 60
        return Sample((token,) * (1 + request.seed % 2), (-5.0,) * (1 + request.seed % 2), "length", request.policy)

    monkeypatch.setattr(LocalEngine, "sample", sample)
    changes = {"evolution.reflector": reflector, "rollout.samples": 4, "evaluation.temperature": 0.25}
    trainer, _ = run(config(model, out, **changes))
    played = [request for request in asked if request.session is not None]
    reflected = [request for request in asked if request.session is None]
    assert reflected and {request.policy for request in reflected} == reflects and trainer.policy.version == 2
    assert {request.policy for request in played if request.temperature == 1.0} == {0, 1}
    assert {request.policy for request in played if request.temperature == 0.25} == {0, 2, None}
    assert all(not started_with_base(played, step) for step in (0, 1))


def started_with_base(requests: Sequence[Request], step: int) -> bool:
    """Whether a session of `step` was played by the base weights."""
    return any(r.policy is None and str(r.session).split("/")[1] == str(step) for r in requests)


def test_a_trainer_goes_on_from_its_checkpoint(model: Path, out: Path, theatre: Theatre) -> None:
    settings = config(model, out)
    with RunDirectory.create(settings) as directory:
        trainer = Trainer(settings, directory, Console(quiet=True))
        trainer._begin()
        trainer._persist(trainer.iterate())
    other, summary = resume(out)
    assert [play.jobs[0].key.step for play in theatre.of("train")] == [1, 2] and summary.rollouts == 24
    assert len(theatre.of("validation")) == 2 and other.islands[0].population.members[1].prompt.born == 1
