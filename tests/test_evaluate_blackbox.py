"""An agent that is a program: the same scores as by the other doors, every call on record, nothing lost when it fails.

Programs are small Python scripts that know nothing of this package: they read their task file, speak HTTP, and print.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from evaluate_kit import ADD, MODEL, PATIENT, TOOLS, Scripted, completion, error, lines, play, serving, sum_in
from program_kit import program
from test_evaluate_endpoint import after_hello

from espl_envs.core import background
from espl_envs.core.messages import Message, ToolCall
from espl_envs.evaluate import doors, proxy
from espl_envs.evaluate import program as program_module
from espl_envs.evaluate.agents import Reply, Seat, Unpaid
from espl_envs.evaluate.cli import main
from espl_envs.evaluate.config import Prices
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.doors import Wanted
from espl_envs.evaluate.endpoint import EndpointDoor
from espl_envs.evaluate.proxy import Budget, Ledger
from espl_envs.evaluate.purse import Halted, Purse
from espl_envs.evaluate.records import Episode, EpisodeKey, Outcome
from espl_envs.evaluate.runner import Limits

ASK = 'print(json.loads(chat())["choices"][0]["message"]["content"])'


def run(tmp_path: Path, body: str, *envs: str, limit: int = 1, **wanted: Any) -> list[Episode]:
    door = doors.choose(Wanted(command=program(tmp_path, body), **wanted))
    return play(tmp_path / "run", door, *(envs or (ADD,)), limit=limit)


def answer_of(a: int, result: int) -> str:
    """What the scripted agent makes of the sum: wrong for every third task."""
    return f"\\boxed{{{result + (a % 3 == 0)}}}"


def test_the_same_agent_scores_the_same_by_every_door(tmp_path: Path) -> None:
    async def scripted(messages: Any, _: Any) -> Reply:
        a = int(messages[-1 if messages[-1].role == "user" else -3].content.split()[2])
        if messages[-1].role == "tool":
            return Reply(Message("assistant", answer_of(a, int(messages[-1].content))))
        return Reply(Message("assistant", "", (ToolCall("c", "add", json.dumps({"a": a, "b": a})),)))

    def served(body: dict[str, Any], _: int) -> Any:
        a = int(next(m for m in body["messages"] if m["role"] == "user")["content"].split()[2])
        if body["messages"][-1]["role"] == "tool":
            return completion(answer_of(a, int(body["messages"][-1]["content"])))
        function = {"name": "add", "arguments": json.dumps({"a": a, "b": a})}
        return completion(None, tool_calls=[{"id": "c", "type": "function", "function": function}])

    by_python = play(tmp_path / "a", Scripted(scripted, tool_syntax="native"), TOOLS)
    with serving(after_hello(served)) as server:
        by_server = play(tmp_path / "b", EndpointDoor(server.url, MODEL, Secret()), TOOLS)
    by_command = run(tmp_path, """
        result = int(tool("add", a=a, b=b)["content"][0]["text"])
        print("thinking aloud")
        print("\\\\boxed{%d}" % (result + (a % 3 == 0)))
    """, TOOLS, limit=10)  # fmt: skip
    scores = [episode.score for episode in by_python]
    assert scores == [episode.score for episode in by_server] == [episode.score for episode in by_command]
    assert 0.0 in scores and 1.0 in scores and len(scores) == 10
    assert [e.tool_calls for e in by_python] == [e.tool_calls for e in by_server] == [e.tool_calls for e in by_command]


def test_every_call_is_recorded_and_the_real_key_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-a-very-secret-key")
    leak = 'open(task["answer_file"], "w").write(json.loads(chat())["choices"][0]["message"]["content"]); ' \
           'print({k: v for k, v in os.environ.items() if "KEY" in k}, file=sys.stderr); print(os.environ)'
    with serving(after_hello(lambda body, _: sum_in(body["messages"]))) as server:
        episodes = run(tmp_path, leak, limit=3, base_url=server.url, model=MODEL, out=tmp_path / "run",
                       secret=Secret.from_variable("MY_KEY"), prices=Prices(1e6, 0))  # fmt: skip
        assert set(server.keys) == {"Bearer sk-a-very-secret-key"}
        assert {body["model"] for body in server.requests} == {MODEL}
    assert [episode.score for episode in episodes] == [1.0] * 3
    assert [(e.prompt_tokens, e.completion_tokens, e.cost) for e in episodes] == [(11, 7, 11.0)] * 3
    records = [json.loads(line) for line in (tmp_path / "run" / proxy.CALLS).read_text().splitlines()]
    assert sorted(record["task"] for record in records) == [0, 1, 2]
    for record in records:
        assert record["request"]["messages"][-1]["role"] == "user"
        assert record["response"]["usage"]["prompt_tokens"] == 11
    assert not any(b"sk-a-very" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_streams_pass_through_and_are_counted(tmp_path: Path) -> None:
    from aiohttp import web

    def streamed(body: dict[str, Any], _: int) -> Any:
        assert body["stream"] and body["stream_options"] == {"include_usage": True}
        chunks: list[Any] = [{"choices": [{"delta": {"content": part}}]} for part in ("\\bo", "xed{", "50}")]
        chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]},
                   {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}]
        text = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\n\n"
        return web.Response(body=text.encode(), content_type="text/event-stream")

    with serving(after_hello(streamed)) as server:
        [episode] = run(tmp_path, """
            events = [line[6:] for line in chat(stream=True).splitlines() if line.startswith("data: ")]
            assert events.pop() == "[DONE]" and not any("usage" in event for event in events), events
            print("".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events))
        """, base_url=server.url, model=MODEL)  # fmt: skip
    assert episode.score == 1.0 and (episode.prompt_tokens, episode.completion_tokens) == (5, 3)
    assert episode.turns[-1].finish_reason == "stop"


def test_what_passes_is_tried_again_and_what_stays_is_a_fault(tmp_path: Path) -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        return error(429, "later", Retry_After="0") if number == 2 else sum_in(body["messages"])

    with serving(flaky) as server:
        [episode] = run(tmp_path, ASK, base_url=server.url, model=MODEL)
        assert episode.score == 1.0 and len(server.requests) == 3
    down = after_hello(lambda *_: error(503, "the GPU is gone"))
    undaunted = f"try:\n    {ASK}\nexcept Exception:\n    print('\\\\boxed{{50}}')"
    with serving(down) as server:
        door = doors.choose(
            Wanted(command=program(tmp_path, undaunted), base_url=server.url, model=MODEL, retry=0.05)
        )
        [fault] = play(tmp_path / "down", door, ADD, limit=1)
    assert fault.outcome is Outcome.FAULT and fault.score is None and "the GPU is gone" in str(fault.error)


def test_budgets_truncate_and_a_program_may_still_answer(tmp_path: Path) -> None:
    greedy = "for _ in range(9): text = chat()\nprint(text)"
    wise = f"{ASK}\ntry:\n    chat()\nexcept Exception as e: print(e.code, e.read(), file=sys.stderr)"
    with serving(after_hello(lambda body, _: sum_in(body["messages"]))) as server:
        model: dict[str, Any] = {"base_url": server.url, "model": MODEL}
        [episode] = run(tmp_path, greedy, budget=Budget(calls=2), **model)
        assert episode.outcome is Outcome.TRUNCATED and episode.score == 0.0 and episode.prompt_tokens == 22
        assert "budget of 2 model calls is used up" in str(episode.error)
        (tmp_path / "two").mkdir()
        [episode] = run(tmp_path / "two", wise, budget=Budget(tokens=18), **model)
        assert episode.outcome is Outcome.ANSWERED and episode.score == 1.0
        (tmp_path / "three").mkdir()
        [episode] = run(tmp_path / "three", greedy, budget=Budget(cost=25.0), prices=Prices(1e6, 0), **model)
        assert episode.outcome is Outcome.TRUNCATED and episode.cost == 33.0


def test_the_money_of_the_evaluation_is_kept_within_a_program_too(tmp_path: Path) -> None:
    """It is denied the model, its answer does not count, and it is played again when there is money."""
    stubborn = """
        for _ in range(5):
            try: chat()
            except Exception: pass
        print("\\\\boxed{50}")
    """
    with serving(after_hello(lambda body, _: sum_in(body["messages"]))) as server:
        def played(limit: float) -> list[Episode]:
            door = doors.choose(Wanted(command=program(tmp_path, stubborn), base_url=server.url, model=MODEL,
                                       prices=Prices(1e6, 0), concurrency=1))  # fmt: skip
            return play(tmp_path / "run", door, ADD, limit=1, limits=Limits(1, max_cost=limit))

        with pytest.raises(Halted, match="the cost limit of 30 is reached"):
            played(30.0)
        assert len(server.requests) == 1 + 3, "three calls of 11; the third one began when 22 were spent"
        [stopped] = lines(tmp_path / "run")
        assert stopped["score"] is None and stopped["outcome"] == "fault" and len(stopped["turns"]) == 3
        assert stopped["error"] == "stopped: the cost limit of 30 is reached (33 spent)"
        [episode] = played(1000.0)
    assert episode.score == 1.0 and len(episode.turns) == 5


def test_calls_that_a_program_makes_at_once_wait_for_each_other_where_money_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty threads, calls of 11 each, and 60 to spend: the sixth may go beyond the limit, and no other is made.

    No reply comes before all twenty have asked, so that the calls are made at once however slow the machine is.
    """
    hasty = """
        import threading
        def ask():
            try: chat()
            except Exception: pass
        threads = [threading.Thread(target=ask) for _ in range(20)]
        [one.start() for one in threads]
        [one.join() for one in threads]
    """
    asked, all_asked, call = itertools.count(1), threading.Event(), Purse.call

    def counted(purse: Purse) -> Any:
        if next(asked) == 20:
            all_asked.set()
        return call(purse)

    async def held(body: dict[str, Any]) -> Any:
        assert await asyncio.to_thread(all_asked.wait, 60), "twenty threads did not ask"
        return sum_in(body["messages"])

    monkeypatch.setattr(Purse, "call", counted)
    with serving(after_hello(lambda body, _: held(body))) as server:
        door = doors.choose(
            Wanted(command=program(tmp_path, hasty), base_url=server.url, model=MODEL, prices=Prices(1e6, 0))
        )
        with pytest.raises(Halted, match="the cost limit of 60 is reached"):
            play(tmp_path / "run", door, ADD, limit=1, limits=Limits(1, max_cost=60.0))
        assert len(server.requests) - 1 == 6 and server.most <= Purse.FIRST
    [stopped] = lines(tmp_path / "run")
    assert stopped["outcome"] == "fault" and sum(turn["cost"] for turn in stopped["turns"]) == 66.0


