"""`espl-eval`: benchmark any agent on any environment; look at results, grade them anew, compare them.

0 done · 1 something unexpected (its traceback is in a file) · 2 something the user can put right, said in one sentence
· 3 no headline: too many faults, or stopped early · 130 Ctrl-C and 143 SIGTERM. What was played is kept in every case.
The answer is on stdout, everything else on stderr.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shlex
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import gymnasium.error

from espl_envs.core import background, commandline
from espl_envs.core.errors import EsplError, MissingExtra
from espl_envs.evaluate import addresses, doors, options, plan
from espl_envs.evaluate.agents import Agent, Door
from espl_envs.evaluate.config import EvalConfig
from espl_envs.evaluate.credentials import Secret
from espl_envs.evaluate.directory import CONFIG, RunDirectory, refuse_foreign
from espl_envs.evaluate.plain import visible
from espl_envs.evaluate.progress import Progress, printable
from espl_envs.evaluate.purse import Halted
from espl_envs.evaluate.runner import Limits, Runner

EARLY = 3


class _Ended(EsplError):
    """Something that the user can put right, found out while episodes were played."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without `argv`, end the process with it."""
    if argv is None:
        commandline.leave("espl-eval", _main(sys.argv[1:]))
    return _main(argv)


def _main(argv: Sequence[str]) -> int:
    words, secret = list(argv), Secret()
    try:
        if words and not words[0].startswith("-"):
            return _command(words[0])(words[1:])
        chosen = options.parser().parse_args(words)
        secret = Secret.from_variable(chosen.api_key_env)
        with commandline.signals():
            return _evaluate(chosen, words)
    except (EsplError, gymnasium.error.Error) as problem:
        return _complain(secret.hidden(str(problem)), 2)
    except KeyboardInterrupt as stop:
        return _stopped(stop, "before anything was played")
    except BrokenPipeError:
        sys.stderr.close()              # whoever read our output has seen enough
        return 1
    except Exception as error:
        return _crashed(error, secret)


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """Everything that is decided before an agent is asked."""

    door: Door
    arenas: tuple[plan.Arena, ...]
    config: EvalConfig
    limits: Limits
    out: Path               # absolute: an agent may change the working directory
    called: Path            # the same as the user says it
    resume: bool
    same_agent: bool
    quiet: bool
    again: str              # the command that goes on with it
    secret: Secret

    def native_tools(self) -> tuple[Any, ...]:
        """The tools that the agent's server will be offered, each once."""
        return tuple(dict.fromkeys(tool for arena in self.arenas if arena.native for tool in arena.tools))

    def early(self) -> RunDirectory | None:
        """The run directory, where it can be had, or refused, before the agent is started."""
        refuse_foreign(self.out)
        if not (self.out / CONFIG).exists():
            return None
        if self.resume:
            return RunDirectory.open(self.out, self.config, self.same_agent)
        return RunDirectory.create(self.out, self.config)

    def standing(self) -> str:
        """What is there, and how to go on."""
        if not (self.out / "config.json").exists():
            return "nothing was played"
        total, left = len(list(self.config.keys())), len(RunDirectory.read(self.out).missing())
        return f"{total - left:,} of {total:,} episodes are kept in {self.called}; go on with\n  {self.again}"


