"""The Python session: a process of its own that runs what it is sent and keeps its variables.

It shares its process with user code, which may do anything to it. So it holds on to the functions it needs, and the
supervisor believes nothing that it says except about the call in flight.
"""

from __future__ import annotations

import _signal
import builtins
import fcntl
import io
import linecache
import os
import resource
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from .talk import FINE, NO_MEMORY, RAISED, REPLY, REQUEST, VALUE_KEEP

_SOURCES_KEPT = 500
_HIGH = 200                             # out of the way of code that closes low descriptors by habit


def main(requests: int, replies: int) -> None:
    """Serve until the supervisor closes the other ends."""
    high = []
    for fd in (requests, replies):
        high.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH))
        os.close(fd)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = io.TextIOWrapper(
            io.FileIO(fd, "w", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [""]
    sys.path[:1] = [""]                  # as in an interactive interpreter; it was the supervisor's directory
    _serve(high[0], high[1], _runner())


def _runner() -> Callable[[int, bytes], tuple[int, str | None]]:
    """What runs one source. All it uses is bound here, before any user code can replace it."""
    module = types.ModuleType("__main__")
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    sys.modules["__main__"] = module
    for name in [name for name in sys.modules if name.startswith("espl_worker")]:
        del sys.modules[name]

    def run(number: int, data: bytes, compile: Any = compile, exec: Any = exec, eval: Any = eval) -> str | None:
        source = data.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
        name = f"<call {number}>"
        _remember(name, number, source)
        tree = compile(source, name, "exec", _ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and type(tree.body[-1]) is _EXPR else None
        if tree.body:
            exec(compile(tree, name, "exec", dont_inherit=True), namespace)
        if last is None:
            return None
        value = eval(compile(_EXPRESSION(last.value), name, "eval", dont_inherit=True), namespace)
        return None if value is None else _shortened(repr(value))

    def guarded(number: int, data: bytes) -> tuple[int, str | None]:
        try:
            return FINE, run(number, data)
        except SystemExit as error:
            return _left(error), None
        except BaseException as error:
            _show(error)
            return NO_MEMORY if isinstance(error, MemoryError) else RAISED, None

    return guarded


_ONLY_AST = 0x400
_EXPR = type(compile("0", "", "exec", _ONLY_AST).body[0])
_EXPRESSION = type(compile("0", "", "eval", _ONLY_AST))


def _serve(
    requests: int, replies: int, run: Callable[[int, bytes], tuple[int, str | None]], *,
    read: Any = os.read, write: Any = os.write, getpid: Any = os.getpid, leave: Any = os._exit,
    on: Any = _signal.signal, number_of: Any = _signal.SIGINT, ignore: Any = _signal.SIG_IGN,
    interrupt: Any = _signal.default_int_handler, usage: Any = resource.getrusage, whom: Any = resource.RUSAGE_SELF,
) -> None:
    me, own = getpid(), (sys.stdout, sys.stderr)

    def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = read(requests, count - len(data))
            if not piece:
                leave(0)
            data += piece
        return bytes(data)

    def calm() -> None:
        while True:
            try:
                on(number_of, ignore)
                return
            except KeyboardInterrupt:
                continue

    calm()
    try:
        while True:
            # Two reads: what is killed while it waits may still take what its read asked for, but no more than that.
            number, size = REQUEST.unpack(exactly(REQUEST.size))
            source = exactly(size)
            outcome, value = RAISED, None
            try:
                on(number_of, interrupt)
                try:
                    outcome, value = run(number, source)
                finally:
                    _flush(own)
            except KeyboardInterrupt:
                pass
            calm()
            if getpid() != me:                # user code forked, and this is the child coming back
                leave(0)
            data = b"" if value is None else value.encode("utf-8", "backslashreplace")
            reply = REPLY.pack(number, outcome, usage(whom).ru_maxrss, -1 if value is None else len(data)) + data
            while reply:
                reply = reply[write(replies, reply):]
    finally:
        leave(1)


def _flush(own: tuple[Any, Any]) -> None:
    for stream in (sys.stdout, sys.stderr, *own):
        try:
            stream.flush()
        except Exception:
            continue              # replaced or closed by user code: its own loss


def _remember(name: str, number: int, source: str, cache: Any = linecache.cache) -> None:
    """Let tracebacks and `inspect` find the source."""
    cache[name] = (len(source), None, source.splitlines(True), name)
    cache.pop(f"<call {number - _SOURCES_KEPT}>", None)


def _shortened(text: str) -> str:
    if len(text) <= 2 * VALUE_KEEP:
        return text
    return f"{text[:VALUE_KEEP]}\n[... {len(text) - 2 * VALUE_KEEP} characters left out ...]\n{text[-VALUE_KEEP:]}"


def _left(error: SystemExit) -> int:
    """What `sys.exit` means where the session goes on."""
    if error.code is None or error.code == 0:
        return FINE
    _say(f"SystemExit: {error.code}\n")
    return RAISED


def _show(error: BaseException, here: str = __file__, explain: Any = traceback.TracebackException) -> None:
    """The traceback of user code, without the frames that are ours."""
    step = error.__traceback__
    while step is not None and step.tb_frame.f_code.co_filename == here:
        step = step.tb_next
    try:
        text = "".join(explain(type(error), error, step, compact=True).format())
    except Exception:
        text = f"{type(error).__name__} (it cannot be shown)\n"
    _say(text)


def _say(text: str, write: Any = os.write) -> None:
    data = text.encode("utf-8", "backslashreplace")
    _flush((sys.stderr, sys.stderr))
    try:
        while data:
            data = data[write(2, data):]
    except OSError:
        return                    # user code closed it
