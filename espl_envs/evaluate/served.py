"""The door to a model on this machine, `--model FOLDER`, and to what a training run made, `--run RUN`.

Both are served by `espl-train serve` in a process of its own, so that nothing here imports torch: first it is asked
what it would serve, then it is started, waited for, asked like any other server, and ended. It ends by itself when this
process does, however that happens.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, ToolSpec
from espl_envs.evaluate.agents import Act, Agent, AgentLost, Reply, Seat, ToolSyntax
from espl_envs.evaluate.config import AgentConfig
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.endpoint import EndpointDoor

if TYPE_CHECKING:
    from espl_envs.evaluate.doors import Wanted

KEY = "ESPL_SERVE_KEY"
DESCRIBE_S = 600.0
START_S = 3600.0            # weights may have to come from far away
END_S = 20.0
LAST_WORDS = 4000           # bytes


class ServedDoor:
    """What is served is known, and seen to be there, before it is loaded. Raises EsplError where it is not."""

    def __init__(self, wanted: Wanted) -> None:
        self.target = wanted.run if wanted.run is not None else str(wanted.model)
        self._words = [self.target, *(["--prompt", wanted.prompt] if wanted.prompt else [])]
        if wanted.run is not None and not (Path(self.target) / "config.toml").is_file():
            raise EsplError(f"--run {self.target} is no run of espl-train: it has no config.toml")
        known = _described(self._words)
        if wanted.run is None and known["kind"] == "run":
            raise EsplError(f"--model {self.target} is a run of espl-train: evaluate it with --run")
        self.name = str(known["name"])
        asked = wanted.sampling
        self.sampling = replace(
            asked,
            temperature=known["temperature"] if asked.temperature is None else asked.temperature,
            max_tokens=known["max_tokens"] if asked.max_tokens is None else asked.max_tokens,
            seeded=True,
        )
        self.limits, self.prices = wanted.limits, wanted.prices
        self.concurrency = self.limits.concurrency
        self.tool_syntax: ToolSyntax = known["tool_syntax"]
        prompt = known["system_prompt"]
        self.system_prompts: tuple[str, ...] = () if prompt is None else (prompt,)
        names = ("prompt", "step", "weights", "base", "max_total_tokens")
        identity = {name: known[name] for name in names if known[name] not in (None, "")}
        self.config = AgentConfig(
            known["kind"], self.name, known["model"], settings={**self.sampling.to_dict(), **identity}
        )

    @asynccontextmanager
    async def open(self, tools: Sequence[ToolSpec]) -> AsyncIterator[Agent]:
        """Load and serve it. Raises EsplError, in its own words, where that fails."""
        key = secrets.token_urlsafe(24)
        async with _process(self._words, key) as server:
            door = EndpointDoor(
                await server.address(), self.name, Secret(KEY, key), self.sampling, self.limits, self.prices,
                self.config, verbatim=True,
            )
            async with door.open(tools) as agent:
                yield _Watched(agent, server)


class _Watched:
    """The agent behind the server, as long as there is one."""

    def __init__(self, agent: Agent, server: _Server) -> None:
        self._agent, self._server = agent, server

    def standing(self) -> str:
        """What the agent says."""
        return self._agent.standing()

    @asynccontextmanager
    async def sit(self, seat: Seat) -> AsyncIterator[Act]:
        """One episode. Raises AgentLost when the server is gone: nobody else will answer."""
        async with self._agent.sit(seat) as act:

            async def watched(messages: Conversation) -> Reply:
                asking = asyncio.ensure_future(act(messages))
                try:
                    await asyncio.wait({asking, self._server.gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not asking.done():
                        raise AgentLost(await self._server.obituary())
                    return await asking
                finally:
                    asking.cancel()

            yield watched


class _Server:
    """`espl-train serve` at work."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.gone = asyncio.ensure_future(process.wait())
        self._said = bytearray()
        self._reading = asyncio.ensure_future(self._read())

    async def address(self) -> str:
        """Where it answers, once it does."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(START_S):
                while line := await self.process.stdout.readline():
                    if line.startswith(b"http://"):
                        return line.split()[0].decode()
        except TimeoutError:
            raise EsplError(f"espl-train serve was not ready after {START_S:g} s") from None
        raise EsplError(await self.obituary())

    async def obituary(self) -> str:
        """Why it ended."""
        code = await self.gone
        await asyncio.wait({self._reading}, timeout=END_S)
        return _complaint(bytes(self._said), code)

    async def end(self) -> None:
        """Stop it; what does not stop is killed."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        await asyncio.wait({self.gone}, timeout=END_S)
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.gone
        self._reading.cancel()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(4096):
            self._said += piece
            del self._said[:-LAST_WORDS]


@asynccontextmanager
async def _process(words: Sequence[str], key: str) -> AsyncIterator[_Server]:
    """The server as a child in a session of its own (Ctrl-C is for us; we end it), its life tied to our end of its
    standard input."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *_command(words), "--until-eof", "--key-env", KEY,
        stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, KEY: key}, start_new_session=True,
    )  # fmt: skip
    server = _Server(process)
    try:
        yield server
    finally:
        await asyncio.shield(server.end())


def _described(words: Sequence[str]) -> dict[str, Any]:
    """What would be served."""
    try:
        told = subprocess.run([*_command(words), "--describe"], capture_output=True, timeout=DESCRIBE_S, check=False)
    except subprocess.TimeoutExpired:
        raise EsplError(f"espl-train serve --describe gave no answer within {DESCRIBE_S:g} s") from None
    if told.returncode:
        raise EsplError(_complaint(told.stderr, told.returncode))
    try:
        found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise EsplError(f"{words[0]!r} is nothing that espl-train serve can describe") from None
    return found


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "espl_train", "serve", *words]


def _complaint(said: bytes, code: int) -> str:
    """The sentence in which espl-train told what the user can put right; else the last thing that was said."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    own = [line.removeprefix("espl-train: ") for line in lines if line.startswith("espl-train: ")]
    if own:
        return own[-1]
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"espl-train serve {ended}{': ' + lines[-1][:300] if lines else ''}"
