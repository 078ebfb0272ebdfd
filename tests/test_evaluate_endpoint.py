"""The door to a server: what passes is tried again, what stays is a fault, and the key is nowhere to be seen."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from evaluate_kit import ADD, MODEL, TOOLS, Server, completion, error, play, serving, sum_in
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_envs.core import background
from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message, ToolCall
from espl_envs.evaluate import endpoint, pace
from espl_envs.evaluate.addresses import checked_url, note
from espl_envs.evaluate.agents import AgentLost, ContextExceeded
from espl_envs.evaluate.config import Prices
from espl_envs.evaluate.credentials import HIDDEN, Secret
from espl_envs.evaluate.endpoint import EndpointDoor, Limits, Sampling
from espl_envs.evaluate.pace import Pace
from espl_envs.evaluate.records import Outcome
from espl_envs.evaluate.refusals import Asked, EndpointFault, Passing, explain
from espl_envs.evaluate.wire import Unreadable, from_wire, to_wire

KEY = "sk-proj/4f+9aXY_secret"
ASKED = Asked("http://here/v1", MODEL, "MY_KEY")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(endpoint, "PREFLIGHT_S", 30.0)


def door(server: Server | str, sampling: Sampling | None = None, prices: Prices | None = None, key: str = KEY,
         model: str = MODEL, **limits: Any) -> EndpointDoor:
    url = server if isinstance(server, str) else server.url
    return EndpointDoor(url, model, Secret("MY_KEY", key), sampling, Limits(**{"concurrency": 8, **limits}), prices)


def hello(body: dict[str, Any]) -> bool:
    """Whether this is the first short call."""
    return bool(body["messages"][-1]["content"] == "Hello.")


def after_hello(answer: Callable[[dict[str, Any], int], Any]) -> Callable[[dict[str, Any], int], Any]:
    return lambda body, number: completion("Hi") if hello(body) else answer(body, number - 1)


def preflight(wanted: EndpointDoor, tools: Any = ()) -> None:
    async def main() -> None:
        async with wanted.open(tools):
            pass

    background.run(main())


# What passes and what stays


def test_what_passes_is_tried_again_until_it_has_passed(tmp_path: Path) -> None:
    stumbles: list[Any] = [
        lambda: error(429, "slow down", Retry_After="0.01"), lambda: error(500, "oops"), lambda: None,
        lambda: web.Response(text='{"choices": [', content_type="application/json"),
        lambda: web.Response(text="<html>bad gateway</html>", status=502), lambda: {"choices": []},
        lambda: web.json_response({"error": {"code": 503, "message": "overloaded"}}),
        lambda: {"choices": [{"message": {"tool_calls": [{"function": "no"}]}}]}, lambda: error(408, "timeout"),
    ]  # fmt: skip

    def answer(body: dict[str, Any], number: int) -> Any:
        return stumbles[number // 2 % len(stumbles)]() if number % 2 else sum_in(body["messages"])

    with serving(after_hello(answer)) as server:
        episodes = play(tmp_path / "run", door(server), ADD, k=2)
    assert len(episodes) == 20 and all(e.outcome is Outcome.ANSWERED and e.score == 1.0 for e in episodes)
    assert len(server.requests) >= 40 and all(e.attempts == 1 for e in episodes)


def test_the_pause_that_a_server_asks_for_is_kept(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(body: dict[str, Any], _: int) -> Any:
        times.append(time.monotonic())
        return error(429, "later", Retry_After="0.2") if len(times) == 1 else sum_in(body["messages"])

    with serving(after_hello(answer)) as server:
        play(tmp_path / "run", door(server), ADD, limit=1)
    assert len(times) == 2 and times[1] - times[0] >= 0.2


def test_what_stays_is_a_fault_and_is_played_again(tmp_path: Path) -> None:
    down = True

    def answer(body: dict[str, Any], _: int) -> Any:
        lost = down and "27 + 27" in body["messages"][-1]["content"]
        return error(503, "the GPU\nis gone") if lost else sum_in(body["messages"])

    with serving(after_hello(answer)) as server:
        episodes = play(tmp_path / "run", door(server, retry_s=0.05), ADD)
        [fault] = [e for e in episodes if e.outcome is Outcome.FAULT]
        assert fault.score is None and fault.task_id == "add-27" and fault.attempts == 1
        assert "answered HTTP 503: the GPU is gone" in str(fault.error) and "\n" not in str(fault.error)
        before, down = len(server.requests), False
        episodes = play(tmp_path / "run", door(server, retry_s=0.05), ADD)
        assert [e.score for e in episodes] == [1.0] * 10 and len(server.requests) == before + 2


def test_a_pause_longer_than_patience_is_a_fault_at_once(tmp_path: Path) -> None:
    with serving(after_hello(lambda *_: error(429, "tomorrow", Retry_After="86400"))) as server:
        [episode] = play(tmp_path / "run", door(server, retry_s=5.0), ADD, limit=1)
    assert episode.outcome is Outcome.FAULT and len(server.requests) == 2


def test_a_slow_reply_is_a_fault(tmp_path: Path) -> None:
    async def slow(body: dict[str, Any]) -> Any:
        await asyncio.sleep(5)
        return sum_in(body["messages"])

    with serving(after_hello(lambda body, _: slow(body))) as server:
        [episode] = play(tmp_path / "run", door(server, request_s=0.2, retry_s=0.1), ADD, limit=1)
    assert episode.outcome is Outcome.FAULT and "gave no answer within 0.2 s" in str(episode.error)


def test_a_reply_of_ten_megabytes_is_the_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        large = "25 + 25" in body["messages"][-1]["content"]
        return completion("x" * 10_000_000) if large else sum_in(body["messages"])

    with serving(after_hello(answer)) as server:
        big, fine = play(tmp_path / "run", door(server), ADD, limit=2)
        assert big.outcome is Outcome.AGENT_ERROR and big.score == 0.0 and big.prompt_tokens == 11, "it was paid for"
        assert big.error == "the reply is too long: 10,000,000 characters, and at most 2,000,000 characters are played"
        assert fine.score == 1.0 and (tmp_path / "run/episodes.jsonl").stat().st_size < 10_000
        monkeypatch.setattr(endpoint, "MAX_BODY", 1 << 20)
        [endless] = play(tmp_path / "again", door(server), ADD, limit=1)
        assert endless.outcome is Outcome.AGENT_ERROR and "too long: more than 1 MB" in str(endless.error)


def test_a_key_that_is_revoked_ends_the_evaluation(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        return error(401, "revoked") if number > 3 else sum_in(body["messages"])

    with serving(after_hello(answer)) as server, pytest.raises(AgentLost, match="does not accept the key in MY_KEY"):
        play(tmp_path / "run", door(server, concurrency=1), ADD)
    assert len((tmp_path / "run/episodes.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("status", "body", "kind", "said"), [
    (401, '{"error": {"message": "Incorrect key", "code": "invalid_api_key"}}', AgentLost, "(HTTP 401): Incorrect key"),
    (402, '{"error": {"message": "no credits"}}', AgentLost, "wants to be paid (HTTP 402): no credits"),
    (429, '{"error": {"message": "quota", "code": "insufficient_quota"}}', AgentLost, "wants to be paid"),
    (429, "", Passing, "http://here/v1 answered HTTP 429"),
    (503, "<html>x</html>", Passing, "http://here/v1 answered HTTP 503"),
    (400, '{"object": "error", "message": "This model\'s maximum context length is 20 tokens."}', ContextExceeded,
     "no longer fits into the context of toy-model"),
    (400, '{"error": {"message": "x", "code": "context_length_exceeded"}}', ContextExceeded, "no longer fits"),
    (400, '{"detail": [{"loc": "temperature"}]}', EndpointFault, "loc"),
    (404, "", EndpointFault, "/chat/completions is not there"),
    (404, '{"error": {"message": "The model `x` does not exist."}}', EndpointFault, "The model `x` does not exist."),
    (307, "", EndpointFault, "give that address as --base-url"),
    (403, '{"error": "\\u001b[31mno"}', EndpointFault, "forbids the key in MY_KEY the model"),
])  # fmt: skip
def test_every_refusal_means_something(status: int, body: str, kind: type[Exception], said: str) -> None:
    found = explain(ASKED, status, {}, body)
    assert type(found) is kind and said in str(found) and "\n" not in str(found) and "\x1b" not in str(found)


def test_pauses_are_read_in_every_form() -> None:
    def asked(**headers: str) -> Any:
        return getattr(explain(ASKED, 429, {k.replace("_", "-"): v for k, v in headers.items()}, ""), "retry_after", 0)

    assert asked(Retry_After="2.5") == 2.5 and asked(retry_after_ms="1500") == 1.5
    assert asked() is None and asked(Retry_After="soon") is None and asked(Retry_After="-1") is None
    assert asked(Retry_After="Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert asked(Retry_After="nan") is None


# What a conversation becomes


def test_native_tools_are_offered_and_bad_arguments_go_on(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        messages = body["messages"]
        assert [tool["function"]["name"] for tool in body["tools"]] == ["add", "submit"]
        assert "<tool_call>" not in json.dumps(messages)
        turn = sum(m["role"] == "assistant" for m in messages)
        n = int(next(m for m in messages if m["role"] == "user")["content"].split()[2])
        wrong = ['{"a": ', '{"a": 1}', "[1]"]
        if turn < 3:
            call = {"type": "function", "function": {"name": "add", "arguments": wrong[turn]}}
        elif turn == 3:
            sent = [m["tool_calls"][0]["function"]["arguments"] for m in messages if m["role"] == "assistant"]
            assert [json.loads(s) for s in sent] == [{"malformed": '{"a": '}, {"a": 1}, {"malformed": "[1]"}]
            call = {"id": "c9", "type": "function", "function": {"name": "add", "arguments": {"a": n, "b": n}}}
        else:
            ids = [m["tool_call_id"] for m in messages if m["role"] == "tool"]
            assert ids == ["call_0", "call_0", "call_0", "c9"]
            return completion(f"\\boxed{{{messages[-1]['content']}}}")
        return completion(None, finish="tool_calls", tool_calls=[call])

    with serving(after_hello(answer)) as server:
        episodes = play(tmp_path / "run", door(server), TOOLS, limit=2)
    assert [e.score for e in episodes] == [1.0, 1.0] and episodes[0].info["tool_errors"] == 3.0
    assert [t.tool_calls for t in episodes[0].turns] == [1, 1, 1, 1, 0]
    assert "tools" in server.requests[0]                   # so that a server which takes none says so at once


def test_calls_in_text_are_answered_in_text(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        last = body["messages"][-1]
        assert "tools" not in body
        if last["content"].startswith("<tool_response>"):
            assert last["role"] == "user"
            return completion("\\boxed{50}")
        return completion('<tool_call>{"name": "add", "arguments": {"a": 25, "b": 25}}</tool_call>')

    with serving(after_hello(answer)) as server:
        plain = door(server)
        plain.tool_syntax = "text"
        [episode] = play(tmp_path / "run", plain, TOOLS, limit=1)
    assert episode.score == 1.0 and [m.role for m in episode.messages][-3:] == ["assistant", "tool", "assistant"]
    assert "<tool_call>" in server.requests[-2]["messages"][0]["content"]


def test_reasoning_is_kept_apart_and_never_sent_back(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        assert "ponder" not in json.dumps(body)
        if len(body["messages"]) > 2:
            return completion("\\boxed{50}", reasoning="second ponder")
        call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 25, "b": 25}'}}
        return completion("", finish="tool_calls", reasoning_content="first ponder \\boxed{9}", tool_calls=[call])

    with serving(after_hello(answer)) as server:
        [episode] = play(tmp_path / "run", door(server), TOOLS, limit=1)
    assert [t.reasoning for t in episode.turns] == ["first ponder \\boxed{9}", "second ponder"] and episode.score == 1.0
    assert [t.finish_reason for t in episode.turns] == ["tool_calls", "stop"]
    assert (episode.prompt_tokens, episode.completion_tokens) == (22, 14)


def test_a_reply_cut_off_for_its_length_is_truncated_unless_it_answers(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        text = "\\boxed{50} and so" if "25 + 25" in body["messages"][-1]["content"] else "Let me think about"
        return completion(text, finish="length")

    with serving(after_hello(answer)) as server:
        done, cut = play(tmp_path / "run", door(server, Sampling(max_tokens=5)), ADD, limit=2)
    assert (done.outcome, done.score) == (Outcome.ANSWERED, 1.0)
    assert (cut.outcome, cut.score, cut.stop_reason) == (Outcome.TRUNCATED, 0.0, "format")


def test_a_conversation_that_outgrows_the_context_is_truncated(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        if "26 + 26" in body["messages"][-1]["content"] or "max_tokens" in body:
            return error(400, "This model's maximum context length is 64 tokens", "context_length_exceeded")
        return sum_in(body["messages"])

    with serving(after_hello(answer)) as server:
        fits, exceeds = play(tmp_path / "run", door(server, Sampling(max_tokens=60)), ADD, limit=2)
    assert fits.score == 1.0                               # with what is left of the context
    assert (exceeds.outcome, exceeds.score, exceeds.stop_reason) == (Outcome.TRUNCATED, 0.0, "context")


def test_settings_are_sent_and_seeds_are_keyed(tmp_path: Path) -> None:
    sampling = Sampling(0.7, 9, True, {"top_p": 0.5})
    with serving(after_hello(lambda body, _: sum_in(body["messages"]))) as server:
        play(tmp_path / "a", door(server, sampling), ADD, k=3, limit=2, seed=4)
        first = {json.dumps(r) for r in server.requests[1:]}
        assert all((r["temperature"], r["max_tokens"], r["top_p"]) == (0.7, 9, 0.5) for r in server.requests[1:])
        assert len({r["seed"] for r in server.requests[1:]}) == 6
        server.requests.clear()
        play(tmp_path / "b", door(server, sampling, concurrency=1), ADD, k=3, limit=2, seed=4)
        assert {json.dumps(r) for r in server.requests[1:]} == first
        server.requests.clear()
        play(tmp_path / "c", door(server), ADD, limit=1)
        assert not {"seed", "temperature", "max_tokens"} & set(server.requests[1])


def test_cost_comes_from_prices_or_from_the_servers_bill(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        said = sum_in(body["messages"])
        return {**said, "usage": {**said["usage"], "cost": 0.5}}  # type: ignore[dict-item]

    with serving(after_hello(answer)) as server:
        [priced] = play(tmp_path / "a", door(server, prices=Prices(1.0, 10.0)), ADD, limit=1)
        [billed] = play(tmp_path / "b", door(server), ADD, limit=1)
    assert priced.cost == pytest.approx((11 * 1 + 7 * 10) / 1e6) and billed.cost == 0.5


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "tool_calls", "function", "arguments", "usage"]), inner),
    max_leaves=12,
))  # fmt: skip
def test_an_answer_is_read_or_refused_whatever_it_is(answer: Any) -> None:
    for body in (answer, {"choices": answer}, {"choices": [{"message": answer}], "usage": answer},
                 {"choices": [{"message": {"tool_calls": answer, "content": answer}}]}):
        try:
            assert isinstance(from_wire(body).message, Message)
        except Unreadable:
            continue


def test_tool_results_without_a_call_are_one_user_message() -> None:
    sent = to_wire((Message("user", "q"), Message("assistant", "…"), Message("tool", "1", name="a"),
                    Message("tool", "2", name="b"), Message("assistant", "", (ToolCall("i", "f", "{}"),)),
                    Message("tool", "3", tool_call_id="i")))
    assert [m["role"] for m in sent] == ["user", "assistant", "user", "assistant", "tool"]
    assert sent[2]["content"] == "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"


# Before the first episode


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(EsplError, match=r"^cannot reach http://127.0.0.1:9/v1: Connection refused: is the server"):
        preflight(door("http://127.0.0.1:9"))


@pytest.mark.parametrize(("answer", "key", "said"), [
    (lambda *_: error(401, f"Incorrect API key: {KEY}"), KEY, rf"does not accept the key in MY_KEY.*{HIDDEN[1:-1]}"),
    (lambda *_: error(401, "no key"), "", "wants a key .HTTP 401.: set OPENAI_API_KEY, or name its variable"),
    (lambda *_: error(403, "not yours"), KEY, "forbids the key in MY_KEY the model 'toy-modle'"),
    (lambda *_: error(404, "no such model"), KEY, "has no model 'toy-modle'; it has toy-model"),
    (lambda *_: error(400, "temperature is wrong"), KEY, "temperature is wrong|it has toy-model"),
    (lambda *_: error(503, "loading"), KEY, "answered HTTP 503: loading, to a first short request, for 1 s"),
    (lambda *_: web.Response(text="Hello, world"), KEY, "answered what cannot be read: it is not JSON"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_any_episode(
    answer: Any, key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "PREFLIGHT_S", 1.0)
    with serving(answer) as server, pytest.raises(EsplError, match=said) as caught:
        preflight(door(server, key=key, model="toy-modle"))
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_web_page_is_no_server_and_nobody_waits_for_it_to_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PREFLIGHT_S", 3600.0)
    page = web.Response(text="<!doctype html><h1>Welcome</h1>", content_type="text/html")
    with serving(lambda *_: page) as server, pytest.raises(EsplError, match="a web page: is --base-url right"):
        preflight(door(server))
    assert len(server.requests) == 1


def test_a_path_that_is_not_there_leads_to_the_one_that_may_be() -> None:
    with serving(lambda *_: completion("Hi")) as server:
        root = server.url.removesuffix("/v1")
        with pytest.raises(EsplError, match=f"{root}/api/chat/completions is not there .HTTP 404.*as in {root}/api/v1"):
            preflight(door(f"{root}/api"))
        preflight(door(f"{server.url}/chat/completions"))
        assert not server.requests[1:]


def test_a_server_without_tools_is_told_apart() -> None:
    from toy import ToyEnv

    def answer(body: dict[str, Any], _: int) -> Any:
        return error(400, '"auto" tool choice requires --enable-auto-tool-choice') if body["tools"] else completion("")

    with serving(answer) as server, pytest.raises(EsplError, match="With --tool-syntax text tools are explained"):
        preflight(door(server), ToyEnv(tools=True).tools)


def test_a_server_that_is_being_loaded_or_wants_other_words_is_waited_for(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        if number == 1:
            return error(503, "loading")
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return completion("") if hello(body) else sum_in(body["messages"])

    with serving(answer) as server:
        [episode] = play(tmp_path / "run", door(server, Sampling(max_tokens=5)), ADD, limit=1)
    assert episode.score == 1.0 and server.requests[-1]["max_completion_tokens"] == 5


@pytest.mark.parametrize("given, url, told", [
    ("http://localhost:8000", "http://localhost:8000/v1", ""),
    (" http://localhost:8000// ", "http://localhost:8000/v1", ""),
    ("https://x.org/api/v2/", "https://x.org/api/v2", ""),
    ("http://x:1//v1///", "http://x:1/v1", ""),
    ("http://x/v1/chat/completions/", "http://x/v1", "read as http://x/v1; /chat/completions is added to it"),
    ("http://x/chat/completions", "http://x", "read as http://x; /chat/completions is added to it"),
    ("https://x/v1/models", "https://x/v1", "read as https://x/v1"),
    ("https://x/models-of-mine", "https://x/models-of-mine", ""),
])  # fmt: skip
def test_a_base_url_is_read_as_it_is_meant(given: str, url: str, told: str) -> None:
    assert checked_url(given) == url
    assert told in note(given) and bool(note(given)) == bool(told)


@pytest.mark.parametrize("given, meant", [
    ("localhost:8000", "http://localhost:8000/v1"), ("127.0.0.1/v1/", "http://127.0.0.1/v1"),
    ("gpu7:8000/v1/chat/completions", "http://gpu7:8000/v1"), ("api.openai.com/v1", "https://api.openai.com/v1"),
])  # fmt: skip
def test_an_address_without_a_protocol_is_shown_with_one(given: str, meant: str) -> None:
    with pytest.raises(EsplError, match=f"did you mean {re.escape(meant)}\\?$"):
        checked_url(given)


def test_urls_are_addresses() -> None:
    for wrong in ("ftp://x", "", "http://", "http://[::1", "http://x:99999/v1", "http://.../v1", "http:/x", "a b"):
        with pytest.raises(EsplError, match="expected a URL"):
            checked_url(wrong)
    for secret in (f"http://u:{KEY}@x/v1", f"http://x/v1?api-key={KEY}", f"http://x/#{KEY}"):
        with pytest.raises(EsplError, match="keys come from an environment variable") as caught:
            checked_url(secret)
        assert KEY not in str(caught.value)


# The key


def spelled(key: str) -> list[str]:
    """The key as a server may write it in JSON."""
    return [key, key.replace("/", "\\/"), "".join(f"\\u{ord(c):04x}" for c in key), key.replace("s", "\\u0073"),
            key.replace("/", "%2F").replace("+", "%2B")]


def test_the_key_is_hidden_however_it_is_spelled() -> None:
    secret = Secret("MY_KEY", KEY)
    for form in spelled(KEY):
        for text in (f'{{"content": "so {form} it is"}}', f'not JSON: "{form}'):
            assert KEY not in secret.hidden(text) and form not in secret.hidden(text), form
            assert KEY not in str(json.loads(secret.hidden(text)) if text.startswith("{") else "")
    assert KEY not in repr(secret) and secret.header() == {"Authorization": f"Bearer {KEY}"}
    assert Secret("X", "EMPTY").hidden("EMPTY words") == "EMPTY words"         # no secret, and a word


def test_keys_come_from_variables_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", f" {KEY}\n")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert Secret.from_variable("OTHER_KEY").key == KEY and Secret.from_variable(None).key == ""
    for wrong, said in (("NOT_SET", "NOT_SET, which is not set"), (KEY, "the NAME of an environment variable")):
        with pytest.raises(EsplError, match=said) as caught:
            Secret.from_variable(wrong)
        assert KEY not in str(caught.value)
    monkeypatch.setenv("OTHER_KEY", "sk-\x01")
    with pytest.raises(EsplError, match="a header cannot hold"):
        Secret.from_variable("OTHER_KEY")


def test_a_server_that_echoes_the_key_does_not_get_it_into_a_file(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        forms = spelled(KEY)
        said = f'{{"choices": [{{"message": {{"content": "{forms[number % 5]}", "reasoning": "{KEY}"}}}}]}}'
        if "25 + 25" in body["messages"][-1]["content"]:
            return error(400, f"bad header: Bearer {KEY}")
        return web.Response(text=said, content_type="application/json")

    with serving(after_hello(answer)) as server:
        episodes = play(tmp_path / "run", door(server), ADD, k=2)
    assert server.keys == [f"Bearer {KEY}"] * 21
    assert [e.outcome for e in episodes[:2]] == [Outcome.FAULT] * 2 and HIDDEN in str(episodes[0].error)
    written = "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert len(written) > 5000
    assert not any(json.dumps(form)[1:-1] in written or form in written for form in spelled(KEY))


def test_the_mutant_that_hides_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Secret, "hidden", lambda _, text: text)
    with pytest.raises(AssertionError):
        test_a_server_that_echoes_the_key_does_not_get_it_into_a_file(tmp_path)


# The pace


class Warped(asyncio.SelectorEventLoop):
    """A loop whose time passes only when everybody waits, and then at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now, select = 0.0, self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            self._now += timeout or 0.0
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def simulate(requests: int, service: Callable[[int], float | None], most: int = 256) -> tuple[Pace, float, int]:
    """`requests` through a Pace to a server that takes `service(under way)` seconds, None to refuse. The pace, the
    seconds that all of it took, and the number of refusals."""
    refused = 0

    async def main() -> tuple[Pace, float]:
        loop = asyncio.get_running_loop()
        meter = Pace(most, loop.time)

        async def one() -> None:
            nonlocal refused
            for attempt in range(100):
                async with meter.slot() as began:
                    assert meter.under_way <= meter.most
                    seconds = service(meter.under_way)
                    await asyncio.sleep(0.01 if seconds is None else seconds)
                    if seconds is not None:
                        meter.answered(began, 80)
                        return
                    meter.pushed_back(began)
                    refused += 1
                await asyncio.sleep(0.1 * (attempt + 1))
            raise AssertionError("never served")

        await asyncio.gather(*(one() for _ in range(requests)))
        return meter, loop.time()

    with asyncio.Runner(loop_factory=Warped) as runner:
        meter, seconds = runner.run(main())
    return meter, seconds, refused


