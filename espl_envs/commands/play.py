"""Play an environment by hand: what the agent would read is printed, what is typed is its reply."""

from __future__ import annotations

import sys
from typing import Any

from espl_envs import registry
from espl_envs.core.messages import transcript

HELP = "Type your reply; an empty line sends it. Ctrl-D gives up."


def play(env_id: str, settings: dict[str, Any], seed: int | None = None, task: int | None = None) -> float:
    """One episode; returns its reward."""
    env: Any = registry.make(env_id, **settings)
    try:
        messages, info = env.reset(seed=seed, options=None if task is None else {"task": task})
        print(f"{env_id} · task {info['task_id']} · {HELP}\n\n{_shown(messages)}\n", flush=True)
        seen, total, over = len(messages), 0.0, False
        while not over:
            reply = _read()
            if reply is None:
                print("given up")
                return total
            messages, reward, terminated, truncated, info = env.step(reply)
            total, over = total + reward, terminated or truncated
            if answered := messages[seen + 1 :]:
                print(f"{_shown(answered)}\n", flush=True)
            seen = len(messages)
        print(f"{info['stop_reason']} · reward {total:g}" + (f" · answer {info['answer']}" if info["answer"] else ""))
        return total
    finally:
        env.close()


def _read() -> str | None:
    """Lines up to an empty one; None at the end of the input with nothing typed."""
    lines: list[str] = []
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not line.strip() and lines:
            return "\n".join(lines)
        if line.strip():
            lines.append(line.rstrip("\n"))
    print()
    return "\n".join(lines) or None


def _shown(messages: Any) -> str:
    """The messages as text that cannot move the terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in
                   transcript(messages))
