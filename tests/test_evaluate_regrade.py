"""Grading again finds what graders changed, from transcripts alone, and leaves the old run as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from espl_envs import registry
from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.family import Episode as Played
from espl_envs.core.family import Family
from espl_envs.core.messages import Message
from espl_envs.core.tasks import StaticTasks, Task
from espl_envs.evaluate.config import AgentConfig, EnvConfig, EvalConfig
from espl_envs.evaluate.directory import RunDirectory, RunError
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome
from espl_envs.evaluate.regrade import regrade
from espl_envs.evaluate.summary import summarise
from espl_envs.grading.verdict import Verdict
from espl_envs.tasks import countdown
from espl_envs.tools.base import make_tools

COUNTDOWN, CONVENTIONS, GAME = "espl/Countdown-v0", "espl/Conventions-v0", "espl/Mastermind-v0"
TASKS = 4


class StateEnv(TextEnv):
    """Judged by what tools left behind; a box that was never opened holds nothing."""

    def __init__(self, **settings: Any) -> None:
        tasks = StaticTasks([Task(f"state-{i}", "test", "Leave something behind.", "") for i in range(TASKS)])
        tools = make_tools(("calculator",))
        super().__init__(Family(sources={"test": lambda: tasks}, grade=self._never, tools=tools), **settings)

    async def judge(self, episode: Played, answer: str) -> Verdict:  # noqa: ARG002
        return Verdict(1.0)

    async def _never(self, task: Task, answer: str) -> Verdict:
        raise NotImplementedError

    def solve(self, episode: Played) -> str:  # noqa: ARG002
        return r"\boxed{done}"


if "tests/State-v0" not in gymnasium.registry:
    gymnasium.register("tests/State-v0", StateEnv)


def played(path: Path, ids: list[str], prompts: tuple[str, ...] = (), replies: tuple[str, ...] = ()) -> Path:
    """The oracle plays the first tasks, but says nonsense in task 0 and nothing that can be read in task 3."""
    envs: list[tuple[TextEnv, EnvConfig]] = []
    for name in ids:
        env: Any = registry.make(name).unwrapped
        envs.append((env, EnvConfig(name, env.split, TASKS, len(env.tasks), env.tasks.hash)))
    settings = EvalConfig(tuple(c for _, c in envs), AgentConfig("builtin", "oracle"), system_prompts=prompts)
    with RunDirectory.create(path, settings) as run:
        for env, one in envs:
            for task in range(TASKS):
                options = {"task": task} | ({"system_prompt": prompts[0]} if prompts else {})
                _, info = env.reset(options=options)
                over = False
                while not over:
                    say: Any = {0: r"\boxed{nonsense}", 3: "I do not know."}.get(task) or env.oracle()
                    messages, reward, terminated, truncated, info = env.step(replies[task] if replies else say)
                    over = terminated or truncated
                kind = Outcome.NO_ANSWER if info["stop_reason"] == "format" else Outcome.ANSWERED
                run.append(Episode(
                    EpisodeKey(one.id, one.split, task, 0), info["task_id"], info["task_hash"],
                    Outcome.TRUNCATED if truncated else kind, info["score"], reward, info["stop_reason"],
                    info["answer"] or None, None, info, messages,
                ))  # fmt: skip
            env.close()
    return path


def rewritten(run: Path, **change: Any) -> None:
    """Task 1 of the run as an earlier grader would have left it."""
    with RunDirectory.open(run) as directory:
        for one in list(directory.episodes()):
            if one.key.task == 1:
                directory.append(replace(one, **change))


def test_graders_that_agree_change_nothing(tmp_path: Path) -> None:
    """Single replies, games of several turns, and tools, with a system prompt of their own."""
    run = played(tmp_path / "run", [COUNTDOWN, CONVENTIONS, GAME], prompts=("Think.",))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    found = regrade(run)
    assert found.out == tmp_path / "run-regraded" and found.graded == 12 and not found.changes and not found.kept
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before, "the old run is never touched"
    old, new = RunDirectory.read(run), RunDirectory.read(found.out)
    assert new.config == old.config
    assert [replace(e, info={}) for e in new.episodes()] == [replace(e, info={}) for e in old.episodes()]


def test_what_an_earlier_grader_got_wrong_is_found(tmp_path: Path) -> None:
    run = played(tmp_path / "run", [COUNTDOWN, CONVENTIONS, GAME])
    rewritten(run, score=0.0, outcome=Outcome.NO_ANSWER, answer=None)
    found = regrade(run)
    assert [(c.key.env, c.key.task) for c in found.changes] == [(name, 1) for name in (COUNTDOWN, CONVENTIONS, GAME)]
    assert {(c.before, c.after) for c in found.changes} == {(("no_answer", 0.0), ("answered", 1.0))}
    assert "12 episodes graded again, 3 changed" in str(found)
    before, after = summarise(run).mean, summarise(found.out).mean
    assert before == pytest.approx(0.25) and after == pytest.approx(0.5)


def test_a_grader_that_takes_everything_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = played(tmp_path / "run", [COUNTDOWN])

    async def lax(_: Task, answer: str) -> Verdict:
        return Verdict(1.0, "ok", answer)

    monkeypatch.setattr(countdown, "grade", lax)
    found = regrade(run)
    assert [(c.key.task, c.after) for c in found.changes] == [(0, ("answered", 1.0))], "no answer is still none"


def test_a_fault_of_the_grader_is_graded_now_and_a_new_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = played(tmp_path / "run", [COUNTDOWN])
    rewritten(run, score=None, outcome=Outcome.FAULT, error="The grader was away.")
    found = regrade(run)
    assert [(c.before, c.after) for c in found.changes] == [(("fault", None), ("answered", 1.0))]

    async def away(*_: object) -> Verdict:
        raise EnvironmentFault("the grader is away")

    monkeypatch.setattr(countdown, "grade", away)
    again = regrade(run)
    assert again.kept == {"grading failed: the grader is away": 3} and not again.changes and again.graded == 1
    assert [one.outcome for one in RunDirectory.read(again.out).episodes()][1] is Outcome.FAULT


def test_what_cannot_be_graded_again_keeps_its_score_and_says_why(tmp_path: Path) -> None:
    run = played(tmp_path / "run", ["tests/State-v0"])
    found = regrade(run)
    assert found.graded == 0 and found.kept == {
        "tests/State-v0 with tools is judged by what they left behind, which no transcript holds": 4
    }  # fmt: skip
    assert summarise(found.out).mean == summarise(run).mean
    assert "4 kept as they were" in str(found)


@pytest.mark.parametrize(("change", "why"), [
    ({"task_hash": "older"}, "another task in its place"),
    ({"outcome": Outcome.AGENT_ERROR, "score": 0.0, "error": "It raised."}, "the agent failed"),
    ({"messages": (Message("user", "…"),)}, "cut off before its end"),
    ({"messages": (Message("user", "…"), *[Message("assistant", r"\boxed{1}")] * 2)}, "ends the episode earlier"),
])
def test_transcripts_that_do_not_fit_are_left_alone(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    run = played(tmp_path / "run", [COUNTDOWN])
    rewritten(run, **change)
    found = regrade(run)
    assert found.graded == 3 and not found.changes and list(found.kept.values()) == [1]
    assert why in next(iter(found.kept))


def test_a_game_that_answers_otherwise_today_is_left_alone(tmp_path: Path) -> None:
    """The second move was chosen after what the game said: with other words it proves nothing."""
    run = played(tmp_path / "run", [GAME], replies=(r"\boxed{ABCD}",) * TASKS)
    with RunDirectory.open(run) as directory:
        first = directory.episode(EpisodeKey(GAME, "train", 0, 0))
        heard = tuple(replace(m, content="You are close.") if m.role == "user" else m for m in first.messages)
        directory.append(replace(first, messages=heard))
    found = regrade(run)
    assert found.graded == 3 and found.kept == {"the environment says something else today": 1}


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    run = played(tmp_path / "run", [COUNTDOWN])
    assert [regrade(run).out.name for _ in range(2)] == ["run-regraded", "run-regraded-2"]
    with pytest.raises(RunError, match="exists already"):
        regrade(run, tmp_path / "run-regraded")
    with pytest.raises(RunError, match="no run directory"):
        regrade(tmp_path / "absent")


def test_a_regrading_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = played(tmp_path / "run", [COUNTDOWN])

    async def broken(*_: object) -> Verdict:
        raise RuntimeError("a bug in the grader")

    monkeypatch.setattr(countdown, "grade", broken)
    with pytest.raises(RuntimeError, match="a bug in the grader"):
        regrade(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (run / "config.json").write_text((run / "config.json").read_text().replace(COUNTDOWN, "espl/Countdwn-v0"))
    with pytest.raises(EsplError, match="did you mean espl/Countdown-v0"):
        regrade(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
