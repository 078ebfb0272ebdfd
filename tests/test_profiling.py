"""Where the time goes: phases add up, tokens are those that were counted, traces are bounded, and without a profile
nothing happens."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import pytest
import torch

from espl_train import profiling
from espl_train.cli import main
from espl_train.profiling import PIECES, Phases, Profile, span, window
from espl_train.runs.metrics import read_lines
from espl_train.settings import parse
from espl_train.settings.options import ConfigError

RUN = [
    *("--steps", "2", "--tensorboard", "no", "--model.threads", "1", "--rollout.problems", "4"),
    *("--rollout.samples", "4", "--evaluation.problems", "2", "--evaluation.test_problems", "2"),
]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*RUN, "--profile=2", "--quiet", "--out", str(folder)]) == 0
    return folder


def test_phases_add_up_to_the_seconds_of_a_step(profiled: Path) -> None:
    for record in list(read_lines(profiled / "metrics.jsonl"))[1:]:
        parts = {k: v for k, v in record.items() if k.endswith("/seconds") and k != "checkpoint/seconds"}
        phases = {"select", "sync", "rollouts", "reflection", "update", "rating"}
        assert {f"{name}/seconds" for name in phases} <= parts.keys() and min(parts.values()) > 0
        assert 0.9 * record["seconds"] <= sum(parts.values()) <= record["seconds"] + 1e-6
        assert ("validation/seconds" in record) == (record["step"] == 2)


def test_the_table_counts_the_tokens_that_the_metrics_count(profiled: Path) -> None:
    told = json.loads((profiled / "profile" / "phases.json").read_text())
    steps = [record for record in read_lines(profiled / "metrics.jsonl") if record["step"]]
    same = {"rollouts": "tokens/sampled", "reflection": "tokens/reflection", "update": "update/computed"}
    for phase, key in same.items():
        assert told["phases"][phase]["tokens"] == sum(record[key] for record in steps), phase
        assert told["phases"][phase]["times"] == 2
    inside = {name: account["seconds"] for name, account in told["inside"].items()}
    assert set(inside) == {
        *("update/pack", "update/forward", "update/backward", "update/optimiser", "update/trace"),
        *("sampling/prefill", "sampling/decode", "sampling/trace"),
    }
    assert sum(v for k, v in inside.items() if k.startswith("update")) <= told["phases"]["update"]["seconds"]
    assert told["peak_memory_mib"]["process"] > 100
    table = (profiled / "profile" / "phases.txt").read_text()
    assert all(word in table for word in ("rollouts", "reflection", "backward", "decode", "peak memory"))
    update = table.partition("inside: update\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in update][-2:] == ["trace", "other"]
    seconds, shares = (sum(float(line.split()[i].rstrip("%")) for line in update) for i in (1, 2))
    assert seconds == pytest.approx(told["phases"]["update"]["seconds"], abs=0.05)
    assert shares == pytest.approx(100, abs=1)


def test_traces_are_of_the_step_asked_for_and_show_the_work(profiled: Path) -> None:
    found = sorted(path.name for path in (profiled / "profile").glob("*.json.gz"))
    assert found == ["step-000002-sampling.json.gz", "step-000002-update.json.gz"]
    for name, operation in zip(found, ("aten::searchsorted", "aten::mm"), strict=True):
        events = json.loads(gzip.decompress((profiled / "profile" / name).read_bytes()))["traceEvents"]
        assert operation in {event.get("name") for event in events}


def test_a_trace_holds_so_many_pieces_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Profile(tmp_path, (3,)) as profile:
        for step in (1, 3):
            profile.begin(step, 1, 9)
            for _ in range(2):                                # the second window of a step is not traced
                with window("work") as piece:
                    for _ in range(PIECES + 5):
                        torch.zeros(3).cumsum(0)
                        piece()
    (path,) = tmp_path.glob("*.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert path.name == "step-000003-work.json.gz"
    assert sum(event.get("name") == "aten::cumsum" for event in events) == PIECES
    assert capfd.readouterr().err == ""


def test_two_windows_at_once_are_one_trace(tmp_path: Path) -> None:
    with Profile(tmp_path, (1,)) as profile:
        profile.begin(1, 1, 1)
        with window("outer"):
            thread = threading.Thread(target=lambda: window("inner").__enter__()())
            thread.start()
            thread.join()
    assert [path.name for path in tmp_path.glob("*.gz")] == ["step-000001-outer.json.gz"]


@pytest.mark.parametrize(("steps", "made", "traced"), [((), (4, 9), 5), ((), (1, 1), 1), ((7,), (4, 9), 7)])
def test_the_second_step_is_traced_where_none_is_named(
    tmp_path: Path, steps: tuple[int, ...], made: tuple[int, int], traced: int
) -> None:
    profile = Profile(tmp_path, steps)
    first, last = made
    chosen = []
    for step in range(first, last + 1):
        profile.begin(step, first, last)
        chosen += [step] if profile._step is not None else []
    assert chosen == [traced]


def test_without_a_profile_nothing_is_counted() -> None:
    assert profiling._current is None
    assert span("a") is not span("b") and not Phases().take()
    with span("update/forward"), window("update") as piece:
        piece()
    assert profiling._current is None


def test_phases_count_what_failed_too_and_start_anew_after_take() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="x"), phases("update") as spent:
        spent.tokens += 5
        raise ValueError("x")
    assert phases.take().keys() == {"update/seconds"} and phases.take() == {}
    assert phases.whole["update"].times == 1 and phases.whole["update"].tokens == 5


@pytest.mark.parametrize("text", ["", "x", "0", "2,,3", "-1", "²"])
def test_steps_that_are_no_numbers_are_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"names no steps: numbers from 1 on, as in --profile=2"):
        parse([f"--profile={text}"])


def test_the_flag_goes_with_and_without_steps() -> None:
    assert parse([]).profile is None and parse(["--profile"]).profile == ()
    assert parse(["--profile=2,10"]).profile == (2, 10)
    with pytest.raises(ConfigError, match=r"There is no option --profil.*--profile"):
        parse(["--profil"])
