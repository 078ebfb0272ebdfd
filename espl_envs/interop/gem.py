"""GEM, both ways: its environments behind our interface, ours as `gem.Env`.

    gym.make("espl_envs.interop.gem:espl/GEM-v0", game="game:Mastermind-v0-easy")
    GemEnv("espl/GSM8K-v0", split="train")                  # reset(seed) → text, step(text) → text, reward, …

The package is gem-llm (tested with 0.1.0); its pins exclude current versions of nltk and reasoning-gym, so it has no
extra here: install it where you need it. It draws from Python's and NumPy's process-global generators; every game has
states of its own that are put in place while it moves, one game at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import gymnasium
import numpy as np

from espl_envs import registry
from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError
from espl_envs.core.family import Episode, Family
from espl_envs.core.protocol import WholeReply
from espl_envs.core.tasks import Split, Task, TaskSource
from espl_envs.core.wrappers import TextObservation
from espl_envs.grading.verdict import Verdict
from espl_envs.tasks.generated import SPLITS, Draft, DrawnTasks, split_of

_MOVING = threading.RLock()


def GemEnv(env_id: str, **arguments: Any) -> Any:
    """The environment `env_id` as a `gem.Env`: observations are what is new, as text; rewards are its own."""
    core = _package().core

    class Ours(core.Env):  # type: ignore[name-defined]
        """One of our environments."""

        def __init__(self) -> None:
            self.env_id = env_id
            self.env = TextObservation(registry.make(env_id, **arguments), new_only=True)

        def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
            """Start an episode. GEM's global seeding is left alone: the seed is the episode's."""
            return self.env.reset(seed=seed)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            """Play one reply."""
            return self.env.step(action)

        def spawn(self, same_state: bool = False, **more: Any) -> Any:
            """Another one, with other arguments if wanted."""
            if same_state:
                raise NotImplementedError("an episode of ours cannot be copied")
            return GemEnv(env_id, **{**arguments, **more})

        def close(self) -> None:
            """Close it."""
            self.env.close()

    return Ours()


class Verbatim(WholeReply):
    """The reply itself is the move, also an empty one: what it is worth is the game's affair."""

    def extract(self, reply: str) -> str | None:
        """The reply."""
        return reply


class Play:
    """One play of a game of GEM's."""

    def __init__(self, game: str, seed: int) -> None:
        self._states: Any = random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()
        with self._in_place():
            try:
                self._game = _package().make(game)
            except ValueError as unknown:
                raise EsplError(f"GEM has no environment {game!r}: gem.print_envs() lists them") from unknown
            said, _ = self._game.reset(seed % 2**32)
            # Its seeding is global and has just replaced the states that were put in place: they are this game's now.
        self.said = str(said)
        self.over, self.reward, self.truncated, self.problem = False, 0.0, False, ""

    def move(self, text: str) -> None:
        """Play one move. A game that breaks over it is over: its state cannot be trusted any more."""
        with self._in_place():
            try:
                said, reward, terminated, truncated, _ = self._game.step(text)
            except Exception as problem:
                self.over, self.problem = True, f"{type(problem).__name__}: {problem}"
                return
        self.said, self.over = str(said), bool(terminated or truncated)
        self.reward += float(reward)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        with _MOVING:
            outside = random.getstate(), np.random.get_state()
            random.setstate(self._states[0])
            np.random.set_state(self._states[1])
            try:
                yield
            finally:
                self._states = random.getstate(), np.random.get_state()
                random.setstate(outside[0])
                np.random.set_state(outside[1])


class GemGameEnv(TextEnv):
    """An environment of GEM: its games, its reasoning-gym tasks.

    Observation: what it says. Action: the whole reply, verbatim. Reward: the sum of its rewards, at the end, as it is
    (it may be negative). Terminated when it ends, truncated after `max_turns` replies. Splits: train 2000, validation
    500, test 500 seeds, no seed in two of them. There is no oracle.

    Arguments
        game: GEM's id, as in "game:Mastermind-v0-easy".
        others: see `TextEnv`. 100 turns by default.

    Source: gem-llm 0.1.0, Apache-2.0. Versions: v0, the first one.
    """

    hidden = True

    def __init__(self, game: str, **settings: Any) -> None:
        self.game = game
        sources = {split: partial(_tasks, game, split) for split in SPLITS}
        super().__init__(Family(sources=sources, grade=_grade, protocol=Verbatim(), max_turns=100), **settings)

    async def follow_up(self, episode: Episode) -> str | None:
        """Play the reply; what it says to it, None at the end."""
        play: Play | None = episode.context.state.get("play")
        if play is None:
            play = await asyncio.to_thread(Play, self.game, episode.task.data["seed"])
            episode.context.state["play"] = play
        await asyncio.to_thread(play.move, episode.messages[-1].content)
        if play.problem:
            episode.diagnostics["game_problem"] = play.problem
        return None if play.over else play.said or "Go on."

    async def judge(self, episode: Episode, answer: str) -> Verdict:
        """The sum of its rewards."""
        return Verdict(episode.context.state["play"].reward, "ok", answer)


@cache
def _tasks(game: str, split: Split) -> TaskSource:
    from importlib.metadata import version

    def draw(seed: int) -> Draft | None:
        return Draft(str(seed), Play(game, seed).said, "", {"seed": seed}) if split_of(str(seed)) == split else None

    _package()
    return DrawnTasks(f"gem-{game}", split, draw, [version("gem-llm")], slow=True)


@cache
def _package() -> Any:
    """GEM, imported once; it sets up the root logger, which is put back."""
    import logging

    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        import gem
        import gem.core
    except ImportError as missing:
        raise EsplError(f"GEM (no module {missing.name}) is not here: pip install gem-llm==0.1.0, in an environment of "
                        "its own, because its pins exclude current versions") from missing
    root.setLevel(level)
    root.handlers[:] = handlers
    return gem


async def _grade(task: Task, answer: str) -> Verdict:
    raise EsplError(f"games are judged by how they end: {task.id}, {answer[:20]!r}")


if "espl/GEM-v0" not in gymnasium.registry:
    gymnasium.register("espl/GEM-v0", f"{__name__}:GemGameEnv")
