"""Agents in Python and built-in ones: whatever they do counts for their episode and for nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from evaluate_kit import ADD, PATIENT, TOOLS, lines, play

from espl_envs import registry
from espl_envs.core.errors import EsplError, MissingData
from espl_envs.core.messages import Message, ToolCall
from espl_envs.evaluate import agents, plan
from espl_envs.evaluate.agents import AgentFailed, Reply, as_reply
from espl_envs.evaluate.builtin import BuiltinDoor
from espl_envs.evaluate.callables import CallableDoor, load
from espl_envs.evaluate.records import Episode, Outcome, TurnUsage
from espl_envs.evaluate.threads import Threads

BOXES = ("MBPP", "HumanEval", "Terminal")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes an agent's source as a file of the current folder; `path:name` is what --agent takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(source)
        return path

    return write


def outcomes(episodes: list[Episode]) -> list[Outcome]:
    return [episode.outcome for episode in episodes]


GOOD = """
import re
def agent(messages, tools):
    a, b = map(int, re.search(r"(\\d+) \\+ (\\d+)", messages[-1].content).groups())
    return f"\\\\boxed{{{a + b}}}"
"""


def test_a_function_is_an_agent(module: Any, tmp_path: Path) -> None:
    module(GOOD)
    episodes = play(tmp_path / "run", CallableDoor("mine.py:agent"), ADD, k=2)
    assert len(episodes) == 20 and all(episode.score == 1.0 for episode in episodes)
    assert episodes[0].answer == episodes[0].reference == "50"
    assert episodes[0].turns[0].prompt_tokens is None       # nobody said


def test_a_class_is_one_agent_per_episode_and_is_closed(module: Any, tmp_path: Path) -> None:
    module("""
alive, closed = set(), 0
class Agent:
    def __init__(self):
        self.turns = 0
        alive.add(self)
    def __call__(self, messages, tools):
        self.turns += 1
        assert self.turns == sum(m.role == "assistant" for m in messages) + 1, "somebody else's memory"
        return "hm" if self.turns < 3 else "\\\\boxed{1}"
    def close(self):
        alive.remove(self)
""")
    door = CallableDoor("mine.py:Agent", concurrency=5)
    episodes = play(tmp_path / "run", door, PATIENT)
    assert outcomes(episodes) == [Outcome.ANSWERED] * 10 and all(len(e.turns) == 3 for e in episodes)
    assert load("mine.py:alive") == set()


def test_an_async_agent_is_awaited_and_usage_counts(module: Any, tmp_path: Path) -> None:
    module("""
import asyncio
from espl_envs.core.messages import Message
from espl_envs.evaluate.agents import Reply
from espl_envs.evaluate.records import TurnUsage
async def agent(messages, tools):
    await asyncio.sleep(0)
    return Reply(Message("assistant", "I do not know"), (TurnUsage(5, 2, 0, 0.1, 0.25), TurnUsage(7, 3, 0, 0.1, 0.5)))
""")
    [episode, *_] = play(tmp_path / "run", CallableDoor("mine.py:agent"), ADD, limit=2)
    assert (episode.prompt_tokens, episode.completion_tokens, episode.cost) == (12, 5, 0.75)
    assert episode.outcome is Outcome.NO_ANSWER and episode.score == 0.0 and episode.stop_reason == "format"


def test_tools_are_called_by_messages_and_dicts(module: Any, tmp_path: Path) -> None:
    module("""
def agent(messages, tools):
    assert [t.name for t in tools] == ["add", "submit"]
    if messages[-1].role == "tool":
        return "\\\\boxed{" + messages[-1].content + "}"
    n = messages[-1].content.split()[2]
    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": int(n), "b": int(n)}}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}
""")
    episodes = play(tmp_path / "run", CallableDoor("mine.py:agent"), TOOLS)
    assert all(episode.score == 1.0 and [t.tool_calls for t in episode.turns] == [1, 0] for episode in episodes)


BAD = """
import asyncio, sys, time, threading
held = threading.Event()
def number(messages):
    return int(messages[-1].content.split()[2])
def agent(messages, tools):
    n = number(messages)
    if n == 25: raise ValueError("no\\nidea")
    if n == 26: return None
    if n == 27: return "x" * 10_000_000
    if n == 28: held.wait(60)
    if n == 29: sys.exit(3)
    if n == 30: return 42
    if n == 31: raise asyncio.CancelledError
    if n == 32: return {"content": 5}
    return "\\\\boxed{" + str(2 * n) + "}"
