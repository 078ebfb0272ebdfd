"""A run directory loses nothing: torn lines, killed writers, full disks, two writers, other configurations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluate_kit import ADD
from evaluation_kit import ENV, config, episode, write_run

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_envs.evaluate import directory as directory_module
from espl_envs.evaluate.cli import main
from espl_envs.evaluate.config import AgentConfig, EvalConfig, Prices
from espl_envs.evaluate.directory import EPISODES, RunDirectory, RunError
from espl_envs.evaluate.records import EpisodeKey
from espl_envs.evaluate.summary import summarise

CONFIG = config({ENV: [[1.0, 0.0]] * 3})
KEYS = list(CONFIG.keys())


def test_what_was_appended_is_read_again_in_every_way(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        for key in KEYS[:4]:
            run.append(episode(key))
        assert run.missing() == KEYS[4:]
        assert [one.key for one in run.episodes()] == KEYS[:4]
    with RunDirectory.open(tmp_path / "run") as again:
        assert again.config == CONFIG and again.missing() == KEYS[4:]
        assert list(again.episodes()) == [episode(key) for key in KEYS[:4]]
    looked = RunDirectory.read(tmp_path / "run")
    assert looked.episode(KEYS[2]) == episode(KEYS[2])
    assert all(one.messages == () and one.score == 1.0 for one in looked.episodes(transcripts=False))
    with pytest.raises(RunError, match="reading only"):
        looked.append(episode(KEYS[5]))


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module.os, "fsync", lambda _: None)
    short = {"change": lambda one: replace(one, messages=(), turns=(), answer=None, reference=None)}
    run = write_run(tmp_path / "run", {ENV: [[1.0], [0.0], [1.0]]}, **short)
    whole = (run / EPISODES).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        (run / EPISODES).write_bytes(whole[:end])
        looked = RunDirectory.read(run)
        assert looked.torn == end - start and (run / EPISODES).stat().st_size == end, "reading changes nothing"
        with RunDirectory.open(run) as again:
            assert again.torn == end - start
            assert [key.task for key in again.missing()] == [2]
            again.append(episode(EpisodeKey(ENV, "test", 2, 0), 0.5))
        assert [one.score for one in RunDirectory.read(run).episodes()] == [1.0, 0.0, 0.5]


WRITER = """
import sys
from pathlib import Path
from evaluation_kit import ENV, config, episode
from espl_envs.core.messages import Message
from espl_envs.evaluate import directory
from espl_envs.evaluate.records import EpisodeKey

if sys.argv[2] == "lazy":
    class Lazy:
        kept = []
        def __getattr__(self, name): return getattr(__import__("os"), name)
        def write(self, file, data):
            self.kept.append(data)
            if len(self.kept) == 50:
                __import__("os").write(file, b"".join(self.kept)); self.kept.clear()
            return len(data)
    directory.os = Lazy()
run = directory.RunDirectory.create(Path(sys.argv[1]), config({ENV: [[1.0]] * 100000}))
for task in range(100000):
    run.append(episode(EpisodeKey(ENV, "test", task, 0), messages=(Message("user", "x" * 20000),)))
    print(task, flush=True)
    if task == 74 and sys.argv[2] == "lazy": __import__("time").sleep(600)     # a later gathering must not save it
"""


@pytest.mark.parametrize("writer", ["ours", "lazy"])
def test_a_writer_that_is_killed_leaves_every_episode_that_it_finished(tmp_path: Path, writer: str) -> None:
    """The lazy writer, which gathers lines before it writes, shows that the check notices."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), writer]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        last = [int(process.stdout.readline()) for _ in range(75)][-1]
        process.send_signal(signal.SIGKILL)
    with RunDirectory.open(tmp_path / "run") as run:
        found = {one.key.task for one in run.episodes()}
        assert (found >= set(range(last + 1))) == (writer == "ours")
        assert run.damaged == 0 and found == set(range(len(found))), "whole lines, in order"
        assert len(run.missing()) == 100_000 - len(found)


def test_a_full_disk_costs_the_episode_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    room = [5, -1]

    def full(file: int, data: bytes) -> int:
        left = room.pop(0)
        if left < 0:
            raise OSError(28, "No space left on device")
        return write(file, data[:left])

    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        run.append(episode(KEYS[0]))
        before = (run.path / EPISODES).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(directory_module.os, "write", full)
            with pytest.raises(RunError, match="No space left"):
                run.append(episode(KEYS[1]))
        assert (run.path / EPISODES).read_bytes() == before
        run.append(episode(KEYS[1]))
        assert run.missing() == KEYS[2:]


