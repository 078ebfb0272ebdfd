"""GEM, the real package: its games keep their rewards behind our interface, our episodes theirs behind its own."""

from __future__ import annotations

import logging
import random
import sys
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import pytest
import toy
from conftest import lacking

from espl_envs.core.errors import EsplError
from espl_envs.interop import gem as room

GAME = "espl_envs.interop.gem:espl/GEM-v0"
GAMES = ["game:GuessTheNumber-v0-easy", "game:Mastermind-v0-easy", "game:FifteenPuzzle-v0-easy"]
SCRIPTS = [[r"\boxed{56}"], [r"\boxed{1}"], ["?"], [toy.call("add", a=28, b=28), r"\boxed{56}"]]
MOVES = ["", "hello", r"\boxed{5}", r"\boxed{1 2}", r"\boxed{3}", "\x00", r"\boxed{8}", r"\boxed{up}"]


@pytest.fixture
def package() -> None:
    if find_spec("gem") is None:
        lacking("openenv", "gem-llm is not installed here: `make interop` sets up an environment that has it")


@pytest.mark.openenv
@pytest.mark.parametrize("game", GAMES)
def test_a_game_inside_is_the_game_outside(package: None, game: str) -> None:  # noqa: ARG001
    import gem

    env: Any = gymnasium.make(GAME, game=game).unwrapped
    opening, _ = env.reset(options={"task": 4})
    seed = env.task.data["seed"]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    outside = gem.make(game)
    said, _ = outside.reset(seed % 2**32)
    assert opening[-1].content == said
    total = 0.0
    for move in MOVES:
        said, reward, terminated, truncated, _ = outside.step(move)
        total += reward
        messages, ours, over, _, _ = env.step(move)
        assert over == (terminated or truncated)
        if over:
            assert ours == total
            break
        assert messages[-1].content == str(said)
    env.close()


def played(env: Any) -> list[Any]:
    seen: list[Any] = [env.reset(options={"task": 0})]
    for move in MOVES:
        seen.append(env.step(move))
        if seen[-1][2]:
            break
    return seen


@pytest.mark.openenv
def test_the_worlds_randomness_and_logging_are_left_alone(package: None) -> None:  # noqa: ARG001
    handlers = list(logging.getLogger().handlers)
    random.seed(4)
    np.random.seed(4)
    before = random.getstate(), np.random.get_state()[1].tolist()
    env: Any = gymnasium.make(GAME, game="game:Mastermind-v0-easy").unwrapped
    first = played(env)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(9)
    again: Any = gymnasium.make(GAME, game="game:Mastermind-v0-easy").unwrapped
    assert played(again) == first
    assert logging.getLogger().handlers == handlers


@pytest.mark.openenv
@pytest.mark.parametrize("script", SCRIPTS)
def test_our_episode_behind_gems_interface_is_the_episode(package: None, script: list[str]) -> None:  # noqa: ARG001
    import gem

    theirs = room.GemEnv("toy:toy/AddTools-v0", split="test")
    assert isinstance(theirs, gem.Env)
    ours: Any = gymnasium.make("toy/AddTools-v0", split="test").unwrapped
    text, info = theirs.reset(seed=3)
    messages, expected = ours.reset(seed=3)
    assert info == expected and messages[-1].content in text
    for reply in script:
        text, *rest = theirs.step(reply)
        _, *wanted = ours.step(reply)
        assert rest == wanted
    other = theirs.spawn(split="train")
    assert other.reset(seed=1)[1]["split"] == "train"
    for env in (theirs, other, ours):
        env.close()


@pytest.mark.openenv
def test_an_unknown_game_is_a_sentence(package: None) -> None:  # noqa: ARG001
    with pytest.raises(EsplError, match="GEM has no environment 'game:Chess'"):
        gymnasium.make(GAME, game="game:Chess").unwrapped.reset()


def test_without_the_package_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gem", None)
    room._package.cache_clear()
    with pytest.raises(EsplError, match="pip install gem-llm"):
        room.GemEnv("toy:toy/Add-v0")
