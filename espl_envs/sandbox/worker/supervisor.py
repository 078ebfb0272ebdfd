"""The loop of the first process in the box: takes calls from the host, one at a time, and sees to it that they end.

It ends the box when stdin ends, at any moment, when the box's lifetime is over, and when anything happens that it does
not understand.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from .box import Box
from .channel import Channel, move_high
from .frames import CALL, HELLO, INTERRUPT, READY, RESULT, VERSION, Frame, FrameError
from .interpreter import Interpreter
from .jobs import FileJob, Job, ProgramJob, PythonJob
from .launch import ignore_signals
from .output import LIMIT, Pipe
from .tree import Stuck

_PARTS_LIMIT = 64 << 20
_FILE_OPERATIONS = frozenset(("read", "write", "list", "stat"))


def main() -> None:
    """Serve on stdin and stdout; never returns."""
    ignore_signals()
    channel = Channel()
    hello = _hello(channel)
    if hello is None:
        os._exit(0)
    box = Box(hello["roots"], hello["spec"])
    try:
        channel.send(READY, {"version": VERSION, "facts": box.attest()})
        Supervisor(channel, box, float(hello["spec"]["lifetime_s"])).serve()
    except (FrameError, ConnectionError, Stuck) as error:
        os.write(2, f"espl supervisor: {error}\n".encode())
    except Exception as error:             # a fault of ours: the box ends, and its last words say why
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        try:
            if not box.tree.first:         # with PID 1 everybody ends, and without it nobody else
                box.tree.sweep()
        finally:
            os._exit(0)


def _hello(channel: Channel) -> dict[str, Any] | None:
    while True:
        frames = channel.receive()
        if frames is None:
            return None
        if frames:
            first, *more = frames
            if first.kind != HELLO or more or first.header.get("version") != VERSION:
                raise FrameError(f"expected a HELLO of version {VERSION}")
            return first.header


class Supervisor:
    """Serves one conversation."""

    def __init__(self, channel: Channel, box: Box, lifetime: float) -> None:
        self._channel, self._box = channel, box
        self._end = time.monotonic() + lifetime
        self._job: Job | None = None
        self._parts = -1                      # a memory file of what came in pieces
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._host_gone = self._regrouped = False
        wake_reader, wake_writer = (move_high(fd) for fd in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._add(wake_reader, lambda: self._somebody_ended(wake_reader))
        self._add(channel.source, self._control)

    def serve(self) -> None:
        """Until the host is gone or the lifetime is over."""
        self._renew_session()
        while not self._host_gone:
            now = time.monotonic()
            if now >= self._end:
                self._lifetime_over()
                return
            until = self._end if self._job is None else min(self._end, self._job.due)
            self._regrouped = False
            for fd, _ in self._poll.poll(math.ceil(max(0.0, until - now) * 1000)):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
                if self._regrouped:          # a number may stand for another file by now: ask again
                    break
            self._advance()

    def _add(self, fd: int, handler: Callable[[], None], events: int = select.POLLIN) -> None:
        self._regrouped = True
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def _remove(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _add_pipe(self, pipe: Pipe) -> None:
        fd = pipe.fd

        def pump() -> None:
            if not pipe.pump():         # readable without a byte: its end
                self._remove(fd)

        self._add(fd, pump)

    def _somebody_ended(self, fd: int) -> None:
        os.read(fd, 4096)
        self._box.tree.reap()

    def _control(self) -> None:
        frames = self._channel.receive()
        if frames is None:
            self._host_gone = True
            return
        for frame in frames:
            if frame.kind == CALL and self._job is None:
                self._begin(frame)
            elif frame.kind == INTERRUPT:
                job = self._job
                if job is not None and job.seq == frame.header.get("call") and job.ending is None:
                    job.stop("cancelled")
            else:
                raise FrameError("a call while another is in flight")

    def _begin(self, frame: Frame) -> None:
        op, header, body = frame.header.get("op"), frame.header, frame.body
        if op == "part":
            self._part(frame)
        elif op == "stats":
            self._answer(frame.seq, {"stats": self._box.stats()})
        elif op == "python":
            session = self._renew_session()
            self._launch(PythonJob(self._box, frame.seq, header, session, self._whole(header, body)))
            self._watch_sending()
        elif op == "shell":
            self._program(frame, {"argv": ["/bin/sh", "-c", os.fsdecode(self._whole(header, body))]}, _nothing())
        elif op == "exec":
            self._program(frame, *self._order(header, body))
        elif op in _FILE_OPERATIONS:
            self._launch(FileJob(self._box, frame.seq, header, body))
        elif op == "reset":
            self._unlisten()
            order = {**header, "op": "scrub", "also": self._box.scrub()}
            self._launch(FileJob(self._box, frame.seq, order, b""))
        else:
            raise FrameError(f"a call of unknown operation {op!r}")

    def _part(self, frame: Frame) -> None:
        if frame.header.get("first") or self._parts < 0:
            self._forget_parts()
            self._parts = os.memfd_create("parts", os.MFD_CLOEXEC)
        if os.fstat(self._parts).st_size + len(frame.body) > _PARTS_LIMIT:
            raise FrameError(f"a call of more than {_PARTS_LIMIT} bytes")
        os.write(self._parts, frame.body)
        self._answer(frame.seq, {})

    def _whole(self, header: dict[str, Any], body: bytes) -> bytes:
        """The body together with the parts that came before it."""
        if header.get("parted") and self._parts >= 0:
            body = os.pread(self._parts, _PARTS_LIMIT, 0) + body
        self._forget_parts()
        return body

    def _order(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], int]:
        """The order of an exec, which is the last `head` bytes of the content, and a descriptor of what stands before
        it: the program's stdin, a file in memory that needs nobody to feed it."""
        size = header["head"]
        if not header.get("parted"):
            self._forget_parts()
            if len(body) == size:
                return json.loads(body), _nothing()
        content, self._parts = self._parts, -1
        if content < 0:
            content = os.memfd_create("stdin", os.MFD_CLOEXEC)
        os.write(content, body)
        end = os.lseek(content, 0, os.SEEK_CUR) - size
        order = json.loads(os.pread(content, size, end))
        os.ftruncate(content, end)
        os.lseek(content, 0, os.SEEK_SET)
        return order, content

    def _forget_parts(self) -> None:
        if self._parts >= 0:
            os.close(self._parts)
            self._parts = -1

    def _program(self, frame: Frame, order: dict[str, Any], stdin: int) -> None:
        try:
            cwd, env = order.get("cwd"), order.get("env")
            self._launch(ProgramJob(self._box, frame.seq, frame.header, order["argv"], stdin, cwd=cwd, env=env))
        finally:
            os.close(stdin)

    def _launch(self, job: Job) -> None:
        self._job = job
        for pipe in job.pipes:
            self._add_pipe(pipe)

    def _renew_session(self) -> Interpreter:
        """The living session; a new one where there is none."""
        session = self._box.session
        if session is not None and self._box.session_pid() is not None:
            return session
        self._unlisten()
        session = self._box.new_session()
        self._add(session.fd, self._heard)
        self._add_pipe(session.out)
        self._add_pipe(session.err)
        return session

    def _unlisten(self) -> None:
        if self._box.session is not None:
            for fd in self._box.session.descriptors:
                self._remove(fd)

    def _watch_sending(self) -> None:
        session = self._box.session
        if session is not None and session.broken:
            self._kill_session()
        elif session is not None and session.sending is not None:
            self._add(session.sending, self._send_on, select.POLLOUT)

    def _send_on(self) -> None:
        session = self._box.session
        if session is not None:
            fd = session.sending
            session.send()
            if fd is not None and session.sending is None:
                self._remove(fd)

    def _heard(self) -> None:
        session = self._box.session
        if session is not None:
            session.receive()
            if session.broken:
                self._remove(session.fd)
                self._kill_session()

    def _kill_session(self) -> None:
        pid = self._box.session_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def _advance(self) -> None:
        """Whatever is due."""
        job, session = self._job, self._box.session
        if job is None:
            if session is not None and session.out.unclaimed + session.err.unclaimed > LIMIT:
                self._kill_session()                      # a thread of it that floods us between calls
            return
        if not job.over():
            if job.flooding():
                job.stop("output_limit")
            elif time.monotonic() >= job.due:
                job.late()
        if job.over():
            if isinstance(job, PythonJob) and job.unheard():
                job.give(self._renew_session())
                self._watch_sending()
            else:
                self._finish(job)

    def _finish(self, job: Job) -> None:
        for pipe in job.pipes:
            self._remove(pipe.fd)
        header, body = job.finish()
        self._job = None
        self._answer(job.seq, header, body)
        self._box.cgroup.killed()             # from here on it concerns the next call; asked while the host is at work
        self._renew_session()

    def _lifetime_over(self) -> None:
        """A call in flight ends with the box; what it was doing is lost, and that is said."""
        job = self._job
        if job is None or isinstance(job, FileJob):
            return
        job.ending = "died"
        self._box.tree.sweep()
        self._finish(job)
        self._channel.flush()

    def _answer(self, seq: int, header: dict[str, Any], body: bytes = b"") -> None:
        self._channel.send(RESULT, {"call": seq, **header}, body)
        if self._channel.waiting:
            self._add(self._channel.sink, self._flush, select.POLLOUT)

    def _flush(self) -> None:
        self._channel.flush()
        if not self._channel.waiting:
            self._remove(self._channel.sink)


def _nothing() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
