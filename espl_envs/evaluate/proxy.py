"""An OpenAI-compatible proxy on loopback between agents that are programs and the model that they are evaluated with.

Every episode has a key of its own, so that each call is known to belong to it; the real key is put in behind the proxy
and is never seen by the program. Calls are counted against the episode's budget and written down, one JSON line each,
in `calls.jsonl` of the run directory: what was asked, what was answered, what it took. What passes (429, 5xx) is tried
again here: a program does not lose an episode because a server was busy. When the money of the whole evaluation is
spent (--max-cost), no call is passed on, and the episode has no score: what a program makes of a model that it was
denied is no result.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espl_envs.core.errors import EsplError
from espl_envs.core.randomness import derive
from espl_envs.evaluate.agents import AgentFailed, AgentLost, ContextExceeded, Seat, Unpaid, too_long
from espl_envs.evaluate.records import TurnUsage
from espl_envs.evaluate.refusals import EndpointFault
from espl_envs.evaluate.wire import Completion, Pieces, from_wire

if TYPE_CHECKING:
    from aiohttp import web

    from espl_envs.evaluate.endpoint import Endpoint

MAX_REQUEST = 64 << 20
CALLS = "calls.jsonl"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one episode may take; None for no limit. A call that has begun is still answered."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The limits there are, for config.json."""
        return {f"episode_{name}": value for name, value in asdict(self).items() if value is not None}


@dataclass(eq=False)
class Ledger:
    """The calls of one episode. `key`: what its program shows. `problem`: what ends the episode, whatever the program
    makes of it: the model's infrastructure failed, or nobody is there."""

    seat: Seat
    budget: Budget
    key: str = field(default_factory=lambda: f"espl-{secrets.token_urlsafe(24)}")
    calls: list[TurnUsage] = field(default_factory=list)
    used_up: str = ""
    problem: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    begun: int = 0
    _told: int = 0

    def news(self) -> tuple[TurnUsage, ...]:
        """The calls since this was last asked."""
        told, self._told = self._told, len(self.calls)
        return tuple(self.calls[told:])

    def broken(self, problem: EsplError) -> None:
        """The episode is over for this reason."""
        if not self.problem.done():
            self.problem.set_exception(problem)
            self.problem.exception()            # whoever waits gets it; nobody need

    def refusal(self) -> str:
        """Why no further call may be made; empty if one may."""
        budget = self.budget
        tokens = [(c.prompt_tokens, c.completion_tokens) for c in self.calls]
        limits: tuple[tuple[str, float | None, float | None], ...] = (
            ("model calls", budget.calls, self.begun),
            ("tokens", budget.tokens, _sum([n for pair in tokens for n in pair])),
            ("money", budget.cost, _sum([c.cost for c in self.calls])),
        )
        for name, limit, used in limits:
            if limit is not None and used is None:
                why = f"the budget of {name} cannot be held: the server does not report what calls take"
                self.broken(AgentLost(why))
                return why
            if limit is not None and used is not None and used >= limit:
                self.used_up = f"the episode's budget of {limit:g} {name} is used up"
        return self.used_up


def _sum(values: list[Any]) -> Any:
    return None if None in values else sum(values)