def test_writes_that_come_up_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        monkeypatch.setattr(directory_module.os, "write", lambda file, data: write(file, data[:7]))
        run.append(episode(KEYS[0]))
    assert list(RunDirectory.read(tmp_path / "run").episodes()) == [episode(KEYS[0])]


def test_the_last_record_of_a_key_counts_and_faults_are_missing(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        for score in (None, 0.0, None, 1.0):
            run.append(episode(KEYS[0], score))
            assert (KEYS[0] in run.missing()) == (score is None)
        run.append(episode(KEYS[1], None))
    looked = RunDirectory.read(tmp_path / "run")
    assert [one.score for one in looked.episodes()] == [1.0, None]
    assert looked.missing() == KEYS[1:]


def test_a_damaged_line_in_the_middle_costs_its_episode_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {ENV: [[1.0], [0.0], [1.0]]})
    lines = (run / EPISODES).read_bytes().splitlines(keepends=True)
    (run / EPISODES).write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    looked = RunDirectory.read(run)
    assert looked.damaged == 1 and "a line of episodes.jsonl cannot be read" in str(summarise(run))
    assert [key.task for key in looked.missing()] == [1]


def test_two_writers_are_kept_apart_and_readers_are_not(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        with pytest.raises(RunError, match=rf"in use by another espl-eval \(process {os.getpid()}\)"):
            RunDirectory.open(tmp_path / "run")
        run.append(episode(KEYS[0]))
        assert len(list(RunDirectory.read(tmp_path / "run").episodes())) == 1
    RunDirectory.open(tmp_path / "run").close()


HOLDER = """
import sys, time
from pathlib import Path
from espl_envs.evaluate.directory import RunDirectory
with RunDirectory.open(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_commands_on_one_directory_are_kept_apart_until_one_is_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own, whether the second one means to go on or to begin."""
    out = tmp_path / "run"
    words = ["--env", ADD, "--agent", "silent", "--out", str(out), "--limit", "2", "--quiet"]
    assert main([*words, "--limit", "1"]) == 0
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        capsys.readouterr()
        for more in ((), ("--resume",)):
            assert main([*words, *more]) == 2
            said = capsys.readouterr().err
            assert said == (f"espl-eval: {out} is in use by another espl-eval (process {holder.pid}): "
                            "wait for it or stop it.\n")  # fmt: skip
        assert main(["report", str(out)]) == 0, "it may be looked at meanwhile"
        holder.kill()
    assert main([*words, "--resume"]) == 0 and len(list(RunDirectory.read(out).episodes())) == 2


def other(**fields: Any) -> EvalConfig:
    return replace(CONFIG, **fields)


@pytest.mark.parametrize(("asked", "said"), [
    (other(seed=7), "seed: 0 there, 7 here"),
    (other(k=1), "k: 2 there, 1 here"),
    (other(agent=AgentConfig("endpoint", "agent", "m")), "agent.kind: 'callable' there, 'endpoint' here"),
    (other(envs=(replace(CONFIG.envs[0], data_hash="new"),)), "data_hash: 'data of espl/Countdown-v0' there, 'new'"),
    (other(envs=(replace(CONFIG.envs[0], kwargs={"numbers": 5}),)), "kwargs.numbers: None there, 5 here"),
    (other(system_prompts=("Think.",)), "system_prompts.0: None there, 'Think.' here"),
    (config({"espl/Game24-v0": [[1.0, 1.0]]}), "'espl/Countdown-v0 (test)' there, 'espl/Game24-v0 (test)' here"),
])
def test_the_directory_of_another_evaluation_is_refused_with_the_differences(
    tmp_path: Path, asked: EvalConfig, said: str
) -> None:
    RunDirectory.create(tmp_path / "run", CONFIG).close()
    for door in (RunDirectory.create, RunDirectory.open):
        with pytest.raises(RunError) as refusal:
            door(tmp_path / "run", asked)
        assert said in str(refusal.value) and "choose another --out" in str(refusal.value)
    assert RunDirectory.read(tmp_path / "run").config == CONFIG


def test_a_run_may_grow(tmp_path: Path) -> None:
    """More samples and more tasks keep what is there; what changes no number may change, too."""
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        for key in KEYS:
            run.append(episode(key))
    more = other(k=3, limit=4, envs=(replace(CONFIG.envs[0], tasks=4),), prices=Prices(1, 2), started="later")
    with RunDirectory.open(tmp_path / "run", more) as run:
        assert sorted(run.missing()) == sorted(set(more.keys()) - set(KEYS))
        assert run.config == replace(more, started=CONFIG.started)
    assert RunDirectory.read(tmp_path / "run").config.k == 3
    with pytest.raises(RunError, match="continue it with --resume"):
        RunDirectory.create(tmp_path / "run", more)


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        RunDirectory.create(tmp_path / "file", CONFIG)
    with pytest.raises(RunError, match="not empty"):
        RunDirectory.create(tmp_path / "full", CONFIG)
    with pytest.raises(RunError, match="no run directory"):
        RunDirectory.open(tmp_path / "absent")
    with pytest.raises(RunError, match=r"has no config\.json"):
        RunDirectory.read(tmp_path / "full")
    (tmp_path / "full" / "config.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        RunDirectory.read(tmp_path / "full")
    (tmp_path / "full" / "config.json").write_text("[]")
    with pytest.raises(RunError, match=r"config\.json is no configuration"):
        RunDirectory.read(tmp_path / "full")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["config.json", "thesis.tex"]


def test_a_start_that_died_early_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("1")
    (tmp_path / "run" / ".config.json.123.new").write_text("{")
    RunDirectory.create(tmp_path / "run", CONFIG).close()


def test_what_the_file_system_refuses_is_a_sentence(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    for refused in (RunDirectory.create, RunDirectory.open):
        with pytest.raises(RunError, match="File name too long"):
            refused(long, CONFIG)
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(RunError, match="run cannot be written: Is a directory"):
        RunDirectory.create(tmp_path / "run", CONFIG)


def test_what_an_agent_forked_does_not_keep_the_directory(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        assert run._lock is not None
        inherited = os.dup(run._lock)
    RunDirectory.open(tmp_path / "run").close()
    os.close(inherited)


def test_environments_grow_in_whatever_order_they_are_named(tmp_path: Path) -> None:
    many, few = (replace(CONFIG.envs[0], id=f"x/{size}-v0", tasks=size, size=size) for size in (9, 3))
    RunDirectory.create(tmp_path / "run", other(envs=(many, few), limit=None)).close()
    with RunDirectory.open(tmp_path / "run", other(envs=(few, many), limit=None)) as run:
        assert len(run.missing()) == 12 * CONFIG.k
    with pytest.raises(RunError, match=r"tasks: 9 there, 8 here"):
        RunDirectory.open(tmp_path / "run", other(envs=(few, replace(many, tasks=8)), limit=None))


def test_a_run_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(EsplError, match="episodes, a run holds 5,000,000 at most"):
        other(k=10**9)


def test_files_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        run.write_json("summary.json", {"mean": 1})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("the machine died")))
            with pytest.raises(RunError, match=r"summary\.json cannot be written: the machine died"):
                run.write_json("summary.json", {"mean": 2})
        assert json.loads((run.path / "summary.json").read_text()) == {"mean": 1}


def test_a_configuration_survives_its_file_and_holds_no_credential() -> None:
    full = other(
        agent=AgentConfig("endpoint", "m", "m", "https://user:secret@host:8000/v1?key=secret#secret", {"top_p": 1}),
        system_prompts=("first ⊕", "second"), prices=Prices(0.5, 2, "EUR"), limit=3, suite="0.1.0", started="now",
    )  # fmt: skip
    text = full.to_json()
    assert EvalConfig.from_json(text, "config.json") == full
    assert "secret" not in text and full.agent.base_url == "https://host:8000/v1"
    assert full.expected() == len(list(full.keys())) == 12
    assert full.prices is not None and full.prices.cost(2_000_000, 500_000) == 2.0
    with pytest.raises(EsplError, match="named twice"):
        other(envs=CONFIG.envs * 2)


def test_big_transcripts_are_read_one_at_a_time(tmp_path: Path) -> None:
    big = Message("assistant", "x" * 3_000_000)
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        for key in KEYS:
            run.append(episode(key, messages=(big,)))
        assert all(one.messages == (big,) for one in run.episodes())
        assert sum(place.size for place in run._index.values()) == (run.path / EPISODES).stat().st_size
