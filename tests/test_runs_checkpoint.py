"""Checkpoints: whatever moment a process dies at, the newest complete one can be loaded, exactly as it was saved."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espl_train.disk import DiskError
from espl_train.runs import checkpoint
from espl_train.runs.checkpoint import CheckpointError, load_newest, save, steps


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs in the process that was writing."""


def payloads(step: int) -> dict[str, Any]:
    return {
        "state": {"step": step, "mu": 25 / 3 + step, "names": ["p0000", "…"], "none": None},
        "weights": {"a": torch.full((3, 2), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)},
        "optimiser": {"state": {0: {"step": torch.tensor(step), "m": torch.ones(2) / 3}}, "groups": [{"lr": 1e-4}]},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and type(a) is type(b)


def test_what_is_saved_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 7, payloads(7), keep=3)
    step, back = load_newest(tmp_path)
    assert step == 7 and same(back, payloads(7))
    assert sorted(p.name for p in (tmp_path / "step-000007").iterdir()) == [
        "MANIFEST.json", "optimiser.pt", "state.json", "weights.safetensors",
    ]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False), max_size=8))
def test_floats_survive_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    folder = tmp_path_factory.mktemp("exact")
    save(folder, 1, {"state": values}, keep=1)
    back = load_newest(folder)[1]["state"]
    assert [v.hex() for v in back] == [v.hex() for v in values]


def test_not_a_number_survives_too(tmp_path: Path) -> None:
    save(tmp_path, 1, {"state": [math.nan, math.inf, -0.0]}, keep=1)
    nan, inf, zero = load_newest(tmp_path)[1]["state"]
    assert math.isnan(nan) and inf == math.inf and math.copysign(1, zero) == -1


def test_any_text_of_a_model_survives(tmp_path: Path) -> None:
    texts = ["half a pair \ud83d", "\x00\x1b", "e\u0301", "≤ 5", "\u2028"]
    save(tmp_path, 1, {"state": texts}, keep=1)
    assert load_newest(tmp_path)[1]["state"] == texts


def test_tied_and_strided_weights_are_stored(tmp_path: Path) -> None:
    tied, wide = torch.randn(4, 4), torch.randn(8, 8)
    weights = {"embed": tied, "head": tied, "column": wide[:, 0], "row": wide[0], "turned": tied.T}
    save(tmp_path, 1, {"weights": weights}, keep=1)
    back = load_newest(tmp_path)[1]["weights"]
    assert all(torch.equal(back[k], weights[k]) for k in weights)


@pytest.mark.parametrize("bad", [{1: "int key"}, {"x": {1, 2}}, {"x": Path("p")}, {"x": b"bytes"}])
def test_what_would_not_come_back_is_refused(tmp_path: Path, bad: Any) -> None:
    save(tmp_path, 1, payloads(1), keep=3)
    with pytest.raises(TypeError, match="payload state"):
        save(tmp_path, 2, {"state": bad}, keep=3)
    assert load_newest(tmp_path)[0] == 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, {"state": step}, keep=2)
    assert steps(tmp_path) == [4, 5]
    assert {p.name for p in tmp_path.iterdir()} == {"step-000004", "step-000005"}


CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")


def die_at(monkeypatch: pytest.MonkeyPatch, moment: int, after: bool) -> Callable[[], int]:
    """From the `moment`-th file-system call on, nothing reaches the disk any more. Returns how many calls were made."""
    made = 0

    def mortal(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made > moment or (made == moment and not after):
                raise Killed
            out = real(*args, **kwargs)
            if made == moment:
                raise Killed
            return out

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, mortal(name))
    return lambda: made


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step again"])
def test_dying_at_any_moment_of_a_save_leaves_a_loadable_newest_one(tmp_path: Path, step: int, after: bool) -> None:
    seen, moment = set(), 0
    while True:
        moment += 1
        folder = tmp_path / f"{moment}"
        save(folder, 1, payloads(1), keep=2)
        save(folder, 2, payloads(2), keep=2)
        with pytest.MonkeyPatch.context() as patch:
            calls = die_at(patch, moment, after)
            try:
                save(folder, step, {**payloads(step), "mark": moment}, keep=2)
                finished = True
            except Killed:
                finished = False
            total = calls()
        warnings: list[str] = []
        found, back = load_newest(folder, warnings.append)
        assert warnings == []
        assert found in (2, step) and same(back["weights"], payloads(found)["weights"])
        seen.add((found, "mark" in back))
        assert all(not p.name.startswith(".") for p in folder.iterdir())
        save(folder, 9, payloads(9), keep=2)
        assert load_newest(folder)[0] == 9 and steps(folder)[-1] == 9
        if finished:
            break
    assert moment > total > 5
    assert seen == {(2, False), (step, True)}


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
@pytest.mark.parametrize("file", ["MANIFEST.json", "optimiser.pt", "state.json", "weights.safetensors"])
def test_a_damaged_checkpoint_falls_back_with_a_warning(tmp_path: Path, file: str, how: str) -> None:
    save(tmp_path, 1, payloads(1), keep=3)
    save(tmp_path, 2, payloads(2), keep=3)
    damage(tmp_path / "step-000002" / file, how)
    warnings: list[str] = []
    step, back = load_newest(tmp_path, warnings.append)
    assert step == 1 and same(back, payloads(1))
    assert len(warnings) == 1 and "step-000002" in warnings[0] and file in warnings[0]


