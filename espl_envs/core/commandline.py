"""What every command does alike: one sentence when something is wrong, one stop that lets the clean-up finish, and an
end that nobody can put off."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from espl_envs.core.errors import EsplError

THREADS_S = 5.0         # for threads that would keep a process alive that has nothing left to do
HOOKS_S = 30.0          # for exit hooks: ours remove sandboxes
UNREAD = 141            # the exit code where nobody reads the output any more, as shells count: 128 and SIGPIPE


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the nearest option or command; no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings}
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is unknown and let through, so a command complains of its words itself, and knows its own options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = _nearest(unknown[0].partition("=")[0], known) or f"; {self.prog} --help lists all options"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raises EsplError."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        raise EsplError(message + (_nearest(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""))


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


class Terminated(KeyboardInterrupt):
    """SIGTERM. A KeyboardInterrupt, because that is what asyncio lets through at once."""


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt and SIGTERM Terminated, once: what follows must not cut the clean-up short.

    In other threads than the main one signals stay as they are.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def complain(program: str, text: str, code: int) -> int:
    """Say on stderr what is wrong; returns `code`, to exit with."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}{program}: {text}{plain}", file=sys.stderr)
    return code


def stopped(program: str, stop: KeyboardInterrupt, standing: str) -> int:
    """Say on stderr that a signal ended the work, and how it stands; returns the code to exit with."""
    print(f"\n{program}: stopped{' by SIGTERM' if isinstance(stop, Terminated) else ''}; {standing}", file=sys.stderr)
    return exit_code(stop)


def exit_code(stop: KeyboardInterrupt) -> int:
    """As shells count: 128 and the signal's number."""
    return 143 if isinstance(stop, Terminated) else 130


def spell_out() -> None:
    """Let standard output take every text: what its encoding does not have is written as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more. What is printed from then on goes nowhere, so that
    the interpreter does not try again at its end."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):               # it is closed, or no file at all
        return False
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def leave(program: str, code: int) -> NoReturn:
    """End the process with `code`, as `sys.exit` does; but threads that are no daemons, and exit hooks, which may be a
    user's own code, are waited for only so long. What is printed on standard output from here on is no result."""
    try:
        sys.stdout.flush()
    except OSError:                             # whoever read it is gone; the interpreter must not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.stdout, hooks_run = sys.stderr, threading.Event()
    atexit.register(hooks_run.set)              # the last one that is registered is the first one that runs
    threading.Thread(target=_insist, args=(program, code, hooks_run), name="espl-leave", daemon=True).start()
    sys.exit(code)


def _insist(program: str, code: int, hooks_run: threading.Event) -> None:
    """End the process if it does not end by itself. The interpreter joins threads first, and runs exit hooks then: they
    run in any case."""
    if hooks_run.wait(THREADS_S):
        time.sleep(HOOKS_S)
    else:
        complain(program, "done; threads that were left behind did not end, and nobody waits for them", code)
        hooks = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
        hooks.start()
        hooks.join(HOOKS_S)
    os._exit(code)
