"""What it means when a server says no: try again, stop, count it against the agent, or tell the user what to change."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espl_envs.evaluate.agents import AgentFault, AgentLost, ContextExceeded

PASSING = frozenset({408, 409, 425, 429})       # and everything from 500
LONGEST_MESSAGE = 240
_CONTEXT = re.compile(
    r"context[ _]length|context window|maximum context|max_model_len|prompt is too long|input is too long|"
    r"maximum.{0,20}input.{0,20}tokens|too many tokens|exceeds? the (?:available )?context",
    re.IGNORECASE,
)
_NOWHERE = re.compile(r"(?:40[45][: ]*)?(?:page |url )?(?:not found|method not allowed)\.?", re.IGNORECASE)


class Passing(Exception):
    """The server could not answer now. `retry_after`: the seconds that it asks to wait, if it does. `advice`: what to
    look at where it has never answered yet; without it, waiting is worth a try."""

    def __init__(self, text: str, retry_after: float | None = None, advice: str = "") -> None:
        super().__init__(text)
        self.retry_after, self.advice = retry_after, advice


class EndpointFault(AgentFault):
    """The server refused a request, or stayed away. `status` 0: there was no answer; `said`: its own words."""

    def __init__(self, text: str, status: int = 0, said: str = "") -> None:
        super().__init__(text)
        self.status, self.said = status, said


@dataclass(frozen=True, slots=True)
class Asked:
    """Who was asked for what, and the variable that the key came from ("" where there is no key)."""

    base_url: str
    model: str
    key_name: str


def explain(asked: Asked, status: int, headers: Mapping[str, str], text: str) -> Exception:
    """The exception that an HTTP status other than 200 stands for. `text` is the body, without the key."""
    said, code = _message(text)
    quoted = f": {said}" if said else ""
    url, key = asked.base_url, asked.key_name and f"the key in {asked.key_name}"
    if code == "insufficient_quota" or status == 402:
        return AgentLost(f"{url} wants to be paid (HTTP {status}){quoted}")
    if status in PASSING or status >= 500:
        return Passing(f"{url} answered HTTP {status}{quoted}", _retry_after(headers))
    if status == 401 and not key:
        return AgentLost(f"{url} wants a key (HTTP 401): set OPENAI_API_KEY, or name its variable with --api-key-env")
    if status == 401:
        return AgentLost(f"{url} does not accept {key} (HTTP 401){quoted}")
    if status == 403:
        return EndpointFault(f"{url} forbids {key or 'this'} the model {asked.model!r} (HTTP 403){quoted}", 403, said)
    if status in (400, 413, 422) and (code == "context_length_exceeded" or _CONTEXT.search(said)):
        return ContextExceeded(f"the conversation no longer fits into the context of {asked.model}{quoted}")
    if 300 <= status < 400:
        return EndpointFault(f"{url} sends elsewhere (HTTP {status}): give that address as --base-url", status, said)
    if status in (404, 405) and (not said or _NOWHERE.fullmatch(said)):
        return EndpointFault(f"{url}/chat/completions is not there (HTTP {status}): {elsewhere(url)}", status)
    return EndpointFault(f"{url} refused a request for the model {asked.model!r} (HTTP {status}){quoted}", status, said)


def elsewhere(url: str) -> str:
    """Where a server that answers, but not as one does, may have what is looked for."""
    return "look up its address" if url.endswith("/v1") else f"most servers have it under /v1, as in {url}/v1"


def _message(text: str) -> tuple[str, str]:
    """What an error body says, in one line, and its code. OpenAI nests both, older vLLM does not, FastAPI: `detail`."""
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        return ("" if text.lstrip().startswith("<") else _line(text)), ""
    for inner in ("error", "detail", "message"):
        if isinstance(body, Mapping) and inner in body:
            code = body.get("code")
            body = body[inner]
            if isinstance(body, Mapping):
                return _line(str(body.get("message") or "")), str(body.get("code") or body.get("type") or "")
            return _line(body if isinstance(body, str) else json.dumps(body)), str(code or "")
    return "", ""


def _line(text: str) -> str:
    """At most so many printable characters in one line: what a server says is not to be trusted with the terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 1]}…"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from any of the forms in use; None without one that can be read."""
    milliseconds, value = _number(headers.get("retry-after-ms")), headers.get("Retry-After")
    if milliseconds is not None:
        return milliseconds / 1000
    if value is None or _number(value) is not None:
        return _number(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _number(value: str | None) -> float | None:
    try:
        number = float("" if value is None else value)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