def _prepare(chosen: Namespace, words: Sequence[str]) -> _Evaluation:
    if not chosen.env:
        raise EsplError("name what is played: --env ID (python -m espl_envs list shows all ids)")
    if chosen.out is None:
        raise EsplError("name the run directory: --out DIR")
    if chosen.same_agent and not chosen.resume:
        raise EsplError("--same-agent is for --resume: it goes on with a run that was begun with other files")
    out = chosen.out.absolute()
    if chosen.base_url is not None and (note := addresses.note(chosen.base_url)):
        _note(note)
    door = doors.choose(options.wanted(chosen))
    syntax = chosen.tool_syntax or door.tool_syntax
    given = options.env_arguments(chosen.env_args, chosen.env)
    arenas = tuple(plan.arena(env_id, given[env_id], chosen.split, chosen.limit, syntax) for env_id in chosen.env)
    config = EvalConfig(
        envs=tuple(arena.config for arena in arenas),
        agent=door.config,
        k=chosen.samples,
        limit=chosen.limit,
        system_prompts=options.prompts(chosen.system_prompt) or door.system_prompts,
        seed=chosen.seed or 0,
        prices=chosen.price,
        suite=version("espl"),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    at_once = plan.concurrency(arenas, chosen.concurrency or door.concurrency)
    again = shlex.join(["espl-eval", *words, *([] if chosen.resume else ["--resume"])])
    limits = Limits(at_once, max_cost=chosen.max_cost)
    secret = Secret.from_variable(chosen.api_key_env)
    if secret.held(config.to_json()):
        raise EsplError(f"the key in {secret.name} stands among the options, too, and would be written to {CONFIG}: "
                        "leave it out, the environment variable is enough")
    return _Evaluation(door, arenas, config, limits, out, chosen.out, chosen.resume, chosen.same_agent, chosen.quiet,
                       again, secret)  # fmt: skip


def _evaluate(chosen: Namespace, words: Sequence[str]) -> int:
    _packages()
    answer = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):        # what an agent prints, whenever, is no part of the answer
            prepared = _prepare(chosen, words)
            early = _played(prepared)
            refused = _results(prepared.out, chosen.allow_faults, chosen.json, chosen.out, answer)
    except _Ended as problem:
        return _complain(f"{problem}\n{prepared.standing()}", 2)
    except KeyboardInterrupt as stop:
        return _stopped(stop, prepared.standing())
    if early:
        return _complain(f"stopped early: {early}\n{prepared.standing()}", EARLY)
    return _complain(f"no headline: {refused}", EARLY) if refused else 0


def _played(prepared: _Evaluation) -> str:
    """Play what is missing; why that ended early, if it did."""
    try:
        background.run_through(_session(prepared))
    except Halted as halted:
        return str(halted)
    return ""


def _packages() -> None:
    """What the report needs is missed now, not after the last episode. Raises MissingExtra."""
    try:
        import jinja2  # noqa: F401
        import rich  # noqa: F401
    except ImportError:
        raise MissingExtra("eval", "espl-eval") from None


async def _session(prepared: _Evaluation) -> None:
    """Open the door, play what is missing, close it. Raises what ends it early."""
    with contextlib.ExitStack() as stack:
        directory = prepared.early()
        if directory is not None:
            stack.enter_context(directory)
            if not directory.missing():
                return
        await plan.probe(prepared.arenas)
        async with prepared.door.open(prepared.native_tools()) as agent:
            if directory is None:
                directory = stack.enter_context(RunDirectory.create(prepared.out, prepared.config))
            await _play(prepared, directory, agent)


async def _play(prepared: _Evaluation, directory: RunDirectory, agent: Agent) -> None:
    there = (episode for episode in directory.episodes(transcripts=False) if episode.score is not None)
    total = len(list(directory.config.keys()))
    title = f"{prepared.config.agent.name} · {', '.join(env.id for env in prepared.config.envs)} · {prepared.called}"
    with Progress(total, there, title, quiet=prepared.quiet) as progress:
        progress.standing = agent.standing
        if directory.torn:
            progress.warn(f"the last record was cut off ({directory.torn} bytes); its episode is played again")
        try:
            await Runner(directory, prepared.arenas, agent, prepared.limits, progress, prepared.secret).run()
        except Halted:
            raise
        except EsplError as problem:
            raise _Ended(str(problem)) from problem


