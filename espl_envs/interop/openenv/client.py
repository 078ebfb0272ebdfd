"""An environment behind an OpenEnv server as one of ours: its tasks or seeds, its rewards, their sum as the score."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

from espl_envs.core import background
from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EnvironmentFault, EsplError, MissingExtra
from espl_envs.core.family import Episode, Family, Stop
from espl_envs.core.messages import Message
from espl_envs.core.protocol import WholeReply, fenced_blocks, visible
from espl_envs.core.tasks import Split, Task, TaskSource
from espl_envs.grading.verdict import Status, Verdict
from espl_envs.tasks.generated import SIZES, SPLITS, seed_of

OURS = {"content", "tool_calls"}


class OpenEnvEnv(TextEnv):
    """Any environment that an OpenEnv server offers.

    Observation: what the server shows, as text: its only text field, else its JSON. A server of this package
    (`espl-eval serve`) gives the conversation itself. Action: where the server's action has one required field, the
    visible reply is it; else the reply holds a JSON object, alone or in a fenced block, and the system message shows
    its schema. An action that the server refuses is answered with the reason and costs a turn. Reward: the sum of the
    server's rewards, given at the end, as it is. Terminated when the server says done; truncated after `max_turns`.

    Splits and tasks: those of the server's Task API; where it has none, seeds (train 2000, validation 500, test 500),
    which mean as much as the server makes of them. There is no oracle: references stay on the server.

    Arguments
        base_url: the server, as in "http://localhost:8000".
        reset: further arguments of every reset.
        timeout: seconds to wait for an answer; longer is a fault.
        others: see `TextEnv`. 50 turns by default.

    Source: openenv 0.10 (extra `openenv`). Versions: v0, the first one.
    """

    hidden = True

    def __init__(
        self, base_url: str, *, reset: Mapping[str, Any] | None = None, timeout: float = 120.0, **settings: Any
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._more, self._timeout = dict(reset or {}), timeout
        self._schema = _asked(f"{self.base_url}/schema")["action"]
        self._session: _Session | None = None
        sources = {split: partial(_tasks, name, split, size, numbered)
                   for split, (name, size, numbered) in _offered(self.base_url).items()}
        super().__init__(Family(sources=sources, grade=_grade, protocol=WholeReply(), max_turns=50), **settings)

    def _pick(self, options: Mapping[str, Any]) -> Task:
        """The task, with the server's opening as its question; runs in a thread, because its source is slow."""
        task = super()._pick(options)
        self._session = background.run(_Session.begin(self.base_url, self._timeout, self._schema,
                                                      {**task.data["reset"], **self._more}))
        self._protocol_text = self._session.protocol
        return replace(task, question=self._session.question)

    async def _play(self, episode: Episode, reply: Message) -> Stop:
        session, self._session = episode.context.state.get("session", self._session), None
        assert session is not None
        if "session" not in episode.context.state:
            episode.context.state["session"] = session
            episode.context.stack.push_async_callback(session.close)
        episode.messages += (reply,)
        episode.turn += 1
        try:
            async with asyncio.timeout(self._seconds_left(episode)) as limit:
                stop = await session.play(reply)
        except TimeoutError:
            if not limit.expired():
                raise
            return "deadline"
        episode.messages += session.heard
        if not stop and episode.turn >= self.max_turns:
            stop = "max_turns"
        if stop:
            episode.verdict = session.verdict()
        return stop

    async def aclose(self) -> None:
        """The asynchronous form of `close`; an opening that was never answered is closed, too."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        await super().aclose()


@dataclass(slots=True)
class _Session:
    """One episode on the server. `heard`: what its last answer adds to the conversation."""

    client: Any
    schema: Mapping[str, Any]
    protocol: str = ""
    question: str = ""
    heard: tuple[Message, ...] = ()
    total: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    async def begin(cls, url: str, timeout: float, schema: Mapping[str, Any], reset: Mapping[str, Any]) -> _Session:
        try:
            from openenv.core import GenericEnvClient
        except ImportError as missing:
            raise MissingExtra("openenv", f"OpenEnv (no module {missing.name})") from missing
        self = cls(GenericEnvClient(base_url=url, message_timeout_s=timeout), schema)
        try:
            start = await self._asked(self.client.reset(**reset))
        except BaseException:
            await self.close()
            raise
        spoken = _messages(start.observation)
        self.question = spoken[-1].content
        if len(spoken) > 1:
            self.protocol = "\n\n".join(message.content for message in spoken[:-1])
        elif self._field() is None:
            self.protocol = f"Answer with one JSON object that fits this schema:\n{json.dumps(schema)}"
        return self

    async def play(self, reply: Message) -> Stop:
        """Send a reply; how the episode ended, if it did."""
        try:
            action = self._action(reply)
            result = await self._asked(self.client.step(action))
        except _Refused as refusal:
            self.heard = (Message("user", f"Error: {refusal}"),)
            return ""
        self.total += float(result.reward or 0.0)
        self.heard = () if result.done and not self._ours else _messages(result.observation)
        self.info = result.metadata or result.observation.get("metadata") or {}
        if not result.done:
            return ""
        stops: tuple[Stop, ...] = get_args(Stop)
        said = self.info.get("stop_reason") if self._ours else ""
        return next((stop for stop in stops if stop and stop == said), "answer")

    def verdict(self) -> Verdict:
        """The sum of the rewards; what a server of ours says of it beside."""
        if not self._ours:
            return Verdict(self.total)
        status: Status = self.info.get("verdict") or "ok"
        return Verdict(self.total, status, self.info.get("answer") or None)

    async def close(self) -> None:
        """Leave the server."""
        await self.client.close()

    @property
    def _ours(self) -> bool:
        return OURS.issubset(self.schema.get("properties", ()))

    def _field(self) -> str | None:
        """The action's one required text field, if it has one."""
        required = self.schema.get("required", ())
        rule = self.schema.get("properties", {}).get(required[0], {}) if len(required) == 1 else {}
        return required[0] if rule.get("type") == "string" else None

    def _action(self, reply: Message) -> dict[str, Any]:
        if self._ours:
            calls = reply.to_openai().get("tool_calls", [])
            return {"content": reply.content, "tool_calls": calls}
        said = visible(reply.content).strip()
        field = self._field()
        if field is not None:
            return {field: said}
        blocks = [content for _, content in fenced_blocks(said)]
        try:
            action = json.loads(blocks[-1] if blocks else said)
        except (ValueError, RecursionError) as problem:
            raise _Refused(f"the reply is no JSON object: {problem}") from problem
        if not isinstance(action, dict):
            raise _Refused(f"the reply is a JSON {type(action).__name__}, expected an object")
        return action

    async def _asked(self, answer: Any) -> Any:
        try:
            return await answer
        except RuntimeError as problem:
            if "(code: VALIDATION_ERROR)" in str(problem):
                raise _Refused(str(problem)) from problem
            raise EnvironmentFault(f"the OpenEnv server failed: {problem}") from problem
        except Exception as problem:            # whatever its transport raises: websockets' errors, OSError, timeouts
            raise EnvironmentFault(f"the OpenEnv server is lost: {type(problem).__name__}: {problem}") from problem