def test_the_mutant_that_asks_only_whether_money_is_left_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Purse, "_affords", lambda purse: not purse.empty)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):         # all twenty were made: none was refused
        test_calls_that_a_program_makes_at_once_wait_for_each_other_where_money_is_short(tmp_path, monkeypatch)


def test_a_program_is_told_that_the_money_is_spent() -> None:
    """With a status that clients do not take for a reason to try again."""
    class Spent:
        def charge(self, calls: Any) -> None: ...
        @contextlib.asynccontextmanager
        async def call(self) -> Any:
            raise Unpaid("the cost limit of 5 is reached")
            yield

    async def main(url: str) -> None:
        door = doors.choose(Wanted(command="true", base_url=url, model=MODEL))
        async with door.open(()) as agent:
            proxy = agent.proxy  # type: ignore[attr-defined]
            ledger = Ledger(Seat(EpisodeKey(ADD, "test", 0, 0), 0, "t", (), True, None, Spent()), Budget())
            with proxy.admit(ledger):
                async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {ledger.key}"}) as session:
                    answer = await session.post(f"{proxy.url}/chat/completions", json={"messages": []})
                    error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (402, "insufficient_quota") and "limit of 5" in error["message"]
            with pytest.raises(Unpaid, match="the cost limit of 5 is reached"):
                ledger.problem.result()

    with serving(after_hello(lambda *_: pytest.fail("the call was passed on"))) as server:
        background.run(main(server.url))


