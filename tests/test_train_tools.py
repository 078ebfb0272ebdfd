"""Training with tools: boxes are lent for an episode, faults are masked, and nothing is left when the run is over."""

from __future__ import annotations

import io
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_kit import HANGS, VANISHES, MemoryProvider, memory_boxes
from hub_model import hub_model
from rich.console import Console as RichConsole
from tools_kit import GSM8K, SMALL, Scripted, as_calls, play, says

import espl_envs
from espl_envs.core.errors import EsplError
from espl_envs.sandbox import pool as pools
from espl_train import sandboxes
from espl_train.chat import Chat
from espl_train.cli import main
from espl_train.config import Config, RolloutConfig, SandboxConfig
from espl_train.records import StopReason
from espl_train.runs.console import Console
from espl_train.runs.metrics import read_lines
from espl_train.settings import from_toml, load, parse, to_toml


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> Iterator[MemoryProvider]:
    """Boxes of memory for everybody: environments, preflight, trainer."""
    del data_dir
    monkeypatch.setattr(sandboxes, "_image", lambda name, _dry: name)
    with memory_boxes(monkeypatch) as provider:
        yield provider


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return hub_model(tmp_path / "model")


def test_64_episodes_at_once_leave_no_box(boxes: MemoryProvider) -> None:
    rollouts = play(Scripted(lambda request: f"x = {request.seed % 1000}\nx * 3", together=64), 64)
    assert [r.stop for r in rollouts] == [StopReason.ANSWER] * 64
    assert len(boxes.made) == 64
    assert {len(r.turns) for r in rollouts} == {2}
    for rollout in rollouts:
        x = int(rollout.messages[-3].content.partition("x = ")[2].partition("\\n")[0])
        assert says(rollout) == str(3 * x)
    assert boxes.open == []


def test_a_box_that_is_killed_masks_the_episode_and_is_not_scored(boxes: MemoryProvider) -> None:
    struck = set(range(0, 16, 4))
    numbers = iter(range(16))
    rollouts = play(Scripted(lambda _: VANISHES if next(numbers) in struck else "1"), 16, concurrency=1)
    lost = [r for r in rollouts if r.faulted]
    assert len(lost) == 4 and all(math.isnan(r.reward) and "gone" in r.info["error"] for r in lost)
    assert all(r.stop is StopReason.ANSWER for r in rollouts if not r.faulted)
    assert boxes.open == []


def test_a_killed_box_is_tried_again_in_a_new_one(boxes: MemoryProvider) -> None:
    codes = iter([VANISHES, "6 * 7"])
    rollout = play(Scripted(lambda _: next(codes)), 1, retries=1)[0]
    assert rollout.stop is StopReason.ANSWER and rollout.key.attempt == 1 and says(rollout) == "42"
    assert len(boxes.made) == 2 and boxes.open == []


def test_an_episode_that_the_trainer_cuts_off_gives_its_box_back_at_once(boxes: MemoryProvider) -> None:
    """One box, one episode after the other: a box that stayed with a finished episode would block the next."""
    pools.close_shared()
    pools.configure(max_live=1, warm=0)
    settings = {"concurrency": 1, "max_turns": 1}
    rollouts = play(Scripted(lambda _: "1"), 3, {"lease_timeout": 5.0}, **settings)
    assert [r.stop for r in rollouts] == [StopReason.MAX_TURNS] * 3
    rollouts = play(Scripted(lambda _: HANGS), 2, {"lease_timeout": 5.0}, concurrency=1, deadline_s=0.3)
    assert [r.stop for r in rollouts] == [StopReason.DEADLINE] * 2
    assert boxes.open == []


def run(model: Path, out: Path, *more: str) -> int:
    return main([*SMALL, "--model", str(model), "--out", str(out), *more])


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chat, "text", as_calls)


@pytest.mark.usefixtures("talkative")
def test_a_run_with_tools_lends_boxes_and_returns_them(
    boxes: MemoryProvider, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path / "run") == 0, capsys.readouterr().err
    records = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(r["tools/calls"] > 0 and r["tools/errors"] == 0 and r["rollouts/faulted"] == 0 for r in records[1:])
    assert all(r["sandbox/unsafe"] == 0 for r in records)
    assert len(boxes.made) > 10 and boxes.open == []
    assert boxes.made[0].spec.memory_mb == 256 and boxes.made[0].spec.lifetime_s == 1800.0


@pytest.mark.usefixtures("talkative")
def test_a_run_with_tools_goes_on_where_it_stopped(
    boxes: MemoryProvider, model: Path, tmp_path: Path
) -> None:
    assert run(model, tmp_path / "whole", "--quiet") == 0
    assert run(model, tmp_path / "run", "--quiet", "--steps", "1") == 0
    assert main(["--resume", str(tmp_path / "run"), "--steps", "2", "--sandbox.max_live", "5", "--quiet"]) == 0
    last = [list(read_lines(tmp_path / name / "metrics.jsonl"))[-1] for name in ("whole", "run")]
    assert last[0]["reward/mean"] == last[1]["reward/mean"] and last[0]["tools/calls"] == last[1]["tools/calls"]
    assert boxes.open == []
    assert main(["--resume", str(tmp_path / "run"), "--sandbox.memory_mb", "128"]) == 2