async def stubborn(messages, tools):
    if number(messages) == 28:
        while not held.is_set():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                pass
    if number(messages) == 29: sys.exit(3)
    if number(messages) == 31: raise asyncio.CancelledError
    return "\\\\boxed{" + str(2 * number(messages)) + "}"
"""


def test_whatever_an_agent_does_is_its_own_episode(module: Any, tmp_path: Path) -> None:
    module(BAD)
    door = CallableDoor("mine.py:agent", timeout=0.3, concurrency=4)
    episodes = play(tmp_path / "run", door, ADD)
    failed, fine = episodes[:8], episodes[8:]
    assert outcomes(failed) == [Outcome.AGENT_ERROR] * 8 and all(episode.score == 0.0 for episode in failed)
    assert [episode.score for episode in fine] == [1.0, 1.0]
    said = [str(episode.error) for episode in failed]
    assert said[0] == "the agent raised ValueError: no (mine.py, line 8)"
    assert said[1] == "the agent returned None, expected a text or an assistant Message"
    assert said[2] == "the reply is too long: 10,000,000 characters, and at most 2,000,000 characters are played"
    assert said[3] == "the agent gave no reply within 0.3 s"
    assert said[4] == "the agent raised SystemExit: 3 (mine.py, line 12)"
    assert said[5] == "the agent returned a value of int, expected a text or an assistant Message"
    assert said[6].startswith("the agent raised CancelledError")
    assert said[7].startswith("the agent returned a dict that is no message: TypeError")
    assert len(lines(tmp_path / "run")) == 10 and "x" * 1000 not in (tmp_path / "run/episodes.jsonl").read_text()
    load("mine.py:held").set()


def test_an_async_agent_that_will_not_end_is_left_behind(module: Any, tmp_path: Path) -> None:
    module(BAD)
    episodes = play(tmp_path / "run", CallableDoor("mine.py:stubborn", timeout=0.3), ADD)
    bad = {25 + i: e.error for i, e in enumerate(episodes) if e.outcome is Outcome.AGENT_ERROR}
    assert list(bad) == [28, 29, 31] and bad[28] == "the agent gave no reply within 0.3 s"
    assert "SystemExit" in str(bad[29]) and "CancelledError" in str(bad[31])


def test_a_failing_constructor_or_close_is_the_agents(module: Any, tmp_path: Path) -> None:
    module("""
class Agent:
    def __call__(self, messages, tools): return "\\\\boxed{50}"
    def close(self): raise OSError("cannot close")
class Never(Agent):
    def __init__(self): raise OSError("cannot start")
