"""Which weights are served, by content: so that an evaluation is not continued with others unawares."""

from __future__ import annotations

import hashlib
from pathlib import Path

from espl_envs.core.errors import EsplError

PARTS = frozenset({".safetensors", ".bin", ".json", ".model", ".tiktoken", ".txt", ".jinja", ".py"})


def weights_of(path: str, revision: str | None = None) -> str:
    """A digest of the model at `path`: of weights, configuration, tokenizer and chat template in a folder (which is
    read as a whole: about a second per gigabyte), the commit where it is a model of the hub. Raises EsplError as
    `locate`, and for what cannot be had or read."""
    from espl_train.learner.loading import locate

    source = locate(path)
    if not Path(source).is_dir():
        return _commit(source, revision)
    whole = hashlib.sha256()
    for file in sorted(file for file in Path(source).iterdir() if file.suffix in PARTS and file.is_file()):
        try:
            with file.open("rb") as stream:
                whole.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
        except OSError as problem:
            raise EsplError(f"{file} cannot be read: {problem.strerror or problem}") from None
    return whole.hexdigest()[:16]


def _commit(repository: str, revision: str | None) -> str:
    """The commit that the hub's name stands for now, or in the cache where the hub cannot be asked."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        file = cached_file(repository, "config.json", revision=revision)
    except OSError as problem:
        raise EsplError(f"the model {repository!r} cannot be had: {str(problem).splitlines()[0]}") from None
    return extract_commit_hash(file, None) or ""