def _results(
    run: Path, allow_faults: bool, as_json: bool, called: Path | None = None, to: TextIO | None = None
) -> str | None:
    """summary.json and report.html, and the table on stdout (or `to`); why there is no headline, if there is none.
    `called`: the run as the user says it."""
    from espl_envs.evaluate.report import write_report
    from espl_envs.evaluate.summary import summarise

    summary = summarise(run, allow_faults=allow_faults)
    page = write_report(run, allow_faults=allow_faults)
    _show(summary, as_json, to)
    if not as_json:
        print(f"report: {printable(str((called or run) / page.name))}", file=to)
    return summary.refused


def _show(result: Any, as_json: bool, to: TextIO | None = None) -> None:
    """A result on stdout (or `to`): JSON, or a table as wide as it needs to be where nobody looks."""
    from rich.console import Console

    if as_json:
        print(json.dumps(result.to_json(), indent=1, ensure_ascii=False), file=to)
        return
    console = Console(file=to, highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(result)


def _report(words: list[str]) -> int:
    parser = options.Parser(prog="espl-eval report", description="Summarise a run again and write its report.html.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--allow-faults", action="store_true", help="a headline also with more than 1 %% of faults")
    parser.add_argument("--json", action="store_true", help="summary.json on stdout")
    chosen = parser.parse_args(words)
    refused = _results(chosen.run, chosen.allow_faults, chosen.json)
    return _complain(f"no headline: {refused}", EARLY) if refused else 0


def _regrade(words: list[str]) -> int:
    from espl_envs.evaluate.regrade import regrade

    parser = options.Parser(prog="espl-eval regrade", description="Grade the transcripts of a run anew, offline.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    chosen = parser.parse_args(words)
    _show(regrade(chosen.run), chosen.json)
    return 0


def _compare(words: list[str]) -> int:
    from espl_envs.evaluate.compare import compare

    parser = options.Parser(prog="espl-eval compare", description="Compare runs on the same tasks, in pairs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories: every two are a pair")
    parser.add_argument("--intersect", action="store_true", help="compare what they share where they differ")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    chosen = parser.parse_args(words)
    _show(compare(chosen.runs, intersect=chosen.intersect), chosen.json)
    return 0


def _leaderboard(words: list[str]) -> int:
    from espl_envs.evaluate.leaderboard import leaderboard

    parser = options.Parser(prog="espl-eval leaderboard", description="Rank all runs below a folder.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder with run directories somewhere below it")
    parser.add_argument("--allow-faults", action="store_true", help="also runs with more than 1 %% of faults")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    chosen = parser.parse_args(words)
    _show(leaderboard(chosen.folder, allow_faults=chosen.allow_faults), chosen.json)
    return 0


def _serve(words: list[str]) -> int:
    from espl_envs.interop.openenv import main as serve

    return serve(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "report": _report, "regrade": _regrade, "compare": _compare, "leaderboard": _leaderboard, "serve": _serve,
}  # fmt: skip


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}; options start with --"
        raise EsplError(f"there is no command {name!r}; {hint}")
    return COMMANDS[name]


def _complain(text: str, code: int) -> int:
    return commandline.complain("espl-eval", visible(text), code)


def _note(text: str) -> None:
    print(f"espl-eval: note: {visible(text)}", file=sys.stderr)


def _stopped(stop: KeyboardInterrupt, standing: str) -> int:
    return commandline.stopped("espl-eval", stop, standing)


def _crashed(error: Exception, secret: Secret) -> int:
    """The traceback into a file, one sentence to the terminal, neither with the key."""
    file = Path(tempfile.gettempdir()) / f"espl-eval-crash-{os.getpid()}.txt"
    try:
        file.write_text(secret.hidden("".join(traceback.format_exception(error))), "utf-8", "backslashreplace")
        where = f"the traceback is in {file}"
    except OSError as problem:
        where = f"the traceback could not be written ({problem})"
    said = secret.hidden((str(error).strip().splitlines() or [""])[0])
    return _complain(f"something unexpected happened: {type(error).__name__}{': ' if said else ''}{said}; {where}", 1)


if __name__ == "__main__":
    sys.exit(main())
