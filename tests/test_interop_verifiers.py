"""verifiers, the real package: its null harness asks a scripted server, and the trace's reward is the environment's."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import toy
from conftest import lacking

pytestmark = pytest.mark.verifiers
SCRIPTS: dict[str, list[str]] = {
    "right": [r"\boxed{56}"],
    "wrong": [r"\boxed{57}"],
    "no answer": ["I do not know."],
    "tools": [toy.call("add", a=28, b=28), toy.call("add", a=13, b=1), r"So \boxed{56}"],
    "submitted": [toy.call("submit", answer="56")],
    "too long": [toy.call("add", a=1, b=1)] * 3,
}


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    if find_spec("verifiers") is None:
        lacking("verifiers", "verifiers is not installed here: `make interop` sets up an environment that has it")


@contextmanager
def server(script: list[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Speaks the script, one reply per turn of the conversation; its address and the requests that it saw."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(body)
            said = {"role": "assistant", "content": script[sum(m["role"] == "assistant" for m in body["messages"])]}
            common = {"id": "x", "created": 1, "model": "toy"}
            if body.get("stream"):
                kind, chunk = "text/event-stream", {**common, "object": "chat.completion.chunk"}
                parts = [{"index": 0, "delta": said, "finish_reason": None},
                         {"index": 0, "delta": {}, "finish_reason": "stop"}]
                out = "".join(f"data: {json.dumps({**chunk, 'choices': [part]})}\n\n" for part in parts)
                out += "data: [DONE]\n\n"
            else:
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                choice = {"index": 0, "message": said, "finish_reason": "stop"}
                kind = "application/json"
                out = json.dumps({**common, "object": "chat.completion", "choices": [choice], "usage": usage})
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(out.encode())))
            self.end_headers()
            self.wfile.write(out.encode())

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", seen
    finally:
        listening.shutdown()
        listening.server_close()


@pytest.fixture
def no_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's program runs in this environment, which has its packages, instead of one that uv downloads."""
    from verifiers.v1.runtimes.base import Runtime

    async def prepare(self: Any, script: str, env: Any = None, *, activate: bool = True) -> list[str]:
        del self, env, activate
        path = tmp_path / "program.py"
        path.write_text(script, "utf-8")
        return [sys.executable, str(path)]

    monkeypatch.setattr(Runtime, "prepare_uv_script", prepare)
    monkeypatch.setenv("TOY_KEY", "no-secret")


def rolled_out(script: list[str], index: int = 3, **arguments: Any) -> tuple[Any, list[dict[str, Any]]]:
    import verifiers.v1 as vf

    config = vf.resolve_env_config({"taskset": {
        "id": "espl-verifiers", "env": "toy:toy/AddTools-v0", "split": "test",
        "arguments": {"max_turns": 3, "system_prompt": "Be brief.", **arguments},
    }})  # fmt: skip
    env = vf.load_environment(config)

    async def episode(url: str) -> Any:
        context = vf.ModelContext(model="toy", client=vf.EvalClientConfig(base_url=url, api_key_var="TOY_KEY"))
        async with env.serving():
            (slot,) = env.slots(list(env.taskset)[index])
            return await env.run_slot(slot, context)

    with server(script) as (url, seen):
        return asyncio.run(episode(url)), seen


def test_the_taskset_is_the_split() -> None:
    import verifiers.v1 as vf

    config = vf.resolve_env_config({"taskset": {"id": "espl-verifiers", "env": "toy:toy/Add-v0", "split": "test"}})
    tasks = list(vf.load_environment(config).taskset)
    rows = toy.load("test")
    assert [(t.data.name, t.data.prompt, t.data.task_hash) for t in tasks] == [
        (row.id, row.question, row.hash) for row in (rows[i] for i in range(10))
    ]
    assert len({task.key for task in tasks}) == 10
    assert rows[3].answer not in json.dumps(tasks[3].data.model_dump(mode="json", exclude={"task_hash"}))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_rollout_is_the_episode(name: str, no_uv: None) -> None:  # noqa: ARG001
    env = gymnasium.make("toy/AddTools-v0", split="test", max_turns=3, system_prompt="Be brief.").unwrapped
    opening, _ = env.reset(options={"task": 3})
    for reply in SCRIPTS[name]:
        messages, reward, *_, info = env.step(reply)
    episode, seen = rolled_out(SCRIPTS[name])
    assert episode.ok, (episode.errors, [trace.errors for trace in episode.traces])
    (trace,) = episode.traces
    assert {key: one.score for key, one in trace.rewards.items()} == {"espl": reward}
    assert trace.info["espl"] == info
    assert [m["content"] for m in seen[0]["messages"]] == [m.content for m in opening]
    assert len(seen) == len(SCRIPTS[name])
    for heard in (m.content for m in messages if m.role == "tool" and len(seen) > 1):
        assert heard in json.dumps(seen[-1]["messages"]) or heard == messages[-1].content


def test_a_fault_is_an_error_and_no_reward(no_uv: None) -> None:  # noqa: ARG001
    episode, _ = rolled_out([r"\boxed{broken}"])
    assert not episode.ok and "the grader's machine is gone" in str(episode.errors)
    assert not any(trace.rewards for trace in episode.traces)


def test_a_reward_that_changes_on_the_way_is_noticed(no_uv: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from verifiers.v1.trace import Trace

    original = Trace.record_reward
    monkeypatch.setattr(Trace, "record_reward", lambda self, name, value: original(self, name, value / 2))
    with pytest.raises(AssertionError):
        test_a_rollout_is_the_episode("right", no_uv)
