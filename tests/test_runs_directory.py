"""Run directories: one owner at a time, one configuration for ever, and logs that go back with the checkpoint."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.errors import EsplError
from espl_train.config import Config
from espl_train.runs import lock
from espl_train.runs.checkpoint import CheckpointError
from espl_train.runs.directory import RunDirectory, default_path, read_config
from espl_train.runs.lock import RunError
from espl_train.runs.metrics import JsonLines, RunLog, plain, read_lines
from espl_train.settings import override


def config(out: Path | str | None, **overrides: Any) -> Config:
    return override(Config(), {"out": None if out is None else str(out), "tensorboard": False, **overrides})


def play(run: RunDirectory, first: int, last: int, save: bool = True) -> None:
    """Stands for the loop: a few decisions, one record and the rollouts of every step, then the checkpoint."""
    for step in range(first, last + 1):
        run.log.event(step, "born", id=f"p{step:04d}", why="…")
        run.log.metrics({"step": step, "reward/mean": step / 7})
        run.write_rollouts(step, [{"step": step, "reward": 1 / (step + 1), "text": "⊕"}])
        run.write_population({"step": step})
        if save:
            run.save(step, {"state": {"step": step}})


def content(path: Path) -> dict[str, bytes]:
    skip = (".lock", "config.toml")
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name not in skip
    }


def test_a_new_run_has_its_whole_configuration_on_disk(tmp_path: Path) -> None:
    wanted = config(tmp_path / "run", seed=3)
    with RunDirectory.create(wanted) as run:
        assert run.config == wanted and run.saved_step is None
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.config == wanted


def test_a_killed_and_resumed_run_equals_one_that_was_not(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "straight")) as run:
        play(run, 1, 6)
    with RunDirectory.create(config(tmp_path / "killed")) as run:
        play(run, 1, 3)
        play(run, 4, 5, save=False)
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "rew')
    with RunDirectory.open(tmp_path / "killed") as run:
        assert run.restore() == (3, {"state": {"step": 3}})
        play(run, 4, 6)
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


def test_falling_back_to_an_older_checkpoint_takes_the_logs_along(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "run")) as run:
        play(run, 1, 4)
    (tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").write_text("{}")
    warnings: list[str] = []
    with RunDirectory.open(tmp_path / "run", warn=warnings.append) as run:
        assert run.restore() == (3, {"state": {"step": 3}})
        assert [r["step"] for r in read_lines(run.path / "metrics.jsonl")] == [1, 2, 3]
        assert [r["step"] for r in read_lines(run.path / "events.jsonl")] == [1, 2, 3]
        assert len(list(run.rollouts.iterdir())) == 3
    assert len(warnings) == 1 and "damaged" in warnings[0]


def test_a_run_killed_before_its_first_checkpoint_starts_at_its_beginning(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "run")) as run:
        play(run, 0, 0, save=False)
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.restore() is None
        assert list(read_lines(run.path / "metrics.jsonl")) == [] and list(run.rollouts.iterdir()) == []


def test_a_run_whose_checkpoints_are_gone_keeps_its_logs(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "run")) as run:
        play(run, 1, 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = content(tmp_path / "run")
    with pytest.raises(CheckpointError, match="tells of 2 steps: put the checkpoints back"):
        RunDirectory.open(tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_rollouts_are_lines_of_json_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Played:
        reward: float
        tokens: tuple[int, ...]

    with RunDirectory.create(config(tmp_path / "run")) as run:
        first = run.write_rollouts(1, [Played(0.5, (1, 2)), Played(math.nan, ())]).read_bytes()
        assert run.write_rollouts(1, [Played(0.5, (1, 2)), Played(math.nan, ())]).read_bytes() == first
    lines = gzip.decompress(first).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"reward": 0.5, "tokens": [1, 2]}, {"reward": None, "tokens": []}]


def test_a_directory_of_another_configuration_is_refused_with_the_keys(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).close()
    with pytest.raises(
        RunError, match=r"other settings \(seed: 0 there, 5 here; rollout\.samples: \d+ there, 2 here\)"
    ):
        RunDirectory.create(config(tmp_path / "run", seed=5, **{"rollout.samples": 2}))


def test_the_same_run_again_is_told_how_to_continue(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).close()
    with pytest.raises(RunError, match=r"espl-train --resume .*run"):
        RunDirectory.create(config(tmp_path / "run"))


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("…")
    with pytest.raises(RunError, match="not empty and is no run directory"):
        RunDirectory.create(config(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunDirectory.create(config(tmp_path / "file"))
    with pytest.raises(RunError, match="cannot be made"):
        RunDirectory.create(config(tmp_path / "file" / "below"))


def test_only_harmless_options_change_on_resume(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).close()
    with RunDirectory.open(tmp_path / "run", {"steps": 99, "keep_checkpoints": 1}) as run:
        assert run.config.steps == 99
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.config.steps == 99
    with pytest.raises(RunError, match=r"learner\.learning_rate: .* cannot change now; only steps"):
        RunDirectory.open(tmp_path / "run", {"learner.learning_rate": 1.0})
    with pytest.raises(RunError, match="leave --out away"):
        RunDirectory.open(tmp_path / "run", {"out": "elsewhere"})


def test_a_missing_run_lists_its_neighbours(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "first")).close()
    with pytest.raises(RunError, match=r"no run directory .*second\. There are: .*first"):
        RunDirectory.open(tmp_path / "second")
    with pytest.raises(RunError, match=r"has no config.toml"):
        RunDirectory.open(tmp_path)


HOLD = """
import sys
from pathlib import Path
from espl_train.runs.directory import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def sleep_for_ever(ready: Any) -> None:
    ready.set()
    multiprocessing.Event().wait()


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=f"in use by another espl-train .process {holder.pid}"):
        RunDirectory.open(tmp_path / "run")
    holder.kill()
    holder.communicate()
    RunDirectory.open(tmp_path / "run").close()


