"""The worked example of docs/add-an-environment.md keeps what every environment promises, and the page shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from espl_envs import registry
from espl_envs.evaluate import cli

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLE = "capitals:examples/Capitals-v0"
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "examples")


def made(split: str) -> Any:
    return registry.make(EXAMPLE, split=split).unwrapped


def test_gymnasiums_checker_has_nothing_to_say() -> None:
    check_env(made("train"))


def test_the_oracle_gets_one_and_silence_nothing_on_every_task() -> None:
    for split in ("train", "test"):
        env = made(split)
        for index in range(len(env.tasks)):
            env.reset(options={"task": index})
            assert env.step(env.oracle())[1:4] == (1.0, True, False)
            env.reset(options={"task": index})
            *_, reward, terminated, _, info = env.step("")
            assert (reward, terminated, info["stop_reason"]) == (0.0, True, "format")


def test_no_question_is_in_two_splits_and_wrong_answers_are_wrong() -> None:
    tasks = {split: made(split).tasks for split in ("train", "test")}
    train, test = ({tasks[split][i].question for i in range(len(tasks[split]))} for split in ("train", "test"))
    assert not train & test
    env = made("test")
    for said, worth in {"la paz": 1.0, " Sucre. ": 1.0, "Sucre|La Paz": 0.0, "Lima": 0.0, "(": 0.0}.items():
        env.reset(options={"task_id": "capitals-test-bolivia"})
        assert env.step(f"\\boxed{{{said}}}")[1] == worth, said


@pytest.mark.parametrize(("agent", "score"), [("oracle", 1.0), ("silent", 0.0)])
def test_espl_eval_measures_it(agent: str, score: float, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(["--env", EXAMPLE, "--agent", agent, "--out", str(out), "--quiet"]) == 0
    assert json.loads((out / "summary.json").read_text("utf-8"))["mean"] == score


def test_the_page_shows_the_file_as_it_is() -> None:
    page = (DOCS / "add-an-environment.md").read_text("utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert (DOCS / "examples" / "capitals.py").read_text("utf-8") in shown