@pytest.mark.usefixtures("talkative")
def test_ctrl_c_leaves_no_box(
    boxes: MemoryProvider, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MemoryProvider.start
    struck = threading.Event()

    async def start(self: MemoryProvider, spec: Any) -> Any:
        if len(self.made) >= 3 and not struck.is_set():
            struck.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return await original(self, spec)

    monkeypatch.setattr(MemoryProvider, "start", start)
    assert run(model, tmp_path / "run", "--quiet") == 130
    assert struck.is_set() and boxes.open == []


def test_no_docker_is_a_sentence_before_anything_is_written(
    model: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del data_dir
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    assert run(model, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "bubblewrap" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_without_tools_no_sandbox_is_asked_for(
    model: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del data_dir
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    words = [word for word in SMALL if word not in ("--tools", "python")]
    assert main([*words, "--model", str(model), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "\nsandbox " not in capsys.readouterr().out


def test_a_dry_run_says_which_boxes(
    boxes: MemoryProvider, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path / "run", "--dry-run", "--sandbox.memory_mb", "128") == 0
    said = capsys.readouterr().out
    assert "docker 1.0, image python" in said and "1 kept warm; 128 MB, 10 s per call" in said
    assert boxes.made == [] and not (tmp_path / "run").exists()


def test_unsafe_local_is_stamped_into_the_results(
    boxes: MemoryProvider, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del boxes
    assert run(model, tmp_path / "run", "--sandbox.provider", "unsafe_local", "--steps", "1") == 0
    said = capsys.readouterr().out
    assert said.count("UNSAFE: what the model wrote ran on this machine") == 2
    assert all(r["sandbox/unsafe"] == 1 for r in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_no_more_episodes_play_at_once_than_there_are_boxes(boxes: MemoryProvider) -> None:
    """An episode in line for a box would be waited for by the deterministic engine, for ever."""
    del boxes
    settings = sandboxes.wanted([espl_envs.make(GSM8K, tools=("python",)).unwrapped])  # type: ignore[list-item]
    assert settings is not None
    limited = sandboxes.Boxes(SandboxConfig(max_live=5), settings).limited(RolloutConfig(concurrency=100))
    assert limited.concurrency == 5
    assert sandboxes.Boxes(SandboxConfig(max_live=5), None).limited(RolloutConfig(concurrency=100)).concurrency == 100


@pytest.mark.parametrize(
    ("words", "tools"),
    [
        (["--tools", "python"], ["python"]),
        (["--tools", "python,submit"], ["python", "submit"]),
        (["--tools=python", "--tools", "submit"], ["python", "submit"]),
        (["--env.args.tools", '["shell"]'], ["shell"]),
        (["--tools", ""], []),
    ],
)
def test_tools_on_the_command_line(words: list[str], tools: list[str]) -> None:
    config = load(overrides=parse(["--env", GSM8K, *words]).overrides)
    assert config.env.args["tools"] == tools
    assert from_toml(to_toml(config)) == config


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tools", "pyhton"], "did you mean 'python'"),
        (["--tools"], "--tools needs a value"),
        (["--tool", "python"], "Did you mean --tools?"),
        (["--tools", "python", "--sandbox.memory_mb", "8"], "sandbox.memory_mb is '8'"),
        (["--tools", "python", "--sandbox.provider", "dokcer"], "Did you mean docker?"),
        (["--tools", "python", "--sandbox.memory", "99"], "Did you mean --sandbox.memory_mb?"),
        (["--tools", "python", "--env.args.sandbox.cpu", "1"], "cpus"),
        (["--env", "espl/Conventions-v0", "--tools", "python"], "no argument 'tools'"),
        (["--tools", "python", "--test-env", "espl/AIME25-v0"], "add --env.test_args.tools"),
    ],
)
def test_wrong_settings_are_a_sentence(
    words: list[str], problem: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del data_dir
    assert main(["--env", GSM8K, "--env.holdout_from", "test", "--out", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert problem in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_section_reaches_the_environments_that_take_it() -> None:
    config = load(overrides={"env.id": GSM8K, "env.args.tools": ["python"], "env.args.sandbox": {"cpus": 2.0}})
    given = sandboxes.equipped(config).args["sandbox"]
    assert (given["memory_mb"], given["cpus"], given["lifetime_s"], given["provider"]) == (256, 2.0, 1800.0, "docker")
    assert "max_live" not in given
    assert "sandbox" not in sandboxes.equipped(Config()).args


def test_a_box_outlives_the_longest_episode() -> None:
    config = load(overrides={"env.id": GSM8K, "env.args.tools": ["python"], "rollout.deadline_s": 7200.0})
    assert sandboxes.equipped(config).args["sandbox"]["lifetime_s"] == 21600.0


def test_too_many_lost_boxes_stop_the_run(boxes: MemoryProvider) -> None:
    with pytest.raises(EsplError, match=r"episodes have no reward.*gone"):
        play(Scripted(lambda _: VANISHES), 8, max_fault_fraction=0.1)
    assert boxes.open == []


def test_the_boxes_are_on_the_panel_and_in_the_plain_lines() -> None:
    for terminal in (True, False):
        now = [0.0]
        file = io.StringIO()
        out = RichConsole(file=file, force_terminal=terminal, width=100, color_system=None)
        console = Console(3, "run", rich=out, clock=lambda now=now: now[0])  # type: ignore[misc]
        console.watch(lambda: "7 live, 2 warm, 3 waiting")
        console.phase("rollouts", 64)
        now[0] = 100.0
        console.progress(5, 100)
        if terminal:
            out.print(console._panel())
        assert "7 live, 2 warm, 3 waiting" in file.getvalue() and "boxes" in file.getvalue()
