"""The door for an agent that is a program of its own: `--command "my-agent {task_file}"`.

For every episode the command is run once in a folder of its own, without a shell. `{task_file}`, as (part of) one word,
is the path of a JSON file:

    {"task_id": …, "messages": […], "tools": […], "answer_file": …, "mcp_url": …, "base_url": …, "model": …}

`messages` is the conversation that opens the episode in OpenAI's shape, `tools` what can be called at `mcp_url` (MCP,
streamable HTTP), one episode's tools at each address. The same is in ESPL_TASK_FILE, ESPL_ANSWER_FILE and ESPL_MCP_URL.
With `--base-url` and `--model`, OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL lead to that model through the
recording proxy (`proxy.py`), and the real key is not in the program's environment.

The answer is what stands in `answer_file` when the program has ended, else the end of what it printed (64 KB). Where
the environment asks on after an answer, the command is run again with the longer conversation. Exit codes other than 0,
and more than `--timeout` seconds of its own, are the agent's errors; at the end of an episode whatever the program has
started is killed, in whatever session it hides. The program is the user's own code: it is not in a sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, Message, ToolCall, ToolSpec
from espl_envs.evaluate import fingerprint
from espl_envs.evaluate.agents import (
    MAX_REPLY,
    Act,
    AgentFailed,
    AgentFault,
    ContextExceeded,
    Reply,
    Seat,
    ToolSyntax,
    Unpaid,
    as_reply,
    too_long,
)
from espl_envs.evaluate.config import AgentConfig
from espl_envs.evaluate.credentials import VARIABLE
from espl_envs.evaluate.endpoint import EndpointDoor
from espl_envs.evaluate.program import Program, ended, words_of
from espl_envs.evaluate.proxy import Ledger, Proxy
from espl_envs.evaluate.records import TurnUsage

if TYPE_CHECKING:
    from espl_envs.evaluate.doors import Wanted
    from espl_envs.interop.mcp import ToolHost

PLACE = "{task_file}"
NOTHING = TurnUsage(0, 0, 0, 0.0, 0.0)


class CommandDoor:
    """Raises EsplError for a command that cannot be run, and for half a server."""

    tool_syntax: ToolSyntax = "native"
    system_prompts: tuple[str, ...] = ()

    def __init__(self, wanted: Wanted) -> None:
        assert wanted.command is not None
        self.words, self.timeout = words_of(wanted.command), wanted.timeout
        if (wanted.base_url is None) != (wanted.model is None):
            raise EsplError("--command takes --base-url and --model together: the model that the program is given")
        self.concurrency = wanted.concurrency or 16
        self.folder, self.budget, self.secret = wanted.out, wanted.budget, wanted.secret
        self.upstream = None
        if wanted.base_url is not None and wanted.model is not None:
            self.upstream = EndpointDoor(
                wanted.base_url, wanted.model, wanted.secret, wanted.sampling, wanted.limits, wanted.prices
            )
        elif self.budget.to_dict():
            raise EsplError("the proxy keeps an episode's budget: name the model with --base-url and --model")
        shown = wanted.secret.hidden(wanted.command)
        self.config = AgentConfig(
            "command", shown, wanted.model, self.upstream.base_url if self.upstream is not None else None,
            {"timeout": self.timeout, **wanted.sampling.to_dict(), **self.budget.to_dict()},
            fingerprint.of_words(self.words),
        )

    @asynccontextmanager
    async def open(self, tools: Sequence[ToolSpec]) -> AsyncIterator[Commands]:
        """Start the proxy and the host of the tools; the model has to answer. Raises EsplError."""
        async with AsyncExitStack() as stack:
            proxy = host = None
            if self.upstream is not None:
                endpoint = await stack.enter_async_context(self.upstream.open(()))
                proxy = await stack.enter_async_context(
                    Proxy(endpoint, self.upstream.sampling.fields(), self.folder).open()
                )
            if tools:
                from espl_envs.interop.mcp import ToolHost

                host = await stack.enter_async_context(ToolHost().open())
            yield Commands(self, proxy, host)


class Commands:
    """Runs the command, once for every episode under way."""

    def __init__(self, door: CommandDoor, proxy: Proxy | None, host: ToolHost | None) -> None:
        self.door, self.proxy, self.host = door, proxy, host
        self.running = 0

    def standing(self) -> str:
        """How many run."""
        return f"{self.running} programs"

    @asynccontextmanager
    async def sit(self, seat: Seat) -> AsyncIterator[Act]:
        """One episode: a folder, a key, an address for its tools, a program."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="espl-episode-"))
        with ExitStack() as stack:
            ledger = Ledger(seat, self.door.budget)
            if self.proxy is not None:
                stack.enter_context(self.proxy.admit(ledger))
            table = _Table(self.door, seat, folder, ledger, self.proxy.url if self.proxy is not None else None)
            if self.host is not None and seat.native and seat.tools:
                from espl_envs.interop.mcp import Offer

                table.mcp_url = stack.enter_context(self.host.offer(Offer(seat.tools, table.call)))
            self.running += 1
            try:
                yield table.act
            finally:
                self.running -= 1
                await asyncio.shield(table.clear())


