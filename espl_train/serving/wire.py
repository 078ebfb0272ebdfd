"""OpenAI's requests, read strictly, and its answers.

What a request asks for and this server does not do is refused by name: a penalty, a JSON schema or an image that is
silently ignored would be a result about something else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espl_envs.core.messages import Message, ToolCall, ToolSpec
from espl_envs.core.protocol import TOOL_TEXT, MalformedCall, read_calls


class Refusal(Exception):
    """A request that cannot be answered as it is, as an HTTP status and OpenAI's error."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """The fields that chats and plain completions share. Those of type Literal are there to be neutral, those of type
    object to be ignored: they change nothing that is sampled."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0, None] = None
    frequency_penalty: Literal[0, None] = None
    user: object = None
    metadata: object = None
    store: object = None
    service_tier: object = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a reply."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or ()) if text)

    @property
    def limit(self) -> int | None:
        """Tokens of a reply, where the request says so."""
        return self.max_tokens


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", None] = None
    max_completion_tokens: int | None = Field(None, ge=1)
    parallel_tool_calls: Literal[True, None] = None
    logprobs: Literal[False, None] = None
    response_format: Mapping[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """See Sampling; the newer name wins."""
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Sampling):
    """`POST /v1/completions`: one prompt, a text or token ids."""

    prompt: str | list[int]
    echo: Literal[False, None] = None
    logprobs: None = None


def read(kind: type[Any], body: bytes) -> Any:
    """The request in a body. Raises Refusal, naming the field."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise Refusal(f"the body is not JSON: {problem}") from None
    if not isinstance(raw, dict):
        raise Refusal("the body is not a JSON object")
    try:
        asked = kind.model_validate(_clean(raw))
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise Refusal(f"this server does not do '{name}'", param=name) from None
        raise Refusal(f"'{name}': {first['msg'].lower()}", param=name) from None
    shape = getattr(asked, "response_format", None)
    if shape is not None and shape.get("type") != "text":
        raise Refusal("this server does not do 'response_format' other than text", param="response_format")
    return asked


def messages(asked: ChatRequest) -> tuple[Message, ...]:
    """The conversation of a request. Raises Refusal."""
    found = []
    for number, raw in enumerate(asked.messages):
        role = {"developer": "system"}.get(raw.get("role", ""), raw.get("role"))
        try:
            found.append(Message.from_openai({**raw, "role": role, "content": _text(raw.get("content"), number)}))
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise Refusal(f"'messages.{number}' is no message: {problem!r}", param="messages") from None
    return tuple(found)


def tools(asked: ChatRequest) -> tuple[ToolSpec, ...]:
    """The tools that may be called. Raises Refusal."""
    if asked.tool_choice == "none":
        return ()
    try:
        functions = [tool["function"] for tool in asked.tools or ()]
        return tuple(
            ToolSpec(str(one["name"]), str(one.get("description") or ""), json.dumps(one.get("parameters") or {}))
            for one in functions
        )
    except (KeyError, TypeError, AttributeError) as problem:
        raise Refusal(f"'tools' cannot be read: {problem!r}", param="tools") from None


def _text(content: Any, number: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise Refusal(f"'messages.{number}.content' is more than text, which this model does not read", param="messages")


def _clean(value: Any) -> Any:
    """Lone surrogates are no text that a tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() if not value.isascii() else value
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def reply(text: str, offered: bool, label: str) -> Message:
    """What was sampled as a message: where tools were offered and every call in it can be read, as native calls (their
    ids begin with `label`); else the text as it is."""
    calls = read_calls(Message("assistant", text)) if offered else ()
    if not calls or any(isinstance(call, MalformedCall) for call in calls):
        return Message("assistant", text)
    named = tuple(ToolCall(f"{label}{i}", call.name, call.arguments) for i, call in enumerate(calls)
                  if isinstance(call, ToolCall))
    return Message("assistant", TOOL_TEXT.sub("", text).strip(), named)


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply. `tokens`: how many were sampled for it."""

    message: Message
    finish: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request. `chat`: in the shape of a chat completion."""

    id: str
    model: str
    prompt_tokens: int
    choices: Sequence[Choice]
    chat: bool

    def to_json(self) -> dict[str, Any]:
        """The body."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [self._choice(i, one, "message") for i, one in enumerate(self.choices)],
                "usage": self._usage()}

    def events(self, usage: bool) -> Iterator[str]:
        """The answer as server-sent events. An engine gives whole replies, so every one is a single piece."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        for number, one in enumerate(self.choices):
            whole = self._choice(number, one, "delta")
            if not self.chat:
                yield _event({**self._head(kind), "choices": [whole]})
                continue
            for place, call in enumerate(whole["delta"].get("tool_calls", ())):
                call["index"] = place
            yield _event({**self._head(kind), "choices": [{**whole, "finish_reason": None}]})
            yield _event({**self._head(kind), "choices": [{**whole, "delta": {}}]})
        if usage:
            yield _event({**self._head(kind), "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def _choice(self, number: int, one: Choice, name: str) -> dict[str, Any]:
        body: dict[str, Any] = {"index": number, "logprobs": None, "finish_reason": one.finish}
        if self.chat:
            said = one.message.to_openai()
            return {**body, name: {**said, "content": said["content"] or (None if one.message.tool_calls else "")}}
        return {**body, "text": one.message.content}

    def _usage(self) -> dict[str, int]:
        sampled = sum(one.tokens for one in self.choices)
        total = self.prompt_tokens + sampled
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": sampled, "total_tokens": total}


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
