"""Who is evaluated. The seam between an episode and an agent, whatever door it is reached by.

A `Door` is a way to an agent: a callable, an endpoint, a command. It is opened once per evaluation and gives an
`Agent`; the agent takes a `Seat` in each episode and is asked for one `Reply` after the other:

    async with door.open(tools) as agent:
        async with agent.sit(seat) as act:
            reply = await act(messages)         # the whole conversation so far → what the agent says next

What goes wrong has a name. `AgentFailed`: the agent's own doing, the episode counts with score 0. `ContextExceeded`:
the conversation has outgrown the agent, the episode is truncated. `AgentFault`: infrastructure, no score.
`Unpaid`: the evaluation's money is spent, no score. `AgentLost`: nobody is there any more (a revoked key, an empty
account). With both the evaluation stops and can be resumed.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from espl_envs.core.errors import EnvironmentFault, EsplError
from espl_envs.core.messages import Conversation, Message, ToolSpec
from espl_envs.evaluate.config import AgentConfig
from espl_envs.evaluate.records import EpisodeKey, TurnUsage

MAX_REPLY = 2_000_000           # characters of one reply, its reasoning included; about half a million tokens
ToolSyntax = Literal["text", "native"]


class AgentFailed(EsplError):
    """The agent raised, hung, or said what is no reply. The episode is an AGENT_ERROR: score 0, with this sentence.
    `calls`: model calls that it had made by then; they are paid for."""

    calls: tuple[TurnUsage, ...] = ()


class ContextExceeded(EsplError):
    """The conversation no longer fits into what the agent can read, or its budget is used up. The episode is truncated.
    `calls` as in AgentFailed."""

    calls: tuple[TurnUsage, ...] = ()


class AgentFault(EnvironmentFault):
    """The infrastructure of the agent failed, and was tried again where that makes sense. The episode has no score.
    `calls` as in AgentFailed."""

    calls: tuple[TurnUsage, ...] = ()


class Unpaid(EsplError):
    """Another model call is needed, and --max-cost leaves none. The episode has no score, whatever it had come to, and
    is played again when there is money. `calls` as in AgentFailed."""

    calls: tuple[TurnUsage, ...] = ()


class AgentLost(EsplError):
    """The agent cannot be reached by anybody any more. The evaluation ends; what is there is kept."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an agent says next: an assistant message, and the model calls that it took (none known: empty).

    The runner fills in `TurnUsage.tool_calls`.
    """

    message: Message
    calls: tuple[TurnUsage, ...] = ()


class Tab(Protocol):
    """What one episode costs, against what the whole evaluation may. The runner charges what an agent's replies took;
    an agent that makes calls between its replies charges them as they are made."""

    def charge(self, calls: Sequence[TurnUsage]) -> None:
        """Count calls that were made; one that was charged already is not charged again. Raises EsplError, which ends
        the evaluation, where there is a limit and nobody knows what they cost."""
        ...

    def call(self) -> AbstractAsyncContextManager[None]:
        """Make one call, and charge it, in this block. It waits while those that are under way could use up the money;
        raises Unpaid when it is spent."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """One episode as the agent's side sees it.

    seed: keyed by the evaluation's seed and `key`, the same whenever this episode is played. tools: what may be called;
    native: whether they are to be offered to the model by its server (otherwise the messages explain them).
    env: the environment itself. It knows the reference answer: for the built-in agents, nobody else looks at it.
    tab: for agents that make model calls between their replies.
    """

    key: EpisodeKey
    seed: int
    task_id: str
    tools: tuple[ToolSpec, ...]
    native: bool
    env: Any
    tab: Tab


Act = Callable[[Conversation], Awaitable[Reply]]


class Agent(Protocol):
    """An agent that can be asked. All calls come from one event loop."""

    def sit(self, seat: Seat) -> AbstractAsyncContextManager[Act]:
        """Take part in one episode. Leaving the block ends whatever the agent does for it."""
        ...

    def standing(self) -> str:
        """How it gets on, for the progress display; may be empty."""
        ...


class Door(Protocol):
    """A way to an agent, known before anything is started.

    config: what config.json says about the agent. tool_syntax: how tools are offered, and concurrency: episodes at
    once, unless the user says otherwise. system_prompts: what the agent brings along (the chosen prompt of a training
    run); empty for the environments' own.
    """

    config: AgentConfig
    tool_syntax: ToolSyntax
    concurrency: int
    system_prompts: tuple[str, ...]

    def open(self, tools: Sequence[ToolSpec]) -> AbstractAsyncContextManager[Agent]:
        """Start what is needed and see that it works. `tools`: all that will be offered natively. Raises EsplError, in
        one sentence and before any episode, where the agent cannot be reached."""
        ...


def as_reply(said: object) -> Reply:
    """What an agent returned as a Reply: a text, an assistant Message (or its dict in OpenAI's shape), or a Reply.
    Raises AgentFailed for anything else, and for a reply of more than MAX_REPLY characters, whose calls are paid for.
    """
    reply = said if isinstance(said, Reply) else Reply(_message(said))
    if not isinstance(reply.message, Message) or reply.message.role != "assistant":
        raise AgentFailed(f"the agent returned {_described(reply.message)}, {_EXPECTED}")
    size = len(reply.message.content) + sum(len(call.reasoning) for call in reply.calls)
    size += sum(len(call.id) + len(call.name) + len(call.arguments) for call in reply.message.tool_calls)
    if size > MAX_REPLY:
        problem = too_long(f"{size:,} characters")
        problem.calls = reply.calls
        raise problem
    return reply


def too_long(size: str) -> AgentFailed:
    """What a reply of this size comes to, whatever door it came by."""
    return AgentFailed(f"the reply is too long: {size}, and at most {MAX_REPLY:,} characters are played")


def _message(said: object) -> Message:
    if isinstance(said, str):
        return Message("assistant", str(said))
    if isinstance(said, Message):
        return said
    if isinstance(said, Mapping):
        try:
            return Message.from_openai({"role": "assistant", **said})
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise AgentFailed(f"the agent returned a dict that is no message: {sentence(problem)}") from problem
    raise AgentFailed(f"the agent returned {_described(said)}, {_EXPECTED}")


_EXPECTED = "expected a text or an assistant Message"


def _described(said: object) -> str:
    if said is None:
        return "None"
    return f"a Message of the role {said.role!r}" if isinstance(said, Message) else f"a value of {type(said).__name__}"


def sentence(problem: BaseException, longest: int = 300) -> str:
    """An exception in one line: its type and the first line of what it says."""
    said = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    text = f"{type(problem).__name__}: {said}" if said else type(problem).__name__
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def failure(problem: BaseException) -> AgentFailed:
    """An exception out of the agent's own code as AgentFailed: what, and in which line, its own rather than a
    library's."""
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if not frame.filename.startswith(_OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    where = f" ({own[-1].filename.rpartition('/')[2]}, line {own[-1].lineno})" if own else ""
    return AgentFailed(f"the agent raised {sentence(problem)}{where}")


_OURS = __file__.rpartition("/")[0]
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