BAD: list[tuple[str, str, Outcome, str]] = [
    ("exit 1", "print('\\\\boxed{50}'); sys.exit('no luck')", Outcome.AGENT_ERROR, "ended with code 1: no luck"),
    ("killed", "os.kill(os.getpid(), 9)", Outcome.AGENT_ERROR, "was killed by SIGKILL"),
    ("hangs", "import time; time.sleep(60)", Outcome.AGENT_ERROR, "did not come to an end within 0.5 s"),
    ("silent", "pass", Outcome.NO_ANSWER, ""),
    ("endless", "sys.stdout.write('x' * 10_000_000); print('\\\\boxed{50}')", Outcome.ANSWERED, ""),
    ("large file", "open(task['answer_file'], 'w').write('x' * 10_000_000)", Outcome.AGENT_ERROR, "file of 10,000,0"),
    ("no text", "sys.stdout.buffer.write(b'\\xff\\xfe \\\\boxed{50}')", Outcome.ANSWERED, ""),
    ("no file", "os.mkdir(task['answer_file'])", Outcome.NO_ANSWER, ""),
]


@pytest.mark.parametrize("body, outcome, sentence", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_whatever_a_program_does_is_an_outcome(tmp_path: Path, body: str, outcome: Outcome, sentence: str) -> None:
    [episode] = run(tmp_path, body, timeout=0.5 if "sleep" in body else 60.0)
    assert episode.outcome is outcome and sentence in str(episode.error or "") and "\n" not in str(episode.error)
    assert episode.score == (1.0 if outcome is Outcome.ANSWERED else 0.0)
    assert (tmp_path / "run/episodes.jsonl").stat().st_size < 200_000


HIDES = """
    import subprocess
    SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
    pids = [subprocess.Popen(SLEEP).pid, subprocess.Popen(SLEEP, start_new_session=True).pid]
    down, up = os.pipe()
    if os.fork() == 0:                          # as daemons do: a session of its own, and an orphan in it
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(up, str(os.getpid()).encode())
        os.chdir("/")
        os.closerange(0, 64)
        os.execve(sys.executable, SLEEP, {{}})    # nothing about it tells where it comes from
    pids.append(int(os.read(down, 16)))
    open({seen!r}, "w").write(" ".join(map(str, [os.getcwd(), *pids])))
    {end}
"""


@pytest.mark.parametrize("end", [
    "print('\\\\boxed{50}')", "tool('submit', answer='50')\n    import time; time.sleep(300)",
])  # fmt: skip
def test_nothing_outlives_its_episode_wherever_it_hides(tmp_path: Path, end: str) -> None:
    """Children, children in a session of their own, and daemons; whether the program has ended or is still at it; and
    nobody is hit who has nothing to do with it."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as bystander:
        try:
            [episode] = run(tmp_path, HIDES.format(seen=str(tmp_path / "seen"), end=end), TOOLS)
            folder, *pids = (tmp_path / "seen").read_text().split()
            assert episode.score == 1.0 and not Path(folder).exists()
            assert len(pids) == 3 and not any(alive(int(pid)) for pid in pids)
            assert bystander.poll() is None
        finally:
            bystander.kill()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.01)
    return True


def test_the_mutant_that_adopts_nobody_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    careless = tmp_path / "warden.py"
    careless.write_text(program_module.WARDEN.read_text().replace("prctl(SUBREAPER, 1,", "prctl(SUBREAPER, 0,"))
    monkeypatch.setattr(program_module, "WARDEN", careless)
    monkeypatch.setattr(program_module, "DRAIN_S", 0.1)
    with pytest.raises(AssertionError):
        test_nothing_outlives_its_episode_wherever_it_hides(tmp_path, "print('\\\\boxed{50}')")
    for pid in (tmp_path / "seen").read_text().split()[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_a_program_dies_with_the_evaluation(tmp_path: Path) -> None:
    """However that ends: the kernel closes the lifeline."""
    ours, theirs = socket.socketpair()
    script = f"echo $$ > {tmp_path / 'pid'}; setsid sleep 300 & echo $! >> {tmp_path / 'pid'}; wait"
    words = [sys.executable, "-I", "-S", str(program_module.WARDEN), "/bin/sh", "-c", script]
    with subprocess.Popen(words, stdin=theirs) as process:
        while not (tmp_path / "pid").exists() or (tmp_path / "pid").read_text().count("\n") < 2:
            time.sleep(0.01)
        theirs.close()
        ours.close()
        assert process.wait(20) == 0
    assert not any(alive(int(pid)) for pid in (tmp_path / "pid").read_text().split())


def test_a_program_that_cannot_be_started_is_the_agents_error(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"no program at all")
    (tmp_path / "odd").chmod(0o755)
    door = doors.choose(Wanted(command=f"{tmp_path / 'odd'} {{task_file}}"))
    [episode] = play(tmp_path / "run", door, ADD, limit=1)
    assert episode.outcome is Outcome.AGENT_ERROR and episode.error == "the command cannot be run: Exec format error"


def test_the_reference_answer_is_not_told(tmp_path: Path) -> None:
    [episode] = run(tmp_path, f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps([task, dict(os.environ)]))")
    task, environment = json.loads((tmp_path / "seen").read_text())
    given = [task, {name: value for name, value in environment.items() if os.environ.get(name) != value}]
    assert episode.reference == "50" and not re.search(r"\b50\b", json.dumps(given).replace(str(tmp_path), ""))


def test_a_partner_that_asks_on_runs_the_program_again(tmp_path: Path) -> None:
    body = "print('\\\\boxed{50}' if len(task['messages']) > 3 else 'let me think')"
    [episode] = run(tmp_path, body, PATIENT)
    assert episode.score == 1.0 and [m.role for m in episode.messages[-3:]] == ["assistant", "user", "assistant"]


@pytest.mark.parametrize("words, sentence", [
    (["--command", "no-such-program {task_file}"], "there is no program 'no-such-program'"),
    (["--command", "echo 'half"], "no closing quotation"),
    (["--command", ""], "--command is empty"),
    (["--command", "true", "--model", "x"], "--base-url and --model together"),
    (["--command", "true", "--episode-calls", "3"], "the proxy keeps an episode's budget"),
    (["--agent", "random", "--episode-calls", "3"], "are for --command"),
    (["--agent", "random", "--prompt", "root"], "--prompt chooses among the prompts of --run"),
    (["--command", "true", "--run", "x"], "name more than one agent"),
])  # fmt: skip
def test_a_wrong_command_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--env", ADD, *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
