"""The door to any OpenAI-compatible server: `--base-url URL --model NAME`.

What passes (429, 5xx, a dropped connection, a garbled answer) is tried again with growing pauses, or after the pause
that the server asks for; what stays is a fault, never a score. How many requests are under way adapts to the server
(`pace.py`). The key comes from an environment variable and goes nowhere but into the request's header: everything that
the server sends is freed of it before anybody else sees it, also where it echoes it.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from espl_envs.core.errors import EsplError, MissingExtra
from espl_envs.core.messages import Conversation, ToolSpec
from espl_envs.core.randomness import derive
from espl_envs.evaluate.addresses import checked_url, proxy_for
from espl_envs.evaluate.agents import Act, AgentFailed, ContextExceeded, Reply, Seat, ToolSyntax, as_reply, too_long
from espl_envs.evaluate.config import AgentConfig, Prices
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.pace import FLOOR, Pace
from espl_envs.evaluate.records import TurnUsage
from espl_envs.evaluate.refusals import Asked, EndpointFault, Passing, elsewhere, explain
from espl_envs.evaluate.wire import Completion, Unreadable, from_wire, to_wire, tools_to_wire

if TYPE_CHECKING:
    import aiohttp
    import tenacity

T = TypeVar("T")

MAX_BODY = 64 << 20
CONNECT_S = 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
HELLO_TOKENS = 16
PREFLIGHT_S = 60.0
RUNNING = "is the server running, and --base-url right?"


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks for. None: the server's default. `more`: further fields of the body, as they are.
    `seeded`: send a seed, keyed by the episode and the turn."""

    temperature: float | None = None
    max_tokens: int | None = None
    seeded: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, for config.json."""
        known = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seeded": self.seeded or None}
        return {name: value for name, value in {**known, **self.more}.items() if value is not None}

    def fields(self) -> dict[str, Any]:
        """What was asked for, as fields of a request."""
        return {name: value for name, value in self.to_dict().items() if name != "seeded"}


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that one request may take, and for how long one that fails is tried again; requests at once at most."""

    request_s: float = 600.0
    retry_s: float = 300.0
    concurrency: int = 256


class EndpointDoor:
    """A model behind a URL. Raises EsplError for a URL that is none. `verbatim`: a server that takes every message as
    it is and decodes all that it is asked at once, as our own does, is sent them so."""

    tool_syntax: ToolSyntax = "native"
    system_prompts: tuple[str, ...] = ()

    def __init__(
        self, base_url: str, model: str, secret: Secret, sampling: Sampling | None = None, limits: Limits | None = None,
        prices: Prices | None = None, config: AgentConfig | None = None, verbatim: bool = False,
    ) -> None:
        self.base_url, self.model, self.secret = checked_url(base_url), model, secret
        self.sampling, self.limits, self.prices = sampling or Sampling(), limits or Limits(), prices
        self.concurrency, self.verbatim = self.limits.concurrency, verbatim
        self.config = config or AgentConfig("endpoint", model, model, self.base_url, self.sampling.to_dict())

    @asynccontextmanager
    async def open(self, tools: Sequence[ToolSpec]) -> AsyncIterator[Endpoint]:
        """Connect, and ask for a word or two: a server that is not there, a wrong key, an unknown model and tools that
        it does not take are EsplErrors here, before there is an episode."""
        try:
            import aiohttp
            import tenacity  # noqa: F401
        except ImportError:
            raise MissingExtra("eval", "an endpoint") from None
        limits = self.limits
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limits.concurrency, ttl_dns_cache=300, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=limits.request_s, sock_connect=CONNECT_S),
            headers={"Content-Type": "application/json", **self.secret.header()},
            proxy=proxy_for(self.base_url),
        ) as session:
            endpoint = Endpoint(self, session)
            await endpoint.preflight(tools)
            yield endpoint


