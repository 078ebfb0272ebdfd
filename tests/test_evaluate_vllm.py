"""espl-eval against a real server: vLLM's own, over the bundled model, on a CPU. It says what our engine says."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import lacking
from evaluate_kit import ADD, lines, play
from program_kit import program

from espl_envs.core.messages import Message
from espl_envs.evaluate import doors
from espl_envs.evaluate.cli import main
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.doors import Wanted
from espl_envs.evaluate.endpoint import EndpointDoor, Sampling
from espl_envs.evaluate.proxy import CALLS
from espl_envs.evaluate.records import Outcome
from espl_train.engines.base import Request
from espl_train.learner.loading import MICRO
from espl_train.serving.exhibit import Exhibit

pytestmark = pytest.mark.vllm

KEY, TASKS, PATIENCE_S = "a-key-of-a-test-server", 8, 600.0
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that answers as `micro` and wants KEY."""
    if find_spec("vllm") is None:
        lacking("vllm", "vLLM is not installed here: `make vllm` sets up an environment that has it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(MICRO), "--served-model-name", "micro",
             "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len",
             "512", "--max-num-seqs", "16", "--api-key", KEY]  # fmt: skip
    log = tmp_path_factory.mktemp("vllm-server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out, env={**os.environ, **SETTINGS})
    try:
        began = time.monotonic()
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() - began < PATIENCE_S, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _healthy(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_model_behind_vllm_says_what_it_says_here(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    words = ["--env", "espl/Conventions-v0", "--base-url", server, "--model", "micro", "--api-key-env", "MY_KEY",
             "--tool-syntax", "text", "--temperature", "0", "--max-tokens", "64", "--limit", str(TASKS), "--quiet",
             "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    episodes = lines(tmp_path / "run")
    assert len(episodes) == TASKS and all(episode["score"] is not None for episode in episodes)
    engine, chat, _ = Exhibit.of("micro", None, {}).load()

    async def say(opening: list[dict[str, str]]) -> tuple[str, int, int]:
        tokens = tuple(chat.open(tuple(map(Message.from_openai, opening))))
        sample = await engine.sample(Request(tokens, 64, 0, chat.stop_ids, 0.0))
        return chat.text(sample.tokens), len(tokens), len(sample.tokens)

    async def every() -> list[tuple[str, int, int]]:
        return await asyncio.gather(*(say(episode["messages"][:1]) for episode in episodes))

    try:
        here = asyncio.run(every())
    finally:
        engine.close()
    first = [episode["turns"][0] for episode in episodes]
    there = [(e["messages"][1]["content"], t["prompt_tokens"], t["completion_tokens"])
             for e, t in zip(episodes, first, strict=True)]
    assert there == here and len({text for text, _, _ in here}) > 1
    assert not any(KEY.encode() in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


@pytest.mark.parametrize("words, sentence", [
    (["--model", "micr"], "has no model 'micr'; it has micro"),
    (["--model", "micro", "--api-key-env", "OTHER"], "does not accept the key in OTHER"),
    (["--model", "micro", "--env.args", "tool_syntax=native"], "With --tool-syntax text"),
])  # fmt: skip
def test_what_vllm_refuses_is_one_sentence(
    server: str, words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OTHER", "another-key-altogether")
    env = ["--env", "toy:toy/AddTools-v0", "--base-url", server, "--out", str(tmp_path / "run")]
    assert main([*env, *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_context_of_vllm_that_is_full_truncates(server: str, tmp_path: Path) -> None:
    door = EndpointDoor(server, "micro", Secret("K", KEY), Sampling(0.0, 16))
    [episode] = play(tmp_path / "run", door, ADD, limit=1, system_prompts=("word " * 600,))
    assert episode.outcome is Outcome.TRUNCATED and "no longer fits" in str(episode.error)


def test_a_program_streams_from_vllm_through_the_proxy(server: str, tmp_path: Path) -> None:
    body = """
        answer = chat(stream=True, temperature=0, max_tokens=8)
        events = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
        streamed = "".join(json.loads(e)["choices"][0]["delta"].get("content") or "" for e in events[:-1])
        whole = json.loads(chat(temperature=0, max_tokens=8))["choices"][0]["message"]["content"]
        print(streamed == whole and len(events) > 4 and events[-1] == "[DONE]", whole)
    """
    door = doors.choose(Wanted(command=program(tmp_path, body), base_url=server, model="micro",
                               secret=Secret("MY_KEY", KEY), out=tmp_path / "run"))  # fmt: skip
    [episode] = play(tmp_path / "run", door, ADD, limit=1)
    assert episode.messages[-1].content.startswith("True ")
    streamed, whole = (json.loads(line) for line in (tmp_path / "run" / CALLS).read_text().splitlines())
    assert streamed["response"]["usage"]["completion_tokens"] == whole["response"]["usage"]["completion_tokens"] == 8
    assert len(episode.turns) == 2 and episode.completion_tokens == 16
