"""A program as an agent: its words, its life under a warden (`warden.py`), what it printed last."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from espl_envs.core.errors import EsplError
from espl_envs.evaluate import warden
from espl_envs.evaluate.agents import AgentFailed

WARDEN = Path(warden.__file__)
PRINTED = 64 << 10          # bytes kept of what a program prints
COMPLAINT = 4 << 10         # bytes kept of its standard error
_INTERPRETER = re.compile(r"(?:python|pypy|bash|sh|node|ruby|perl)[\d.]*")
_SCRIPT = re.compile(r"[^-{][^{]*")
DRAIN_S = 5.0               # for output that is still in the pipes when it has ended


@dataclass(eq=False)
class Program:
    """The command at work. `process` is its warden, which ends as it does; `lifeline` what ties the two to us."""

    process: asyncio.subprocess.Process
    lifeline: socket.socket
    printed: asyncio.Task[bytes]
    complaint: asyncio.Task[bytes]

    @classmethod
    async def start(cls, words: Sequence[str], folder: Path, env: Mapping[str, str]) -> Program:
        """In a session of its own. Raises AgentFailed where no process can be had."""
        printed, out = await _pipe(PRINTED)
        complaint, err = await _pipe(COMPLAINT)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(WARDEN), *words, cwd=folder, env=dict(env), start_new_session=True,
                stdin=theirs.fileno(), stdout=out, stderr=err,
            )
        except (OSError, ValueError) as problem:
            ours.close()
            raise AgentFailed(f"the command cannot be run: {problem}") from problem
        finally:
            theirs.close()
            os.close(out)
            os.close(err)
        return cls(process, ours, printed, complaint)

    async def end(self) -> tuple[bytes, bytes]:
        """Have all that is left of it killed; what it printed last, on both channels. Raises AgentFailed where it was
        never started. Who is out of everybody's reach may still hold the pipes: nobody waits long for them."""
        try:
            refused = self.lifeline.recv(1 << 12).decode("utf-8", "replace")
        except OSError:
            refused = ""
        self.lifeline.close()
        try:
            await asyncio.wait_for(self.process.wait(), warden.SWEEP_S + DRAIN_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        reading = {self.printed, self.complaint}
        done, pending = await asyncio.wait(reading, timeout=DRAIN_S)
        for task in pending:
            task.cancel()
        if refused:
            raise AgentFailed(f"the command cannot be run: {refused}")
        printed, complaint = (task.result() if task in done else b"" for task in (self.printed, self.complaint))
        return printed, complaint


def words_of(command: str) -> list[str]:
    """The command as words. It runs in a folder of its own, so words that name files here become absolute."""
    try:
        words = shlex.split(command)
    except ValueError as problem:
        raise EsplError(f"--command {command!r} cannot be read: {str(problem).lower()}") from None
    if not words:
        raise EsplError('--command is empty, expected a program, as in --command "my-agent {task_file}"')
    program = shutil.which(words[0])
    if program is None:
        raise EsplError(f"--command: there is no program {words[0]!r}")
    script = words[1] if _INTERPRETER.fullmatch(Path(program).name) and len(words) > 1 else ""
    if _SCRIPT.fullmatch(script) and not Path(script).is_file():
        raise EsplError(f"--command: there is no file {script!r} here for {words[0]} to run")
    arguments = [str(Path(word).absolute()) if Path(word).exists() else word for word in words[1:]]
    return [str(Path(program).absolute()), *arguments]      # not resolved: a virtual environment's python is a link


async def _pipe(most: int) -> tuple[asyncio.Task[bytes], int]:
    """What will be written into a pipe, its last `most` bytes, and the end to write to. asyncio's own pipes would not
    do: with them a process has not ended before everybody has who holds them."""
    reading, writing = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0)
    )
    return asyncio.create_task(_tail(reader, transport, most)), writing


async def _tail(stream: asyncio.StreamReader, transport: asyncio.BaseTransport, most: int) -> bytes:
    """The last `most` bytes of a stream, however long it is."""
    kept = bytearray()
    try:
        while piece := await stream.read(1 << 16):
            kept += piece
            del kept[:-most]
    finally:
        transport.close()
    return bytes(kept)


def ended(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"
