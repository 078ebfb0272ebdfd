"""Atomic checkpoints: a directory `step-000123/` is either complete and verified, or it does not count.

A checkpoint is a set of named payloads. Plain data becomes JSON (floats exact), a flat dict of tensors safetensors, and
any other tree with tensors in it (an optimiser's state) a `torch.save` file that is read with `weights_only=True`.
Everything is written aside, fsynced, listed with size and sha256 in MANIFEST.json, and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_train import disk
from espl_train.disk import WRITING

MANIFEST = "MANIFEST.json"
FORMAT = 5
NAME = re.compile(r"step-(\d{6,})")
REPLACED = ".replaced-"


class CheckpointError(EsplError):
    """There is no checkpoint that can be used."""


class Damaged(Exception):
    """One checkpoint directory does not match its manifest."""


class Foreign(Damaged):
    """One checkpoint is of another format."""


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def save(folder: Path, step: int, payloads: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and keep the newest `keep`. On return it is on disk; before, the last one is.

    `payloads` maps names (letters, digits, `_`, `-`) to JSON-able data, dicts of tensors, or trees that hold tensors.
    Raises DiskError.
    """
    with disk.explained(folder):
        return _save(folder, step, payloads, keep)


def _save(folder: Path, step: int, payloads: Mapping[str, Any], keep: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    target = folder / f"step-{step:06d}"
    aside = folder / f"{WRITING}{target.name}"
    aside.mkdir()
    files = {}
    for name, payload in payloads.items():
        path = _write_payload(aside, name, payload)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "step": step, "files": files}
    disk.put(aside / MANIFEST, json.dumps(manifest, indent=2).encode())
    disk.sync(aside)
    if target.exists():
        target.rename(folder / f"{REPLACED}{target.name}")
    aside.replace(target)
    disk.sync(folder)
    recover(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:06d}")
    return target


def load_newest(folder: Path, warn: Callable[[str], None] = to_stderr) -> tuple[int, dict[str, Any]]:
    """Step and payloads of the newest checkpoint that matches its manifest; damaged ones cost a warning each.

    Tensors come back on the CPU. Raises CheckpointError where there is none.
    """
    recover(folder)
    return read_newest(folder, None, warn)


def read_newest(
    folder: Path, names: Collection[str] | None = None, warn: Callable[[str], None] = to_stderr
) -> tuple[int, dict[str, Any]]:
    """`load_newest` for whoever only reads, also while the run goes on: nothing is tidied up. Of the payloads only
    `names`, by default all."""
    found = steps(folder)
    if not found:
        raise CheckpointError(f"There is no checkpoint in {folder}.")
    foreign = ""
    for step in reversed(found):
        path = folder / f"step-{step:06d}"
        try:
            payloads = _read(path, step, names)
        except Foreign as other:
            foreign = foreign or f"The checkpoint {path} {other}"
        except Damaged as damage:
            warn(f"The checkpoint {path} is damaged ({damage}); trying the one before it.")
        else:
            if foreign:
                warn(foreign)
            return step, payloads
    raise CheckpointError(
        foreign or
        f"All {len(found)} checkpoints in {folder} are damaged; restore one from a backup or start the run anew."
    )


def read_step(folder: Path, step: int, names: Collection[str] | None = None) -> dict[str, Any]:
    """Payloads (`names`, by default all) of the checkpoint of one step. Raises CheckpointError where it cannot be used,
    with those that may be."""
    path = folder / f"step-{step:06d}"
    try:
        if path.is_dir():
            return _read(path, step, names)
    except Foreign as other:
        raise CheckpointError(f"The checkpoint {path} {other}") from None
    except Damaged as damage:
        raise CheckpointError(f"The checkpoint {path} is damaged ({damage}).") from None
    kept = ", ".join(map(str, steps(folder))) or "none"
    raise CheckpointError(f"There is no checkpoint of step {step} in {folder}; kept are those of: {kept}.")


def steps(folder: Path) -> list[int]:
    """Steps of all checkpoints in `folder`, oldest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)))


def recover(folder: Path) -> None:
    """Tidy up after a process that died while writing: half-written directories go, replaced ones without heir
    return."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(REPLACED) and not (heir := folder / path.name.removeprefix(REPLACED)).exists():
            path.replace(heir)
        elif path.name.startswith((WRITING, REPLACED)):
            shutil.rmtree(path)


