"""`TextEnv`: the Gymnasium environment that every family of text tasks is.

A *family* is plain data: where the tasks of each split come from, how an answer is asked for and read, which tools
there are, and an async grader. It is put together in one file of `espl_envs/tasks/`, by a subclass whose docstring is
the documentation page and whose constructor takes JSON-able arguments only and passes the settings on:

    class CapitalsEnv(TextEnv):
        '''Name the capital of a country. (Observation, action, reward, arguments, versions.)'''

        def __init__(self, continent: str = "europe", *, tools: Sequence[str] = (), **settings: Any) -> None:
            family = Family(
                sources={"train": partial(load, continent, "train"), "test": partial(load, continent, "test")},
                protocol=BoxedAnswer(),
                grade=grade,
                tools=make_tools(tools),
            )
            super().__init__(family, **settings)

    async def grade(task: Task, answer: str) -> Verdict:
        return Verdict(float(answer == task.answer), "ok", answer, task.answer)

- `sources`: split → function without arguments that returns a `TaskSource`. It is called at the first reset or when
  `tasks` is touched, possibly from several threads at once; cache it (`functools.cache`) so that envs share the rows.
- `grade(task, answer)` gets what `protocol.extract(reply)` found. Without an answer it is not called: the episode ends
  with status `no_answer`, score 0. A grader that cannot judge returns status `unavailable` or raises EnvironmentFault.
- Conversations with a partner (games, feedback) override `follow_up(episode)`: the next user message, or None when the
  episode is over. Graders that need the whole episode (the state of a sandbox) override `judge(episode, answer)`.
- `solve(episode)` is the next reply of an agent that knows everything. Override it where writing down `task.answer` is
  not enough: every id is tested to give its oracle 1 and a silent agent 0.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from espl_envs.core import background
from espl_envs.core.errors import EnvironmentFault, EsplError, UnknownTask
from espl_envs.core.family import Episode, Family, Stop
from espl_envs.core.messages import Conversation, Message, ToolCall, ToolSpec, transcript
from espl_envs.core.protocol import MalformedCall, Placement, opening, protocol_text, read_calls
from espl_envs.core.shuffle import Shuffle
from espl_envs.core.spaces import ChatSpace, ReplySpace
from espl_envs.core.tasks import Split, Task, TaskSource, twins_of
from espl_envs.grading.verdict import Verdict
from espl_envs.tools.base import Tool, ToolContext, ToolResult, use_tool

Info = dict[str, Any]
Step = tuple[Conversation, float, bool, bool, Info]
OPTIONS = ("task", "task_id", "system_prompt")


class TextEnv(gymnasium.Env[Conversation, str | Message]):
    """The whole conversation is the observation, the agent's reply is the action.

    Observation: `tuple[Message, ...]`, frozen. Action: `str`, or an assistant `Message` with native tool calls; kept
    verbatim. Reward: the verdict's score at the end, 0.0 before. Terminated: an answer was given (`stop_reason` answer)
    or a reply without one (format). Truncated: a budget ran out (max_turns, token_budget, tool_budget, deadline).

    `reset(options=…)` takes `task` (an index into `tasks`) or `task_id`, and `system_prompt`. Without a task, resets
    draw without repetition until the epoch ends, in an order that the last seed decides.

    Arguments
        split: where episodes come from; by default the first of train, validation, test that the family has, so that
            nobody trains on a test set by accident.
        twins: 0 for the tasks themselves; k for the k-th twin of each, a task of the same kind with other numbers,
            where the family makes such (generated ones do). Whoever learnt the tasks by heart does worse on twins.
        system_prompt: default of the system-prompt slot; an empty one makes no system message.
        protocol: where answer format and tool syntax go: "system" (after the system prompt), "user" (after the
            question) or "none".
        tool_syntax: "text" explains `<tool_call>` in the protocol text; "native" leaves that to the agent's chat
            template or server. Calls are read either way.
        max_turns: replies per episode; the tool calls of the last one are still made, so that a tool can submit.
        max_tool_calls: tool calls per episode, None for no limit.
        deadline: seconds per episode from reset, None for no limit.
        on_fault: "raise" EnvironmentFault, or "mask": truncate with info["fault"] = 1.0.
        render_mode: "ansi" (render returns the transcript) or "human" (messages are printed as they come).
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        family: Family,
        *,
        split: Split | None = None,
        twins: int = 0,
        system_prompt: str = "",
        protocol: Placement = "system",
        tool_syntax: Literal["text", "native"] = "text",
        max_turns: int | None = None,
        max_tool_calls: int | None = None,
        deadline: float | None = None,
        on_fault: Literal["raise", "mask"] = "raise",
        render_mode: str | None = None,
    ) -> None:
        self.family = family
        self.splits: tuple[Split, ...] = tuple(name for name in get_args(Split) if name in family.sources)
        self.split: Split = self.splits[0] if split is None else split
        _expect("split", self.split, self.splits)
        _expect("protocol", protocol, get_args(Placement))
        _expect("tool_syntax", tool_syntax, ("text", "native"))
        _expect("on_fault", on_fault, ("raise", "mask"))
        _expect("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        self.twins = twins
        self.system_prompt = system_prompt
        for name, limit, least in (
            ("max_turns", max_turns, 1), ("max_tool_calls", max_tool_calls, 0), ("twins", twins, 0)
        ):  # fmt: skip
            if limit is not None and limit < least:
                raise EsplError(f"{name} is {limit}, expected at least {least}")
        if deadline is not None and not deadline > 0:
            raise EsplError(f"deadline is {deadline}, expected more than 0 seconds")
        self.max_turns = max_turns or family.max_turns or (8 if family.tools else 1)
        self.max_tool_calls = max_tool_calls
        self.deadline = deadline
        self.on_fault = on_fault
        self.render_mode = render_mode
        self.tools: tuple[ToolSpec, ...] = tuple(tool.spec for tool in family.tools)
        self.observation_space = ChatSpace()
        self.action_space = ReplySpace()
        self._placement = protocol
        self._protocol_text = protocol_text(family.protocol.instruction, self.tools if tool_syntax == "text" else ())
        self._tools: dict[str, Tool] = {tool.spec.name: tool for tool in family.tools}
        if len(self._tools) != len(family.tools):
            raise EsplError(f"two tools share a name: {', '.join(tool.name for tool in self.tools)}")
        self._tasks: TaskSource | None = None
        self._order: Shuffle | None = None
        self._position = 0
        self._episode: Episode | None = None
        self._shown = 0

    @property
    def tasks(self) -> TaskSource:
        """The tasks of the chosen split; loaded when first touched. Raises MissingData where they cannot be found."""
        if self._tasks is None:
            self._tasks = twins_of(self.family.sources[self.split](), self.twins)
            if not len(self._tasks):
                raise EsplError(f"the split {self.split!r} of {type(self).__name__} has no tasks")
        return self._tasks

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What depends on time or host: seconds, stderr, the last fault. Never part of `info`."""
        return dict(self._episode.diagnostics) if self._episode else {}

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Conversation, Info]:
        """Start an episode; see the class. Blocks; the asynchronous form is `areset`."""
        return background.run(self.areset(seed=seed, options=options))

    def step(self, action: str | Message) -> Step:
        """Play one reply; see the class. Blocks; the asynchronous form is `astep`."""
        return background.run(self.astep(action))

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Conversation, Info]:
        """Start an episode. Raises UnknownTask, MissingData, and EsplError for unknown options."""
        options = _known_options(options)
        await self.aclose()
        super().reset(seed=seed)
        if self._tasks is None:
            await asyncio.to_thread(lambda: self.tasks)
        if seed is not None:
            self._order = None
        slow = getattr(self._tasks, "slow", False)
        task = await asyncio.to_thread(self._pick, options) if slow else self._pick(options)
        prompt = options.get("system_prompt", self.system_prompt)
        messages = self.opening(task.question, prompt)
        self._episode = Episode(task, task.hash, messages, ToolContext(task))
        self._show(from_start=True)
        return messages, self._info(self._episode)

    async def astep(self, action: str | Message) -> Step:
        """Play one reply. Raises ResetNeeded without a running episode, InvalidAction for anything that is no reply,
        and EnvironmentFault unless `on_fault="mask"`. An exception ends the episode.
        """
        episode = self._episode
        if episode is None or episode.over:
            raise ResetNeeded("the episode is over (or none was started): call reset first")
        if not self.action_space.contains(action):
            raise InvalidAction(f"action is {_describe(action)}, expected str or an assistant Message")
        if episode.busy:
            raise EsplError("a step of this episode is still running: one environment plays one episode at a time")
        reply = Message("assistant", action) if isinstance(action, str) else action
        episode.busy = True
        started = time.monotonic()
        stop: Stop = "environment_error"
        try:
            stop = await self._play(episode, reply)
        except EnvironmentFault as fault:
            episode.diagnostics["fault"] = str(fault)
            if self.on_fault == "raise":
                raise
        finally:
            episode.stop, episode.busy = stop, False
            episode.diagnostics["step_seconds"] = time.monotonic() - started
            if episode.over:
                await _release(episode)
        self._show()
        reward = float(episode.verdict.score) if episode.verdict else 0.0
        return episode.messages, reward, episode.terminated, episode.truncated, self._info(episode)

    def opening(self, question: str, system_prompt: str = "") -> Conversation:
        """What an episode about `question` begins with. Needs no tasks: whoever shows the form has no problem to."""
        return opening(question, system_prompt, self._protocol_text, self._placement)

    @property
    def task(self) -> Task | None:
        """The task of the running (or last) episode; None before the first."""
        return self._episode.task if self._episode else None

    @property
    def messages(self) -> Conversation:
        """The conversation of the running (or last) episode; empty before the first."""
        return self._episode.messages if self._episode else ()

    def cut(self, reason: Stop) -> None:
        """Truncate the running episode from outside, as a wrapper's budget does; the next reset releases its tools."""
        if self._episode is not None and not self._episode.over:
            self._episode.stop = reason

    async def follow_up(self, episode: Episode) -> str | None:
        """What the partner says after a reply without tool calls; None (the default) ends the episode with it."""

    def solve(self, episode: Episode) -> str | Message:
        """What an agent that knows everything says next; the default writes the reference answer down."""
        return self.family.protocol.compose(episode.task.answer)

    def oracle(self) -> str | Message:
        """The oracle agent's next reply in the running episode; played to the end it scores 1. Raises ResetNeeded."""
        if self._episode is None or self._episode.over:
            raise ResetNeeded("there is no running episode: call reset first")
        return self.solve(self._episode)

    async def judge(self, episode: Episode, answer: str) -> Verdict:
        """Grade the answer of a finished episode; the default asks the family's `grade`."""
        return await self.family.grade(episode.task, answer)

    async def _play(self, episode: Episode, reply: Message) -> Stop:
        episode.messages += (reply,)
        episode.turn += 1
        left = self._seconds_left(episode)
        if left is not None and left <= 0:
            return "deadline"
        calls = read_calls(reply) if self._tools else ()
        if calls:
            return await self._use_tools(episode, calls)
        said = await self.follow_up(episode)
        if said is None:
            return await self._finish(episode, self.family.protocol.extract(reply.content))
        if episode.turn >= self.max_turns:
            return "max_turns"
        episode.messages += (Message("user", said),)
        return ""

    async def _use_tools(self, episode: Episode, calls: tuple[ToolCall | MalformedCall, ...]) -> Stop:
        for call in calls:
            if self.max_tool_calls is not None and episode.tool_calls >= self.max_tool_calls:
                return "tool_budget"
            episode.tool_calls += 1
            try:
                async with asyncio.timeout(self._seconds_left(episode)) as limit:
                    result = await self._call(episode, call)
            except TimeoutError:
                if not limit.expired():
                    raise
                return "deadline"
            if result.answer is not None:
                return await self._finish(episode, result.answer)
        return "max_turns" if episode.turn >= self.max_turns else ""

    async def _call(self, episode: Episode, call: ToolCall | MalformedCall) -> ToolResult:
        if isinstance(call, MalformedCall):
            result = ToolResult(f"Error: {call.problem}", error=True)
            message = Message("tool", result.text)
        else:
            result = await use_tool(self._tools, call, episode.context)
            message = Message("tool", result.text, tool_call_id=call.id or None, name=call.name)
        episode.messages += (message,)
        episode.tool_errors += result.error
        if result.diagnostics:
            episode.diagnostics.setdefault("tools", []).append(dict(result.diagnostics))
        return result

    async def _finish(self, episode: Episode, answer: str | None) -> Stop:
        if answer is None:
            episode.verdict = Verdict(0.0, "no_answer", None, episode.task.answer)
            return "format"
        verdict = await self.judge(episode, answer)
        if verdict.status == "unavailable":
            raise EnvironmentFault(f"the grader could not judge task {episode.task.id!r}")
        if undeclared := set(verdict.parts) - set(self.family.parts):
            raise ValueError(f"the verdict has parts that the family does not declare: {sorted(undeclared)}")
        episode.verdict = verdict
        return "format" if verdict.status == "no_answer" else "answer"

    def _seconds_left(self, episode: Episode) -> float | None:
        return None if self.deadline is None else episode.started + self.deadline - time.monotonic()

    def _pick(self, options: Mapping[str, Any]) -> Task:
        tasks = self.tasks
        if "task" in options:
            index = int(options["task"])
            if not 0 <= index < len(tasks):
                raise UnknownTask(f"task {index} is outside 0..{len(tasks) - 1} of the split {self.split!r}")
            return tasks[index]
        if "task_id" in options:
            for index in range(len(tasks)):
                if tasks[index].id == options["task_id"]:
                    return tasks[index]
            raise UnknownTask(f"the split {self.split!r} has no task with the id {options['task_id']!r}")
        if self._order is None or self._position >= len(self._order):
            self._order = Shuffle(len(tasks), int(self.np_random.integers(2**63)))
            self._position = 0
        self._position += 1
        return tasks[self._order[self._position - 1]]

    def _info(self, episode: Episode) -> Info:
        verdict = episode.verdict or Verdict(0.0)
        return {
            "task_id": episode.task.id,
            "task_hash": episode.task_hash,
            "split": episode.task.split,
            "turn": float(episode.turn),
            "tool_calls": float(episode.tool_calls),
            "tool_errors": float(episode.tool_errors),
            "score": float(verdict.score),
            "reward/answer": float(verdict.score),
            **{f"reward/{part}": float(verdict.parts.get(part, 0.0)) for part in self.family.parts},
            "answer": verdict.extracted or "",
            "verdict": verdict.status if episode.verdict else "",
            "stop_reason": episode.stop,
            "fault": float(episode.stop == "environment_error"),
        }

    def render(self) -> str | None:
        """The transcript under "ansi"; None under "human", where messages are printed as they come."""
        if self.render_mode != "ansi" or self._episode is None:
            return None
        return transcript(self._episode.messages)

    def _show(self, from_start: bool = False) -> None:
        if self.render_mode == "human" and self._episode is not None:
            text = transcript(self._episode.messages[0 if from_start else self._shown :])
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), end="\n\n", flush=True)
            self._shown = len(self._episode.messages)

    def close(self) -> None:
        """End the episode and close what its tools opened. Calling it again is fine."""
        if self._episode is not None and not sys.is_finalizing():
            background.run(self.aclose())

    async def aclose(self) -> None:
        """The asynchronous form of `close`."""
        episode, self._episode = self._episode, None
        if episode is not None:
            await _release(episode)


async def _release(episode: Episode) -> None:
    """Close what tools opened. A fault here is noted only: the episode's outcome stands."""
    try:
        await episode.context.stack.aclose()
    except EnvironmentFault as fault:
        episode.diagnostics["release_fault"] = str(fault)


def _known_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    options = options or {}
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise EsplError(f"unknown reset option {unknown[0]!r}; options: {', '.join(OPTIONS)}")
    if "task" in options and "task_id" in options:
        raise EsplError("the reset options `task` and `task_id` exclude each other")
    for name, kind, wanted in (("task", (int, np.integer), "an index"), ("task_id", str, "text"),
                               ("system_prompt", str, "text")):
        if name in options and (not isinstance(options[name], kind) or isinstance(options[name], bool)):
            raise EsplError(f"the reset option `{name}` is {options[name]!r}, expected {wanted}")
    return options


def _expect(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise EsplError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _describe(action: Any) -> str:
    return f"a {action.role} Message" if isinstance(action, Message) else type(action).__name__