class _Refused(Exception):
    """The agent's action is none; the text goes back to it."""


class _RemoteTasks:
    """`size` tasks that a server knows by number, or seeds. Their content is known when they are played."""

    slow = True

    def __init__(self, name: str, split: Split, size: int, numbered: bool) -> None:
        self._name, self._split, self._size, self._numbered = name, split, size, numbered
        self.hash = hashlib.sha256(json.dumps([name, split, size, numbered]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Task:
        """The task at `index`; IndexError outside `range(len(self))`."""
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} is outside 0..{self._size - 1}")
        seed = seed_of(self._name, SPLITS[self._split], index) % 2**31
        wanted = {"split": self._split, "index": index} if self._numbered else {"seed": seed}
        return Task(f"{self._name}-{self._split}-{index}", self._split, "", "", {"reset": wanted})


def _tasks(name: str, split: Split, size: int, numbered: bool) -> TaskSource:
    return _RemoteTasks(name, split, size, numbered)


def _offered(url: str) -> dict[Split, tuple[str, int, bool]]:
    """Split → the environment's name, how many tasks, and whether the server knows them by number."""
    names = _asked(f"{url}/list_environments", optional=True) or ["openenv"]
    place = f"{url}/{urllib.parse.quote(names[0])}"
    found = [split["name"] for split in _asked(f"{place}/splits", optional=True) or ()]
    known: list[Split] = [split for split in SPLITS if split in found]
    if not known:
        return {split: (names[0], size, False) for split, size in SIZES.items()}
    return {split: (names[0], _asked(f"{place}/num_tasks", {"split": split})["num_tasks"], True) for split in known}


def _asked(url: str, body: Mapping[str, Any] | None = None, *, optional: bool = False) -> Any:
    """What a page of the server says; None for an optional one that it does not have. Raises EsplError."""
    if not url.startswith(("http://", "https://")):
        raise EsplError(f"base_url is {url.rpartition('/')[0]!r}, expected http://… or https://…")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as problem:
        if optional and problem.code in (404, 405, 422, 501):
            return None
        raise EsplError(f"{url} answers {problem.code}: is an OpenEnv server there?") from problem
    except (OSError, ValueError) as problem:
        raise EsplError(f"there is no OpenEnv server at {url.rpartition('/')[0]}: {problem}") from problem


def _messages(observation: Mapping[str, Any]) -> tuple[Message, ...]:
    """What an observation says: its messages, its only text, or all of it as JSON."""
    spoken = observation.get("messages")
    if isinstance(spoken, list) and spoken and all(isinstance(one, dict) and "role" in one for one in spoken):
        return tuple(Message.from_openai(one) for one in spoken)
    if "messages" in observation and "truncated" in observation:
        return ()
    shown = {key: value for key, value in observation.items() if key != "metadata" and value not in (None, "", [], {})}
    texts = [value for value in shown.values() if isinstance(value, str)]
    return (Message("user", texts[0] if len(shown) == len(texts) == 1 else json.dumps(shown, ensure_ascii=False)),)


async def _grade(task: Task, answer: str) -> Verdict:
    raise EsplError(f"episodes of a server are judged there: {task.id}, {answer[:20]!r}")
