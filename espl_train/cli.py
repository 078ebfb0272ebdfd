"""`espl-train`: from arguments to an exit code. What training is stands in loop.py.

0 done · 1 something unexpected (its traceback is in crash.txt) · 2 something the user can put right, said in one
sentence · 130 Ctrl-C and 143 SIGTERM, with where the run stands and the command that continues it · 141 nobody reads
what is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from espl_envs.core import commandline
from espl_envs.core.errors import EsplError, MissingExtra
from espl_train.learner.ranks import ALONE, Place, RankLost

if TYPE_CHECKING:
    from espl_train.learner.ranks import Ranks
    from espl_train.preflight import Plan
    from espl_train.profiling import Profile
    from espl_train.runs.directory import RunDirectory
    from espl_train.settings import Request

EXTRA = frozenset(
    (
        *("torch", "transformers", "peft", "safetensors", "trueskill", "pydantic", "pydantic_core", "jinja2"),
        *("rich", "tomli_w", "math_verify", "datasets", "huggingface_hub", "aiohttp"),
    )
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nothing but the answer to `--help` and a dry run is on stdout."""
    words = list(sys.argv[1:] if argv is None else argv)
    commandline.spell_out()
    try:
        with _explained_imports(), _ranks() as ranks:
            code = _command(words, ranks)
            sys.stdout.flush()
            return code
    except EsplError as error:
        return _complain(str(error), 2)
    except RankLost as lost:
        return _complain(f"{lost}.", 1)
    except KeyboardInterrupt as stop:
        return _stopped(stop, "before anything was written")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and commandline.unread():
            return commandline.UNREAD
        return _crashed(error, Path(tempfile.gettempdir()) / f"espl-crash-{os.getpid()}.txt")


@contextlib.contextmanager
def _ranks() -> Iterator[Ranks]:
    """The processes of this run. Under torchrun, only rank 0 comes back from here: the others follow it to its end."""
    place = Place.take(os.environ)
    if place is None:
        yield ALONE
        return
    from espl_train.learner.distributed import Team, serve

    if place.rank:
        serve(place)
    with Team(place) as team:
        yield team


def _command(words: list[str], ranks: Ranks) -> int:
    from espl_train import settings
    from espl_train.settings.subcommands import COMMANDS

    if words and words[0] in COMMANDS:
        with commandline.signals():
            return COMMANDS[words[0]](words[1:])
    request = settings.parse(words)
    if "help" in request.flags:
        print(settings.help_text(), end="")
        return 0
    if "version" in request.flags:
        print(f"espl {version('espl')}")
        return 0
    with commandline.signals():
        return _dry_run(request, ranks) if request.dry_run else _run(request, ranks)


def _dry_run(request: Request, ranks: Ranks) -> int:
    from espl_train.preflight import inspect
    from espl_train.runs.directory import continued, read_config
    from espl_train.settings import load, to_toml

    if request.resume:
        config = continued(request.resume, read_config(request.resume), request.overrides)
    else:
        config = load(request.presets, request.config, request.overrides)
    plan = inspect(config, request.resume, True).plus(ranks.check(config))
    print(to_toml(config))
    print(plan)
    return 0


def _run(request: Request, ranks: Ranks) -> int:
    from espl_train.preflight import inspect, settled
    from espl_train.runs.directory import RunDirectory, continued, read_config
    from espl_train.settings import load

    if request.resume:
        stored = read_config(request.resume)
        plan = inspect(continued(request.resume, stored, request.overrides), request.resume)    # nothing is written yet
        with RunDirectory.open(request.resume, request.overrides) as run:
            return _guarded(run, request, ranks, plan)
    config = load(request.presets, request.config, request.overrides)
    plan = inspect(config)
    ranks.check(config)
    with RunDirectory.create(settled(config)) as run:
        return _guarded(run, request, ranks, plan)


def _guarded(run: RunDirectory, request: Request, ranks: Ranks, plan: Plan) -> int:
    """Train; whatever ends it early is told together with how to go on."""
    from espl_train.runs.checkpoint import CheckpointError

    try:
        with _explained_imports():
            _train(run, request, ranks, plan)
    except CheckpointError as error:
        run.abandon()
        return _complain(str(error), 2)
    except EsplError as error:
        return _complain(f"{error}{_left(run)}", 2)
    except KeyboardInterrupt as stop:
        cause = ranks.cause(stop)
        return _bereft(cause, run) if isinstance(cause, RankLost) else _stopped(cause, run.standing())
    except Exception as error:
        if isinstance(error, BrokenPipeError) and commandline.unread():
            return _complain(f"stopped; nobody reads what it prints{_left(run)}", commandline.UNREAD)
        return _crashed(error, run.path / "crash.txt", run.standing())
    return 0


def _left(run: RunDirectory) -> str:
    """Give the directory up; where it still is there, a sentence on how the run goes on."""
    standing = run.standing()
    run.abandon()
    return f"\n{_capital(standing)}." if run.path.exists() else ""


def _train(run: RunDirectory, request: Request, ranks: Ranks, plan: Plan) -> None:
    from espl_train.runs.console import Console

    title = f"{run.config.env_ids} · {run.config.model.path} · seed {run.config.seed} · {run.path}"
    with Console(run.config.steps, title, request.quiet) as console, contextlib.ExitStack() as open_:
        run.warn = console.warn
        console.phase("loading the model")
        from espl_train.training import complete

        for name, text in ranks.check(run.config):
            console.note(f"{name}: {text}")
        profile = None
        if request.profile is not None:
            profile = open_.enter_context(_profile(run, request.profile))
        complete(run, console, ranks, profile, plan)
        if profile is not None:
            console.show(profile.table())


def _profile(run: RunDirectory, steps: Sequence[int]) -> Profile:
    from espl_train.learner.loading import pick_device
    from espl_train.profiling import Profile

    return Profile(run.path / "profile", steps, device=pick_device(run.config.model.device).type)


@contextlib.contextmanager
def _explained_imports() -> Iterator[None]:
    """A package of the extra `train` that is not there becomes the sentence that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in EXTRA:
            raise MissingExtra("train", f"espl-train (here: {error.name})") from error
        raise


def _complain(text: str, code: int) -> int:
    return commandline.complain("espl-train", text, code)


def _stopped(stop: KeyboardInterrupt, standing: str) -> int:
    return commandline.stopped("espl-train", stop, standing)


def _bereft(lost: RankLost, run: RunDirectory) -> int:
    """Another rank is gone: what it said of itself into a file, one sentence to the terminal."""
    where = f"; its traceback is in {run.write_text('crash.txt', lost.details)}" if lost.details else ""
    return _complain(f"{lost}{where}{_left(run)}", 1)


def _crashed(error: Exception, file: Path, standing: str = "") -> int:
    """The traceback into a file, one sentence to the terminal."""
    try:
        file.write_text("".join(traceback.format_exception(error)), "utf-8", "backslashreplace")
        where = f"the traceback is in {file}"
    except OSError as problem:
        where = f"the traceback could not be written ({problem})"
    said = (str(error).strip().splitlines() or [""])[0]
    text = f"something unexpected happened: {type(error).__name__}{': ' if said else ''}{said}; {where}"
    return _complain(f"{text}\n{_capital(standing)}." if standing else f"{text}.", 1)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    sys.exit(main())
