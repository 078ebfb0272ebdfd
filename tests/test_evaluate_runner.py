"""Playing an evaluation: every episode once, faults never scored, nothing decided by the order of events."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import toy
from evaluate_kit import ADD, PATIENT, TOOLS, Scripted, Watcher, lines, play
from rich.console import Console

from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.messages import Message
from espl_envs.evaluate import plan, runner
from espl_envs.evaluate.agents import AgentFault, Reply, Seat
from espl_envs.evaluate.builtin import BuiltinDoor
from espl_envs.evaluate.config import EvalConfig
from espl_envs.evaluate.progress import Progress, RunningMean
from espl_envs.evaluate.purse import Halted, Purse
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome, TurnUsage
from espl_envs.evaluate.runner import Limits, order


def said(text: str, cost: float | None = None, **usage: Any) -> Reply:
    return Reply(Message("assistant", text), (TurnUsage(10, 5, 0, 0.0, cost, **usage),))


def door(answer: Any, **settings: Any) -> Scripted:
    """An agent that says `answer(messages, seat)`."""

    async def act(messages: Any, seat: Seat) -> Reply:
        reply = answer(messages, seat)
        return said(reply) if isinstance(reply, str) else reply

    return Scripted(act, **settings)


def right(messages: Any, _: Seat) -> str:
    numbers = re.search(r"(\d+) \+ (\d+)", messages[-1].content)
    assert numbers
    return f"\\boxed{{{int(numbers[1]) + int(numbers[2])}}}"


def test_every_task_and_sample_once_under_every_prompt(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(messages: Any, seat: Seat) -> str:
        seen.append(messages[0].content.split(".")[0])
        return right(messages, seat)

    config: dict[str, Any] = {"k": 2, "system_prompts": ("Prompt A.", "Prompt B.")}
    episodes = play(tmp_path / "run", door(answer), ADD, PATIENT, limit=3, **config)
    assert len({e.key for e in episodes}) == len(lines(tmp_path / "run")) == 2 * 3 * 2 * 2
    assert all(e.score == 1.0 and e.attempts == 1 for e in episodes) and sorted(seen) == ["Prompt A"] * 12 + [
        "Prompt B"] * 12
    assert {e.key.system_prompt: e.messages[0].content[:8] for e in episodes} == {0: "Prompt A", 1: "Prompt B"}


def test_samples_come_after_each_other_so_that_a_run_cut_short_saw_every_task() -> None:
    arena = plan.arena(ADD, {}, limit=3)
    config = EvalConfig((arena.config,), BuiltinDoor("silent").config, k=2, system_prompts=("a", "b"))
    keys = order(config, list(config.keys()))
    assert [key.sample for key in keys] == [0] * 6 + [1] * 6
    assert [key.task for key in keys[:6]] == [0, 1, 2, 0, 1, 2]


def test_what_is_played_depends_on_no_order(tmp_path: Path) -> None:
    def drawing(messages: Any, seat: Seat) -> str:
        return f"\\boxed{{{seat.seed % 1000}}}" if len(messages) > 3 else f"hm {seat.key.sample}"

    def told(folder: str, **settings: Any) -> list[Any]:
        episodes = play(tmp_path / folder, door(drawing), PATIENT, k=2, **settings)
        return [(e.key, e.messages, e.score, e.info) for e in episodes]

    first = told("a", limits=Limits(7))
    assert told("b", limits=Limits(1)) == first
    assert told("c", seed=1) != first
    assert len({messages[-1].content for _, messages, _, _ in first}) > 15       # every episode has a seed of its own


def test_an_environment_that_fails_is_played_again_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[Any] = []          # the objects themselves: a closed one's id may be that of the next
    step = toy.ToyEnv.astep

    async def astep(self: Any, action: Any) -> Any:
        again = any(self is env for env in broken)
        if self.task.id == "add-26" and len(broken) < 2 and not again:
            broken.append(self)
            raise EnvironmentFault("the box is gone")
        assert not again, "played in a broken environment"
        return await step(self, action)

    monkeypatch.setattr(toy.ToyEnv, "astep", astep)
    episodes = play(tmp_path / "run", door(right), ADD, limit=3, limits=Limits(1))
    assert [e.score for e in episodes] == [1.0] * 3 and [e.attempts for e in episodes] == [1, 3, 1]


@pytest.mark.parametrize(("answer", "problem"), [
    ("\\boxed{lost}", "the grader could not judge task 'add-25'"),
    ("\\boxed{broken}", "the grader's machine is gone"),
])  # fmt: skip
def test_a_fault_that_stays_has_no_score_and_is_resumed(tmp_path: Path, answer: str, problem: str) -> None:
    first = door(lambda messages, seat: answer if seat.key.task == 0 else right(messages, seat))
    episodes = play(tmp_path / "run", first, ADD, limit=3, limits=Limits(2, retries=1))
    assert [e.outcome for e in episodes] == [Outcome.FAULT, Outcome.ANSWERED, Outcome.ANSWERED]
    assert episodes[0].score is None and episodes[0].reward is None and episodes[0].attempts == 2
    assert episodes[0].error == problem and episodes[0].reference == "50"
    watcher = Watcher()
    episodes = play(tmp_path / "run", door(right), ADD, limit=3, watcher=watcher)
    assert [e.score for e in episodes] == [1.0] * 3 and [e.key.task for e in watcher.episodes] == [0]
    assert len(lines(tmp_path / "run")) == 4


def test_a_fault_that_is_only_noted_is_one_as_well(tmp_path: Path) -> None:
    episodes = play(tmp_path / "run", door(lambda *_: "\\boxed{lost}"), ADD, limit=1, arguments={"on_fault": "mask"})
    assert episodes[0].outcome is Outcome.FAULT and "notes a fault" in str(episodes[0].error)


def test_an_environment_with_a_bug_costs_its_episode_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def grade(task: Any, answer: str) -> Any:
        if task.id == "add-26":
            raise KeyError("oops")
        return await toy_grade(task, answer)

    toy_grade = toy.grade
    monkeypatch.setattr(toy, "grade", grade)
    episodes = play(tmp_path / "run", door(right), ADD, limit=3)
    assert [e.score for e in episodes] == [1.0, None, 1.0]
    assert episodes[1].error == "the environment raised KeyError: 'oops'"


def test_an_environment_that_hangs_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STEP_S", 0.05)
    call = toy.call("add", a=77, b=1)
    [episode] = play(tmp_path / "run", door(lambda *_: call), TOOLS, limit=1, limits=Limits(1, retries=0))
    assert episode.outcome is Outcome.FAULT and "did not come back within 0.05 s" in str(episode.error)


def test_budgets_of_the_environment_truncate(tmp_path: Path) -> None:
    call = toy.call("add", a=1, b=1)
    [turns] = play(tmp_path / "a", door(lambda *_: call), TOOLS, limit=1, arguments={"max_turns": 3})
    assert (turns.outcome, turns.stop_reason, turns.score, len(turns.turns)) == (Outcome.TRUNCATED, "max_turns", 0.0, 3)
    [calls] = play(tmp_path / "b", door(lambda *_: call + call), TOOLS, limit=1, arguments={"max_tool_calls": 3})
    assert (calls.stop_reason, [t.tool_calls for t in calls.turns]) == ("tool_budget", [2, 1])


def test_a_fault_of_the_agents_server_is_not_played_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(_: Any, seat: Seat) -> str:
        asked.append(seat.key.task)
        raise AgentFault("the server\nis gone")

    [episode] = play(tmp_path / "run", door(answer), ADD, limit=1)
    assert asked == [0] and episode.error == "the server is gone" and episode.stop_reason == "fault"


def test_when_nothing_works_any_more_it_ends(tmp_path: Path) -> None:
    def answer(messages: Any, seat: Seat) -> str:
        if seat.key.sample:
            raise AgentFault("the server is gone")
        return right(messages, seat)

    with pytest.raises(Halted, match="25 episodes in a row came to nothing; the last one: the server is gone"):
        play(tmp_path / "run", door(answer), ADD, k=20, limits=Limits(4))
    assert len(lines(tmp_path / "run")) < 10 + 25 + 8


def test_an_error_that_the_user_can_put_right_ends_it_and_keeps_what_is_there(tmp_path: Path) -> None:
    def answer(messages: Any, seat: Seat) -> str:
        if seat.key.task == 5:
            raise EsplError("there is no daemon")
        return right(messages, seat)

    with pytest.raises(EsplError, match="there is no daemon"):
        play(tmp_path / "run", door(answer), ADD, limits=Limits(1))
    assert len(lines(tmp_path / "run")) == 5
    assert len(play(tmp_path / "run", door(right), ADD)) == 10


# Money


@pytest.mark.parametrize("at_once", [1, 8, 64])
def test_a_cost_limit_is_kept_and_no_money_is_forgotten(tmp_path: Path, at_once: int) -> None:
    """An episode that was stopped for want of money has no score; what it cost is on record, and counts next time."""
    asked = 0

    async def act(messages: Any, _: Seat) -> Reply:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        turn = len([m for m in messages if m.role == "assistant"])
        return said("hm" if turn < 2 else "\\boxed{1}", cost=0.01)

    under_way = min(at_once, Purse.FIRST)
    for limit in (0.1, 0.2):
        with pytest.raises(Halted, match=f"the cost limit of {limit:g} is reached"):
            play(tmp_path / "run", Scripted(act), PATIENT, k=5, limits=Limits(at_once, max_cost=limit))
        assert asked * 0.01 < limit + under_way * 0.01
    kept = lines(tmp_path / "run")
    scored = [(row["task"], row["sample"]) for row in kept if row["score"] is not None]
    stopped = [row for row in kept if row["score"] is None]
    assert sum(turn["cost"] for row in kept for turn in row["turns"]) == pytest.approx(asked * 0.01)
    assert len(scored) == len(set(scored)) and 3 * len(scored) + 2 * len(stopped) >= asked
    assert all("stopped: the cost limit of" in row["error"] and row["outcome"] == "fault" for row in stopped)
    assert at_once > 1 or (asked, len(scored), len(stopped)) == (18, 6, 0)


def test_money_for_a_game_that_was_not_ended_is_gone_as_well(tmp_path: Path) -> None:
    """Stopped in the middle, twice: the second session knows what the first one cost, and so does the third."""
    asked = 0

    def answer(*_: Any) -> Reply:
        nonlocal asked
        asked += 1
        return said("hm", cost=0.04)

    for limit, calls in ((0.07, 2), (0.1, 3), (0.1, 3)):
        with pytest.raises(Halted, match="is reached"):
            play(tmp_path / "run", door(answer), PATIENT, limits=Limits(1, max_cost=limit))
        assert asked == calls
    assert [row["outcome"] for row in lines(tmp_path / "run")] == ["fault", "fault"]


def test_the_mutant_that_begins_whatever_it_costs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Purse, "_admits", lambda purse: not purse.empty)
    with pytest.raises(AssertionError):
        test_a_cost_limit_is_kept_and_no_money_is_forgotten(tmp_path, 64)


def test_a_limit_that_cannot_be_held_is_said(tmp_path: Path) -> None:
    for number, reply in enumerate((right, lambda *_: Reply(Message("assistant", "no word of what that took")))):
        with pytest.raises(Halted, match="--max-cost cannot be held"):
            play(tmp_path / f"run-{number}", door(reply), ADD, limits=Limits(1, max_cost=1.0))


# Environments


def test_arenas_know_splits_limits_and_tools() -> None:
    arena = plan.arena(TOOLS, {"max_turns": 3}, limit=4, tool_syntax="native")
    assert (arena.config.split, arena.config.tasks, arena.config.size) == ("test", 4, 10)
    assert arena.native and arena.config.kwargs == {"tool_syntax": "native", "max_turns": 3}
    assert [tool.name for tool in arena.tools] == ["add", "submit"]
    assert not plan.arena(TOOLS, {"tool_syntax": "text"}, tool_syntax="native").native
    assert not plan.arena(ADD, {}, tool_syntax="native").native
    assert plan.arena(ADD, {"split": "train"}, "test").config.split == "train"
    for arguments, split, wanted in (({}, "dev", "has no split 'dev'; it has train, validation, test"),
                                     ({"speed": 3}, None, "has no argument 'speed'")):
        with pytest.raises(EsplError, match=wanted):
            plan.arena(ADD, arguments, split)
    with pytest.raises(EsplError, match="CartPole-v1 is a CartPoleEnv: espl-eval plays text environments"):
        plan.arena("CartPole-v1", {})


def test_no_more_episodes_at_once_than_boxes() -> None:
    from espl_envs.sandbox import pool
    from espl_envs.tools.box import BoxSettings

    class Boxes:
        def boxes(self) -> Any:
            return BoxSettings(), 2

    pool.configure(max_live=6)
    try:
        assert plan.concurrency([Boxes()], 100) == 3 and plan.concurrency([Boxes()], 2) == 2  # type: ignore[list-item]
        assert plan.concurrency([plan.arena(ADD, {})], 100) == 100
    finally:
        pool.configure()


def test_environments_are_used_again_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = plan._made
    monkeypatch.setattr(plan, "_made", lambda config: made.append(make(config)) or made[-1])
    play(tmp_path / "run", door(right), ADD, k=10, limits=Limits(4))
    assert len(made) <= 4 and all(env.unwrapped.messages == () for env in made)


# What is shown


class Screen:
    is_terminal = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, text: str, **_: Any) -> None:
        self.lines.append(text)


def episode(task: int, score: float | None, env: str = "e", error: str | None = None) -> Episode:
    outcome = Outcome.FAULT if score is None else Outcome.AGENT_ERROR if error else Outcome.ANSWERED
    key = EpisodeKey(env, "test", task, 0)
    return Episode(key, str(task), "", outcome, score, error=error or ("gone" if score is None else None))


def test_the_running_mean_is_that_of_the_tasks_of_each_environment() -> None:
    mean = RunningMean()
    assert mean.value() is None
    for task, score, env in ((0, 1.0, "a"), (0, 0.0, "a"), (0, 0.0, "a"), (1, 1.0, "a"), (0, 0.5, "b"), (1, None, "b")):
        mean.add(episode(task, score, env))
    value = mean.value()
    assert value is not None and value[0] == pytest.approx(((1 / 3 + 1) / 2 + 0.5) / 2) and 0 < value[1] < 1
    sure = RunningMean()
    for task in range(100):
        sure.add(episode(task, 1.0))
    value = sure.value()
    assert value is not None and value[0] == 1.0 and 0 < value[1] < 0.05


def test_progress_is_a_line_with_everything_and_hostile_text_is_tamed() -> None:
    now, screen = 0.0, Screen()
    progress = Progress(100, [episode(9, 1.0)], "title", console=screen, clock=lambda: now)
    progress.standing = lambda: "3 requests of 32"
    now = 10.0
    progress.paid(TurnUsage(600, 400, 0, 1.0, 0.25))
    for task in range(8):
        progress.finished(episode(task, 1.0))
    progress.finished(episode(8, None))
    progress.finished(episode(10, 0.0, error="\x1b[2J\u202eraised"))
    assert progress.line() == (
        "11/100 episodes, mean 0.900 ± 0.203, 100 tokens/s, cost 0.25, 1 fault, 1 agent error, 3 requests of 32, "
        "1 min 29 s left"
    )
    assert screen.lines == ["  fault: gone", "  agent_error: [2J raised"]
    drawn = io.StringIO()
    Console(file=drawn, width=300).print(progress._panel())
    assert progress.line() in drawn.getvalue() and "agent_error: [2J raised" in drawn.getvalue()


def test_nobody_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are written by a thread of their own: the loop goes on while a write takes its time."""
    import threading

    from espl_envs.evaluate.directory import RunDirectory

    threads: set[str] = set()
    append = RunDirectory.append

    def noted(self: Any, record: Episode) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        append(self, record)

    monkeypatch.setattr(RunDirectory, "append", noted)
    play(tmp_path / "run", door(right), ADD)
    assert threads == {"espl-records"}


def test_lines_are_json_and_self_contained(tmp_path: Path) -> None:
    play(tmp_path / "run", door(lambda *_: "\ud800 \\boxed{∑}"), ADD, limit=1)
    [row] = lines(tmp_path / "run")
    assert row["answer"] == "∑" and row["reference"] == "50" and row["stop_reason"] == "answer"
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["started"].endswith("+00:00") and json.dumps(row)