def test_the_pace_reaches_what_a_server_bears() -> None:
    meter, seconds, refused = simulate(3000, lambda _: 1.0)
    assert meter.limit == 256 and refused == 0 and seconds < 3000 / 256 + 5


def test_the_pace_settles_below_where_a_server_refuses() -> None:
    _, seconds, refused = simulate(3000, lambda there: 1.0 if there <= 50 else None)
    assert refused < 600 and seconds < 1.6 * 3000 / 50


def test_a_burst_of_refusals_halves_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Pace(64, lambda: 5.0)
    for _ in range(30):
        meter.pushed_back(4.0)
    assert meter.limit == 16
    monkeypatch.setattr(Pace, "_cut", property(lambda _: float("-inf"), lambda *_: None), raising=False)
    broken = Pace(64, lambda: 5.0)
    for _ in range(30):
        broken.pushed_back(4.0)
    assert broken.limit == 1                               # the mutant: without the memory of the cut


def test_a_queue_that_grows_is_not_fed() -> None:
    meter, _, _ = simulate(4000, lambda there: 1.0 if there <= 20 else 1.0 + (there - 20) ** 2 / 40)
    assert pace.FLOOR <= meter.limit < 128


def test_longer_replies_are_no_congestion() -> None:
    meter = Pace(64, lambda: 100.0)
    for tokens in (10, 2000) * 200:
        meter.under_way = meter.limit
        meter.answered(100.0 - tokens / 50 - 0.4, tokens)
    assert meter.limit == 64


