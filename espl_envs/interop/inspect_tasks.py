"""Our environments as inspect_ai tasks (extra `inspect`): its models and logs, our episodes and scores.

    inspect eval espl_envs/environment -T env=espl/GSM8K-v0 --model mockllm/model --limit 10
    inspect_ai.eval(environment("espl/Countdown-v0", k=4), model="openai/gpt-4o")

`play` is the solver: it asks the model and steps the environment until the episode is over. `episode_score` gives its
reward. Under a solver of another make the score is that of the last completion, played as a single reply.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from espl_envs.core.errors import EsplError, MissingExtra

try:
    from inspect_ai import Epochs, Task, task
except ImportError as missing:
    raise MissingExtra("inspect", f"inspect_ai (no module {missing.name})") from missing

from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import Tool, ToolCall, ToolDef, ToolParams

from espl_envs.core import background, messages
from espl_envs.evaluate import plan
from espl_envs.evaluate.agents import ToolSyntax
from espl_envs.evaluate.wire import to_wire

STORE = "espl/episode"


@task(name="espl_envs/environment")      # installed as a wheel that is its name anyway
def environment(
    env: str, split: str | None = None, system_prompt: str | None = None, k: int = 1, limit: int | None = None,
    **arguments: Any,
) -> Task:
    """The environment `env` as a task.

    Args:
        env: its id.
        split: test where it has one, else validation, else train.
        system_prompt: for the system-prompt slot.
        k: samples per task.
        limit: the first so many tasks only.
        arguments: of the environment; its tools are offered by the model's server unless tool_syntax is "text".
    """  # fmt: skip
    if system_prompt is not None:
        arguments["system_prompt"] = system_prompt
    syntax: ToolSyntax = "text" if arguments.get("tool_syntax") == "text" else "native"
    arena = plan.arena(env, arguments, split, limit, syntax)
    samples = [_sample(arena, index) for index in range(arena.config.tasks)]
    return Task(
        dataset=MemoryDataset(samples, name=f"{env}:{arena.config.split}"),
        solver=play(env, arena.config.split, dict(arena.config.kwargs)),
        scorer=episode_score(env, arena.config.split, dict(arena.config.kwargs)),
        epochs=Epochs(k, "mean") if k > 1 else None,
        name=env.rpartition(":")[2],
        metadata={"env": env, "split": arena.config.split, "data_hash": arena.config.data_hash},
    )


@solver
def play(env: str, split: str, arguments: Mapping[str, Any]) -> Solver:
    """Plays the sample's task: the model replies, the environment answers, until the episode is over."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        played = await asyncio.to_thread(_made, env, split, arguments)
        try:
            conversation, _ = await _here(played.areset(options={"task": state.metadata["task"]}))
            state.messages = to_chat(conversation)
            state.tools = [_offered(tool) for tool in played.unwrapped.tools] if _native(arguments) else []
            state.tool_choice = "auto" if state.tools else None
            over, reward, info = False, 0.0, {}
            while not over:
                state = await generate(state, tool_calls="none")
                reply = from_chat(state.output.message)
                conversation, reward, terminated, truncated, info = await _here(played.astep(reply))
                over = terminated or truncated
                said = state.messages[-1]
                state.messages = [*to_chat(conversation, said)]
            state.store.set(STORE, {"reward": reward, "info": info})
        finally:
            await _here(played.aclose())
        state.completed = True
        return state

    return solve


@scorer(metrics=[mean(), stderr()])
def episode_score(env: str, split: str, arguments: Mapping[str, Any]) -> Scorer:
    """The episode's reward, as the environment gave it."""

    async def score(state: TaskState, target: Target) -> Score:
        del target
        episode = state.store.get(STORE)
        if episode is None:
            episode = await asyncio.to_thread(_single, env, split, arguments, state)
        info = episode["info"]
        return Score(value=episode["reward"], answer=info["answer"], explanation=info["stop_reason"], metadata=info)

    return score


def to_chat(conversation: messages.Conversation, last: ChatMessage | None = None) -> list[ChatMessage]:
    """A conversation as inspect's messages. `last`: its own form of the last reply, kept whole (reasoning, id)."""
    chat: list[ChatMessage] = []
    replies = sum(message.role == "assistant" for message in conversation)
    for raw in to_wire(conversation):
        if raw["role"] == "assistant":
            replies -= 1
            if last is not None and not replies:
                chat.append(last)
                continue
        chat.append(_chat(raw))
    return chat


def from_chat(reply: ChatMessageAssistant) -> messages.Message:
    """What a model said. Arguments that inspect could not parse stay unparseable: the environment answers them."""
    calls = tuple(messages.ToolCall(call.id, call.function, _arguments(call)) for call in reply.tool_calls or ())
    return messages.Message("assistant", reply.text, calls)


def _arguments(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False) if call.parse_error is None else call.parse_error


def _chat(raw: Mapping[str, Any]) -> ChatMessage:
    content = raw["content"]
    if raw["role"] == "system":
        return ChatMessageSystem(content=content)
    if raw["role"] == "user":
        return ChatMessageUser(content=content)
    if raw["role"] == "tool":
        return ChatMessageTool(content=content, tool_call_id=raw["tool_call_id"], function=raw.get("name"))
    functions = [(call["id"], call["function"]) for call in raw.get("tool_calls", ())]
    calls = [ToolCall(id=key, function=one["name"], arguments=json.loads(one["arguments"])) for key, one in functions]
    return ChatMessageAssistant(content=content, tool_calls=calls or None)


def _offered(tool: messages.ToolSpec) -> Tool:
    """The tool as the model sees it. Calls are the environment's to make, so this form of it is never called."""

    async def execute() -> str:
        raise EsplError(f"{tool.name} is called by the environment")

    schema = json.loads(tool.schema)
    described = {name: {"description": name, **rule} for name, rule in schema["properties"].items()}
    parameters = ToolParams.model_validate({**schema, "properties": described, "additionalProperties": False})
    return ToolDef(execute, tool.name, tool.description, parameters).as_tool()


def _sample(arena: plan.Arena, index: int) -> Sample:
    opening, _ = arena.example.reset(options={"task": index})
    found = arena.example.task
    return Sample(
        input=to_chat(opening), target=found.answer, id=found.id, metadata={"task": index, "task_hash": found.hash}
    )


def _single(env: str, split: str, arguments: Mapping[str, Any], state: TaskState) -> dict[str, Any]:
    played = _made(env, split, arguments).unwrapped
    played.reset(options={"task": state.metadata["task"]})
    try:
        *_, reward, terminated, truncated, info = played.step(state.output.completion)
    finally:
        played.close()
    if not (terminated or truncated):
        raise EsplError(f"{env} goes on after the first reply: play it with its own solver")
    return {"reward": reward, "info": info}


def _made(env: str, split: str, arguments: Mapping[str, Any]) -> Any:
    return plan.arena(env, arguments, split).take()


def _native(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("tool_syntax") == "native"


async def _here(work: Any) -> Any:
    """Await on this loop what belongs on the environments' own."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, background.loop()))
