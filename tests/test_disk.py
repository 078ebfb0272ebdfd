"""Files that are whole or not there, and file systems that refuse, in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from espl_envs.core.errors import EsplError
from espl_train import disk
from espl_train.disk import DiskError
from espl_train.runs.metrics import JsonLines, read_lines


class Killed(BaseException):
    """Stands for SIGKILL."""


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("moment", ["put", "sync"])
def test_a_reader_finds_the_old_content_or_the_new_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write(tmp_path / "a", b"old")

    def die(*_: object) -> None:
        assert (tmp_path / "a").read_bytes() == b"old"
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(disk, moment, die)
        disk.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    disk.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and everything(tmp_path) == ["a"]


def test_what_is_made_once_is_never_replaced(tmp_path: Path) -> None:
    assert disk.write_once(tmp_path / "a", b"first") and not disk.write_once(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and everything(tmp_path) == ["a"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        disk.write(tmp_path / "a", b"")
        disk.write_once(tmp_path / "b", b"")
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in "ab"] == ["0o640"] * 2


@pytest.mark.parametrize("write", [disk.write, disk.write_once])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    assert callable(write)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"a cannot be written: No space left on device"):
        write(tmp_path / "a", b"new")
    assert everything(tmp_path) == []


def test_a_line_is_whole_or_none_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ' + b"2" * 200_000)
    assert list(read_lines(path)) == [{"a": 1}]
    lines = JsonLines(path)
    lines.write({"c": 3})
    lines.close()
    assert list(read_lines(path)) == [{"a": 1}, {"c": 3}]
    (tmp_path / "t.jsonl").write_bytes(b"torn from the first byte on")
    JsonLines(tmp_path / "t.jsonl").close()
    assert (tmp_path / "t.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff"])
def test_a_line_that_is_no_record_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(EsplError, match=r"m.jsonl is damaged: line 2 is no record"):
        list(read_lines(tmp_path / "m.jsonl"))
