"""Adapters on their way to a sampler: whole or not there, never under a used name, gone when nobody needs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from espl_train import disk
from espl_train.engines import adapters
from espl_train.engines.adapters import PREFIX, AdapterStore
from espl_train.engines.scratch import LOCK


def write(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "more").mkdir()
    (folder / "more" / "config.json").write_text("{}")


def test_names_ids_and_paths_are_never_given_twice(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    made = [store.publish(version, write) for version in (0, 0, 1, 0)]
    assert [adapter.version for adapter in made] == [0, 0, 1, 0]
    assert [adapter.id for adapter in made] == [1, 2, 3, 4]
    assert len({adapter.name for adapter in made}) == len({adapter.path for adapter in made}) == 4
    assert all((adapter.path / "more" / "config.json").is_file() for adapter in made)


def test_what_could_not_be_written_whole_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("no space left on device")

    store = AdapterStore(tmp_path)
    with pytest.raises(OSError, match="no space"):
        store.publish(0, fail)
    assert [path.name for path in store.folder.iterdir()] == [LOCK]
    assert store.publish(0, write).id == 2


def test_a_reader_never_sees_half_an_adapter(tmp_path: Path) -> None:
    """While files are written there is nothing under the final name; the rename comes after the fsyncs."""
    seen: list[list[str]] = []
    store = AdapterStore(tmp_path)

    def watch(folder: Path) -> None:
        write(folder)
        seen.append([path.name for path in store.folder.iterdir() if not path.name.startswith(".")])

    adapter = store.publish(7, watch)
    assert seen == [[LOCK]] and adapter.name.startswith("policy-000007")


def test_files_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, sync = Path.rename, disk.sync
    monkeypatch.setattr(disk, "sync", lambda path: (events.append(path.name), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("rename"), rename(path, to))[1])
    store = AdapterStore(tmp_path)
    store.publish(0, write)
    assert {"adapter_model.safetensors", "config.json", "more"} < set(events[: events.index("rename")])
    assert events[-1] == store.folder.name


def test_only_what_is_served_is_kept_and_nothing_after_close(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    old, new = store.publish(0, write), store.publish(1, write)
    store.keep(new)
    assert new.path.is_dir() and not old.path.exists()
    store.close()
    store.close()
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_engine_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    living = AdapterStore(tmp_path)
    living.publish(0, write)
    program = (
        "import os, sys; from pathlib import Path; from espl_train.engines.adapters import AdapterStore; "
        "store = AdapterStore(Path(sys.argv[1])); "
        "store.publish(0, lambda folder: None); print(store.folder, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert killed.returncode == -9 and left.is_dir()
    AdapterStore(tmp_path).close()
    assert [*tmp_path.glob(f"{PREFIX}*")] == [living.folder]


def test_memory_is_used_where_there_is_room_for_a_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapters, "MEMORY", tmp_path)
    monkeypatch.setattr(adapters.tempfile, "gettempdir", lambda: "/elsewhere")
    assert adapters._fastest(10**3) == tmp_path
    assert adapters._fastest(10**18) == Path("/elsewhere")
    monkeypatch.setattr(adapters, "MEMORY", tmp_path / "none")
    assert adapters._fastest(0) == Path("/elsewhere")


def test_a_folder_that_a_sweep_removed_between_its_making_and_its_locking_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, swept = os.open, []

    def slowly(path: Path, flags: int, *mode: int, **place: int) -> int:
        descriptor = opened(path, flags, *mode, **place)
        if flags & os.O_CREAT and not swept:
            swept.append(path)
            shutil.rmtree(Path(path).parent)              # as a sweep that locked first
        return descriptor

    monkeypatch.setattr(os, "open", slowly)
    store = AdapterStore(tmp_path)
    assert swept and store.folder.is_dir() and store.folder != swept[0].parent
    store.close()
