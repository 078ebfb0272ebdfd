"""The tools of an episode over the Model Context Protocol: for agents that bring their own loop.

`ToolHost` serves many episodes at once on loopback, each at an address of its own that nobody can guess. `python -m
espl_envs.interop.mcp --env ID --task N` plays one episode over standard input and output: its tools, and one more that
takes the final answer.

A call goes to the environment as an agent's native call would, so schemas, limits and scores are the same; what is
wrong with it comes back as a tool error. Needs the extra `mcp`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError, MissingExtra
from espl_envs.core.messages import Message, ToolCall, ToolSpec, transcript
from espl_envs.tools.base import tool_spec

ANSWER = "final_answer"
ERROR = "Error: "           # how texts of tools begin that tell an agent of its mistake

Play = Callable[[ToolCall], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Offer:
    """Tools, and what makes one call of them and gives the text that comes of it."""

    tools: tuple[ToolSpec, ...]
    play: Play


_offered: ContextVar[Offer] = ContextVar("espl_mcp_offer")


def tool_server(offer: Callable[[], Offer], instructions: str | None = None) -> Any:
    """An MCP server (`mcp.server.Server`); `offer` is asked in the context of every request what it is about.

    Raises MissingExtra without the package.
    """
    try:
        import mcp_types as types
        from mcp.server.lowlevel import Server
    except ImportError:
        raise MissingExtra("mcp", "a server of tools over MCP") from None

    async def on_list_tools(_context: Any, _params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[
            types.Tool(name=tool.name, description=tool.description, input_schema=json.loads(tool.schema))
            for tool in offer().tools
        ])

    async def on_call_tool(_context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        call = ToolCall(f"mcp_{secrets.token_hex(8)}", params.name, json.dumps(params.arguments or {}))
        text = (await offer().play(call)).encode("utf-8", "replace").decode()
        content: list[types.ContentBlock] = [types.TextContent(type="text", text=text)]
        return types.CallToolResult(content=content, is_error=text.startswith(ERROR))

    return Server("espl", instructions=instructions, on_list_tools=on_list_tools, on_call_tool=on_call_tool)


class ToolHost:
    """Streamable HTTP on 127.0.0.1. Open it on the loop on which episodes are played."""

    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}
        self._manager: Any = None
        self._url = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ToolHost]:
        """Listen for the length of the block. Raises MissingExtra."""
        server = tool_server(_offered.get)
        import uvicorn
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
        from mcp.server.transport_security import TransportSecuritySettings

        listener = socket.create_server(("127.0.0.1", 0))
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        self._url = f"http://{host}"
        security = TransportSecuritySettings(allowed_hosts=[host])
        self._manager = StreamableHTTPSessionManager(
            server, json_response=True, stateless=True, security_settings=security
        )
        http = uvicorn.Server(uvicorn.Config(
            self._dispatch, interface="asgi3", lifespan="off", ws="none", log_config=None, access_log=False,
            timeout_graceful_shutdown=1,
        ))  # fmt: skip
        serving = asyncio.create_task(self._serve(http, listener))
        try:
            while not http.started and not serving.done():
                await asyncio.sleep(0.01)
            yield self
        finally:
            http.should_exit = True
            await asyncio.wait({serving})

    @contextmanager
    def offer(self, offer: Offer) -> Iterator[str]:
        """The address of an episode's tools, as long as the block lasts."""
        token = secrets.token_urlsafe(24)
        self._offers[token] = offer
        try:
            yield f"{self._url}/{token}/mcp"
        finally:
            del self._offers[token]

    async def _serve(self, http: Any, listener: socket.socket) -> None:
        """In a task of its own: what is raised through the manager's block would come out in groups."""
        async with self._manager.run():
            await http.serve(sockets=[listener])

    async def _dispatch(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application: by the token in the path to the episode."""
        token, _, rest = scope.get("path", "").removeprefix("/").partition("/")
        if scope["type"] == "http" and rest == "mcp" and token in self._offers:
            _offered.set(self._offers[token])
            await self._manager.handle_request(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"there is no such episode, or it is over\n"})


class Game:
    """One episode of an environment played over MCP, by whoever calls: one call at a time."""

    def __init__(self, env: TextEnv) -> None:
        self.env, self.reward, self.over = env, 0.0, False
        self._turn = asyncio.Lock()

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Those of the environment, and one for the answer."""
        text = {"text": {"type": "string", "description": "The reply, in the form that the task asks for."}}
        return (*self.env.tools, tool_spec(ANSWER, "Reply without a tool; for most tasks this ends the episode.", text))

    async def play(self, call: ToolCall) -> str:
        """What comes back."""
        async with self._turn:
            if self.over:
                return f"{ERROR}the episode is over."
            before = len(self.env.messages)
            if call.name == ANSWER:
                said = call.parsed().get("text")
                if not isinstance(said, str):
                    return f"{ERROR}{ANSWER}: the argument 'text' is missing."
                reply = Message("assistant", said)
            else:
                reply = Message("assistant", "", (call,))
            messages, reward, terminated, truncated, info = await self.env.astep(reply)
            self.reward, self.over = self.reward + reward, terminated or truncated
            said = "\n\n".join(message.content for message in messages[before + 1 :])
            ending = f"The episode is over ({info['stop_reason']}); the score is {self.reward:g}." if self.over else ""
            return "\n\n".join(part for part in (said, ending) if part)


async def play_over_stdio(env_id: str, task: int, **arguments: Any) -> None:
    """Serve one episode until the client leaves. The task stands in the server's instructions."""
    from mcp.server.stdio import stdio_server

    from espl_envs.registry import make

    env: Any = make(env_id, **{"tool_syntax": "native", **arguments}).unwrapped
    if not isinstance(env, TextEnv):
        raise EsplError(f"{env_id} is a {type(env).__name__}: only text environments are played over MCP")
    messages, _ = await env.areset(seed=0, options={"task": task})
    game = Game(env)
    offer = Offer(game.tools, game.play)
    server = tool_server(lambda: offer, transcript(messages))
    try:
        async with stdio_server() as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())
    finally:
        await env.aclose()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m espl_envs.interop.mcp`."""
    parser = ArgumentParser(prog="python -m espl_envs.interop.mcp", description="One episode over MCP (stdio).")
    parser.add_argument("--env", required=True, metavar="ID")
    parser.add_argument("--task", type=int, default=0, metavar="N", help="index into the split (0)")
    parser.add_argument("--split", help="default: the first that the environment has")
    chosen = parser.parse_args(argv)
    try:
        more = {"split": chosen.split} if chosen.split else {}
        asyncio.run(play_over_stdio(chosen.env, chosen.task, **more))
    except EsplError as problem:
        print(f"espl-mcp: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
