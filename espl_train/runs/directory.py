"""One directory per run, owned by one process at a time, from which the run can always be continued.

    config.toml  events.jsonl  metrics.jsonl  rollouts/step-000012.jsonl.gz  population/  checkpoints/step-000012/

A checkpoint remembers how long the logs were when it was taken. Restoring it cuts them back to that length, so a run
that was killed and resumed leaves the same files as one that was not (but for seconds).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from espl_train import disk
from espl_train.config import Config
from espl_train.runs import checkpoint
from espl_train.runs.lock import LOCK, RunError, acquire, locked, release
from espl_train.runs.metrics import RunLog, TensorBoard, plain, read_lines
from espl_train.settings import differences, from_toml, override, to_toml
from espl_train.settings.options import options

HARMLESS = (
    *("steps", "budget_rollouts", "keep_checkpoints", "tensorboard", "overlap", "model.device", "model.threads"),
    *("engine.rounding",),
    *("learner.parallel", "learner.rank_timeout"),
    *("sandbox.max_live", "sandbox.warm", "sandbox.lease_timeout"),
    *("evolution.reflector", "reflection.*"),
)
BOOKKEEPING = "run"
CONFIG, CHECKPOINTS, METRICS = "config.toml", "checkpoints", "metrics.jsonl"


class RunDirectory:
    """An open run. Make one with `create` or `open`; it holds the lock until `close` or the end of the process."""

    def __init__(self, path: Path, config: Config, lock: int, warn: Callable[[str], None]) -> None:
        self.path, self.config, self.warn = path, config, warn
        self._lock: int | None = lock
        for folder in (self.rollouts, self.population, self.checkpoints):
            with disk.explained(folder):
                folder.mkdir(exist_ok=True)
        sinks = {"TensorBoard": self._tensorboard} if config.tensorboard else {}
        self.log = RunLog(path, sinks, lambda text: self.warn(text))
        self._restored: int | None = None
        self._fresh = False

    @classmethod
    def create(cls, config: Config, warn: Callable[[str], None] = checkpoint.to_stderr) -> Self:
        """A new run directory for `config`. Raises RunError where the directory is in use or holds something else."""
        path = Path(config.out) if config.out else default_path(config)
        refuse_taken(path, config)                 # before there is a lock file in somebody's folder
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"The run directory {path} cannot be made: {error.strerror}.") from None
        with locked(path) as lock:
            _refuse_other(path, config)            # another start may have been quicker
            disk.write(path / CONFIG, _header(config).encode() + to_toml(config).encode())
            run = cls(path, config, lock, warn)
        run._fresh = True
        return run

    @classmethod
    def open(
        cls, path: Path, overrides: Mapping[str, Any] | None = None, warn: Callable[[str], None] = checkpoint.to_stderr
    ) -> Self:
        """An existing run, to be continued with its own configuration; only harmless options may be overridden."""
        read_config(path)
        with locked(path) as lock:
            stored = read_config(path)             # as the last owner left it
            config = continued(path, stored, overrides or {})
            if config != stored:
                disk.write(path / CONFIG, _header(config).encode() + to_toml(config).encode())
            return cls(path, config, lock, warn)

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def population(self) -> Path:
        return self.path / "population"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint, None before the first."""
        return max(checkpoint.steps(self.checkpoints), default=None)

    @property
    def resume_command(self) -> str:
        return f"espl-train --resume {shlex.quote(str(self.path))}"

    def standing(self) -> str:
        """Where the run stands and how it goes on, in one sentence."""
        step = self.saved_step
        if step is None:
            return f"nothing is saved yet in {self.path}; start again, with the same settings: {self.resume_command}"
        return f"{step} of {self.config.steps} steps are saved in {self.path}; continue with: {self.resume_command}"

    def save(self, step: int, payloads: Mapping[str, Any]) -> Path:
        """Checkpoint after `step`: `payloads` and the present length of the logs, atomically."""
        if BOOKKEEPING in payloads:
            raise ValueError(f"the payload name {BOOKKEEPING!r} is taken")
        last = max((path.name for path in self.rollouts.glob("step-*")), default="")
        bookkeeping = {"logs": self.log.sizes(), "rollouts": last}
        return checkpoint.save(
            self.checkpoints, step, {BOOKKEEPING: bookkeeping, **payloads}, self.config.keep_checkpoints
        )

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """Step and payloads of the newest good checkpoint, with the logs cut back to it; None if none was ever taken
        (then the logs are empty again and the run starts at its beginning). Raises CheckpointError where those that
        were taken are of no use, or gone."""
        checkpoint.recover(self.checkpoints)
        if saved(self.path) is None:
            self._rewind({"metrics": 0, "events": 0}, "")
            return None
        step, payloads = checkpoint.load_newest(self.checkpoints, self.warn)
        bookkeeping = payloads.pop(BOOKKEEPING)
        self._rewind(bookkeeping["logs"], bookkeeping["rollouts"])
        self._restored = step
        return step, payloads

    def write_rollouts(self, step: int, rollouts: Iterable[Any]) -> Path:
        """All rollouts of a step as gzipped JSON lines (dataclasses or mappings); the bytes depend on nothing else.
        Raises DiskError."""
        path = self.rollouts / f"step-{step:06d}.jsonl.gz"
        lines = (json.dumps(_record(item), ensure_ascii=False) for item in rollouts)
        text = "".join(f"{line}\n" for line in lines)
        with disk.explained(path):
            path.write_bytes(gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0))
        return path

    def write_population(self, state: Any, name: str = "") -> None:
        """The population (of the environment `name`, where there are several) as it is now, for readers; the checkpoint
        holds its own copy."""
        text = json.dumps(plain(state), ensure_ascii=False, indent=1)
        path = self.population / f"{name or 'population'}.json"
        disk.write(path, text.encode("utf-8", "surrogatepass"))

    def write_text(self, name: str, text: str) -> Path:
        """A small file of the run (`best_prompt.txt`, `crash.txt`)."""
        disk.write(self.path / name, text.encode("utf-8", "backslashreplace"))
        return self.path / name

    def abandon(self) -> None:
        """Close; a directory in which nothing has happened yet goes, so that a failed start leaves nothing behind."""
        if self._fresh and self.saved_step is None and not any(self.log.sizes().values()):
            self.log.close()
            shutil.rmtree(self.path, ignore_errors=True)        # while it is ours: whoever comes next begins anew
        self.close()

    def close(self) -> None:
        """Close the logs and give the directory free."""
        if self._lock is None:
            return
        self.log.close()
        release(self.path, self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewind(self, sizes: Mapping[str, int], last_rollouts: str) -> None:
        self.log.truncate(sizes)
        for path in self.rollouts.glob("step-*"):
            if path.name > last_rollouts:
                path.unlink()

    def _tensorboard(self) -> TensorBoard:
        return TensorBoard(self.path / "tensorboard", None if self._restored is None else self._restored + 1)


def default_path(config: Config) -> Path:
    """runs/<env>-<UTC time>; a second run within the same second gets a number."""
    name = re.sub(r"[^\w.-]+", "-", config.env_ids.replace("espl/", "")).strip("-").lower()[:80]
    base = Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return next(p for n in range(1, 1000) if not (p := base.with_name(f"{base.name}-{n}") if n > 1 else base).exists())


def read_config(path: Path) -> Config:
    """The configuration of the run in `path`. Raises RunError where there is none."""
    if not path.is_dir():
        close = sorted(p.parent for p in path.parent.glob(f"*/{CONFIG}"))[-3:] if path.parent.is_dir() else []
        others = f" There are: {', '.join(map(str, close))}." if close else ""
        raise RunError(f"There is no run directory {path}.{others}")
    if not (path / CONFIG).exists():
        raise RunError(f"{path} is no run directory: it has no {CONFIG}.")
    try:
        text = (path / CONFIG).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise RunError(f"{path / CONFIG} cannot be read: {problem}.") from None
    return from_toml(text, str(path / CONFIG))


def saved(path: Path) -> int | None:
    """The step from which the run in `path` would go on; None where it would begin. Raises CheckpointError where it
    cannot: a run whose checkpoints are gone would lose all else."""
    step = checkpoint.newest(path / CHECKPOINTS)
    if step is None and (done := max((row["step"] for row in read_lines(path / METRICS, "step")), default=0)):
        raise checkpoint.CheckpointError(
            f"There is no checkpoint in {path / CHECKPOINTS}, but {METRICS} tells of {done} steps: put the checkpoints "
            "back, or start a new run with another --out."
        )
    return step


def continued(path: Path, stored: Config, overrides: Mapping[str, Any]) -> Config:
    """The configuration with which the run in `path` goes on. Raises RunError for an override that would change it, and
    CheckpointError where it cannot go on."""
    config = override(stored, overrides)
    free = [key for key in options() if any(fnmatchcase(key, pattern) for pattern in HARMLESS)]
    changed = differences(stored, config, free)
    if "out" in changed:
        raise RunError(f"A run continues in its own directory {path}: leave --out away.")
    if (done := saved(path) or 0) > config.steps:
        raise RunError(f"{done} steps are done already in {path}: --steps {config.steps} would have to undo some.")
    if config.steps != stored.steps and config.schedule in ("sequential", "weights_then_prompts"):
        when = f"after a share of {stored.steps} steps"
        raise RunError(f"The schedule {config.schedule} turns {when}: leave --steps away.")
    if changed:
        raise RunError(
            f"A run is continued with its own settings, so {_list_changes(changed)} cannot change now; only "
            f"{', '.join(HARMLESS)} can. Start a new run for other settings."
        )
    return config


def refuse_taken(path: Path, config: Config) -> None:
    """Raises RunError unless `path` is free for a new run: absent, or empty but for what a start that died leaves."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file: choose another --out.")
    if (path / CONFIG).exists():
        lock = acquire(path)                       # whoever is at work there is told of first
        try:
            _refuse_other(path, config)
        finally:
            release(path, lock)
    elif any(p.name != LOCK and not p.name.startswith(disk.WRITING) for p in path.iterdir()):
        raise RunError(f"{path} is not empty and is no run directory: choose another --out.")


def refuse_busy(path: Path) -> None:
    """Raises RunError where another process is at work in the run directory `path`."""
    release(path, acquire(path))


def _refuse_other(path: Path, config: Config) -> None:
    if not (path / CONFIG).exists():
        return
    changed = differences(read_config(path), config, ("out",))
    if changed:
        raise RunError(f"{path} belongs to a run with other settings ({_list_changes(changed)}): choose another --out.")
    raise RunError(
        f"{path} holds this very run already; continue it with: espl-train --resume {shlex.quote(str(path))}"
    )


def _list_changes(changed: Mapping[str, tuple[Any, Any]], most: int = 5) -> str:
    shown = [f"{key}: {there!r} there, {here!r} here" for key, (there, here) in list(changed.items())[:most]]
    return "; ".join(shown) + (f"; and {len(changed) - most} more" if len(changed) > most else "")


def _header(config: Config) -> str:
    return f"# The whole configuration of this run of espl-train on {config.env_ids}, defaults included.\n\n"


def _record(item: Any) -> Any:
    return plain(dataclasses.asdict(item) if dataclasses.is_dataclass(item) and not isinstance(item, type) else item)
