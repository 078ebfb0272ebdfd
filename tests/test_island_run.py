"""Two worlds and one model, for real, through the command line: stopped and continued, it is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_loop_resume import contents, same

from espl_train import training
from espl_train.cli import main
from espl_train.runs.console import Console
from espl_train.runs.directory import RunDirectory
from espl_train.runs.metrics import read_lines
from espl_train.serving.exhibit import Exhibit

WORLDS = (
    "--env", "espl/Conventions-v0=2", "--env.args.world", "3", "--env", "espl/Conventions-v0", "--env.args.world", "4",
    "--steps", "2", "--rollout.problems", "3", "--rollout.prompts", "2", "--rollout.samples", "4",
    "--evaluation.every", "0", "--evaluation.problems", "2", "--evaluation.test_problems", "2",
    "--evolution.migration", "1", "--tensorboard", "false", "--quiet",
)  # fmt: skip


def stopped_in_the_second_step(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when the second step begins to reflect: both worlds have played it by then."""
    began: list[str] = []
    original = Console.phase

    def phase(self: Console, name: str, total: int | None = None) -> None:
        original(self, name, total)
        began.append(name)
        if began.count("reflection") == 2:
            raise KeyboardInterrupt

    patch.setattr(Console, "phase", phase)


def without_a_picture(run: RunDirectory, console: Console) -> None:
    """It is drawn from the metrics, which are compared."""
    del run, console


def test_a_run_of_two_worlds_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*WORLDS, "--out", str(whole)]) == 0
    assert "best system prompt of conventions-2" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stopped_in_the_second_step(patch)
        assert main([*WORLDS, "--out", str(broken)]) == 130
    monkeypatch.setattr(training, "_plot", without_a_picture)
    assert main(["--resume", str(broken), "--quiet"]) == 0
    straight, resumed = contents(whole), contents(broken)
    for name, expected in straight.items():
        assert same(resumed[name], expected), name
    assert {path.name for path in whole.glob("best_prompt*")} == {
        "best_prompt.conventions.txt", "best_prompt.conventions-2.txt"
    }  # fmt: skip
    played = [r for r in read_lines(whole / "metrics.jsonl") if r["step"]]
    assert [r["envs/conventions/rollouts/count"] for r in played] == [16, 16]
    asked = {key.split("/")[2] for record in played for key in record if key.startswith("reflection/for/")}
    assert asked and all(":p0" in prompt for prompt in asked), "a prompt is named once, with its environment"
    assert (whole / "plot.png").stat().st_size > 10_000
    shown = Exhibit.of(str(whole), "conventions-2/best", {}).to_json()
    assert shown["prompt"].startswith("conventions-2:p000")


def test_bad_input_is_told_before_anything_is_written(tmp_path: Path) -> None:
    for wrong in (["--env.args.world", "3"], ["--env", "espl/Nowhere-v0"], ["--env.args.wrld", "3"]):
        assert main([*WORLDS, "--out", str(tmp_path / "x"), *wrong]) == 2
    assert not (tmp_path / "x").exists()
