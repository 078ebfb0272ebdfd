"""Any reasoning-gym data set: the episode is worth what the data set's own scorer says."""

from __future__ import annotations

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra 'reasoning' is not installed")

from espl_envs.interop.reasoning_gym import DatasetEnv  # noqa: E402


def test_scores_are_those_of_the_data_set_partial_credit_included() -> None:
    dataset = reasoning_gym.create_dataset("leg_counting", size=5, seed=42)
    env = DatasetEnv(dataset, split="test")
    seen = set()
    for index in range(len(dataset)):
        entry = dataset[index]
        for answer in (str(entry["answer"]), f"{entry['answer']} legs", "many"):
            messages, _ = env.reset(options={"task": index})
            assert entry["question"].strip() in messages[-1].content
            *_, reward, terminated, _, _ = env.step(f"\\boxed{{{answer}}}")
            assert (reward, terminated) == (dataset.score_answer(answer, entry), True)
            seen.add(reward)
        env.reset(options={"task": index})
        assert env.step("")[1] == 0.0
    assert 1.0 in seen and any(0.0 < score < 1.0 for score in seen)
    env.reset(options={"task": 0})
    assert env.step(env.oracle())[1] == 1.0


def test_a_composite_is_a_data_set() -> None:
    from reasoning_gym.composite import DatasetSpec

    parts = [DatasetSpec(name=name, weight=1, config={}) for name in ("leg_counting", "basic_arithmetic")]
    dataset = reasoning_gym.create_dataset("composite", size=4, seed=1, datasets=parts)
    env = DatasetEnv(dataset)
    for index in range(4):
        env.reset(options={"task": index})
        assert env.step(env.oracle())[1] == 1.0
    assert DatasetEnv(dataset).tasks.hash == env.tasks.hash
