"""What the tests of evaluation share: a server that speaks OpenAI's protocol and fails as told, and ways to play."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toy
from aiohttp import web

from espl_envs.core import background
from espl_envs.evaluate import plan
from espl_envs.evaluate.agents import Act, Agent, Door, Reply, Seat
from espl_envs.evaluate.config import AgentConfig, EvalConfig
from espl_envs.evaluate.directory import RunDirectory
from espl_envs.evaluate.records import Episode, TurnUsage
from espl_envs.evaluate.runner import Limits, Runner

ADD, TOOLS, PATIENT = (f"toy:{env_id}" for env_id in toy.IDS)
MODEL = "toy-model"
Answer = dict[str, Any] | web.Response | None


def completion(text: str | None, *, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """The body of an answer; `more` goes into its message."""
    message = {"role": "assistant", "content": text, **more}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def error(status: int, message: str, code: str = "", **headers: str) -> web.Response:
    """A refusal in OpenAI's form."""
    return web.json_response({"error": {"message": message, "code": code}}, status=status,
                             headers={name.replace("_", "-"): value for name, value in headers.items()})


def sum_in(messages: Sequence[dict[str, Any]]) -> str:
    """What a good calculator answers to the toy world's question."""
    found = next(re.search(r"What is (\d+) \+ (\d+)", str(m["content"])) for m in messages if m["role"] == "user")
    return completion(f"\\boxed{{{int(found[1]) + int(found[2])}}}") if found else completion("Hello!")  # type: ignore[return-value]


@dataclass
class Server:
    """Answers `/v1/chat/completions` with `answer(body, number)`: a body, a response, or None to hang up.

    `requests` are the bodies seen, `keys` the keys that came with them; `most` is how many were there at once.
    """

    answer: Callable[[dict[str, Any], int], Answer | Awaitable[Answer]]
    models: Sequence[str] = (MODEL,)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    now: int = 0
    most: int = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            said = self.answer(body, len(self.requests))
            answer = await said if isinstance(said, Awaitable) else said
        finally:
            self.now -= 1
        if answer is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return web.json_response(answer) if isinstance(answer, dict) else answer

    async def listed(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Any], **settings: Any) -> Iterator[Server]:
    """A server on loopback, on a loop and a thread of its own."""
    server, loop, ready = Server(answer, **settings), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", server.complete)
        app.router.add_get("/v1/models", server.listed)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        return runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@dataclass
class Watcher:
    """Notes what the runner tells."""

    episodes: list[Episode] = field(default_factory=list)
    calls: list[TurnUsage] = field(default_factory=list)

    def paid(self, usage: TurnUsage) -> None:
        self.calls.append(usage)

    def finished(self, episode: Episode) -> None:
        self.episodes.append(episode)


@dataclass
class Scripted:
    """A door whose agent is an async function of (messages, seat)."""

    said: Callable[[Any, Seat], Awaitable[Reply]]
    config: AgentConfig = field(default_factory=lambda: AgentConfig("callable", "scripted"))
    tool_syntax: Any = "text"
    concurrency: int = 8
    system_prompts: tuple[str, ...] = ()

    @asynccontextmanager
    async def open(self, tools: Any) -> AsyncIterator[Agent]:  # noqa: ARG002
        yield self

    def standing(self) -> str:
        return ""

    @asynccontextmanager
    async def sit(self, seat: Seat) -> AsyncIterator[Act]:
        async def act(messages: Any) -> Reply:
            return await self.said(messages, seat)

        yield act


def play(
    folder: Path, door: Door, *env_ids: str, arguments: dict[str, Any] | None = None, limits: Limits | None = None,
    limit: int | None = None, split: str | None = None, watcher: Watcher | None = None, **config: Any,
) -> list[Episode]:
    """Evaluate as the command does, and return the episodes by key; a folder that is there is continued."""
    arenas = [plan.arena(e, arguments or {}, split, limit, door.tool_syntax) for e in env_ids or (ADD,)]
    wanted = EvalConfig(tuple(arena.config for arena in arenas), door.config, **config)
    native = [tool for arena in arenas if arena.native for tool in arena.tools]

    async def session(directory: RunDirectory) -> None:
        async with door.open(native) as agent:
            told = watcher or Watcher()
            await Runner(directory, arenas, agent, limits or Limits(door.concurrency), told).run()

    opened = RunDirectory.open if (folder / "config.json").exists() else RunDirectory.create
    with opened(folder, wanted) as directory:
        background.run_through(session(directory))
        return sorted(directory.episodes(), key=lambda episode: episode.key)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records as they stand in the file."""
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text("utf-8").splitlines()]
