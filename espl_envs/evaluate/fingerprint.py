"""What an agent is made of, by content: a run is continued with the agent that it was begun with, or not unawares.

Of Python code these are its file and the files that it imports from beside it and from the current folder (found by
reading imports, nothing is run); packages that are installed count only where the agent is one of them. Of a command,
the program and the files among its words. What an agent reads while it plays (prompts, weights, a server) is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

OURS = ("espl_envs", "espl_train")          # of these, config.json has the version
DIGITS = 16


def of_module(module: ModuleType) -> dict[str, str]:
    """The files behind a module and their digests; empty for one that is compiled into Python."""
    if not getattr(module, "__file__", None):
        return {}
    file = Path(str(module.__file__)).resolve()
    package = module.__spec__.parent if module.__spec__ is not None else ""
    names = package.split(".") if package else []
    root = file.parents[len(names)]
    roots = (root, Path.cwd().resolve())
    begun = dict.fromkeys([file, *_files(names, (root,))])      # importing a module runs the packages that it is in
    return _digests(_reachable(list(begun), roots, root / names[0] if names else file), root)


def of_words(words: Sequence[str]) -> dict[str, str]:
    """The files among the words of a command, the program first, and their digests."""
    found: list[Path] = []
    for word in words:
        if (file := Path(word)).is_file():
            found += _reachable([file], (file.resolve().parent,), file)
    return _digests(found, Path.cwd())


def digest(file: Path) -> str:
    """The first 64 bits of the SHA-256 of a file's content, in hexadecimal."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:DIGITS]
    except OSError as problem:
        return f"unreadable: {problem.strerror or problem}"


def _digests(files: Sequence[Path], root: Path) -> dict[str, str]:
    """By name: short where the file is below `root`."""
    return {str(file.relative_to(root) if file.is_relative_to(root) else file): digest(file) for file in files}


def _reachable(begun: Sequence[Path], roots: Sequence[Path], own: Path) -> list[Path]:
    """The files `begun` with, and what they import, directly or not, from below `roots`. Nothing of Python's library,
    and of installed packages only what is below `own`."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found, waiting = [*begun], [*begun]
    while waiting:
        for one in _imported(waiting.pop(), roots):
            foreign = any(one.is_relative_to(library) for library in installed) and not one.is_relative_to(own)
            if not foreign and one not in found:
                found.append(one)
                waiting.append(one)
    return [*begun, *sorted(found[len(begun) :])]


def _imported(file: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """The files of the modules that a file names in its imports, as far as they lie below `roots`."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name.split("."), roots)
        elif isinstance(node, ast.ImportFrom):
            beside = [file.parents[node.level - 1]] if 0 < node.level <= len(file.parents) else roots
            parts = node.module.split(".") if node.module else []
            for alias in node.names:
                yield from _files([*parts, alias.name], beside)


def _files(parts: Sequence[str], roots: Sequence[Path]) -> Iterator[Path]:
    """The files that importing a dotted name runs: of its packages, and its own if it is a module."""
    if parts[:1] and parts[0] in OURS:
        return
    for root in roots:
        for count in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:count])
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())