class Proxy:
    """Forwards to `endpoint`. `defaults`: fields of requests that the program does not set itself. `folder`: where
    calls are written down, None for nowhere."""

    def __init__(self, endpoint: Endpoint, defaults: Mapping[str, Any], folder: Path | None) -> None:
        self.endpoint, self.defaults, self.folder = endpoint, defaults, folder
        self.url = ""
        self._ledgers: dict[str, Ledger] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Proxy]:
        """Listen for the length of the block."""
        from aiohttp import web

        app = web.Application(client_max_size=MAX_REQUEST)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("*", "/{path:.*}", self._elsewhere)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            yield self
        finally:
            await runner.cleanup()

    @contextmanager
    def admit(self, ledger: Ledger) -> Iterator[None]:
        """Calls with the ledger's key are taken, as long as the block lasts."""
        self._ledgers[ledger.key] = ledger
        try:
            yield
        finally:
            del self._ledgers[ledger.key]

    def _of(self, request: web.Request) -> Ledger | None:
        return self._ledgers.get(request.headers.get("Authorization", "").removeprefix("Bearer ").strip())

    async def _models(self, request: web.Request) -> web.Response:
        from aiohttp import web

        if self._of(request) is None:
            return _error(401, "this key belongs to no episode, or it is over", "invalid_api_key")
        one = {"id": self.endpoint.door.model, "object": "model", "created": 0, "owned_by": "espl"}
        return web.json_response({"object": "list", "data": [one]})

    async def _elsewhere(self, request: web.Request) -> web.Response:
        return _error(404, f"{request.method} {request.path} is not recorded here: only /v1/chat/completions is", "")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        ledger = self._of(request)
        if ledger is None:
            return _error(401, "this key belongs to no episode, or it is over", "invalid_api_key")
        if refused := ledger.refusal():
            return _error(403, refused, "budget_exceeded")
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as problem:
            return _error(400, f"the body cannot be read: {problem}", "")
        ledger.begun += 1
        body = {**self.defaults, **body, "model": self.endpoint.door.model}
        seed = derive(ledger.seat.seed, "proxy", ledger.begun)
        try:
            async with ledger.seat.tab.call():
                if body.get("stream"):
                    return await self._stream(request, ledger, body, seed)
                return await self._whole(ledger, body, seed)
        except Unpaid as unpaid:
            ledger.broken(unpaid)
            return _error(402, str(unpaid), "insufficient_quota")
        except ContextExceeded as problem:
            return _error(400, str(problem), "context_length_exceeded")
        except EndpointFault as fault:
            if 400 <= fault.status < 500 and fault.status not in (401, 403):
                self._note(ledger, body, None, 0.0, str(fault))
                return _error(fault.status, fault.said or str(fault), "")
            ledger.broken(fault)
            return _error(502, str(fault), "")
        except (AgentFailed, AgentLost) as problem:
            ledger.broken(problem)
            return _error(502, str(problem), "")

    async def _whole(self, ledger: Ledger, body: dict[str, Any], seed: int) -> web.Response:
        from aiohttp import web

        said, seconds = await self.endpoint.completed(body, seed, urgent=True)
        self._note(ledger, body, said, seconds)
        return web.json_response(said.raw)

    async def _stream(
        self, request: web.Request, ledger: Ledger, body: dict[str, Any], seed: int
    ) -> web.StreamResponse:
        """Pass the answer on as it comes, and read it in passing. Usage is asked for in any case."""
        from aiohttp import web

        options = body.get("stream_options")
        wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        asked = {**body, "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True}}
        pieces, response = Pieces(), web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        began = time.monotonic()
        async with self.endpoint.streamed(asked, seed) as incoming:
            await response.prepare(request)
            async for event in _events(incoming):
                text = self.endpoint.door.secret.hidden(event.decode("utf-8", "replace"))
                if pieces.read(text) or wants_usage:
                    with suppress(ConnectionError):
                        await response.write(text.encode())
        self._note(ledger, body, from_wire(pieces.to_answer()), time.monotonic() - began)
        with suppress(ConnectionError):
            await response.write_eof()
        return response

    def _note(
        self, ledger: Ledger, body: Mapping[str, Any], said: Completion | None, seconds: float, error: str = ""
    ) -> None:
        """Count a call, and write it down with one system call, so that lines of many episodes do not mix."""
        if said is not None:
            ledger.calls.append(self.endpoint.usage(said, seconds))
            try:
                ledger.seat.tab.charge(ledger.calls[-1:])
            except EsplError as problem:
                ledger.broken(problem)
        if self.folder is None:
            return
        record = {
            **asdict(ledger.seat.key), "number": ledger.begun, "episode": ledger.key[-8:], "request": body,
            "response": None if said is None else said.raw, "seconds": seconds, "error": error or None,
        }  # fmt: skip
        line = self.endpoint.door.secret.hidden(json.dumps(record)) + "\n"
        descriptor = os.open(self.folder / CALLS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


async def _events(incoming: Any) -> AsyncIterator[bytes]:
    """The server-sent events of a stream, each with the empty line that ends it."""
    buffer = b""
    async for part in incoming.iter_any():
        buffer = (buffer + part).replace(b"\r\n", b"\n")
        if len(buffer) > MAX_REQUEST:
            raise too_long(f"a streamed event of more than {MAX_REQUEST >> 20} MB")
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            yield event + b"\n\n"
    if buffer.strip():
        yield buffer + b"\n\n"


def _error(status: int, message: str, code: str) -> web.Response:
    from aiohttp import web

    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code or None}
    return web.json_response({"error": error}, status=status)
