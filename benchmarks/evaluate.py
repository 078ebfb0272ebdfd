"""What evaluating costs by itself: CPU per single-turn episode, and 1,000 of them against a server that only waits.

The agents answer at once, so that nothing but our own work is measured: one inside the process, one behind a server.
The server is another process that echoes after a given latency, at most `--slots` requests at a time: what it needs for
all of them is known, and what we need beyond that is ours.
Run: python benchmarks/evaluate.py [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from espl_envs.core import background
from espl_envs.core.messages import Message
from espl_envs.evaluate import plan
from espl_envs.evaluate.agents import Agent, Door
from espl_envs.evaluate.builtin import BuiltinDoor
from espl_envs.evaluate.callables import CallableDoor
from espl_envs.evaluate.config import EvalConfig
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.endpoint import EndpointDoor
from espl_envs.evaluate.progress import Progress
from espl_envs.evaluate.runner import Limits, Runner

ENV = "espl/Conventions-v0"
BOUND_MS = 2.0
MODEL = "echo"
WARM_UP = 50                # episodes before the clock runs


def at_once(messages: tuple[Message, ...], tools: Any) -> str:  # noqa: ARG001
    """The agent inside the process."""
    return "\\boxed{0}"


async def serve(latency: float, slots: int) -> None:
    """Echo until the standard input ends; the first line of the output is the port."""
    from aiohttp import web

    free = asyncio.Semaphore(slots)

    async def complete(request: web.Request) -> web.Response:
        said = (await request.json())["messages"][-1]["content"]
        async with free:
            await asyncio.sleep(latency)
        message = {"role": "assistant", "content": f"{said} \\boxed{{0}}"}
        usage = {"prompt_tokens": 100, "completion_tokens": 100}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def server(latency: float, slots: int) -> Iterator[str]:
    """The URL of an echo server in a process of its own."""
    command = [sys.executable, __file__, "--serve", "--latency", str(latency), "--slots", str(slots)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.stdin.close()


def evaluate(door: Door, episodes: int, folder: Path) -> dict[str, float]:
    """Seconds and CPU of `episodes` episodes, as the command plays them: recorded, with progress. A few others, played
    before, have made the imports and connections."""
    arena = plan.arena(ENV, {}, limit=episodes)
    clock = {"cpu_ms": 0.0, "seconds": 0.0}

    async def play(agent: Agent, name: str, config: EvalConfig) -> None:
        progress = Progress(episodes, (), "", quiet=True)
        with RunDirectory.create(folder / name, config) as directory:
            began, cpu = time.perf_counter(), time.process_time()
            await Runner(directory, [arena], agent, Limits(door.concurrency), progress).run()
            clock["seconds"] = time.perf_counter() - began
            clock["cpu_ms"] = 1e3 * (time.process_time() - cpu) / episodes

    async def session() -> None:
        async with door.open(()) as agent:
            few = replace(arena.config, tasks=min(WARM_UP, arena.config.tasks))
            await play(agent, "before", EvalConfig((few,), door.config))
            k = max(1, episodes // arena.config.tasks)
            await play(agent, "run", EvalConfig((arena.config,), door.config, k=k))

    background.run_through(session())
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=None, help="seconds per reply of the server (0.1, 0.5, 2)")
    parser.add_argument("--slots", type=int, default=128, help="requests that the server works on at a time")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/evaluate.json")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.latency, options.slots))
        return
    figures: dict[str, Any] = {"env": ENV, "episodes": options.episodes, "slots": options.slots, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        runs = (Path(folder) / str(number) for number in range(100))
        doors: list[tuple[str, Door]] = [
            ("built-in agent", BuiltinDoor("silent")), ("function", CallableDoor(f"{__file__}:at_once"))
        ]
        for name, door in doors:
            row = {"agent": name, **evaluate(door, options.episodes, next(runs))}
            figures["rows"].append(row)
            print(f"{name:28} {row['cpu_ms']:6.2f} ms of CPU per episode {row['seconds']:8.2f} s")
        for latency in (0.1, 0.5, 2.0) if options.latency is None else (options.latency,):
            with server(latency, options.slots) as url:
                row = evaluate(EndpointDoor(url, MODEL, Secret()), options.episodes, next(runs))
            ideal = latency * -(-options.episodes // options.slots)
            row = {"agent": "server", "latency_s": latency, "ideal_s": ideal, "ratio": row["seconds"] / ideal, **row}
            figures["rows"].append(row)
            print(f"{f'server, {latency:g} s a reply':28} {row['cpu_ms']:6.2f} ms of CPU per episode "
                  f"{row['seconds']:8.2f} s, the server alone {ideal:.2f} s: {row['ratio']:.2f}x")
    if options.write:
        from common import machine, write

        write("evaluate", {**machine("aiohttp"), **figures})
    if any(row["cpu_ms"] > BOUND_MS for row in figures["rows"]):
        raise SystemExit(f"more than {BOUND_MS:g} ms of CPU per episode")


if __name__ == "__main__":
    main()
