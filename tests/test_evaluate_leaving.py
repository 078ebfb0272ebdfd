"""The command ends: whatever threads, loops and exit hooks an agent leaves behind, once everything is written."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from evaluate_kit import ADD, lines, play

from espl_envs.core import commandline
from espl_envs.evaluate import callables
from espl_envs.evaluate.callables import CallableDoor
from espl_envs.evaluate.records import Outcome
from espl_envs.evaluate.threads import Loop

IMPATIENT = "from espl_envs.core import commandline; commandline.THREADS_S, commandline.HOOKS_S = 0.2, {hooks};"
AGENT = """
import atexit, concurrent.futures, threading, time
pool = concurrent.futures.ThreadPoolExecutor()
atexit.register(lambda: open("hooked", "w").write("yes"))

threading.Thread(target=time.sleep, args=(1e6,)).start()

def chatter():
    while True:
        print("noise"), time.sleep(0.01)

def agent(messages, tools):
    pool.submit(chatter)
    return "\\\\boxed{50}"
"""


def python(program: str, folder: Path, *words: str, hooks: float = 30.0) -> subprocess.CompletedProcess[str]:
    """A program that has less patience with what keeps it alive."""
    tests = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", IMPATIENT.format(hooks=hooks) + textwrap.dedent(program), *words]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": tests}, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip


def test_threads_of_the_agent_do_not_keep_the_command(tmp_path: Path) -> None:
    """Neither threads that are no daemons nor those of a pool, for which the interpreter waits before anything else."""
    (tmp_path / "mine.py").write_text(AGENT)
    words = ["--env", ADD, "--agent", "mine.py:agent", "--out", "run", "--quiet", "--json", "--limit", "1"]
    done = python("from espl_envs.evaluate.cli import main; main()", tmp_path, *words)
    assert done.returncode == 0 and json.loads(done.stdout)["mean"] == 1.0, "the answer is whole, and the answer only"
    assert "espl-eval: done; threads that were left behind did not end" in done.stderr
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "hooked").read_text() == "yes"


@pytest.mark.parametrize("left, hooks", [
    ("threading.Thread(target=time.sleep, args=(1e6,)).start()", 30.0),
    ("atexit.register(time.sleep, 1e6)", 0.2),
    ("atexit.register(time.sleep, 1e6); threading.Thread(target=time.sleep, args=(1e6,)).start()", 0.2),
    ("", 30.0),
])  # fmt: skip
def test_whatever_is_left_the_exit_code_is_the_evaluation_s(left: str, hooks: float, tmp_path: Path) -> None:
    done = python(f"import atexit, threading, time\n{left}\nprint('said')\ncommandline.leave('espl-eval', 3)",
                  tmp_path, hooks=hooks)  # fmt: skip
    assert done.returncode == 3 and done.stdout == "said\n" and ("did not end" in done.stderr) == ("Thread" in left)


def test_the_mutant_that_just_exits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **named: run(*args, **{**named, "timeout": 1}))
    stuck = "import threading, time; threading.Thread(target=time.sleep, args=(1e6,)).start();"
    with pytest.raises(subprocess.TimeoutExpired):
        python(f"import sys; {stuck} sys.exit(3)", tmp_path)
    assert commandline.THREADS_S >= 1, "people's threads have a moment to end"


def test_a_reader_that_is_gone_is_no_traceback() -> None:
    program = "import sys; from espl_envs.core.commandline import leave; sys.stdin.read(); print('x'); leave('e', 0)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-E", "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Agents that hang until this is set, as `mine.py:worker` and `mine.py:blocker`."""
    (tmp_path / "mine.py").write_text(
        "import asyncio, threading\nheld = threading.Event()\n"
        "async def worker(messages, tools):\n    await asyncio.to_thread(held.wait)\n"
        "async def blocker(messages, tools):\n    held.wait()\n"
    )
    monkeypatch.chdir(tmp_path)
    held: threading.Event = callables.load("mine.py:held")
    return held


@pytest.mark.parametrize("name", ["worker", "blocker"])
def test_an_async_agent_that_hangs_for_good_is_given_up(name: str, tmp_path: Path, stuck: threading.Event) -> None:
    """Also where it takes more worker threads than the pool of an event loop has: nobody else waits for one of those.
    """
    door = CallableDoor(f"mine.py:{name}", timeout=0.1, concurrency=50)
    door.target.__globals__["held"] = stuck
    try:
        episodes = play(tmp_path / "run", door, ADD, k=5)
    finally:
        stuck.set()
    assert {episode.outcome for episode in episodes} == {Outcome.AGENT_ERROR} and len(lines(tmp_path / "run")) == 50
    assert {episode.error for episode in episodes} == {"the agent gave no reply within 0.1 s"}


def test_a_loop_that_stands_still_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, held, now = callables.CallableAgent(None, 1.0), threading.Event(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert agent.standing() == ""
    blocked = threading.Event()

    async def block() -> None:
        blocked.set()
        held.wait()

    async def main() -> None:
        task = asyncio.create_task(agent.loop.run(block))
        await asyncio.to_thread(blocked.wait)
        nonlocal now
        assert agent.standing() == "", "asked for a sign of life"
        now = 130.0
        assert "loop has stood still for 30 s: an `async def` agent must await" in agent.standing()
        held.set()
        await task
        await agent.loop.run(lambda: asyncio.sleep(0))
        assert agent.standing() == ""

    asyncio.run(main())
    agent.loop.close()


def test_a_task_that_exits_takes_no_loop_along() -> None:
    async def leave() -> None:
        raise SystemExit(7)

    async def spawn() -> str:
        task = asyncio.get_running_loop().create_task(leave())
        await asyncio.wait([task])
        assert isinstance(task.exception(), SystemExit)
        return "still here"

    async def main() -> None:
        loop = Loop()
        with pytest.raises(SystemExit):
            await loop.run(leave)
        assert await asyncio.wait_for(loop.run(spawn), 10) == "still here"
        loop.close()

    asyncio.run(main())