""")
    [episode] = play(tmp_path / "one", CallableDoor("mine.py:Agent"), ADD, limit=1)
    assert episode.outcome is Outcome.ANSWERED and episode.score == 1.0        # it was over before
    assert "cannot close" in str(episode.error)
    [episode] = play(tmp_path / "two", CallableDoor("mine.py:Never"), ADD, limit=1)
    assert episode.outcome is Outcome.AGENT_ERROR and "cannot start" in str(episode.error)
    assert episode.messages and episode.task_id == "add-25"


@pytest.mark.parametrize(("path", "problem"), [
    ("nothing", "expected package.module:name"),
    ("mine.py:", "expected package.module:name"),
    ("absent.py:agent", "there is no file absent.py"),
    ("no.such.module:agent", "there is no module 'no'"),
    ("mine.py:agend", "has no 'agend'; it has agent, one"),
    ("mine.py:NUMBER", "is a value of int, expected something to call"),
    ("mine.py:one", r"takes \(messages\), expected two arguments: messages and tools"),
    ("mine.py:Bare", "whose instances cannot be called"),
    ("broken.py:agent", "importing it raised ZeroDivisionError: division by zero"),
])  # fmt: skip
def test_a_wrong_path_is_one_sentence(module: Any, path: str, problem: str) -> None:
    module("NUMBER = 1\ndef agent(messages, tools): ...\ndef one(messages): ...\nclass Bare: ...\n")
    module("1 / 0\n", "broken.py")
    with pytest.raises(EsplError, match=problem) as caught:
        CallableDoor(path)
    assert "\n" not in str(caught.value)


def test_a_file_does_not_take_the_place_of_a_module(module: Any) -> None:
    import json

    module("def agent(messages, tools): ...\n", "json.py")
    CallableDoor("json.py:agent")
    import json as again

    assert again is json and hasattr(again, "dumps")


def test_replies_come_in_four_forms() -> None:
    message = Message("assistant", "x", (ToolCall("1", "add", "{}"),))
    usage = (TurnUsage(1, 1, 0, 0.0),)
    assert as_reply("x").message == Message("assistant", "x")
    assert as_reply(message).message == message == as_reply(message.to_openai()).message
    assert as_reply(Reply(message, usage)).calls == usage
    for wrong in (Message("user", "x"), Reply(Message("tool", "x")), b"x", ["x"], {"tool_calls": [1]}):
        with pytest.raises(AgentFailed):
            as_reply(wrong)


def test_long_arguments_count_as_well_as_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "MAX_REPLY", 10)
    as_reply("1234567890")
    with pytest.raises(AgentFailed, match="11 characters"):
        as_reply(Message("assistant", "12345", (ToolCall("", "f", "12345"),)))
    with pytest.raises(AgentFailed, match="11 characters"):
        as_reply(Reply(Message("assistant", "1"), (TurnUsage(1, 1, 0, 1.0, reasoning="1234567890"),)))


def test_threads_are_used_again_and_given_up(tmp_path: Path) -> None:
    assert tmp_path
    held = threading.Event()

    async def main() -> tuple[set[int], int]:
        threads = Threads()
        seen = {await threads.run(threading.get_ident) for _ in range(20)}
        waiting = asyncio.create_task(threads.run(held.wait))
        await asyncio.sleep(0)
        waiting.cancel()
        other = await threads.run(threading.get_ident)
        held.set()
        threads.close()
        return seen, other

    seen, other = asyncio.run(main())
    assert len(seen) == 1 and other not in seen


def test_oracle_silent_and_random_on_the_toy_world(tmp_path: Path) -> None:
    for env in (ADD, TOOLS, PATIENT):
        for name, wanted in (("oracle", 1.0), ("silent", 0.0)):
            episodes = play(tmp_path / f"{name}{env[4:].replace('/', '')}", BuiltinDoor(name), env)
            assert [e.score for e in episodes] == [wanted] * 10, (env, name)
    first = play(tmp_path / "a", BuiltinDoor("random"), ADD, k=20)
    again = play(tmp_path / "b", BuiltinDoor("random"), ADD, k=20)
    assert [e.answer for e in first] == [e.answer for e in again]
    assert 0.03 < sum(e.score or 0 for e in first) / len(first) < 0.2          # one in ten, by chance
    other = play(tmp_path / "c", BuiltinDoor("random"), ADD, k=20, seed=1)
    assert [e.answer for e in first] != [e.answer for e in other]


def available(env_ids: list[str]) -> list[str]:
    """Those whose data is here."""
    found = []
    for env_id in env_ids:
        with contextlib.suppress(MissingData):
            plan.arena(env_id, {})
            found.append(env_id)
    return found


def test_oracle_is_one_and_silent_is_zero_on_every_id_with_data(data_dir: Path, tmp_path: Path) -> None:
    assert data_dir
    generated = [env_id for env_id in registry.ids() if env_id.startswith("espl/rg-")]
    others = [e for e in registry.ids() if e not in generated and not any(word in e for word in BOXES)]
    thinned = available(others) + generated[:: 1 if os.environ.get("ESPL_FULL") else 12]
    assert len(thinned) > 25
    for name, wanted in (("oracle", 1.0), ("silent", 0.0)):
        episodes = play(tmp_path / name, BuiltinDoor(name), *thinned, limit=2)
        assert {e.key.env for e in episodes} == set(thinned)
        assert [str(e.key) for e in episodes if e.score != wanted] == []


def test_oracle_and_silent_where_boxes_are_needed(data_dir: Path, docker_provider: Any, tmp_path: Path) -> None:
    assert data_dir and docker_provider
    ids = ["espl/HumanEval-v0", "espl/Terminal-v0"]
    for name, wanted in (("oracle", 1.0), ("silent", 0.0)):
        episodes = play(tmp_path / name, BuiltinDoor(name), *ids, limit=1)
        assert [e.score for e in episodes] == [wanted] * 2, [e.error for e in episodes]