START = """
import sys
from pathlib import Path
from espl_train.config import Config
from espl_train.runs.directory import RunDirectory
from espl_train.settings import override
run = RunDirectory.create(override(Config(), {"out": sys.argv[1], "tensorboard": False}))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_new_run_does_not_enter_where_another_one_is_at_work(tmp_path: Path) -> None:
    """Two real processes: who is there is told, whatever the newcomer's settings; its death frees the directory."""
    holder = subprocess.Popen(
        [sys.executable, "-c", START, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    before = (tmp_path / "run" / "config.toml").read_bytes()
    for changes in ({}, {"seed": 9}):
        with pytest.raises(RunError, match=f"in use by another espl-train .process {holder.pid}"):
            RunDirectory.create(config(tmp_path / "run", **changes))
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    holder.kill()
    holder.communicate()
    with pytest.raises(RunError, match="holds this very run already; continue it with"):
        RunDirectory.create(config(tmp_path / "run"))
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.restore() is None


def test_whoever_comes_second_to_a_new_directory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found it absent; the first one has begun and died before the second one has the lock."""
    acquire = lock.acquire

    def late(path: Path) -> int:
        monkeypatch.setattr(lock, "acquire", acquire)
        RunDirectory.create(config(tmp_path / "run", seed=1)).close()
        return acquire(path)

    monkeypatch.setattr(lock, "acquire", late)
    with pytest.raises(RunError, match="seed: 1 there, 2 here"):
        RunDirectory.create(config(tmp_path / "run", seed=2))
    assert read_config(tmp_path / "run").seed == 1
    RunDirectory.open(tmp_path / "run").close()             # the one that was refused holds nothing


def test_a_lock_in_a_directory_that_was_just_removed_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf, run = lock.fcntl.lockf, RunDirectory.create(config(tmp_path / "run"))

    def slow(handle: int, how: int) -> None:
        monkeypatch.setattr(lock.fcntl, "lockf", lockf)
        run.abandon()
        (tmp_path / "run").mkdir()
        lockf(handle, how)

    monkeypatch.setattr(lock.fcntl, "lockf", slow)
    lock._held.clear()                                 # as in another process
    handle = lock.acquire(tmp_path / "run")
    assert lock._is(handle, tmp_path / "run" / ".lock")
    lock.release(tmp_path / "run", handle)


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".writing-00-config.toml"):
        (tmp_path / "run" / name).write_text("")
    RunDirectory.create(config(tmp_path / "run")).close()


@pytest.mark.parametrize("name", ["config.toml", ".lock", "metrics.jsonl", "rollouts"])
def test_a_run_directory_that_is_not_as_it_should_be_is_a_sentence(name: str, tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run")).close()
    path = tmp_path / "run" / name
    if path.is_dir():
        path.rmdir()
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(EsplError, match=name):
        RunDirectory.open(tmp_path / "run")
    assert not lock._held


def test_one_process_does_not_open_a_run_twice(tmp_path: Path) -> None:
    with RunDirectory.create(config(tmp_path / "run")), pytest.raises(RunError, match="in use"):
        RunDirectory.open(tmp_path / "run")
    RunDirectory.open(tmp_path / "run").close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run"))
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=sleep_for_ever, args=(ready,), daemon=True)
    worker.start()
    ready.wait()
    run.close()
    check = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    worker.kill()
    worker.join()
    assert check.stdout == "open\n", check.stderr


def test_a_start_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run"))
    run.abandon()
    assert not (tmp_path / "run").exists()
    run = RunDirectory.create(config(tmp_path / "run"))
    run.log.metrics({"step": 0})
    run.abandon()
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    run = RunDirectory.open(tmp_path / "run")
    run.restore()
    run.abandon()
    assert (tmp_path / "run" / "config.toml").exists()


def test_default_directories_tell_the_environment_and_do_not_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [RunDirectory.create(config(None, **{"env.id": "espl/rg-x y-v0"})) for _ in range(3)]
    names = [run.path.name for run in runs]
    assert len(set(names)) == 3 and all(re.match(r"rg-x-y-v0-\d{8}-\d{6}(-\d)?$", name) for name in names)
    for run in runs:
        run.close()
    assert default_path(config(None)).parent == Path("runs")


def test_metrics_are_strict_json_whatever_is_in_them(tmp_path: Path) -> None:
    import numpy as np
    import torch

    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write(
        {"a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": torch.tensor(2), "e": (1, "⊕"), "f": "\ud800"}
    )
    lines.close()
    text = (tmp_path / "m.jsonl").read_bytes().decode("utf-8", "replace")
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["c"] == 0.5
    assert plain({"a": math.nan, 1: {2, 1}}) == {"a": None, "1": [1, 2]}


class Broken:
    def __init__(self, at: str) -> None:
        self.at = at
        if at == "start":
            raise ImportError("No module named 'tensorboard'")

    def write(self, _record: object) -> None:
        if self.at == "write":
            raise OSError("disk full")

    def close(self) -> None:
        if self.at == "close":
            raise RuntimeError


@pytest.mark.parametrize("at", ["start", "write", "close"])
def test_a_broken_tracker_costs_one_warning_and_never_the_run(tmp_path: Path, at: str) -> None:
    warnings: list[str] = []
    log = RunLog(tmp_path, {"Tracker": lambda: Broken(at)}, warnings.append)
    for step in range(3):
        log.metrics({"step": step})
    log.close()
    assert len(warnings) == 1 and warnings[0].startswith("Tracker is off")
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 3


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDirectory.create(override(config(tmp_path / "run"), {"tensorboard": True})) as run:
        for step in range(3):
            run.log.metrics({"step": step, "reward/mean": 0.5, "best": "p0001", "update/loss": math.nan})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("reward/mean")] == [0, 1, 2]
    assert events.Tags()["scalars"] == ["reward/mean"]
