"""What the answers of a box mean. They come from where hostile code runs: every function raises KeyError, TypeError or
ValueError for an answer without sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from espl_envs.sandbox.base import ExecResult, FileInfo, SandboxPathError, Status

_STATUSES = frozenset(get_args(Status))


def result(header: dict[str, Any], content: bytes) -> ExecResult:
    """Of `python`, `shell` and `exec`."""
    status, code = header["status"], header["exit_code"]
    if status not in _STATUSES or not (code is None or isinstance(code, int)):
        raise ValueError(f"status {status!r}, exit code {code!r}")
    out, err = int(header["out"]), int(header["err"])
    text = content[:out].decode("utf-8", "replace")
    errors = content[out:out + err].decode("utf-8", "replace")
    value = content[out + err:].decode("utf-8", "replace") if header["value"] else None
    return ExecResult(
        status, code, text, errors, value, bool(header["truncated"]), int(header["bytes_out"]),
        header["wall_us"] / 1e6, header["cpu_us"] / 1e6, header["peak_kib"] / 1024, bool(header.get("fresh", False)),
    )


def infos(entries: Sequence[Sequence[Any]]) -> tuple[FileInfo, ...]:
    """[name, kind, size, mode] each."""
    found = []
    for name, kind, size, mode in entries:
        if not isinstance(name, str) or kind not in ("file", "directory", "link", "other"):
            raise ValueError(f"an entry {name!r} of kind {kind!r}")
        found.append(FileInfo(name, kind, int(size), int(mode)))
    return tuple(found)


def entry(path: str, header: dict[str, Any]) -> FileInfo | None:
    """Of `stat`."""
    return None if header["entry"] is None else infos([[path, *header["entry"]]])[0]


def page(header: dict[str, Any], _: bytes) -> tuple[tuple[FileInfo, ...], bool]:
    """Of `list`: entries, and whether more follow."""
    return infos(header["entries"]), bool(header["more"])


def contents(header: dict[str, Any], content: bytes) -> Sequence[bytes]:
    """The files that an answer holds one after the other."""
    parts, start = [], 0
    for size in header["sizes"]:
        parts.append(content[start:start + int(size)])
        start += int(size)
    return parts


def nothing(_: dict[str, Any], __: bytes) -> None:
    """Of what only says that it was done."""


def relative(name: str) -> None:
    """Names of a tree go to or come from the box: none leads out of it. Raises SandboxPathError."""
    if not name or name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise SandboxPathError(f"{name[:100]!r} is no name inside a tree")
