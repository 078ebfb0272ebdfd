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
    """What a server answered. Counts are None where it did not say; `cost` is its own bill, if it sends one; `raw` the
    answer itself."""

    message: Message
    reasoning: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    raw: Any = None


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
        answer,
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


class Pieces:
    """A streamed answer, put together from its events."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish, self._usage = "", None

    def read(self, event: str) -> bool:
        """Take in one event; False for one that only says what the answer took."""
        data = "\n".join(line[5:].lstrip(" ") for line in event.splitlines() if line.startswith("data:"))
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            return True                     # [DONE], a comment
        if not isinstance(chunk, Mapping):
            return True
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            return not chunk.get("usage")
        self._finish = _text(choices[0].get("finish_reason")) or self._finish
        delta = choices[0].get("delta")
        if isinstance(delta, Mapping):
            self._add(delta)
        return True

    def to_answer(self) -> dict[str, Any]:
        """The answer as it would have been in one piece. Lists of calls are in the order of their indices."""
        message: dict[str, Any] = {"role": "assistant", **{name: "".join(t) for name, t in self._texts.items()}}
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        choice = {"index": 0, "message": message, "finish_reason": self._finish or None}
        return {"object": "chat.completion", "choices": [choice], "usage": self._usage}

    def _add(self, delta: Mapping[str, Any]) -> None:
        for name in ("content", "refusal", *REASONING):
            if text := _text(delta.get(name)):
                self._texts.setdefault(name, []).append(text)
        for piece in delta.get("tool_calls") or ():
            if not isinstance(piece, Mapping):
                continue
            function = piece.get("function")
            function = function if isinstance(function, Mapping) else {}
            index = piece.get("index")
            call = self._calls.setdefault(
                index if isinstance(index, int) else len(self._calls),
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = _text(piece.get("id")) or call["id"]
            call["function"]["name"] += _text(function.get("name"))
            call["function"]["arguments"] += _text(function.get("arguments"))