def test_episodes_that_have_begun_go_first_and_cancelled_ones_leave_no_gap() -> None:
    async def main() -> list[str]:
        meter, order = Pace(1), []

        async def one(name: str, urgent: bool = False, until: asyncio.Event | None = None) -> None:
            async with meter.slot(urgent):
                order.append(name)
                if until is not None:
                    await until.wait()

        free = asyncio.Event()
        first = asyncio.create_task(one("first", until=free))
        await asyncio.sleep(0)
        waiting = {name: asyncio.create_task(one(name, urgent)) for name, urgent in
                   (("new", False), ("begun", True), ("given up", True), ("newer", False))}
        await asyncio.sleep(0)
        waiting["given up"].cancel()
        free.set()
        await asyncio.gather(first, *waiting.values(), return_exceptions=True)
        holder = asyncio.create_task(one("holder", until=asyncio.Event()))
        admitted = asyncio.create_task(one("admitted and cancelled at once"))
        await asyncio.sleep(0)
        holder.cancel()
        await asyncio.sleep(0)
        admitted.cancel()
        await asyncio.gather(holder, admitted, return_exceptions=True)
        async with asyncio.timeout(1):
            await one("late")
        assert meter.under_way == 0
        return [name for name in order if "cancelled" not in name]

    assert asyncio.run(main()) == ["first", "begun", "new", "newer", "holder", "late"]
