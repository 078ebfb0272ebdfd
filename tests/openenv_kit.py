"""Servers for the tests of OpenEnv: ours in a process of its own, and two of OpenEnv's kind that know nothing of us."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

HERE = Path(__file__).parent


@contextlib.contextmanager
def served(env_id: str, *more: str) -> Iterator[str]:
    """`espl-eval serve` on a free port; its address."""
    command = [sys.executable, "-m", "espl_envs.evaluate.cli", "serve", "--env", env_id, "--port", "0", *more]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}) as child:
        assert child.stderr is not None
        try:
            line = child.stderr.readline()
            found = re.search(r"http://\S+", line)
            assert found, line + child.stderr.read()
            yield found[0]
        finally:
            child.terminate()


class Guess(Action):
    number: str


class Hint(Observation):
    text: str


class Guessing(Environment):
    """Find 7: half a point for the first guess that is near, half for the right one."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Hint:
        del seed, episode_id
        return Hint(text="Guess a number.")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Hint:
        del timeout_s
        if action.number == "crash":
            raise ValueError("the dice are gone")
        right = action.number == "7"
        return Hint(text="yes" if right else "near", reward=0.5, done=right)

    @property
    def state(self) -> State:
        return State()


class Move(Action):
    x: int
    y: int


class Board(Observation):
    cells: list[int]


class Grid(Environment):
    """Reach 2, 3; its action is an object."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Board:
        del episode_id
        return Board(cells=[seed or 0])

    def step(self, action: Move, timeout_s: float | None = None, **_: Any) -> Board:
        del timeout_s
        return Board(cells=[action.x, action.y], reward=1.25, done=(action.x, action.y) == (2, 3))

    @property
    def state(self) -> State:
        return State()


@contextlib.contextmanager
def foreign(environment: type[Environment], action: type[Action], seen: type[Observation]) -> Iterator[str]:
    """An OpenEnv server in this process; its address."""
    app = create_fastapi_app(environment, action, seen, max_concurrent_envs=8)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    started = threading.Event()
    original = server.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(30)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
