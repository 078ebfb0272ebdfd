"""What a conversation is made of: frozen, comparable, picklable messages.

A message never changes after it was made, so observations can be shared between steps, threads and wrappers. Dicts
in OpenAI's shape exist only at the borders (`to_openai`, `from_openai`). Assistant text is kept verbatim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the assistant. `arguments` is the JSON text exactly as the model wrote it."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """The arguments as a dict. Raises ValueError where the text is not a JSON object."""
        value = json.loads(self.arguments)
        if not isinstance(value, dict):
            raise ValueError(f"arguments of {self.name} are {type(value).__name__}, expected a JSON object")
        return value


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the agent sees it. `schema` is the JSON schema of its arguments, as JSON text (hashable)."""

    name: str
    description: str
    schema: str

    def to_openai(self) -> dict[str, Any]:
        """The dict that OpenAI-compatible servers and `apply_chat_template(tools=…)` take."""
        function = {"name": self.name, "description": self.description, "parameters": json.loads(self.schema)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `tool_calls` only on assistant messages; `tool_call_id` and `name` only on tool messages."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role is {self.role!r}, expected one of {', '.join(get_args(Role))}")
        if not isinstance(self.content, str):
            raise TypeError(f"content is {type(self.content).__name__}, expected str")

    def to_openai(self) -> dict[str, Any]:
        """The message as an OpenAI-shaped dict; absent fields are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        return out

    @classmethod
    def from_openai(cls, raw: Mapping[str, Any]) -> Message:
        """Read an OpenAI-shaped dict. Content `None` (a pure tool call) becomes the empty string."""
        calls = tuple(
            ToolCall(str(call.get("id") or ""), function["name"], _as_text(function.get("arguments", "{}")))
            for call in raw.get("tool_calls") or ()
            for function in (call["function"],)
        )
        content = raw.get("content")
        return cls(raw["role"], "" if content is None else content, calls, raw.get("tool_call_id"), raw.get("name"))


Conversation = tuple[Message, ...]


def transcript(messages: Conversation) -> str:
    """A conversation as plain text, one `[role]` heading per message; native tool calls are shown as JSON."""
    return "\n\n".join(f"[{message.name or message.role}]\n{_body(message)}" for message in messages)


def _body(message: Message) -> str:
    calls = [f"→ {call.name}({call.arguments})" for call in message.tool_calls]
    return "\n".join([message.content, *calls] if message.content else calls)


def _as_text(arguments: str | Mapping[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
