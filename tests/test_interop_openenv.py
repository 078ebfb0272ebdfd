"""OpenEnv, the real package: our environments pass its validation, and an episode is worth the same in and outside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import toy
from conftest import lacking
from gymnasium.error import Error

from espl_envs.core.errors import EnvironmentFault, EsplError, MissingExtra
from espl_envs.core.messages import Message, ToolCall
from espl_envs.evaluate import cli
from espl_envs.grading.verdict import Verdict
from espl_envs.interop import openenv

needs_package = pytest.mark.openenv
REMOTE = "espl_envs.interop.openenv:espl/OpenEnv-v0"
SCRIPTS: dict[str, list[str | Message]] = {
    "right": [r"\boxed{56}"],
    "wrong": [r"\boxed{57}"],
    "no answer": ["I do not know."],
    "tools": [toy.call("add", a=28, b=28), toy.call("add", a=13, b=1), toy.call("add", a="x"), r"\boxed{56}"],
    "native tools": [Message("assistant", "", (ToolCall("c1", "add", '{"a": 28, "b": 28}'),)), r"\boxed{56}"],
    "submitted": [toy.call("submit", answer="56")],
    "too long": [toy.call("add", a=1, b=1)] * 3,
    "strange": ["\x00 \u2603 </tool_call> \\boxed{"],
}
WORTH = {"right": 1.0, "tools": 1.0, "native tools": 1.0, "submitted": 1.0}


@pytest.fixture(scope="module")
def package() -> None:
    if find_spec("openenv") is None:
        lacking("openenv", "openenv is not installed here: `make interop` sets up an environment that has it")


@pytest.fixture(scope="module")
def server(package: None) -> Iterator[str]:  # noqa: ARG001
    import openenv_kit

    with openenv_kit.served("toy:toy/AddTools-v0", "--env.args", "max_turns=4") as address:
        yield address


def played(env: Any, script: list[str | Message]) -> list[Any]:
    seen: list[Any] = [env.reset(options={"task": 3, "system_prompt": "Be brief."})[0]]
    for reply in script:
        *step, info = env.step(reply)
        keys = ("score", "verdict", "stop_reason", "answer", "turn")
        seen.append((*step, {key: info[key] for key in keys}))
        if step[2] or step[3]:
            break
    env.close()
    return seen


@needs_package
def test_the_server_passes_openenvs_validation(server: str) -> None:
    command = [Path(sys.executable).with_name("openenv"), "validate", "--url", server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "Verdict: PASS" in done.stdout, done.stdout + done.stderr


@needs_package
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_episode_over_the_wire_is_the_episode(server: str, name: str) -> None:
    inside = played(gymnasium.make("toy/AddTools-v0", split="test", max_turns=4).unwrapped, SCRIPTS[name])
    outside = played(gymnasium.make(REMOTE, base_url=server, split="test").unwrapped, SCRIPTS[name])
    assert outside == inside
    assert inside[-1][1] == WORTH.get(name, 0.0)


@needs_package
def test_openenvs_own_client_sees_new_messages_only_and_the_reward_at_the_end(server: str) -> None:
    from openenv import GenericEnvClient

    with GenericEnvClient(base_url=server).sync() as client:
        start = client.reset(split="validation", index=0, episode_id="mine")
        assert [message["role"] for message in start.observation["messages"]] == ["system", "user"]
        assert [tool["function"]["name"] for tool in start.observation["tools"]] == ["add", "submit"]
        said = client.step({"content": toy.call("add", a=20, b=20)})
        assert [(m["role"], m["content"]) for m in said.observation["messages"]] == [("tool", "40")]
        assert (said.reward, said.done) == (0.0, False)
        state = client.state()
        assert (state["episode_id"], state["step_count"], state["task_id"]) == ("mine", 1, "add-20")
        last = client.step({"content": r"\boxed{40}"})
        assert (last.reward, last.done, last.observation["truncated"]) == (1.0, True, False)
        assert "reference" not in str(last.metadata)


@needs_package
def test_a_seed_draws_what_it_draws_inside(server: str) -> None:
    from openenv import GenericEnvClient

    inside = gymnasium.make("toy/AddTools-v0", split="test").unwrapped
    with GenericEnvClient(base_url=server).sync() as client:
        for seed in range(5):
            assert client.reset(seed=seed).metadata["task_id"] == inside.reset(seed=seed)[1]["task_id"]


@needs_package
def test_the_task_api_counts_and_never_tells_the_answer(server: str) -> None:
    from espl_envs.interop.openenv.client import _asked

    place = f"{server}/AddTools-v0"
    assert [split["name"] for split in _asked(f"{place}/splits")] == ["train", "validation", "test"]
    assert _asked(f"{place}/num_tasks", {"split": "test"}) == {"num_tasks": 10}
    task = _asked(f"{place}/task", {"split": "test", "index": 3})["task"]
    assert task == {"id": "add-28", "index": 3, "split": "test", "hash": toy.load("test")[3].hash,
                    "question": "What is 28 + 28?"}
    assert len(_asked(f"{place}/task_range", {"split": "test", "start": 7})["tasks"]) == 3


@needs_package
def test_a_broken_grader_is_a_fault_over_the_wire_and_no_reward(server: str) -> None:
    env = gymnasium.make(REMOTE, base_url=server, split="test").unwrapped
    env.reset(options={"task": 0})
    with pytest.raises(EnvironmentFault, match="the grader's machine is gone"):
        env.step(r"\boxed{broken}")
    env.close()


@needs_package
def test_what_changes_a_score_on_the_way_is_noticed(package: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    import openenv_kit

    from espl_envs.interop.openenv.client import _Session

    monkeypatch.setattr(_Session, "verdict", lambda self: Verdict(self.total / 2))
    with openenv_kit.served("toy:toy/AddTools-v0") as address, pytest.raises(AssertionError):
        test_an_episode_over_the_wire_is_the_episode(address, "right")


@needs_package
def test_a_foreign_environment_keeps_its_rewards(package: None) -> None:  # noqa: ARG001
    import openenv_kit as kit

    with kit.foreign(kit.Guessing, kit.Guess, kit.Hint) as address:
        env = gymnasium.make(REMOTE, base_url=address).unwrapped
        assert env.splits == ("train", "validation", "test") and len(env.tasks) == 2000
        messages, _ = env.reset(seed=1)
        assert [(m.role, m.content) for m in messages] == [("user", "Guess a number.")]
        messages, reward, terminated, _, info = env.step("<think>hm</think> 5")
        assert (messages[-1].content, reward, terminated) == ("near", 0.0, False)
        *_, reward, terminated, _, info = env.step("7")
        assert (reward, terminated, info["score"], info["stop_reason"]) == (1.0, True, 1.0, "answer")
        env.reset(seed=1)
        with pytest.raises(EnvironmentFault, match="the dice are gone"):
            env.step("crash")
        env.close()


@needs_package
def test_a_foreign_action_is_an_object_and_a_bad_one_costs_a_turn(package: None) -> None:  # noqa: ARG001
    import openenv_kit as kit

    with kit.foreign(kit.Grid, kit.Move, kit.Board) as address:
        env = gymnasium.make(REMOTE, base_url=address, max_turns=4).unwrapped
        messages, _ = env.reset(seed=1)
        assert '"x"' in messages[0].content and messages[0].role == "system"
        assert "no JSON object" in env.step("left")[0][-1].content
        assert "expected an object" in env.step("[1]")[0][-1].content
        assert "VALIDATION_ERROR" in env.step('{"x": "far", "y": 1}')[0][-1].content
        *_, reward, terminated, truncated, _ = env.step('So:\n```json\n{"x": 2, "y": 3}\n```')
        assert (reward, terminated, truncated) == (1.25, True, False)
        env.reset(seed=2)
        for _ in range(3):
            env.step("?")
        *_, reward, terminated, truncated, info = env.step('{"x": 0, "y": 0}')
        assert (reward, terminated, truncated, info["stop_reason"]) == (1.25, False, True, "max_turns")
        env.close()


@needs_package
def test_espl_eval_plays_behind_a_server(server: str, tmp_path: Path) -> None:
    words = ["--env", REMOTE, "--env.args", f"base_url={server}", "--agent", "silent", "--limit", "4", "--quiet"]
    pytest.importorskip("jinja2")
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0


@needs_package
@pytest.mark.parametrize("words", [
    ["--env", "espl/Nothing-v0"], ["--env", "toy:toy/Add-v0", "--split", "dev"],
    ["--env", "toy:toy/Add-v0", "--port", "-1"], ["--env", "toy:toy/Add-v0", "--host", "256.0.0.1"],
    ["--env", "toy:toy/Add-v0", "--env.args", "colour=red"],
])  # fmt: skip
def test_what_cannot_be_served_is_one_sentence(
    package: None, words: list[str], capsys: pytest.CaptureFixture[str]  # noqa: ARG001
) -> None:
    assert cli.main(["serve", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "ftp://example", "nonsense"])
def test_no_server_is_one_sentence(address: str) -> None:
    with pytest.raises(EsplError, match=r"no OpenEnv server|expected http") as problem:
        gymnasium.make(REMOTE, base_url=address)
    assert "\n" not in str(problem.value) and not isinstance(problem.value, Error)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openenv", None)
    monkeypatch.setitem(sys.modules, "openenv.core.env_server", None)
    with pytest.raises(MissingExtra, match=r"espl\[openenv\]"):
        openenv.main(["--env", "toy:toy/Add-v0"])