@dataclass(eq=False)
class _Table:
    """One episode: what its program and the environment say to each other."""

    door: CommandDoor
    seat: Seat
    folder: Path
    ledger: Ledger
    base_url: str | None
    mcp_url: str | None = None
    program: Program | None = None
    left: float = 0.0                                       # seconds of its own that the program has
    over: bool = False
    calls: asyncio.Queue[tuple[ToolCall, asyncio.Future[str]]] = field(default_factory=asyncio.Queue)
    answered: list[asyncio.Future[str]] = field(default_factory=list)      # calls that the environment is playing

    async def call(self, call: ToolCall) -> str:
        """A tool call of the program: the text that the environment answers."""
        if self.over:
            return "Error: the episode is over."
        result: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.calls.put_nowait((call, result))
        return await result

    async def act(self, messages: Conversation) -> Reply:
        """The program's next tool calls, or its answer."""
        try:
            message = await self._act(messages)
        except (AgentFailed, AgentFault, ContextExceeded, Unpaid) as problem:
            problem.calls = self.ledger.news()
            raise
        calls = self.ledger.news()
        return as_reply(Reply(message, calls or ((NOTHING,) if self.base_url else ())))

    async def _act(self, messages: Conversation) -> Message:
        self._deliver(messages)
        if self.program is None:
            self.left = self.door.timeout
            self.program = await Program.start(*await asyncio.to_thread(self._prepared, messages))
        began = time.monotonic()
        called = asyncio.ensure_future(self.calls.get())
        gone = asyncio.ensure_future(self.program.process.wait())
        events: set[asyncio.Future[Any]] = {called, gone, self.ledger.problem}
        try:
            await asyncio.wait(events, timeout=max(self.left, 0.0), return_when=asyncio.FIRST_COMPLETED)
            self.left -= time.monotonic() - began
            if self.ledger.problem.done():
                self.ledger.problem.result()
            if called.done():
                return self._called(called.result())
            if gone.done():
                return await self._answer()
        finally:
            called.cancel()
            gone.cancel()
        raise AgentFailed(f"the command did not come to an end within {self.door.timeout:g} s")

    def _called(self, first: tuple[ToolCall, asyncio.Future[str]]) -> Message:
        """All calls that are there, in one reply."""
        made = [first]
        while not self.calls.empty():
            made.append(self.calls.get_nowait())
        self.answered = [result for _, result in made]
        return Message("assistant", "", tuple(call for call, _ in made))

    def _deliver(self, messages: Conversation) -> None:
        """What the environment answered to the calls: its tool messages, in order."""
        texts = [message.content for message in messages[len(messages) - len(self.answered):]]
        for result, text in zip(self.answered, texts, strict=True):
            if not result.done():
                result.set_result(text)
        self.answered = []

    async def _answer(self) -> Message:
        """The program has ended."""
        assert self.program is not None
        program, self.program = self.program, None
        code = program.process.returncode
        printed, complaint = await program.end()
        if code and self.ledger.used_up:
            raise ContextExceeded(f"{self.ledger.used_up}, and the command {ended(code)}")
        if code:
            said = [line for line in complaint.decode("utf-8", "replace").splitlines() if line.strip()]
            why = self.door.secret.hidden(said[-1].strip().replace(self.ledger.key, "[key]"))[:300] if said else ""
            raise AgentFailed(f"the command {ended(code)}{': ' + why if why else ''}")
        return Message("assistant", await asyncio.to_thread(_written, self.folder / "answer.txt", printed))

    def _prepared(self, messages: Conversation) -> tuple[list[str], Path, dict[str, str]]:
        """The command's words, its folder with the task file, its environment."""
        task_file, answer_file = self.folder / "task.json", self.folder / "answer.txt"
        answer_file.unlink(missing_ok=True)
        task: dict[str, Any] = {
            "task_id": self.seat.task_id,
            "messages": [message.to_openai() for message in messages],
            "tools": [tool.to_openai() for tool in self.seat.tools] if self.mcp_url else [],
            "answer_file": str(answer_file),
            "mcp_url": self.mcp_url,
            "base_url": self.base_url,
            "model": self.door.config.model,
        }
        task_file.write_text(json.dumps(task, indent=1))
        told = {"ESPL_TASK_FILE": str(task_file), "ESPL_ANSWER_FILE": str(answer_file), "ESPL_MCP_URL": self.mcp_url}
        hidden: tuple[str, ...] = ()
        if self.base_url is not None:
            hidden = (VARIABLE, self.door.secret.name)
            told |= {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_BASE": self.base_url, VARIABLE: self.ledger.key,
                     "OPENAI_MODEL": self.door.config.model}  # fmt: skip
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env |= {name: value for name, value in told.items() if value is not None}
        return [word.replace(PLACE, str(task_file)) for word in self.door.words], self.folder, env

    async def clear(self) -> None:
        """The episode is over: end the program and remove the folder."""
        self.over = True
        if self.program is not None:
            with suppress(AgentFailed):         # it is over anyway
                await self.program.end()
        waiting = [*self.answered, *(self.calls.get_nowait()[1] for _ in range(self.calls.qsize()))]
        for result in waiting:
            if not result.done():
                result.set_result("Error: the episode is over.")
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


def _written(file: Path, printed: bytes) -> str:
    """The answer: the file where there is one, else what was printed last. Raises AgentFailed where it is too long."""
    if not file.is_file():
        return printed.decode("utf-8", "replace").strip()
    with file.open("rb") as stream:
        found = stream.read(4 * MAX_REPLY + 1)
    if len(found) > 4 * MAX_REPLY:
        raise too_long(f"an answer file of {file.stat().st_size:,} bytes")
    return found.decode("utf-8", "replace").strip()
