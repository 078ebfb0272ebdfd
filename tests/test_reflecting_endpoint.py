"""A server that reflects: asked before anything is written, tried again where that helps, and never told twice what its
key is. Played against real HTTP servers on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from evaluate_kit import MODEL, completion, error, serving

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_envs.evaluate import endpoint as door
from espl_train.config import Config
from espl_train.evolution.reflection import Declined
from espl_train.evolution.rejections import Reason
from espl_train.reflecting.cache import Cache
from espl_train.reflecting.choice import inspect
from espl_train.reflecting.client import Client
from espl_train.reflecting.endpoint import EndpointSource, check
from espl_train.reflecting.ledger import Ledger
from espl_train.settings import ConfigError, load

KEY = "sk-proj/4f+9aXY_secret"
ASK = (Message("user", "What separates them?"),)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(door, "PREFLIGHT_S", 1.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings(url: str, **more: Any) -> Config:
    chosen = {"base_url": url, "model": MODEL, "concurrency": 4, **more}
    return load(overrides={"evolution.reflector": "endpoint", **{f"reflection.{k}": v for k, v in chosen.items()}})


def opened(config: Config, folder: Path) -> Client:
    cache = Cache(Path(config.reflection.cache_dir)) if config.reflection.cache_dir else None
    client = Client(EndpointSource(config), config, Ledger(config.reflection, folder), cache)
    client.open()
    client.begin(1)
    return client


def said(client: Client, seed: int = 2**40 + 5) -> str | tuple[Reason, str]:
    """The reply, or why there is none."""
    try:
        return background.run(client.complete(ASK, seed))
    except Declined as declined:
        return declined.reason, str(declined)


@pytest.fixture
def tidy() -> Iterator[list[Client]]:
    clients: list[Client] = []
    yield clients
    for client in clients:
        client.close()


def after_hello(answer: Callable[[dict[str, Any], int], Any]) -> Callable[[dict[str, Any], int], Any]:
    """The first short request is answered; the others are counted from 1."""
    return lambda body, number: completion("Hi") if number == 1 else answer(body, number - 1)


def test_what_passes_is_tried_again_until_it_has_passed(tmp_path: Path, tidy: list[Client]) -> None:
    stumbles: list[Callable[[], Any]] = [
        lambda: error(429, "slow down", Retry_After="0.01"), lambda: error(500, "oops"), lambda: None,
        lambda: web.Response(text='{"choices": [{"message": {"role": "assi', content_type="application/json"),
        lambda: web.Response(text="<html>bad gateway</html>", status=502),
    ]  # fmt: skip

    def answer(_: dict[str, Any], number: int) -> Any:
        return stumbles[number - 1]() if number <= len(stumbles) else completion("An edit.")

    with serving(after_hello(answer)) as server:
        tidy.append(opened(settings(server.url), tmp_path))
        assert said(tidy[0]) == "An edit." and len(server.requests) == 1 + len(stumbles) + 1
    total = tidy[0].ledger.total
    assert (total.calls, total.failed, total.prompt_tokens, total.completion_tokens) == (1, 0, 11, 7)


def test_a_request_holds_seed_sampling_and_extra_fields_and_the_key_only_in_its_header(
    tmp_path: Path, tidy: list[Client]
) -> None:
    echo = after_hello(lambda body, _: completion(f"your key is {KEY}, you said {body['messages'][0]['content']}"))
    more = {"extra": {"reasoning_effort": "low"}, "cache": "record", "cache_dir": str(tmp_path / "cache")}
    with serving(echo) as server:
        tidy.append(opened(settings(server.url, **more), tmp_path))
        assert said(tidy[0]) == said(tidy[0], 6) == "your key is [key], you said What separates them?"
    first = server.requests[1]
    assert first["seed"] == (2**40 + 5) & 0x7FFFFFFF and first["reasoning_effort"] == "low"
    assert first["temperature"] == 0.7 and first["max_tokens"] == 256 and first["model"] == MODEL
    assert set(server.keys) == {f"Bearer {KEY}"} and KEY not in json.dumps(server.requests)
    tidy[0].ledger.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and not any(KEY.encode() in path.read_bytes() for path in files)


def test_a_server_without_seeds_is_asked_without_them(tmp_path: Path, tidy: list[Client]) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        return error(400, "Unrecognized request argument supplied: seed") if "seed" in body else completion("Fine.")

    with serving(answer) as server:
        assert "takes no seeds" in background.run(check(settings(server.url)))
        tidy.append(opened(settings(server.url), tmp_path))
        assert said(tidy[0]) == "Fine." and "seed" not in server.requests[-1]


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (lambda: completion("x" * 10_000_000), Reason.COMPLETION_FAILED, "10,000,000 characters"),
        (lambda: error(403, "no"), Reason.COMPLETION_FAILED, "HTTP 403"),
        (lambda: error(401, "revoked"), Reason.COMPLETION_FAILED, "does not accept the key in OPENAI_API_KEY"),
        (lambda: error(402, "pay"), Reason.COMPLETION_FAILED, "wants to be paid"),
        (lambda: error(400, "maximum context length is 10"), Reason.COMPLETION_FAILED, "no longer fits"),
    ],
)  # fmt: skip
def test_what_stays_is_a_reason_and_not_an_exception(
    answer: Callable[[], Any], reason: Reason, detail: str, tmp_path: Path, tidy: list[Client]
) -> None:
    with serving(after_hello(lambda *_: answer())) as server:
        tidy.append(opened(settings(server.url), tmp_path))
        found = said(tidy[0])
    assert found[0] is reason and detail in found[1] and KEY not in str(found)


def test_a_server_that_hangs_or_only_stumbles_is_given_up_in_time(tmp_path: Path, tidy: list[Client]) -> None:
    async def hang() -> Any:
        await asyncio.sleep(60)

    with serving(after_hello(lambda _, number: hang() if number == 1 else error(500, "still"))) as server:
        tidy.append(opened(settings(server.url, deadline_s=0.2), tmp_path))
        for _ in range(2):
            found = said(tidy[0])
            assert found[0] in (Reason.DEADLINE, Reason.COMPLETION_FAILED)
    assert tidy[0].ledger.total.failed == 2 and tidy[0].ledger.exhausted() == ""


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda: error(404, "The model `x` does not exist", "model_not_found"), "has no model .* it has other"),
        (lambda: error(401, "bad key"), "does not accept the key in OPENAI_API_KEY"),
        (lambda: error(503, "loading"), "HTTP 503: loading, to a first short request"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_before_a_run(answer: Callable[[], Any], sentence: str) -> None:
    with serving(lambda *_: answer(), models=("other",)) as server, pytest.raises(EsplError, match=sentence) as raised:
        list(inspect(settings(server.url)))
    assert KEY not in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_said_with_the_names_that_options_have_here() -> None:
    with pytest.raises(EsplError, match=r"reflection: cannot reach .* --reflection.base_url right\?"):
        list(inspect(settings("http://127.0.0.1:9/v1")))


def test_a_run_that_only_replays_needs_no_server(tmp_path: Path) -> None:
    config = settings("http://127.0.0.1:9/v1", cache="replay_only", cache_dir=str(tmp_path))
    assert ("reflection", "only what was recorded") in list(inspect(config))
    missing = settings("http://127.0.0.1:9/v1", cache="replay_only", cache_dir=str(tmp_path / "none"))
    with pytest.raises(EsplError, match="there is no folder"):
        list(inspect(missing))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evolution.reflector": "endpoint"}, "say which, with --reflection.base_url URL and --reflection.model NAME"),
        ({"reflection.model": "m"}, "evolution.reflector is reference; it takes endpoint"),
        ({"reflection.api_key_env": KEY}, "is not the NAME of an environment variable"),
        ({"reflection.base_url": f"http://user:{KEY}@host/v1"}, "holds more than an address"),
        ({"reflection.cache": "replay"}, "name what was recorded"),
        ({"reflection.cache_dir": "x"}, "reflection.cache is off"),
        ({"reflection.max_cost": 1.0}, "needs the prices"),
        ({"reflection.prices": (1.0, -2.0)}, "none can be below 0"),
        ({"reflection.extra": {"stream": True}}, "every request has a stream of its own"),
    ],
)
def test_settings_that_make_no_sense_are_refused_without_repeating_a_key(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        load(overrides=changes)
    assert KEY not in str(raised.value)


def test_a_key_among_the_extra_fields_is_refused_without_being_shown() -> None:
    with pytest.raises(EsplError, match="holds the key of OPENAI_API_KEY") as raised:
        EndpointSource(settings("http://127.0.0.1:9/v1", extra={"token": KEY}))
    assert KEY not in str(raised.value)


def test_a_variable_that_is_named_and_not_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(EsplError, match=r"--reflection\.api_key_env names OTHER_KEY, which is not set"):
        EndpointSource(settings("http://127.0.0.1:9/v1", api_key_env="OTHER_KEY"))
