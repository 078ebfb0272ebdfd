"""One call from its start to its result: a source for the session, a program, or a file operation.

A job is started, told about time (`stop`, then `kill`), asked whether it is `over`, and finished. The three kinds
differ in what runs and in what ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from typing import Any

from .box import Box
from .files import perform
from .interpreter import Interpreter
from .output import LIMIT, Capture, Pipe
from .talk import FINE, NO_MEMORY

GRACE = 0.25               # seconds between asking and killing
ROUSE = 0.01               # seconds after which a session that has not taken its source may be a stopped one
_ANSWER_LIMIT = (1 << 20) - 4096
_SIGNALLED = 128           # a program that a signal ended: its exit code as shells have it

Result = tuple[dict[str, Any], bytes]


class Job:
    """What all calls have in common."""

    def __init__(self, box: Box, seq: int, header: dict[str, Any]) -> None:
        self.box, self.seq = box, seq
        self.started = time.monotonic()
        self.due = self.started + float(header["timeout"])      # when to call `late`
        self.ending: str | None = None         # why it was stopped, once it was
        self.out, self.err = Capture(), Capture()
        self.pipes: tuple[Pipe, ...] = ()      # opened for this call alone
        self.pid = 0
        self._orphans_cpu = box.tree.orphans_cpu

    def stop(self, why: str) -> None:
        """Ask it to end, and set the time at which it will be killed."""
        self.ending = why
        self.due = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGINT)
            os.killpg(self.pid, signal.SIGCONT)

    def late(self) -> None:
        """Its time has come."""
        if self.ending is None:
            self.stop("timeout")
        else:
            self.kill()

    def kill(self) -> None:
        """End everybody who belongs to the call."""
        self.box.tree.sweep(self.box.session_pid())

    def over(self) -> bool:
        """Whether there is a result."""
        return self.pid in self.box.tree.exits

    def flooding(self) -> bool:
        """Whether it writes more than anybody will read."""
        return self.ending is None and self.out.total + self.err.total > LIMIT

    def finish(self) -> Result:
        """Header and body of the result, once the job is over. Nobody whom the call started is left afterwards, but
        for children of the session."""
        raise NotImplementedError

    def _report(self, status: str, code: int | None, cpu: float, peak_kib: int, value: bytes | None) -> Result:
        if status != "ok" and self.box.cgroup.killed():
            status = "out_of_memory"
            self.box.release_memory()
        out, err = self.out.content(), self.err.content()
        header = {
            "status": self.ending or status, "exit_code": code if self.ending is None else None,
            "out": len(out), "err": len(err), "value": value is not None,
            "truncated": self.out.truncated or self.err.truncated, "bytes_out": self.out.total + self.err.total,
            # whole numbers: the digits of fractions take longer to make than all the rest of a header
            "wall_us": int((time.monotonic() - self.started) * 1e6),
            "cpu_us": int(max(0.0, cpu + self.box.tree.orphans_cpu - self._orphans_cpu) * 1e6), "peak_kib": peak_kib,
        }
        return header, out + err + (value or b"")


class PythonJob(Job):
    """A source in the session. When it has to be killed, the session goes with it."""

    def __init__(self, box: Box, seq: int, header: dict[str, Any], session: Interpreter, source: bytes) -> None:
        super().__init__(box, seq, header)
        self._source = source
        self._sessions = 0
        self._limit = self.due
        self.give(session)

    def give(self, session: Interpreter) -> None:
        """Have `session` run it."""
        self._session, self._fresh = session, session.fresh
        self._sessions += 1
        self.pid = session.pid
        self._cpu = session.cpu()
        session.submit(self._source, self.out, self.err)
        self._roused, self.due = False, min(self.started + ROUSE, self._limit)

    def late(self) -> None:
        if self._roused or self.ending is not None:
            super().late()
            return
        self._roused, self.due = True, self._limit
        if self._session.unheard():                   # somebody stopped it between calls
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    def unheard(self) -> bool:
        """Whether the session ended, as it had long been going to, before it took notice of this call."""
        dead_before = self._session.reply is None and self._session.unheard()
        return dead_before and self.ending is None and self._sessions == 1

    def kill(self) -> None:
        self.box.tree.sweep()

    def over(self) -> bool:
        return self._session.reply is not None or self.pid in self.box.tree.exits

    def finish(self) -> Result:
        session, tree = self._session, self.box.tree
        reply, gone = session.reply, tree.exits.get(self.pid)
        if gone is not None:
            tree.sweep()
        elif self.ending is not None:
            tree.sweep(self.pid, spare_children=False)
        elif tree.strays(self.pid):
            tree.sweep(self.pid)
        session.end_call()
        if reply is not None:
            status = "ok" if reply.outcome == FINE else "out_of_memory" if reply.outcome == NO_MEMORY else "nonzero"
            result = self._report(status, None, session.cpu() - self._cpu, reply.peak_kib, reply.value)
        else:
            assert gone is not None, "the job is not over"
            used = gone.usage.ru_utime + gone.usage.ru_stime - self._cpu
            result = self._report("died", None, used, gone.usage.ru_maxrss, None)
        result[0]["fresh"] = self._fresh
        return result


class ProgramJob(Job):
    """A program or a shell command. What it leaves running ends with it; the session stays."""

    def __init__(
        self, box: Box, seq: int, header: dict[str, Any], argv: list[str], stdin: int, *,
        cwd: str | None = None, env: dict[str, str] | None = None,
    ) -> None:
        super().__init__(box, seq, header)
        self.pipes = (Pipe(), Pipe())
        self.pipes[0].capture, self.pipes[1].capture = self.out, self.err
        self.pid = box.start(argv, stdin, self.pipes[0].writer, self.pipes[1].writer, cwd=cwd, env=env)
        for pipe in self.pipes:
            pipe.close_writer()

    def finish(self) -> Result:
        tree, session = self.box.tree, self.box.session_pid()
        if tree.strays(session):
            tree.sweep(session)
        for pipe in self.pipes:
            pipe.drain()
            pipe.close()
        gone = tree.exits[self.pid]
        tree.forget(self.pid)
        code = os.waitstatus_to_exitcode(gone.status)
        status = "ok" if code == 0 else "nonzero" if code > 0 else "died"
        used = gone.usage.ru_utime + gone.usage.ru_stime
        return self._report(status, code if code >= 0 else _SIGNALLED - code, used, gone.usage.ru_maxrss, None)


class FileJob(Job):
    """A file operation in a fork of the supervisor."""

    def __init__(self, box: Box, seq: int, header: dict[str, Any], body: bytes) -> None:
        super().__init__(box, seq, header)
        answer = Pipe()
        self.pipes = (answer,)
        self._answer = answer.capture = Capture(keep=_ANSWER_LIMIT)
        self.pid = box.fork()
        if self.pid == 0:
            _operate(box, header, body, answer.writer)
        answer.close_writer()

    def stop(self, why: str) -> None:
        self.ending = why
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> Result:
        self.pipes[0].drain()
        self.pipes[0].close()
        status = self.box.tree.exits[self.pid].status
        self.box.tree.forget(self.pid)
        if self.ending is not None or status != 0 or self._answer.total > _ANSWER_LIMIT:
            why = {"timeout": "it took too long", "cancelled": "cancelled"}.get(self.ending or "", "its process died")
            return {"error": f"the file operation did not end well: {why}", "reason": "other"}, b""
        size, _, rest = self._answer.content().partition(b"\n")
        return json.loads(rest[:int(size)]), rest[int(size):]


def _operate(box: Box, header: dict[str, Any], body: bytes, writer: int) -> None:
    """What the fork does; never returns."""
    try:
        answer, content = perform(box.roots, header, body)
        text = json.dumps(answer).encode()
        data = memoryview(b"%d\n%b%b" % (len(text), text, content))
        while data:
            data = data[os.write(writer, data):]
        os._exit(0)
    finally:
        os._exit(1)
