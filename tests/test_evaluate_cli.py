"""`espl-eval` as a person uses it: one command, a number, a report; interrupted, wrong and spied upon."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from evaluate_kit import ADD, MODEL, PATIENT, TOOLS, completion, error, lines, serving, sum_in

from espl_envs.core.errors import EsplError
from espl_envs.evaluate import cli, endpoint, options
from espl_envs.evaluate.cli import main

KEY = "sk-live-0123456789abcdef"
AGENT = """
import re, time
def agent(messages, tools):
    a, b = map(int, re.search(r"(\\d+) \\+ (\\d+)", messages[-1].content).groups())
    time.sleep(0.02)
    return f"\\\\boxed{{{a + b if a % 3 else 0}}}"
"""
LEAKS = """
import json, os
from base64 import b64encode
from urllib.parse import quote
def agent(messages, tools):
    key = os.environ['OPENAI_API_KEY']
    if '25' in messages[-1].content:
        raise RuntimeError(f'401 for {key}')
    return f'\\\\boxed{{{key}}} {json.dumps(key)} {quote(key)} {b64encode(key.encode()).decode()}'
"""
SCORES = [float(task % 3 != 0) for task in range(25, 35)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(endpoint, "PREFLIGHT_S", 30.0)
    Path("mine.py").write_text(AGENT)


def evaluate(*words: str, env: str = ADD, agent: str = "mine.py:agent", out: str = "run") -> int:
    return main(["--env", env, "--agent", agent, "--out", out, *words])


def test_one_command_gives_a_number_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-k", "2") == 0
    shown = capsys.readouterr()
    assert "toy:toy/Add-v0" in shown.out and "0.700" in shown.out and "report: run/report.html" in shown.out
    assert shown.err == "" and Path("run/report.html").stat().st_size > 1000
    assert json.loads(Path("run/summary.json").read_text())["mean"] == pytest.approx(sum(SCORES) / 10)
    assert main(["report", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(sum(SCORES) / 10)
    config = json.loads(Path("run/config.json").read_text())
    assert (config["k"], config["agent"]["name"], config["envs"][0]["tasks"]) == (2, "mine.py:agent", 10)


def test_results_are_looked_at_with_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(out="runs/mine") == evaluate(out="runs/oracle", agent="oracle") == 0
    for words in (["compare", "runs/mine", "runs/oracle"], ["leaderboard", "runs"], ["regrade", "runs/mine"]):
        capsys.readouterr()
        assert main(words) == 0, words
        assert capsys.readouterr().out.strip()
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("words", "said"), [
    ([], "name what is played: --env ID"),
    (["--env", ADD, "--agent", "oracle"], "name the run directory: --out DIR"),
    (["--env", ADD, "--out", "x"], "who is to be evaluated? Name the agent"),
    (["--env", "espl/GMS8K-v0", "--agent", "oracle", "--out", "x"], "did you mean espl/GSM8K-v0"),
    (["--env", ADD, "--agent", "orakel", "--out", "x"], "no built-in agent 'orakel'; did you mean oracle?"),
    (["--env", ADD, "--agent", "mine.py", "--out", "x"], "that file, too, as in mine.py:agent"),
    (["--env", ADD, "--command", "sh nothere.sh {task_file}", "--out", "x"], "no file 'nothere.sh' here for sh to run"),
    (["--env", ADD, "--agent", "mine.py:agnet", "--out", "x"], "has no 'agnet'; it has agent"),
    (["--env", ADD, "--agent", "oracle", "--run", "r", "--out", "x"], "--agent and --run name more than one agent"),
    (["--env", ADD, "--agent", "oracle", "--temperature", "1", "--out", "x"], "--temperature is for models behind"),
    (["--env", ADD, "--base-url", "http://localhost:9", "--out", "x"], "--base-url needs --model NAME"),
    (["--env", ADD, "--base-url", "http://127.0.0.1:9", "--model", "m", "--out", "x"], "Connection refused"),
    (["--env", ADD, "--base-url", "localhost:9", "--model", "m", "--out", "x"], "mean http://localhost:9/v1?"),
    (["--env", ADD, "--agent", "oracle", "--limt", "3"], "unrecognized arguments: --limt 3; did you mean --limit?"),
    (["--env", ADD, "--agent", "oracle", "-k", "0"], "argument -k/--samples: '0' is not a positive whole number"),
    (["--env", ADD, "--agent", "oracle", "--price", "3"], "'3' is not IN,OUT"),
    (["--env", ADD, "--agent", "oracle", "--env.args", "max_turns", "--out", "x"], "expected NAME=VALUE"),
    (["--env", ADD, "--agent", "oracle", "--env.args", "other/X-v0:a=1", "--out", "x"], "which no --env names"),
    (["--env", ADD, "--agent", "oracle", "--env.args", "speed=1", "--out", "x"], "has no argument 'speed'"),
    (["--env", ADD, "--agent", "oracle", "--system-prompt", "no.txt", "--out", "x"], "cannot read no.txt"),
    (["--env", ADD, "--base-url", "http://localhost:9", "--model", "m", "--request", "n=2"], "cannot set 'n'"),
    (["--env", ADD, "--env", ADD, "--agent", "oracle", "--out", "x"], "is named twice"),
    (["comapre", "a", "b"], "there is no command 'comapre'; did you mean compare?"),
    (["report", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "--out", "x"] if "--request" in words or "-k" in words or "--price" in words else words
    assert main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.startswith("espl-eval: ") and shown.err.count("\n") == 1 and not shown.out
    assert not Path("x").exists()


def test_a_directory_is_continued_only_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--limit", "5") == 0
    assert evaluate("--limit", "5") == 2 and "--resume" in capsys.readouterr().err
    assert evaluate("--limit", "5", "--resume", agent="oracle") == 2
    assert "'mine.py:agent' there, 'oracle' here" in capsys.readouterr().err
    assert evaluate("--limit", "5", "--resume", env=PATIENT) == 2 and "toy/Patient-v0" in capsys.readouterr().err
    assert evaluate("-k", "2", "--resume") == 0                 # more tasks, more samples: what is there stays
    assert Counter((row["task"], row["sample"]) for row in lines(Path("run"))) == Counter(
        (task, sample) for task in range(10) for sample in range(2))
    assert evaluate("--resume", out="new") == 0                # nothing there yet: begun


def test_arguments_reach_the_environments_that_they_are_for() -> None:
    given = options.env_arguments(["max_turns=3", f"{ADD}:protocol=user", "x=true"], [ADD, PATIENT])
    assert given == {ADD: {"max_turns": 3, "protocol": "user", "x": True}, PATIENT: {"max_turns": 3, "x": True}}
    assert main(["--env", ADD, "--env", PATIENT, "--env.args", "max_turns=1", "split=train", "--agent", "silent",
                 "--limit", "1", "--out", "run", "--quiet"]) == 0
    rows = lines(Path("run"))
    assert [(row["split"], row["stop_reason"]) for row in rows] == [("train", "format"), ("train", "max_turns")]


def test_several_prompts_measure_their_spread() -> None:
    Path("a.txt").write_text("Prompt A\n")
    Path("b.txt").write_text("Prompt B")
    assert evaluate("--system-prompt", "a.txt", "--system-prompt", "b.txt", "--limit", "2") == 0
    assert json.loads(Path("run/config.json").read_text())["system_prompts"] == ["Prompt A", "Prompt B"]
    assert Counter(row["messages"][0]["content"][:8] for row in lines(Path("run"))) == {"Prompt A": 2, "Prompt B": 2}


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, words in (("rich", ()), ("jinja2", ()), ("aiohttp", ("http://localhost:9",))):
        monkeypatch.setitem(sys.modules, module, None)
        who = ["--base-url", *words, "--model", "m"] if words else ["--agent", "oracle"]
        assert main(["--env", ADD, *who, "--out", "x"]) == 2, module
        assert "pip install 'espl[eval]'" in capsys.readouterr().err
        monkeypatch.undo()


# A server


def test_a_server_is_evaluated_and_its_price_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda body, _: sum_in(body["messages"])) as server:
        words = ["--env", ADD, "--base-url", server.url, "--model", MODEL, "--out", "run"]
        assert main([*words, "--price", "1,10", "--request", "top_p=0.5"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["mean"] == 1.0 and "1.000" in capsys.readouterr().out
    assert sum(row["turns"][0]["cost"] for row in lines(Path("run"))) == pytest.approx(10 * (11 + 70) / 1e6)
    config = json.loads(Path("run/config.json").read_text())
    assert config["agent"]["settings"] == {"top_p": 0.5} and config["agent"]["base_url"] == server.url


def test_the_address_of_the_route_is_cut_back_to_the_base_url(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda body, _: sum_in(body["messages"])) as server:
        words = ["--env", ADD, "--base-url", f"{server.url}/chat/completions", "--model", MODEL, "--limit", "1"]
        assert main([*words, "--out", "run"]) == 0
    said = capsys.readouterr().err
    assert said == f"espl-eval: note: --base-url is read as {server.url}; /chat/completions is added to it\n"
    assert json.loads(Path("run/config.json").read_text())["agent"]["base_url"] == server.url


def test_native_and_textual_tools_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda *_: completion("\\boxed{50}")) as server:
        words = ["--env", TOOLS, "--base-url", server.url, "--model", MODEL, "--limit", "1"]
        assert main([*words, "--out", "native"]) == 0 and "tools" in server.requests[-1]
        assert main([*words, "--out", "text", "--tool-syntax", "text"]) == 0 and "tools" not in server.requests[-1]
    assert capsys.readouterr().err == ""


def test_too_many_faults_are_no_headline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any], _: int) -> Any:
        return error(404, "gone") if "27 + 27" in body["messages"][-1]["content"] else sum_in(body["messages"])

    with serving(answer) as server:
        words = ["--env", ADD, "--base-url", server.url, "--model", MODEL, "--out", "run"]
        assert main(words) == 3
        shown = capsys.readouterr()
        assert "no headline" in shown.err and "fault: " in shown.err
        assert json.loads(Path("run/summary.json").read_text())["mean"] is None
        assert main([*words, "--resume", "--allow-faults"]) == 0
    assert len(lines(Path("run"))) == 11                       # the fault was played again, and nothing else
    assert monkeypatch


def test_a_cost_limit_stops_it_and_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda body, _: sum_in(body["messages"])) as server:
        words = ["--env", ADD, "--base-url", server.url, "--model", MODEL, "--price", "1,10", "--out", "run"]
        assert main([*words, "--max-cost", "0.0005"]) == 3
        shown = capsys.readouterr().err
        assert "stopped early: the cost limit of 0.0005 is reached" in shown
        assert "of 10 episodes are kept in run" in shown
        assert shown.rstrip().endswith("--resume")
        assert main([*words, "--max-cost", "1", "--resume"]) == 0
    assert len(lines(Path("run"))) == 10


def test_the_key_is_in_no_file_and_on_no_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        if "26 + 26" in body["messages"][-1]["content"]:
            return error(400, f"what is Bearer {KEY}?")
        if "27 + 27" in body["messages"][-1]["content"]:
            return error(401, f"{KEY} is revoked")
        return completion(f"your key is {KEY} \\boxed{{50}}", reasoning_content=KEY) if number else None

    monkeypatch.setenv("MY_KEY", KEY)
    with serving(answer) as server:
        words = ["--env", ADD, "--base-url", server.url, "--model", MODEL, "--api-key-env", "MY_KEY", "--out", "run"]
        assert main([*words, "--concurrency", "1"]) == 2                    # revoked while it ran
        assert main([*words, "--limit", "2", "--out", "other"]) == 3
        monkeypatch.setattr(cli, "_prepare", lambda *_: (_ for _ in ()).throw(RuntimeError(f"odd {KEY}")))
        assert main(words) == 1
        assert main([*words[:-4], "--api-key-env", KEY]) == 2
    assert set(server.keys) == {f"Bearer {KEY}"}
    shown = capsys.readouterr()
    crash = re.search(r"the traceback is in (\S+)", shown.err)
    assert crash and "something unexpected happened: RuntimeError: odd [key]" in shown.err
    files = [path for path in Path().rglob("*") if path.is_file()] + [Path(crash[1])]
    assert {path.name for path in files} >= {"config.json", "episodes.jsonl", "report.html"}
    for text in (shown.out, shown.err, *(path.read_text("utf-8", "replace") for path in files)):
        assert KEY not in text
    assert "is revoked" in shown.err and len(lines(Path("run"))) == 2
    Path(crash[1]).unlink()


# Stopped


def started(*words: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "espl_envs.evaluate.cli", "--env", ADD, "--agent", "mine.py:agent", "-k", "20"]
    return subprocess.Popen([*command, "--concurrency", "2", "--out", "run", *words], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def written(at_least: int) -> int:
    """Wait until so many records are there; how many there are."""
    file = Path("run/episodes.jsonl")
    while (count := file.read_bytes().count(b"\n") if file.exists() else 0) < at_least:
        time.sleep(0.01)
    return count


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_in_the_middle_and_resumed_every_episode_is_there_once(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with started() as process:
        count = written(15)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and count < 200 and not out
    before = len(Path("run/episodes.jsonl").read_bytes().splitlines())
    if number == signal.SIGINT:
        kept = f"{before} of 200 episodes are kept in run"
        assert re.search(rf"stopped; {kept}; go on with\n  espl-eval .* --resume\n", err)
    Path("mine.py").write_text(AGENT.replace("time.sleep(0.02)", "pass"))
    assert evaluate("-k", "20", "--resume", "--same-agent") == 0
    rows = lines(Path("run"))
    assert Counter((row["task"], row["sample"]) for row in rows) == Counter(
        (task, sample) for task in range(10) for sample in range(20))
    assert all(row["score"] == SCORES[row["task"]] for row in rows) and len(rows) - before >= 1
    assert json.loads(Path("run/summary.json").read_text())["mean"] == pytest.approx(sum(SCORES) / 10)
    assert capsys.readouterr().err == ""


def test_an_agent_s_prints_and_travels_leave_the_answer_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("sub").mkdir()
    Path("sub/neighbour_of_agent.py").write_text("ANSWER = 'x'")
    Path("sub/loud.py").write_text("import os\nfrom neighbour_of_agent import ANSWER\n"
                                   "print('imported')\nos.chdir('/')\ndef agent(messages, tools):\n"
                                   "    print('noise')\n    return ANSWER\n")
    assert evaluate("--json", "--limit", "2", agent="sub/loud.py:agent") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["mean"] == 0 and "imported" in shown.err and "noise" in shown.err
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_module_that_exits_is_no_silent_success(capsys: pytest.CaptureFixture[str]) -> None:
    Path("exits.py").write_text("import sys\nsys.exit(0)\n")
    assert evaluate(agent="exits.py:agent") == 2 and "importing it raised SystemExit" in capsys.readouterr().err


def test_a_key_that_an_agent_says_or_raises_is_in_no_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = 'sk-live/hunter"corvid'
    monkeypatch.setenv("OPENAI_API_KEY", key)
    Path("leaks.py").write_text(LEAKS)
    assert evaluate(agent="leaks.py:agent") == 0
    shown, rows = capsys.readouterr(), lines(Path("run"))
    said = shown.out + shown.err + "".join(file.read_text() for file in Path("run").iterdir())
    for form in ("sk-live", "hunter", "corvid", base64.b64encode(key.encode()).decode()[:12]):
        assert form not in said
    assert said.count("[key]") >= 20
    assert {row["outcome"] for row in rows} == {"answered", "agent_error"}
    assert evaluate("--env.args", f"protocol={key}", out="other") == 2 and not Path("other").exists()


def test_names_are_no_markup_and_no_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("[red]b.py").write_text(AGENT)
    assert evaluate(out="a[/b]") == evaluate(out="\x1b[31mb", agent="[red]b.py:agent") == 0
    assert main(["compare", "a[/b]", "\x1b[31mb"]) == main(["leaderboard", "."]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("[red]b.py:agent") == 3 and "\x1b" not in shown.out
    assert main(["report", "\x1b[31mc"]) == 2 and "\x1b" not in capsys.readouterr().err


def test_the_command_line_is_documented() -> None:
    text = options.parser().format_help()
    for word in ("--env.args", "--resume", "exit codes", "leaderboard", "--max-cost", "{task_file}"):
        assert word in text
    with pytest.raises(EsplError, match="did you mean --concurrency"):
        options.parser().parse_args(["--concurency", "3"])
