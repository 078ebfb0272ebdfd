"""Many environments at once: lock-step like Gymnasium's own, a few of them, and each at its own pace."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from toy import PatientEnv, ToyEnv, call

from espl_envs.core import background
from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.vector import TextVectorEnv, Transition

pytestmark = pytest.mark.filterwarnings("error")


class Gated(ToyEnv):
    """Answers a step of "slow" only once its gate is opened."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gate = asyncio.Event()

    async def astep(self, action: Any) -> Any:
        if action == "slow":
            await self.gate.wait()
        return await super().astep(action)


def patient() -> PatientEnv:
    return PatientEnv(max_turns=5)


def doubled(transition: Transition) -> str:
    return f"\\boxed{{{2 * int(transition.obs[-1].content.split()[2])}}}"


def test_lock_step_gives_what_gymnasiums_sync_vector_env_gives() -> None:
    ours = TextVectorEnv(patient, 4)
    theirs = SyncVectorEnv([patient] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    for envs in (ours, theirs):
        envs.action_space.seed(3)
    (obs, infos), (their_obs, their_infos) = ours.reset(seed=7), theirs.reset(seed=7)
    assert obs == their_obs
    for step in range(12):
        replies = [f"\\boxed{{{(step + i) % 5}}}" if (step + i) % 3 else "hm" for i in range(4)]
        obs, rewards, terminated, truncated, infos = ours.step(replies)
        their_obs, their_rewards, their_terminated, their_truncated, their_infos = theirs.step(replies)
        assert obs == their_obs
        assert rewards.dtype == np.float64 and terminated.dtype == truncated.dtype == np.bool_
        np.testing.assert_array_equal(rewards, their_rewards)
        np.testing.assert_array_equal(terminated, their_terminated)
        np.testing.assert_array_equal(truncated, their_truncated)
        assert set(infos) == set(their_infos)
        for key in ("score", "turn", "_score", "task_id", "_final_obs"):
            np.testing.assert_array_equal(infos.get(key), their_infos.get(key))
    ours.close()


def test_a_registered_id_makes_it_and_its_spec_survives() -> None:
    envs = gymnasium.make_vec("espl/Conventions-v0", num_envs=3, split="validation")
    assert isinstance(envs, TextVectorEnv) and envs.num_envs == 3
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, infos = envs.reset(seed=0)
    assert len(obs) == 3 and set(infos["split"]) == {"validation"}
    assert envs.observation_space.contains(obs) and envs.action_space.contains(("a", "b", "c"))
    assert pickle.loads(pickle.dumps(envs.spec)) == envs.spec
    assert EnvSpec.from_json(gymnasium.spec("espl/Conventions-v0").to_json()).vector_entry_point
    assert gymnasium.make_vec("espl/Conventions-v0", vectorization_mode="sync", num_envs=2).num_envs == 2
    envs.close()
    envs.close()


def test_an_ended_episode_keeps_its_last_observation_and_the_next_one_has_begun() -> None:
    envs = TextVectorEnv(ToyEnv, 2)
    first, _ = envs.reset(options=[{"task": 3}, {"task": 4}])
    obs, rewards, terminated, _, infos = envs.step([r"\boxed{6}", "no idea"])
    assert rewards.tolist() == [1.0, 0.0] and terminated.all()
    for i in range(2):
        assert infos["final_obs"][i][: len(first[i])] == first[i] and len(infos["final_obs"][i]) == len(first[i]) + 1
        assert len(obs[i]) == len(first[i]) and obs[i] != infos["final_obs"][i]
    assert infos["final_info"]["task_id"].tolist() == ["add-3", "add-4"]
    assert infos["final_info"]["score"].tolist() == [1.0, 0.0]
    assert infos["score"].tolist() == [0.0, 0.0]


def test_scores_stay_fractions_whoever_comes_first() -> None:
    envs = TextVectorEnv(ToyEnv, 2)
    envs.reset(options=[{"task": 0}, {"task": 1}])
    *_, infos = envs.step(["", r"\boxed{12345}"])
    assert infos["final_info"]["reward/length"].tolist() == [0.0, 0.5]


def test_a_mapping_steps_only_those_it_names() -> None:
    envs = TextVectorEnv(patient, 3)
    started, _ = envs.reset(options={"task": 5})
    obs, rewards, terminated, truncated, infos = envs.step({2: "hm", 0: r"\boxed{10}"})
    assert set(obs) == set(rewards) == set(terminated) == set(truncated) == set(infos) == {0, 2}
    assert rewards == {0: 1.0, 2: 0.0} and terminated == {0: True, 2: False}
    assert infos[0]["final_info"]["score"] == 1.0 and "final_info" not in infos[2]
    assert envs.envs[1].unwrapped._episode.messages == started[1]


def test_at_its_own_pace_nobody_waits_for_the_slowest() -> None:
    envs = TextVectorEnv(Gated, 4)

    async def play() -> list[int]:
        order: list[int] = []
        async for i, transition in envs.run({"task": t} for t in range(8)):
            order.append(i)
            if len(order) == 4 + 7:      # four began and seven are over: only now may environment 0 go on
                background.loop().call_soon_threadsafe(envs.envs[0].gate.set)
            if transition.obs:
                envs.send(i, "slow" if i == 0 and not transition.over else doubled(transition))
        return order

    order = asyncio.run(play())
    assert order.count(0) == 2 and order[-1] == 0
    assert len(order) == 4 + 8


def test_every_episode_asked_for_is_played_once_and_its_end_is_kept() -> None:
    envs = TextVectorEnv(patient, 5)

    async def play() -> list[Transition]:
        ends = []
        async for i, transition in envs.run({"task": t} for t in range(20)):
            if transition.over:
                ends.append(transition)
            if transition.obs:
                envs.send(i, doubled(transition) if transition.info["turn"] == 0 else "?")
        return ends

    ends = asyncio.run(play())
    infos = [end.final_info for end in ends if end.final_info is not None]
    assert sorted(info["task_id"] for info in infos) == sorted(f"add-{t}" for t in range(20))
    assert all(end.reward == 1.0 and end.final_obs for end in ends)


def test_without_a_list_it_goes_on_until_it_is_left_and_leaves_nothing_behind() -> None:
    envs = TextVectorEnv(Gated, 3)

    async def play() -> int:
        seen = 0
        async for i, transition in envs.run():
            seen += 1
            if seen > 50:
                break
            envs.send(i, "slow" if seen == 40 else doubled(transition))
        return seen

    assert asyncio.run(play()) == 51
    assert not [task for task in asyncio.all_tasks(background.loop()) if "_finish" in repr(task)]
    envs.reset(seed=0)
    assert envs.step({0: "x"})[2] == {0: True}


def test_an_early_exit_and_a_second_run_are_possible_but_two_at_once_are_not() -> None:
    envs = TextVectorEnv(ToyEnv, 2)
    with pytest.raises(EsplError, match=r"inside `async for"):
        envs.send(0, "x")

    async def play() -> None:
        async for _ in envs.run():
            with pytest.raises(EsplError, match="running already"):
                async for _ in envs.run():
                    pass
            break

    for _ in range(2):
        asyncio.run(play())


def test_an_environment_that_is_not_waiting_takes_no_reply() -> None:
    envs = TextVectorEnv(Gated, 2)

    async def play() -> None:
        async for i, _ in envs.run():
            envs.send(i, "slow")
            with pytest.raises(EsplError, match=f"environment {i} is not waiting"):
                envs.send(i, "again")
            break

    asyncio.run(play())


@pytest.mark.parametrize("free", [False, True])
def test_a_step_past_its_deadline_truncates_that_episode_alone(free: bool) -> None:
    envs = TextVectorEnv(Gated, 2, step_deadline=2)
    if free:
        async def play() -> dict[str, Transition]:
            ends = {}
            async for i, transition in envs.run([{"task": 1}, {"task": 2}]):
                if transition.final_info is not None:
                    ends[transition.final_info["task_id"]] = transition
                else:
                    envs.send(i, "slow" if transition.info["task_id"] == "add-1" else doubled(transition))
            return ends

        ends = asyncio.run(play())
        late, right = ends["add-1"], ends["add-2"]
        assert late.truncated and not late.terminated and late.final_info is not None
        assert late.final_info["stop_reason"] == "deadline" and right.reward == 1.0
        return
    envs.reset(options=[{"task": 1}, {"task": 2}])
    _, rewards, terminated, truncated, infos = envs.step(["slow", r"\boxed{4}"])
    assert rewards.tolist() == [0.0, 1.0]
    assert terminated.tolist() == [False, True] and truncated.tolist() == [True, False]
    assert infos["final_info"]["stop_reason"].tolist() == ["deadline", "answer"]


def test_a_fault_is_masked_or_raised_as_asked_and_never_a_plain_zero() -> None:
    envs = TextVectorEnv(lambda: ToyEnv(on_fault="mask"), 2)
    envs.reset(options=[{"task": 1}, {"task": 2}])
    _, _, terminated, truncated, infos = envs.step([r"\boxed{lost}", r"\boxed{4}"])
    assert truncated.tolist() == [True, False] and terminated.tolist() == [False, True]
    assert infos["final_info"]["fault"].tolist() == [1.0, 0.0]
    assert gymnasium.make_vec("espl/Conventions-v0", num_envs=1).envs[0].on_fault == "mask"
    raising = TextVectorEnv(ToyEnv, 2)
    raising.reset(options=[{"task": 1}, {"task": 2}])
    with pytest.raises(EnvironmentFault):
        raising.step([r"\boxed{lost}", r"\boxed{4}"])

    async def play() -> None:
        async for i, _ in raising.run():
            raising.send(i, r"\boxed{lost}")

    with pytest.raises(EnvironmentFault):
        asyncio.run(play())


def test_wrong_use_is_said_in_a_sentence() -> None:
    with pytest.raises(EsplError, match="num_envs is 0"):
        TextVectorEnv(ToyEnv, 0)
    with pytest.raises(EsplError, match="step_deadline is 0"):
        TextVectorEnv(ToyEnv, 1, step_deadline=0)
    envs = TextVectorEnv(ToyEnv, 2)
    with pytest.raises(ResetNeeded):
        envs.step(["a", "b"])
    with pytest.raises(EsplError, match="3 for 2 environments"):
        envs.step(["a", "b", "c"])
    with pytest.raises(EsplError, match="one text for 2 environments"):
        envs.step("ab")
    with pytest.raises(EsplError, match=r"no environment 2; indices: 0\.\.1"):
        envs.step({2: "a"})


def test_tools_work_as_in_a_single_environment() -> None:
    envs = TextVectorEnv(lambda: ToyEnv(tools=True), 16)
    envs.reset(seed=1)
    obs, *_ = envs.step([call("add", a=i, b=1) for i in range(16)])
    assert [o[-1].content for o in obs] == [str(i + 1) if i != 13 else "Error: 13 brings bad luck" for i in range(16)]


def test_the_garbage_collector_may_close_it_on_the_loop_itself() -> None:
    """As Gymnasium 1.1 has it, whose vector environments close themselves in `__del__`."""
    envs = TextVectorEnv(lambda: ToyEnv(tools=True), 2)
    envs.reset(options=[{"task": 0}, {"task": 1}])
    envs.step([call("add", a=1, b=1)] * 2)

    async def collected() -> None:
        envs.close()
        assert envs.closed
        await asyncio.gather(*background._finishing)

    background.run(collected())
    assert [len(env.unwrapped.adder.closed) for env in envs.envs] == [1, 1] and not background._finishing


def test_a_process_ends_that_leaves_it_open() -> None:
    program = "import espl_envs\nfrom espl_envs.core.vector import TextVectorEnv as Envs\nimport toy\n" \
              "Envs.__del__ = lambda self: self.close_extras()\nenvs = Envs(toy.ToyEnv, 2)\nenvs.reset(seed=0)\n"
    ended = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")