class Endpoint:
    """An open connection to a server."""

    def __init__(self, door: EndpointDoor, session: aiohttp.ClientSession) -> None:
        most = door.limits.concurrency
        self.door, self.pace = door, Pace(most, floor=most if door.verbatim else FLOOR)
        self._session = session
        self._limit_name = "max_tokens"
        self._asked = Asked(door.base_url, door.model, door.secret.name if door.secret.key else "")

    def standing(self) -> str:
        """Requests under way and the limit of the moment."""
        return f"{self.pace.under_way} requests of {self.pace.limit}"

    @asynccontextmanager
    async def sit(self, seat: Seat) -> AsyncIterator[Act]:
        """One episode: every turn is one chat completion of the whole conversation."""
        tools = tools_to_wire(seat.tools) if seat.native else []
        turn = 0

        async def act(messages: Conversation) -> Reply:
            nonlocal turn
            body = self._body(messages, tools, derive(seat.seed, turn))
            turn += 1
            return await self._reply(body, seat.seed + turn, urgent=turn > 1)

        yield act

    async def ask(self, messages: Conversation, seed: int) -> Reply:
        """One reply outside of any episode. Raises as `completed` does, and AgentFailed for what is no reply."""
        return await self._reply(self._body(messages, (), seed), seed, urgent=False)

    def _body(
        self, messages: Conversation, tools: Sequence[Mapping[str, Any]], seed: int | None = None
    ) -> dict[str, Any]:
        sampling = self.door.sampling
        sent = [message.to_openai() for message in messages] if self.door.verbatim else to_wire(messages)
        body: dict[str, Any] = {"model": self.door.model, "messages": sent}
        if sampling.temperature is not None:
            body["temperature"] = sampling.temperature
        if sampling.max_tokens is not None:
            body[self._limit_name] = sampling.max_tokens
        if tools:
            body["tools"] = tools
        if sampling.seeded and seed is not None:
            body["seed"] = seed & 0x7FFFFFFF
        return {**body, **sampling.more}

    async def _reply(self, body: dict[str, Any], seed: int, urgent: bool) -> Reply:
        try:
            said, seconds = await self.completed(body, seed, urgent)
        except ContextExceeded:
            if self._limit_name not in body:
                raise
            # What is left of the context is less than was asked for: the server's own limit is just that.
            shorter = {name: value for name, value in body.items() if name != self._limit_name}
            said, seconds = await self.completed(shorter, seed, urgent)
        return as_reply(Reply(said.message, (self.usage(said, seconds),)))

    def usage(self, said: Completion, seconds: float) -> TurnUsage:
        """What a completion took; its cost by the price table, else by the server's own bill."""
        prices = self.door.prices
        cost = prices.cost(said.prompt_tokens, said.completion_tokens) if prices else said.cost
        return TurnUsage(
            said.prompt_tokens, said.completion_tokens, 0, seconds, cost, said.finish_reason, said.reasoning
        )

    async def completed(self, body: Mapping[str, Any], seed: int, urgent: bool) -> tuple[Completion, float]:
        """Ask until there is an answer; it, and the seconds that it took itself. Raises EndpointFault when what should
        pass does not, AgentLost, ContextExceeded, AgentFailed."""
        data = json.dumps(body).encode()
        return await self._again(partial(self._attempt, data, urgent), seed)

    @asynccontextmanager
    async def streamed(self, body: Mapping[str, Any], seed: int) -> AsyncIterator[aiohttp.StreamReader]:
        """An answer as it comes. Until it begins, everything is as in `completed`; where it breaks off, EndpointFault:
        what was read of it cannot be taken back."""
        data = json.dumps(body).encode()
        async with self.pace.slot(urgent=True) as began:
            response = await self._again(partial(self._begun, data, began), seed)
            try:
                with self._explained():
                    yield response.content
                self.pace.answered(began, None)
            except Passing as problem:
                raise EndpointFault(f"{problem} (in the middle of an answer)") from None
            finally:
                response.close()

    async def _begun(self, data: bytes, began: float) -> aiohttp.ClientResponse:
        url = f"{self.door.base_url}/chat/completions"
        with self._explained():
            response = await self._session.post(url, data=data, allow_redirects=False)
            if response.status == 200:
                return response
            async with response:
                text = self.door.secret.hidden((await response.content.read(MAX_BODY)).decode("utf-8", "replace"))
        problem = explain(self._asked, response.status, response.headers, text)
        if isinstance(problem, Passing):
            self.pace.pushed_back(began)
        raise problem

    async def _again(self, attempt: Callable[[], Awaitable[T]], seed: int) -> T:
        """`attempt` until it is not Passing. Raises EndpointFault when patience ends."""
        import tenacity

        began = time.monotonic()
        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_before_delay(self.door.limits.retry_s),
            wait=lambda state: _pause(state, seed),
            reraise=True,
        )
        try:
            return await again(attempt)
        except Passing as problem:
            raise EndpointFault(f"{problem} (given up after {time.monotonic() - began:.0f} s)") from None

    async def _attempt(self, data: bytes, urgent: bool) -> tuple[Completion, float]:
        async with self.pace.slot(urgent) as began:
            try:
                completion = await self._post(data)
            except Passing:
                self.pace.pushed_back(began)
                raise
            self.pace.answered(began, completion.completion_tokens)
            return completion, time.monotonic() - began

    async def _post(self, data: bytes) -> Completion:
        status, headers, text = await self._fetch("POST", "/chat/completions", data)
        if status != 200:
            raise explain(self._asked, status, headers, text)
        try:
            answer = json.loads(text)
            if isinstance(answer, dict) and "choices" not in answer and answer.get("error"):
                code = answer["error"].get("code") if isinstance(answer["error"], dict) else None
                status = code if isinstance(code, int) and 400 <= code < 600 else 500
                raise explain(self._asked, status, {}, text)
            return from_wire(answer)
        except (ValueError, RecursionError) as problem:
            page = text.lstrip().startswith("<")
            what = problem if isinstance(problem, Unreadable) else "a web page" if page else "it is not JSON"
            advice = f"is --base-url right? {elsewhere(self.door.base_url)}" if page else ""
            raise Passing(f"{self.door.base_url} answered what cannot be read: {what}", advice=advice) from None

    async def _fetch(self, method: str, path: str, data: bytes | None = None) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and body of one request, without the key. Raises Passing where there is no answer and
        AgentFailed for one that is endless."""
        url, size, parts = self.door.base_url + path, 0, []
        with self._explained():
            async with self._session.request(method, url, data=data, allow_redirects=False) as response:
                async for part in response.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_BODY:
                        raise too_long(f"more than {MAX_BODY >> 20} MB")
                text = b"".join(parts).decode("utf-8", "replace")
                return response.status, response.headers, self.door.secret.hidden(text)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong with a connection, as Passing."""
        import aiohttp

        try:
            yield
        except aiohttp.ConnectionTimeoutError:
            raise Passing(f"cannot reach {self.door.base_url}: it does not take connections", advice=RUNNING) from None
        except TimeoutError:
            raise Passing(f"{self.door.base_url} gave no answer within {self.door.limits.request_s:g} s") from None
        except (aiohttp.ClientError, OSError) as problem:
            why = self.door.secret.hidden(_reason(problem))
            raise Passing(f"cannot reach {self.door.base_url}: {why}", advice=RUNNING) from None

    async def preflight(self, tools: Sequence[ToolSpec]) -> None:
        """One short call with the settings that episodes will use. Raises EsplError in one sentence."""
        body = self._body((), tools_to_wire(tools), 0)
        body["messages"] = [{"role": "user", "content": "Hello."}]
        problem: Passing | None = None
        try:
            async with asyncio.timeout(PREFLIGHT_S):
                while (problem := await self._hello(body)) is not None:
                    await asyncio.sleep(FIRST_PAUSE_S)
        except TimeoutError:
            why = problem or f"{self.door.base_url} gave no answer"
            raise EsplError(f"{why}, to a first short request, for {PREFLIGHT_S:g} s") from None
        except EndpointFault as fault:
            raise EsplError(await self._advised(fault, tools)) from None

    async def _hello(self, body: Mapping[str, Any]) -> Passing | None:
        """Why the server cannot answer now; None when it did. Servers that want `max_completion_tokens` say so, and a
        model that thinks for longer than the few tokens is there."""
        try:
            await self._post(json.dumps({**body, self._limit_name: HELLO_TOKENS}).encode())
        except Passing as problem:
            if problem.advice:
                raise EsplError(f"{problem}: {problem.advice}") from None
            return problem
        except EndpointFault as fault:
            refused = fault.said if fault.status == 400 else ""
            if "max_completion_tokens" in refused and self._limit_name == "max_tokens":
                self._limit_name = "max_completion_tokens"
                return await self._hello({name: value for name, value in body.items() if name != "max_tokens"})
            if "output limit was reached" not in refused:
                raise
        return None

    async def _advised(self, fault: EndpointFault, tools: Sequence[ToolSpec]) -> str:
        """The refusal with what to do: other tools, or one of the models that the server has."""
        if tools and "tool" in fault.said.lower():
            return f"{fault}. With --tool-syntax text tools are explained in the messages instead"
        if fault.status not in (400, 404, 422) or "model" not in fault.said.lower():
            return str(fault)
        try:
            status, _, text = await self._fetch("GET", "/models")
            names = [str(model["id"]) for model in json.loads(text)["data"]] if status == 200 else []
        except (Passing, AgentFailed, ValueError, LookupError, TypeError):
            names = []
        if not names or self.door.model in names:
            return str(fault)
        near = difflib.get_close_matches(self.door.model, names, 3, 0.4) or sorted(names)[:5]
        return f"{self.door.base_url} has no model {self.door.model!r}; it has {', '.join(near)}"


def _pause(state: tenacity.RetryCallState, seed: int) -> float:
    """What the server asked for, else twice as long every time; keyed noise, so that not all come back at once."""
    problem = state.outcome.exception() if state.outcome else None
    asked = getattr(problem, "retry_after", None)
    part = derive(seed, state.attempt_number) / 2**63
    if asked is not None:
        return float(asked) + part
    return min(FIRST_PAUSE_S * 2.0 ** (state.attempt_number - 1), LONGEST_PAUSE_S) * (0.5 + part / 2)


def _reason(problem: Exception) -> str:
    """What went wrong with a connection, in the words of the system where it has some."""
    cause = getattr(problem, "os_error", None) or problem
    number = getattr(cause, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number)
    return getattr(cause, "strerror", None) or str(cause).partition("\n")[0] or type(problem).__name__
