"""docs/runs.md names every key of metrics.jsonl, every kind of event and every file of a run, and none that is not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from espl_train.cli import main
from espl_train.config import ReflectionConfig
from espl_train.evolution.templates import Stage
from espl_train.records import StopReason
from espl_train.reflecting.ledger import BRIEF, Account, Ledger, Spent
from espl_train.runs.metrics import read_lines

ROOT = Path(__file__).resolve().parents[1]
METRICS, EVENTS, FILES = "## metrics.jsonl", "## events.jsonl", "# What a run leaves behind"
WORLDS = (
    "--env", "espl/Conventions-v0", "--env.args.world", "3", "--env", "espl/Conventions-v0", "--env.args.world", "4",
    "--steps", "2", "--rollout.problems", "2", "--rollout.prompts", "2", "--rollout.samples", "2",
    "--rollout.dynamic_rounds", "1", "--learner.overlong", "penalise", "--evolution.migration", "1",
    "--evaluation.every", "0", "--evaluation.problems", "1", "--evaluation.test_problems", "1",
    "--tensorboard", "false", "--quiet",
)  # fmt: skip
RARE = {        # what that run has no reason to say, and who says it otherwise
    "trials/rollouts": "trials.py", "trials/tokens": "trials.py",
    "twins/rollouts": "loop.py", "twins/tokens": "loop.py",
    "sync/publish_seconds": "engines/vllm.py", "sync/load_seconds": "engines/vllm.py",
    "sync/prove_seconds": "engines/vllm.py", "sandbox/unsafe": "sandboxes.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, in which much is switched on."""
    folder = tmp_path_factory.mktemp("documented") / "run"
    assert main([*WORLDS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def keys(run: Path) -> set[str]:
    found = {key for record in read_lines(run / "metrics.jsonl") for key in record}
    assert len(found) > 100
    return found


@cache
def table(heading: str) -> dict[str, str]:
    """The names in the first column of the table below a heading, each with what stands in the last one."""
    section = (ROOT / "docs" / "runs.md").read_text("utf-8").partition(f"{heading}\n")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in section.splitlines() if line.startswith("| `")]
    return {name: cells[-1] for cells in rows for name in code(cells[0])}


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def pattern(row: str) -> str:
    """What a row of the metrics is about, as a regular expression."""
    rows = table(METRICS)
    wild = {
        "<prompt>": [r"root|best|all|([\w-]+:)?p\d{4,}"], "<reason>": StopReason, "<stage>": get_args(Stage),
        "<phase>": code(rows["<phase>/seconds"]), "<sum>": code(rows["reflection/<sum>"]),
    }  # fmt: skip
    return r"(envs/[\w-]+/)?" + re.sub(r"<\w+>", lambda name: f"({'|'.join(wild[name[0]])})", row)


def unexplained(keys: Iterable[str], rows: Iterable[str]) -> set[str]:
    patterns = [re.compile(pattern(row)) for row in rows]
    return {key for key in keys if not any(known.fullmatch(key) for known in patterns)}


def test_every_number_of_a_run_is_explained(keys: set[str]) -> None:
    assert not unexplained(keys, table(METRICS))


def test_one_that_is_not_would_be_found(keys: set[str]) -> None:
    rows = [row for row in table(METRICS) if row != "update/entropy"]
    strange = {"update/entropy", "reward/p1", "stop/bored", "envs/a/b/step", "reflection/dream/calls"}
    assert unexplained(keys | strange, rows) == strange


def test_no_number_is_explained_that_there_is_not(keys: set[str]) -> None:
    silent = {row for row in table(METRICS) if not any(re.fullmatch(pattern(row), key) for key in keys)}
    assert silent == set(RARE)
    for row, file in RARE.items():
        group, _, name = row.partition("/")
        said = (ROOT / "espl_train" / file).read_text("utf-8")
        assert f'"{row}"' in said or (f'"{group}/{{' in said and name in ("rollouts", "tokens")), row


def test_the_sums_of_reflection_and_the_ends_of_episodes_are_all_of_them() -> None:
    ledger, rows = Ledger(ReflectionConfig(prices=(1.0, 2.0))), table(METRICS)
    ledger.book(Account("", "critique", "p0001"), Spent(calls=1))
    sums = {key.rpartition("/")[2] for key in ledger.metrics()}
    assert set(code(rows["reflection/<sum>"])) == sums
    assert set(code(rows["reflection/<stage>/<sum>"])) == set(get_args(Stage))
    assert set(code(rows["reflection/for/<prompt>/<sum>"])) == set(BRIEF)
    assert set(code(rows["stop/<reason>"])) == set(StopReason)


def test_every_kind_of_event_is_explained_and_exists(run: Path) -> None:
    kinds = {event["kind"] for event in read_lines(run / "events.jsonl")}
    assert len(kinds) > 8 and kinds <= set(table(EVENTS))
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "espl_train").rglob("*.py"))
    assert not {kind for kind in table(EVENTS) if f'"{kind}"' not in sources}


def test_every_file_of_a_run_is_explained(run: Path) -> None:
    named = {name.partition("/")[0] for name in table(FILES)}
    there = {re.sub(r"^best_prompt\..*", "best_prompt.txt", path.name) for path in run.iterdir()}
    assert there - {".lock"} <= named
    assert named - there <= {"tensorboard", "profile", "reflections", "spending.jsonl", "review", "crash.txt"}
