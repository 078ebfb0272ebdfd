"""Requests go where their beginning is in memory, unless that sampler has too much to do."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espl_train.engines.routing import BEGINNING, SLACK, Router

beginnings = st.lists(st.integers(0, 9), min_size=1, max_size=80)


@given(st.integers(1, 9), st.lists(beginnings, min_size=1, max_size=60))
def test_nobody_has_more_than_slack_times_its_share(count: int, requests: list[list[int]]) -> None:
    router, loads = Router(count), [0] * count
    for tokens in requests:
        chosen = router.choose(tokens, None, loads)
        loads[chosen] += 1
        assert loads[chosen] <= math.ceil(SLACK * sum(loads) / count)


def test_who_begins_alike_goes_to_the_same_sampler_while_it_has_room() -> None:
    router, idle = Router(8), [0] * 8
    for prompt in range(20):
        beginning = [prompt] * BEGINNING
        assert len({router.choose([*beginning, task], None, idle) for task in range(20)}) == 1
    homes = Counter(router.choose([prompt] * BEGINNING, None, idle) for prompt in range(400))
    assert len(homes) == 8 and max(homes.values()) < 100, "different prompts spread"


def test_a_prompt_that_fills_its_sampler_takes_the_next_and_always_the_same() -> None:
    router, beginning = Router(4), [7] * BEGINNING
    first = router.choose(beginning, None, [0, 0, 0, 0])
    loads = [0, 0, 0, 0]
    loads[first] = 8
    second = router.choose(beginning, None, loads)
    assert second != first and {router.choose([*beginning, i], None, loads) for i in range(9)} == {second}


def test_an_episode_stays_where_it_began_until_it_is_released() -> None:
    router = Router(3)
    home = router.choose([1, 2], "episode", [0, 0, 0])
    full = [0, 0, 0]
    full[home] = 100
    assert router.choose([1, 2, 3, 4], "episode", full) == home
    router.release("episode")
    router.release("unknown")
    assert router.choose([1, 2, 3, 4], "episode", full) != home


@pytest.mark.parametrize("session", [None, "a"])
def test_the_only_sampler_gets_everything(session: str | None) -> None:
    assert Router(1).choose([1], session, [10**6]) == 0
