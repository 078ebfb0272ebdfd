"""Conversations as OpenAI-compatible servers speak them: what is sent, and how hostile answers are read.

Tool results that belong to no native call (the model wrote `<tool_call>` as text) go back as a user message with
`<tool_response>`, which is what chat templates make of them: servers refuse a tool message without its call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espl_envs.core.messages import Conversation, Message, ToolCall, ToolSpec

REASONING = ("reasoning_content", "reasoning")      # DeepSeek and vLLM; OpenRouter and newer vLLM


class Unreadable(ValueError):
    """A server's answer is no chat completion."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server answered. Counts are None where it did not say; `cost` is its own bill, if it sends one."""

    message: Message
    reasoning: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None


def to_wire(messages: Conversation) -> list[dict[str, Any]]:
    """The messages of a request."""
    sent: list[dict[str, Any]] = []
    responses: list[str] = []
    for message in messages:
        if message.role == "tool" and message.tool_call_id is None:
            responses.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        _flush(responses, sent)
        raw = message.to_openai()
        for call in raw.get("tool_calls", ()):
            call["function"]["arguments"] = _object(call["function"]["arguments"])
        sent.append(raw)
    _flush(responses, sent)
    return sent


def _flush(responses: list[str], sent: list[dict[str, Any]]) -> None:
    if responses:
        sent.append({"role": "user", "content": "\n".join(responses)})
        responses.clear()


def _object(arguments: str) -> str:
    """Servers parse the arguments of earlier calls and refuse the conversation where they are no JSON object; a model
    that wrote such finds its text under "malformed", and in the tool's answer what was wrong with it."""
    try:
        if isinstance(json.loads(arguments), dict):
            return arguments
    except (ValueError, RecursionError):
        pass
    return json.dumps({"malformed": arguments}, ensure_ascii=False)


def tools_to_wire(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """The tools of a request."""
    return [tool.to_openai() for tool in tools]


def from_wire(answer: Any) -> Completion:
    """Read the answer to a chat completion. Raises Unreadable."""
    try:
        choice = answer["choices"][0]
        said = choice["message"]
        if not isinstance(said, Mapping):
            raise Unreadable("the message is no object")
        calls = tuple(_call(call, number) for number, call in enumerate(said.get("tool_calls") or ()))
    except (LookupError, TypeError, AttributeError) as problem:
        raise Unreadable(f"it has no choices[0].message ({type(problem).__name__}: {problem})") from None
    usage = answer.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    return Completion(
        Message("assistant", _text(said.get("content")) or _text(said.get("refusal")), calls),
        next((text for name in REASONING if (text := _text(said.get(name)))), ""),
        _text(choice.get("finish_reason")),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _amount(usage.get("cost")),
    )


def _call(raw: Any, number: int) -> ToolCall:
    """A native call; one without an id gets one, so that its result can be sent back."""
    function = raw["function"]
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return ToolCall(_text(raw.get("id")) or f"call_{number}", _text(function.get("name")), text)


def _text(value: Any) -> str:
    """Text, also from a list of parts; anything else is empty."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, Mapping))
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _amount(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < float("inf") else None
