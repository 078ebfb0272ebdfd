"""What `espl-train serve` promises: a run is evaluated as it evaluates itself, exact tokens, errors in OpenAI's shape.

One run of the bundled model, made once; the server is the real one over the real engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from evaluate_kit import lines
from learner_kit import shake

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message, ToolSpec
from espl_envs.evaluate.cli import main
from espl_train.chat import Chat
from espl_train.config import EngineConfig, LearnerConfig, ModelConfig
from espl_train.engines.base import Request
from espl_train.engines.local import LocalEngine
from espl_train.learner.loading import load_tokenizer, locate
from espl_train.learner.policy import Policy
from espl_train.loop import Trainer
from espl_train.problems import Problems
from espl_train.records import Rollout, StopReason
from espl_train.runs import checkpoint
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.serving.exhibit import Exhibit
from espl_train.serving.identity import weights_of
from espl_train.serving.recall import Recall
from espl_train.serving.server import Offer, Server
from espl_train.settings import ConfigError, load
from espl_train.stage import Stage

PROBLEMS = 6
ROOT = "count from the right"
TOKENS = 23                 # of an episode: some of those of the test want more


class Watched(Trainer):
    """Learns something for sure."""

    def _update(self, *args: Any, **named: Any) -> Any:
        report = super()._update(*args, **named)
        shake(self.policy, 0.02)
        self.policy.advance(1)
        return report


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Rollout]]]:
    """A run that has ended, and its own test with the trained weights, greedy, on the first problems."""
    folder = tmp_path_factory.mktemp("served") / "a-run"
    config = load((), None, {
        "out": str(folder), "steps": 1, "rollout.prompts": 1, "rollout.problems": 2, "rollout.samples": 2,
        "evaluation.problems": 1, "evaluation.test_problems": PROBLEMS, "evaluation.temperature": 0.0,
        "evaluation.prompts": 1, "tensorboard": False, "evolution.root": (ROOT,), "evolution.mutate": False,
        "evolution.crossover_probability": 0.0, "rollout.max_total_tokens": TOKENS, "rollout.max_new_tokens": TOKENS,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, RunDirectory.create(config) as run, Console(1, "", True) as console:
        played: dict[str, list[list[Rollout]]] = {}

        def play(self: Stage, *args: Any, **named: Any) -> list[list[Rollout]]:
            played[args[3]] = original(self, *args, **named)
            return played[args[3]]

        original = Stage.play
        patch.setattr(Stage, "play", play)
        patch.setattr(Problems, "sample", lambda self, _, size: [int(i) for i in self.indices[:size]])
        Watched(config, run, console).train()
        run.log.close()
    (test,) = played["test"]
    yield folder, test


def test_espl_eval_of_a_run_is_its_own_test(trained: tuple[Path, list[Rollout]], tmp_path: Path) -> None:
    folder, own = trained
    assert [rollout.policy for rollout in own] == [1] * PROBLEMS
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["--env", "espl/Conventions-v0", "--run", str(folder), "--limit", str(PROBLEMS), "--out", str(out),
                 "--quiet"]) == 0  # fmt: skip
    found = {line["task"]: line for line in lines(out)}
    for rollout in own:
        line = found[rollout.key.task]
        assert [Message.from_openai(message) for message in line["messages"]] == list(rollout.messages)
        assert line["score"] == rollout.reward
        assert ROOT in line["messages"][0]["content"]
        assert [turn["completion_tokens"] for turn in line["turns"]] == [len(turn.tokens) for turn in rollout.turns]
        assert sum(turn["completion_tokens"] for turn in line["turns"]) <= TOKENS
        assert line["outcome"] == "truncated" or rollout.stop is not StopReason.MAX_TOKENS
    stops = {rollout.stop for rollout in own}
    assert StopReason.MAX_TOKENS in stops and len(stops) > 1 and max(len(rollout.turns) for rollout in own) > 1
    settings = json.loads((out / "config.json").read_text())["agent"]["settings"]
    assert settings["step"] == 1 and settings["temperature"] == 0.0 and settings["prompt"] == "p0000"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "the run was written to"


def test_the_base_weights_would_have_said_something_else(trained: tuple[Path, list[Rollout]]) -> None:
    """The mutant of the test above: with the adapter left out, some reply differs."""
    folder, own = trained
    engine, chat, offer = Exhibit.of(str(folder), None, {}).load()
    try:
        async def say(rollout: Rollout, policy: int | None) -> str:
            tokens = tuple(chat.open(rollout.messages[:2]))
            sample = await engine.sample(Request(tokens, 64, 0, chat.stop_ids, 0.0, 1.0, policy))
            return chat.text(sample.tokens)

        async def every(policy: int | None) -> list[str]:
            return await asyncio.gather(*(say(rollout, policy) for rollout in own))

        said = [rollout.messages[2].content for rollout in own]
        assert asyncio.run(every(offer.policy)) == said
        assert asyncio.run(every(None)) != said
    finally:
        engine.close()


def test_a_run_says_what_it_would_serve(trained: tuple[Path, list[Rollout]], tmp_path: Path) -> None:
    folder, _ = trained
    assert ROOT in str(Exhibit.of(str(folder), "root", {}).to_json()["system_prompt"])
    assert Exhibit.of(str(folder), "none", {}).to_json()["system_prompt"] is None
    with pytest.raises(EsplError, match=r"has no prompt 'p9'; choose best, root, or an id such as p0000"):
        Exhibit.of(str(folder), "p9", {})
    with pytest.raises(ConfigError, match="rank changes nothing when a run is served"):
        Exhibit.of(str(folder), None, {"learner.rank": 3})
    with pytest.raises(EsplError, match="chooses among the prompts of a run"):
        Exhibit.of("micro", "best", {})
    (tmp_path / "config.toml").write_text((folder / "config.toml").read_text())
    with pytest.raises(checkpoint.CheckpointError, match="There is no checkpoint"):
        Exhibit.of(str(tmp_path), None, {})


def test_the_weights_behind_a_folder_are_known_by_content(tmp_path: Path) -> None:
    """So that --resume does not go on with others: weights, tokenizer and configuration, but no notes beside them."""
    shutil.copytree(locate("micro"), tmp_path / "model")
    model = str(tmp_path / "model")

    def known() -> str:
        return str(Exhibit.of(model, None, {}).to_json()["base"])

    first = known()
    assert first == weights_of("micro") and len(first) == 16
    (tmp_path / "model/notes.md").write_text("trained on a Friday")
    assert known() == first
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        file = tmp_path / "model" / name
        file.write_bytes(file.read_bytes() + b" ")
        assert weights_of(model) != first, name
        first = weights_of(model)


def test_reading_a_checkpoint_leaves_a_run_alone_that_writes_one(trained: tuple[Path, list[Rollout]]) -> None:
    half = trained[0] / "checkpoints" / ".writing-step-000002"
    half.mkdir()
    Exhibit.of(str(trained[0]), None, {})
    assert half.exists()
    half.rmdir()


def test_the_server_ends_when_its_parent_does() -> None:
    words = [sys.executable, "-m", "espl_train", "serve", "micro", "--until-eof"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=120)       # closes its standard input, as the kernel does for the dead
    assert process.returncode == 143 and not said


@pytest.mark.parametrize("words, sentence", [
    (["--run", "nowhere"], "nowhere"),
    (["--model", "./nowhere"], "no such folder"),
    (["--run", "micro"], "is no run of espl-train"),
])  # fmt: skip
def test_what_is_not_there_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from espl_envs.evaluate import served
    from espl_train import cli

    def described(argv: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        """In this process: importing everything once more takes seconds."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main(argv[3:])
        return subprocess.CompletedProcess(argv, code, out.getvalue().encode(), err.getvalue().encode())

    monkeypatch.setattr(served.subprocess, "run", described)
    assert main(["--env", "espl/Conventions-v0", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("printed", [b"", b"usage: espl-train serve\n"])
def test_a_description_that_is_none_is_one_sentence(
    printed: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from espl_envs.evaluate import served

    monkeypatch.setattr(served.subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 0, printed, b""))
    assert main(["--env", "espl/Conventions-v0", "--model=-h", "--out", "out"]) == 2
    assert capsys.readouterr().err == "espl-eval: '-h' is nothing that espl-train serve can describe\n"


@pytest.fixture(scope="module")
def api() -> Iterator[tuple[openai.OpenAI, Server]]:
    """The official client of a server over the bundled model, with a key."""
    import threading

    from aiohttp import web

    policy = Policy.load(ModelConfig(), LearnerConfig(rank=1))
    server = Server(LocalEngine(policy, EngineConfig(deterministic=False)), Chat(policy.tokenizer),
                    Offer("micro", system_prompt="Be brief."), key="sesame-sesame-sesame")
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    with openai.OpenAI(base_url=url, api_key="sesame-sesame-sesame", max_retries=0) as client:
        yield client, server
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    server.engine.close()
    loop.call_soon_threadsafe(loop.stop)


HELLO: Any = [{"role": "user", "content": "hello"}]


def test_seeds_decide_replies_and_streams_say_the_same(api: tuple[openai.OpenAI, Server]) -> None:
    client, _ = api

    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="micro", messages=HELLO, max_tokens=12, **more)

    first, again, other = ask(seed=1), ask(seed=1), ask(seed=2)
    assert first.choices[0].message.content == again.choices[0].message.content != other.choices[0].message.content
    several = ask(seed=1, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == first.choices[0].message.content and len(set(texts)) > 1
    assert several.usage.completion_tokens > first.usage.completion_tokens
    pieces = list(ask(seed=1, stream=True, stream_options={"include_usage": True}))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == first.choices[0].message.content and pieces[-1].usage == first.usage
    assert [model.id for model in client.models.list()] == ["micro"]


def test_a_stop_text_cuts_the_reply_and_its_count(api: tuple[openai.OpenAI, Server]) -> None:
    client, _ = api
    whole = client.chat.completions.create(model="micro", messages=HELLO, max_tokens=20, temperature=0)
    text = whole.choices[0].message.content or ""
    place = text[len(text) // 2 :][:1]
    cut = client.chat.completions.create(model="micro", messages=HELLO, max_tokens=20, temperature=0, stop=[place])
    assert cut.choices[0].message.content == text[: text.index(place)] and cut.choices[0].finish_reason == "stop"
    assert whole.usage and cut.usage and cut.usage.completion_tokens <= whole.usage.completion_tokens


def test_the_offered_prompt_is_for_conversations_without_one(api: tuple[openai.OpenAI, Server]) -> None:
    client, server = api
    given = [{"role": "system", "content": "Be brief."}, *HELLO]
    counts = {
        client.chat.completions.create(model="micro", messages=said, max_tokens=1).usage.prompt_tokens  # type: ignore[union-attr]
        for said in (HELLO, given)
    }
    assert counts == {len(server.chat.open((Message("system", "Be brief."), Message("user", "hello"))))}


def test_a_conversation_may_say_so_much_and_no_more(
    api: tuple[openai.OpenAI, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an episode of training: all turns together; also where the server has forgotten what it had sampled."""
    client, server = api
    monkeypatch.setattr(server, "offer", replace(server.offer, max_total=8))
    said, told = list(HELLO), []
    for _ in range(2):
        answer = client.chat.completions.create(model="micro", messages=said, max_tokens=12, seed=3)
        told.append(answer.usage.completion_tokens)  # type: ignore[union-attr]
        said += [{"role": "assistant", "content": answer.choices[0].message.content}, *HELLO]
    assert sum(told) == 8 and told[0] > 2
    for recall in (server._recall, Recall(server.chat, lambda _: None)):
        monkeypatch.setattr(server, "_recall", recall)
        with pytest.raises(openai.BadRequestError, match=r"rollout\.max_total_tokens") as refused:
            client.chat.completions.create(model="micro", messages=said, max_tokens=1)
        assert refused.value.code == "context_length_exceeded"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt"}, 404, "no model 'gpt' here"),
    ({"temperature": -1}, 400, "'temperature'"),
    ({"presence_penalty": 0.5}, 400, "'presence_penalty'"),
    ({"extra_body": {"top_k": 5}}, 400, "does not do 'top_k'"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"tools": [WEATHER]}, 400, "does not show tools"),
    ({"messages": []}, 400, "'messages'"),
    ({"messages": [{"role": "bogus", "content": "x"}]}, 400, "'messages.0' is no message"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "more than text"),
    ({"messages": [{"role": "user", "content": "long " * 3000}]}, 400, "maximum context length is 2048"),
]


@pytest.mark.parametrize("asked, status, sentence", WRONG)
def test_what_cannot_be_done_is_refused_by_name(
    api: tuple[openai.OpenAI, Server], asked: dict[str, Any], status: int, sentence: str
) -> None:
    client, _ = api
    with pytest.raises(openai.APIStatusError, match=sentence) as refused:
        client.chat.completions.create(**{"model": "micro", "messages": HELLO, "max_tokens": 1, **asked})
    assert refused.value.status_code == status and refused.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_without_the_key_nothing_is_said(api: tuple[openai.OpenAI, Server]) -> None:
    client, _ = api
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sesame").models.list()


def test_a_conversation_goes_on_from_the_very_tokens() -> None:
    chat = Chat(load_tokenizer(ModelConfig()))
    released: list[str] = []
    recall = Recall(chat, released.append, most=1)
    word = max((w for w in chat.tokenizer.get_vocab() if w.isascii() and w.isalpha()), key=lambda w: (len(w), w))
    asked, said, more = (Message("user", "go"), Message("assistant", word), Message("user", "again"))
    letters = tuple(i for letter in word for i in chat.tokenizer(letter, add_special_tokens=False)["input_ids"])
    rendered = tuple(chat.open((asked, said, more)))
    prompt = recall.prompt((asked,))
    recall.keep((asked,), (), prompt, said, letters, word)
    onwards = recall.prompt((asked, said, more))
    assert onwards.tokens[: len(prompt.tokens) + len(letters)] == (*prompt.tokens, *letters)
    assert onwards.tokens != rendered and onwards.session is not None, "the tokeniser would have cut it otherwise"
    assert recall.prompt((asked, Message("assistant", f"{word}s"), more)).session is None
    assert recall.prompt((asked, said, more), (ToolSpec("f", "", "{}"),)).session is None
    recall.keep((more,), (), prompt, said, letters, word)
    assert released == [onwards.session] and recall.prompt((asked, said, more)).tokens == rendered


@pytest.mark.parametrize("port", ["65536", "-3", "http", "²"])
def test_a_port_that_is_none_is_said_before_a_model_is_read(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    from espl_train import cli

    assert cli.main(["serve", "micro", f"--port={port}"]) == 2
    assert "is no port: a whole number from 0 to 65535" in capsys.readouterr().err
