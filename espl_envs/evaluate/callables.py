"""The door for an agent written in Python: `--agent mypackage:agent`.

    def agent(messages, tools):                 # tuple[Message, ...], tuple[ToolSpec, ...]
        return "… \\boxed{42}"                   # a text, or an assistant Message with tool calls

- `messages` is the whole conversation, `message.to_openai()` the dict that servers take; `tools` are OpenAI schemas
  (`tool.to_openai()`). Return a text, a `Message`, its dict, or a `Reply` that also says what the model calls took.
- A plain function runs in a thread, many at once; an `async def` is awaited on an event loop that all its episodes
  share, and must not block it.
- A class is made anew for every episode, so that an agent may remember its episode; it is called like the function. If
  it has a method `close`, that is called at the end. Any other object is shared by all episodes.
- `mypackage` is found in the current folder, too, and may be a file: `path/to/agent.py:agent`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Conversation, ToolSpec
from espl_envs.evaluate import fingerprint
from espl_envs.evaluate.agents import Act, AgentFailed, Reply, Seat, ToolSyntax, as_reply, failure, sentence
from espl_envs.evaluate.config import AgentConfig
from espl_envs.evaluate.threads import Loop, Threads

CLOSE_S = 10.0
STILL_S = 5.0           # without a sign of life of the agent's event loop, before that is said
BLOCKED = "an `async def` agent must await what takes time, or be a plain function"


class CallableDoor:
    """The agent at `path`, "package.module:name". `timeout`: seconds for one reply, after which the agent hangs.

    Raises EsplError where there is no such thing, or it cannot be called with messages and tools.
    """

    tool_syntax: ToolSyntax = "text"
    system_prompts: tuple[str, ...] = ()
    concurrency = 32

    def __init__(self, path: str, timeout: float = 600.0, concurrency: int = 32) -> None:
        module, self.target = _loaded(path)
        self.timeout, self.concurrency = timeout, concurrency
        _callable_with_two(path, self.target)
        files = fingerprint.of_module(module)
        self.config = AgentConfig("callable", path, settings={"timeout": timeout}, files=files)

    @asynccontextmanager
    async def open(self, tools: Sequence[ToolSpec]) -> AsyncIterator[CallableAgent]:  # noqa: ARG002
        """Nothing has to be started."""
        agent = CallableAgent(self.target, self.timeout)
        try:
            yield agent
        finally:
            agent.threads.close()
            agent.loop.close()


class CallableAgent:
    """Asks a callable, or an instance of a class per episode."""

    def __init__(self, target: Any, timeout: float) -> None:
        self.target, self.timeout, self.threads, self.loop = target, timeout, Threads(), Loop()

    def standing(self) -> str:
        """Whether one episode keeps the others waiting."""
        still = self.loop.still()
        return f"the agent's event loop has stood still for {still:.0f} s: {BLOCKED}" if still > STILL_S else ""

    @asynccontextmanager
    async def sit(self, seat: Seat) -> AsyncIterator[Act]:
        """One episode; see the module."""
        instance = await self._ask(self.target, threaded=True) if inspect.isclass(self.target) else self.target

        async def act(messages: Conversation) -> Reply:
            said = await self._ask(partial(instance, messages, seat.tools), threaded=not _is_async(instance))
            return as_reply(said)

        try:
            yield act
        finally:
            close = getattr(instance, "close", None)
            if instance is not self.target and callable(close):
                await self._ask(close, threaded=not _is_async(close), timeout=CLOSE_S)

    async def _ask(self, call: Callable[[], Any], threaded: bool, timeout: float | None = None) -> Any:
        """The result of the agent's code. Raises AgentFailed for whatever it raises, and at the timeout; a coroutine
        that does not let itself be cancelled is left behind."""
        limit = self.timeout if timeout is None else timeout
        task = asyncio.create_task(self._said(call, threaded))
        try:
            await asyncio.wait({task}, timeout=limit)
        finally:
            task.cancel()
        if not task.done() or task.cancelled():
            raise AgentFailed(f"the agent gave no reply within {limit:g} s")
        value, problem = task.result()
        if isinstance(problem, AgentFailed):
            raise problem
        if problem is not None:
            raise failure(problem) from problem
        return value

    async def _said(self, call: Callable[[], Any], threaded: bool) -> tuple[Any, BaseException | None]:
        """What the agent's code comes to; exceptions as values, since SystemExit out of a task would end the loop."""
        try:
            said = await self.threads.run(call) if threaded else await self.loop.run(call)
            return (await self.loop.run(partial(_awaited, said)) if inspect.isawaitable(said) else said), None
        except BaseException as problem:
            return None, problem


async def _awaited(said: Awaitable[Any]) -> Any:
    return await said


def _is_async(target: Any) -> bool:
    bound = target.func if isinstance(target, partial) else target
    return inspect.iscoroutinefunction(bound) or inspect.iscoroutinefunction(getattr(bound, "__call__", None))  # noqa: B004


def load(path: str) -> Any:
    """The object at "package.module:name" or "file.py:name". Raises EsplError, in one sentence, where there is none."""
    return _loaded(path)[1]


def _loaded(path: str) -> tuple[ModuleType, Any]:
    """The module, and the object in it."""
    module, colon, name = path.rpartition(":")
    if not colon or not module or not name:
        raise EsplError(f"--agent is {path!r}, expected package.module:name, file.py:name, or oracle, silent, random")
    home = found = _module(module, path)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = [n for n, value in vars(found).items() if callable(value) and not n.startswith("_")][:5]
            hint = f"; it has {', '.join(near)}" if near else ""
            raise EsplError(f"--agent {path!r}: {module} has no {part!r}{hint}") from None
    return home, found


def _module(name: str, path: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))        # last: a json.py here must not become everybody's json
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise EsplError(f"--agent {path!r}: there is no file {name}")
        return _from_file(Path(name))
    except EsplError:
        raise
    except ModuleNotFoundError as missing:
        raise EsplError(f"--agent {path!r}: there is no module {missing.name!r} here") from missing
    except (Exception, SystemExit) as problem:
        raise EsplError(f"--agent {path!r}: importing it raised {sentence(problem)}") from problem


def _from_file(file: Path) -> Any:
    """Under a name of its own: a file json.py must not take the place of the module json. It finds its neighbours, as
    it does when Python runs it."""
    sys.path.append(str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"espl_agent_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _callable_with_two(path: str, target: Any) -> None:
    if not callable(target):
        raise EsplError(f"--agent {path!r} is a value of {type(target).__name__}, expected something to call")
    called: Any = getattr(target, "__call__", None) if inspect.isclass(target) else target  # noqa: B004
    if inspect.isclass(target) and "__call__" not in {name for kind in target.__mro__ for name in vars(kind)}:
        raise EsplError(f"--agent {path!r} is a class whose instances cannot be called: give it __call__")
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return                                          # a built-in function does not say
    wanted: tuple[object, ...] = ((),) * (3 if inspect.isclass(target) else 2)
    try:
        signature.bind(*wanted)
    except TypeError:
        raise EsplError(f"--agent {path!r} takes {signature}, expected two arguments: messages and tools") from None