def _write_payload(folder: Path, name: str, payload: Any) -> Path:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"payload name {name!r}: letters, digits, _ and - only")
    if not _has_tensors(payload, name):
        path = folder / f"{name}.json"
        disk.put(path, json.dumps(payload).encode())      # in ASCII: half a surrogate pair comes back as it was
        return path
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    flat = isinstance(payload, Mapping) and all(isinstance(v, torch.Tensor) for v in payload.values())
    path = folder / f"{name}.{'safetensors' if flat else 'pt'}"
    try:
        if flat:
            save_file(_unshared(payload), path)
        else:
            torch.save(payload, path)
    except (RuntimeError, SafetensorError) as problem:          # neither passes on what the file system said
        said = str(problem).partition("\n")[0]
        raise disk.DiskError(f"{path} cannot be written: {said} (is the disk full?)") from problem
    disk.sync(path)
    return path


def _unshared(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous CPU tensors that own their storage, as safetensors wants them (tied weights are stored twice)."""
    out, seen = {}, set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != kept.nbytes:
            kept = kept.clone()
        seen.add(storage.data_ptr())
        out[name] = kept
    return out


def _has_tensors(value: Any, path: str) -> bool:
    """Whether a tree holds tensors. Raises TypeError on what neither JSON nor torch would bring back as it was."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        found = [_has_tensors(v, f"{path}.{k}") for k, v in value.items()]
        if not any(found) and (bad := next((k for k in value if not isinstance(k, str)), None)) is not None:
            raise TypeError(f"checkpoint payload {path}: key {bad!r} is no text, JSON would change it")
        return any(found)
    if isinstance(value, list | tuple):
        found = [_has_tensors(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return any(found)
    if value is None or isinstance(value, str | int | float | bool):
        return False
    raise TypeError(f"checkpoint payload {path}: a {type(value).__name__} cannot be stored")


def newest(folder: Path) -> int | None:
    """Step of the newest checkpoint that this version reads, by its manifest alone; None where there is none at all.
    Raises CheckpointError where there are only others."""
    problem = ""
    left = folder.glob(f"{REPLACED}step-*") if folder.is_dir() else ()          # will return, see `recover`
    there = {path.name.removeprefix(REPLACED): path for path in left}
    there |= {f"step-{step:06d}": folder / f"step-{step:06d}" for step in steps(folder)}
    known = {int(match[1]): path for name, path in there.items() if (match := NAME.fullmatch(name))}
    for step, path in sorted(known.items(), reverse=True):
        try:
            _manifest(path, step)
        except Foreign as other:
            problem = problem or f"The checkpoint {path} {other}"
        except Damaged as damage:
            problem = problem or f"The checkpoint {path} is damaged ({damage}), and so are those before it."
        else:
            return step
    if problem:
        raise CheckpointError(problem)
    return None


def _read(path: Path, step: int, names: Collection[str] | None) -> dict[str, Any]:
    files = _manifest(path, step)
    for file, (size, digest) in files.items():
        if not (path / file).is_file():
            raise Damaged(f"{file} is missing")
        if (path / file).stat().st_size != size or _sha256(path / file) != digest:
            raise Damaged(f"{file} does not match its checksum")
    wanted = [file for file in files if names is None or Path(file).stem in names]
    return {Path(file).stem: _read_payload(path / file) for file in wanted}


def _manifest(path: Path, step: int) -> dict[str, tuple[int, str]]:
    """The files of a checkpoint, each with its size and its hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version, written = manifest["format"], manifest["step"]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise Damaged(f"{MANIFEST} is unreadable") from None
    if written != step:
        raise Damaged(f"{MANIFEST} speaks of step {written}")
    if version != FORMAT:
        made = "an older" if isinstance(version, int) and version < FORMAT else "another"
        raise Foreign(
            f"was made by {made} version of espl (format {version}, here {FORMAT}): continue the run with that "
            "version, or start a new one."
        )
    return files


def _read_payload(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
