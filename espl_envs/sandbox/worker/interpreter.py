"""The supervisor's side of the Python session: starts it, sends it source, reads its replies.

What comes back is hostile: user code can write to the same descriptor. A reply is taken only for the call in flight
and within its size; anything else ends the session.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import termios
import time
from typing import NamedTuple

from .launch import Launcher
from .output import Capture, Pipe
from .talk import FINE, NO_MEMORY, REPLY, REQUEST, VALUE_LIMIT


class Reply(NamedTuple):
    """What the session says of the call in flight."""

    outcome: int
    peak_kib: int
    value: bytes | None


class Interpreter:
    """One session, from its start to its end. `broken` once it cannot be believed any more."""

    def __init__(self, launcher: Launcher) -> None:
        theirs_in, self._requests = os.pipe2(os.O_CLOEXEC)
        self.fd, theirs_out = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._requests, False)
        os.set_blocking(self.fd, False)
        self.out, self.err = Pipe(), Pipe()
        here = os.path.dirname(os.path.abspath(__file__))
        argv = [sys.executable, "-I", "-B", "-X", "utf8", here, "session", str(theirs_in), str(theirs_out)]
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.pid = launcher.start(argv, null, self.out.writer, self.err.writer, passing=(theirs_in, theirs_out))
        for fd in (null, theirs_in, theirs_out):
            os.close(fd)
        self.out.close_writer()
        self.err.close_writer()
        self._written = select.poll()
        for pipe in (self.out, self.err):
            self._written.register(pipe.fd, select.POLLIN)
        self.descriptors = (self.fd, self._requests, self.out.fd, self.err.fd)
        self.fresh = True
        self.broken = False
        self.reply: Reply | None = None
        self._number = 0
        self._busy, self._source_size = False, 0
        self._inbox, self._outbox = bytearray(), memoryview(b"")

    def submit(self, source: bytes, out: Capture, err: Capture) -> None:
        """Begin a call."""
        self._number += 1
        self._busy, self.fresh, self.reply = True, False, None
        self.out.capture, self.err.capture = out, err
        self._source_size = len(source)
        self._outbox = memoryview(REQUEST.pack(self._number, len(source)) + source)
        self.send()

    @property
    def sending(self) -> int | None:
        """The descriptor that waits to take more of the source, if there is more."""
        return self._requests if self._outbox and not self.broken else None

    def send(self) -> None:
        """Pass on what the session takes of the source."""
        try:
            self._outbox = self._outbox[os.write(self._requests, self._outbox):]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.broken = True

    def receive(self) -> None:
        """One read; sets `reply` when it is whole, `broken` when it cannot be one."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return
        self._inbox += data
        if not data or not self._busy:
            self.broken = True
        elif len(self._inbox) >= REPLY.size:
            number, outcome, peak, size = REPLY.unpack_from(self._inbox)
            length = REPLY.size + max(size, 0)
            sane = number == self._number and FINE <= outcome <= NO_MEMORY and -1 <= size <= VALUE_LIMIT
            if not sane or len(self._inbox) > length:
                self.broken = True
            elif len(self._inbox) == length:
                self.reply = Reply(outcome, peak, None if size < 0 else bytes(self._inbox[REPLY.size:]))
                self._inbox.clear()
                self._busy = False

    def unheard(self) -> bool:
        """Whether the session has read no source of the call in flight: then none of it was run."""
        unread = struct.unpack("i", fcntl.ioctl(self._requests, termios.FIONREAD, bytes(4)))[0]
        return len(self._outbox) + unread >= self._source_size

    def end_call(self) -> None:
        """What the session writes from here on belongs to no call."""
        for fd, _ in self._written.poll(0):        # one question instead of two reads that mostly find nothing
            (self.out if fd == self.out.fd else self.err).drain()
        self.out.capture = self.err.capture = None
        self.out.unclaimed = self.err.unclaimed = 0

    def cpu(self) -> float:
        """Seconds of processor time of the session, all threads; 0 when it is gone."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:
            return 0.0

    def close(self) -> None:
        os.close(self._requests)
        os.close(self.fd)
        self.out.close()
        self.err.close()