def test_the_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, payloads(step), keep=3)
    damage(tmp_path / "step-000002" / "state.json", "flip")
    save(tmp_path, 2, payloads(2), keep=3)
    assert load_newest(tmp_path)[0] == 2


def test_every_single_byte_is_watched(tmp_path: Path) -> None:
    """A flipped byte anywhere is noticed, or it was in blank space of the manifest and changes nothing."""
    save(tmp_path, 1, {"state": {"x": 1}}, keep=1)
    for path in (tmp_path / "step-000001").iterdir():
        good = path.read_bytes()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            try:
                assert load_newest(tmp_path, lambda _: None) == (1, {"state": {"x": 1}})
                assert path.name == checkpoint.MANIFEST
            except CheckpointError:
                pass
        path.write_bytes(good)
    assert load_newest(tmp_path) == (1, {"state": {"x": 1}})


def test_without_a_good_checkpoint_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_newest(tmp_path / "none")
    save(tmp_path, 1, payloads(1), keep=3)
    damage(tmp_path / "step-000001" / "state.json", "gone")
    with pytest.raises(CheckpointError, match="damaged; restore one from a backup or start the run anew"):
        load_newest(tmp_path, lambda _: None)


@pytest.mark.parametrize(("version", "said"), [(1, "made by an older version"), (99, "made by another version")])
def test_a_checkpoint_of_another_format_is_not_called_damaged(tmp_path: Path, version: int, said: str) -> None:
    for step in (1, 2):
        save(tmp_path, step, payloads(step), keep=3)
    for step in (2, 1):
        path = tmp_path / f"step-{step:06d}" / "MANIFEST.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": version}))
        warnings: list[str] = []
        if step == 2:                   # the one before it still serves, as with any other fault
            assert load_newest(tmp_path, warnings.append)[0] == 1 and said in warnings[0]
            continue
        with pytest.raises(CheckpointError, match=rf"step-000002 was {said}.* start a new one") as refused:
            load_newest(tmp_path, warnings.append)
        assert warnings == [] and "damaged" not in str(refused.value)


def test_a_manifest_is_readable_by_people(tmp_path: Path) -> None:
    path = save(tmp_path, 12, payloads(12), keep=1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["step"] == 12
    assert manifest["files"]["state.json"]["size"] == (path / "state.json").stat().st_size


def test_whether_a_run_can_go_on_is_known_from_manifests_alone(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "absent") is None
    save(tmp_path, 1, payloads(1), keep=3)
    save(tmp_path, 2, payloads(2), keep=3)
    assert checkpoint.newest(tmp_path) == 2
    manifest = tmp_path / "step-000002" / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 1'))
    assert checkpoint.newest(tmp_path) == 1, "load_newest goes on from there, with a warning"
    (tmp_path / "step-000001" / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="was made by an older version of espl"):
        checkpoint.newest(tmp_path)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"step-000002 is damaged \(MANIFEST.json is unreadable\), and so are"):
        checkpoint.newest(tmp_path)


def test_one_that_was_being_replaced_counts(tmp_path: Path) -> None:
    (save(tmp_path, 4, payloads(4), keep=3)).rename(tmp_path / f"{checkpoint.REPLACED}step-000004")
    assert checkpoint.newest(tmp_path) == 4 and load_newest(tmp_path)[0] == 4


@pytest.mark.parametrize("name", ["weights", "optimiser"])
def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stands(name: str, tmp_path: Path) -> None:
    """A real limit of the kernel: no file may grow beyond 64 KiB."""
    save(tmp_path, 1, payloads(1), keep=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = torch.ones(1 << 16)
    big = {"weights": {"a": large}, "optimiser": {"state": [large]}}[name]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(DiskError, match=rf"{name}\.\w+ cannot be written: .*is the disk full"):
            save(tmp_path, 2, {**payloads(2), name: big}, keep=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_newest(tmp_path)[0] == 1 and same(load_newest(tmp_path)[1], payloads(1))
