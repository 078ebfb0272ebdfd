"""Replies by content: a folder in which a reflection call finds what was once said to the very same words.

The key is a hash of everything that decides a reply: model or weights, sampling parameters, seed, messages. Every reply
is a file of its own, readable and written whole or not at all, so a folder may be shared by runs, merged and committed.
Model text is in it, and the problems that reflection saw; keys of servers are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from espl_envs.core.errors import EsplError
from espl_envs.core.messages import Message
from espl_train import disk
from espl_train.reflecting.source import Failure, Said

FORMAT = 1


class NotRecorded(EsplError):
    """A run that replays only has come to a call that nobody recorded."""


class Cache:
    """The folder of replies. Raises EsplError where it cannot be made, or (`only`) is not there."""

    def __init__(self, folder: Path, only: bool = False) -> None:
        self.folder, self._only = folder, only
        if only and not folder.is_dir():
            raise EsplError(f"reflection.cache is replay_only, but there is no folder {folder}: name a recorded one")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EsplError(f"reflection.cache_dir {folder} cannot be made: {problem.strerror}") from None

    def find(self, key: str) -> Said | Failure | None:
        """What was said, or None. A file that is damaged is none; of a failed call only a run that asks nobody wants to
        know. Raises NotRecorded where nothing is there and nobody else may answer."""
        path = self._path(key)
        try:
            record = json.loads(path.read_bytes())
            if record["format"] == FORMAT and record["key"] == key:
                if "reply" in record:
                    return Said(**record["reply"])
                if self._only:
                    return Failure(**record["failure"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError):
            if self._only:
                raise NotRecorded(f"the recorded reply {path} cannot be read: record it again") from None
        if self._only:
            raise NotRecorded(
                f"reflection.cache is replay_only, and {self.folder} has no reply to a call that this run makes: with "
                "other settings, data or weights it is not the recorded experiment (reflection.cache replay would ask)"
            )
        return None

    def keep(self, key: str, asked: Mapping[str, Any], said: Said | Failure) -> None:
        """Write down what came of a call; `asked` is what the key was made of. Of two writers at once one is kept.
        Raises DiskError."""
        path = self._path(key)
        with disk.explained(path.parent):
            path.parent.mkdir(exist_ok=True)
        kind = "reply" if isinstance(said, Said) else "failure"
        record = {"format": FORMAT, "key": key, "asked": asked, kind: asdict(said)}
        disk.write(path, _canonical(record, indent=1))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def question(identity: Mapping[str, Any], messages: Sequence[Message], seed: int) -> tuple[str, dict[str, Any]]:
    """The key of a call, 64 hex digits, and what it is a hash of."""
    asked = {**identity, "seed": seed, "messages": [message.to_openai() for message in messages]}
    return hashlib.sha256(_canonical(asked)).hexdigest(), asked


def _canonical(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent)
    return text.encode("utf-8", "surrogatepass")
