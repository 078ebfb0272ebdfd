"""What every command does alike: one sentence when something is wrong, and one stop that lets the clean-up finish."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


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
