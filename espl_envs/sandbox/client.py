"""The host's end of a box: a byte stream in, calls out.

One call is in flight at a time. A box that is late, gone or talks nonsense is removed and the call ends in a
SandboxFault; there is no second try here, because nobody can know what the first one did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn, Protocol, TypeVar

from espl_envs.core.errors import EsplError
from espl_envs.sandbox import answers
from espl_envs.sandbox.base import (
    Attestation,
    ExecResult,
    FaultKind,
    FileInfo,
    SandboxFault,
    SandboxPathError,
    SandboxSpec,
)
from espl_envs.sandbox.worker import frames
from espl_envs.sandbox.worker.files import MOST_ENTRIES, PIECE
from espl_envs.sandbox.worker.frames import Decoder, Encoder, Frame, FrameError

GRACE = 10.0                  # seconds beyond a call's own limit before the box is given up
CANCEL_GRACE = 3.0            # seconds for the result of a call whose task was cancelled
TREE_BYTES = 256 << 20
READ_BYTES = 256 << 20
CONTENT_BYTES = 64 << 20      # source, command, or arguments and stdin of one call

T = TypeVar("T")
Entries = tuple[FileInfo, ...]


class Writer(Protocol):
    """The part of asyncio.StreamWriter that a box needs."""

    def write(self, data: bytes) -> None: ...

    async def drain(self) -> None: ...

    def close(self) -> None: ...


class _Late(Exception):
    """What is read instead of a result that does not come; lighter than a timeout around every call."""


async def connect(
    reader: asyncio.StreamReader, writer: Writer, spec: SandboxSpec, *, name: str, claims: frozenset[str],
    remove: Callable[[], Awaitable[None]], timeout: float, roots: Sequence[str] | None = None,
    grace: float = GRACE,
) -> RemoteSandbox:
    """Greet the supervisor at the other end and hold its attestation against `claims`. `remove` is awaited exactly
    once, when the box is closed or broken, also when this fails. `roots`: the folders that can be written, where they
    are not those of the spec.

    Raises SandboxFault: start (no READY in time), protocol, refused (the box is weaker than claimed).
    """
    box = RemoteSandbox(reader, writer, spec, name, remove, grace)
    try:
        async with asyncio.timeout(timeout):
            await box._greet(spec.roots if roots is None else roots)
    except TimeoutError:
        await box.close()
        raise SandboxFault("start", f"{name} did not answer within {timeout:g} s") from None
    except SandboxFault as fault:
        await box.close()
        if fault.kind == "gone":
            raise SandboxFault("start", f"{name} ended before it was ready") from None
        raise
    except BaseException:
        await box.close()
        raise
    lacking = box.attestation.missing(spec, claims)
    if lacking:
        await box.close()
        raise SandboxFault("refused", f"{name} is weaker than asked for: {'; '.join(lacking)}")
    return box


class RemoteSandbox:
    """A live box behind a byte stream; see base.Sandbox. Made by `connect`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: Writer, spec: SandboxSpec, name: str,
        remove: Callable[[], Awaitable[None]], grace: float,
    ) -> None:
        self.name, self.spec, self.attestation = name, spec, Attestation()
        self._reader, self._writer, self._grace = reader, writer, grace
        key = secrets.token_bytes(frames.KEY_BYTES)
        self._key = key
        self._encoder, self._decoder = Encoder(frames.TO_BOX, key), Decoder(frames.TO_HOST, key)
        self._lock = asyncio.Lock()
        self._in_flight: int | None = None
        self._born = time.monotonic()
        self._end: str | None = None              # why nothing can be asked any more
        self._remove = remove
        self._removal: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether the box is closed or broken, or its stream has ended, without asking it."""
        return self._end is not None or self._reader.at_eof() or self._reader.exception() is not None

    async def python(self, code: str, timeout: float | None = None) -> ExecResult:
        return await self._run({"op": "python"}, code.encode("utf-8", "surrogatepass"), timeout)

    async def shell(self, command: str, timeout: float | None = None) -> ExecResult:
        try:
            data = command.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:                        # half a character, as models write it
            data = command.encode("utf-8", "surrogatepass")
        return await self._run({"op": "shell"}, data, timeout)

    async def exec(
        self, argv: Sequence[str], stdin: bytes = b"", cwd: str | None = None,
        env: Mapping[str, str] | None = None, timeout: float | None = None,
    ) -> ExecResult:
        if not argv:
            raise EsplError("exec needs at least the name of a program")
        head = json.dumps({"argv": list(argv), "cwd": cwd, "env": dict(env or {})}).encode()
        return await self._run({"op": "exec", "head": len(head)}, stdin + head, timeout)

    async def read(self, path: str, offset: int = 0, limit: int | None = None) -> bytes:
        most, have = READ_BYTES if limit is None else limit, 0
        pieces = []
        while have < most:
            count = min(PIECE, most - have)
            order = {"op": "read", "files": [[path, offset + have, count]]}
            whole, piece = await self._files(order, lambda header, content: (int(header["whole"][0]), content))
            if limit is None and whole > READ_BYTES:
                raise SandboxPathError(f"{path} has {whole} bytes: read it in parts", "big")
            pieces.append(piece)
            have += len(piece)
            if len(piece) < count:
                break
        return b"".join(pieces)

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        for offset in range(0, max(len(data), 1), PIECE):
            piece = data[offset:offset + PIECE]
            await self._files({"op": "write", "files": [[path, len(piece), mode, offset]]}, answers.nothing, piece)

    async def list(self, path: str = ".") -> Entries:
        prefix = "" if path in (".", "./") else path.rstrip("/") + "/"
        return tuple(replace(info, path=prefix + info.path) for info in await self._entries(path, deep=False))

    async def stat(self, path: str) -> FileInfo | None:
        return await self._files({"op": "stat", "path": path}, lambda header, _: answers.entry(path, header))

    async def put_tree(self, files: Mapping[str, bytes], root: str = ".") -> None:
        for name in files:
            answers.relative(name)
        batch: list[tuple[str, bytes]] = []
        size = 0
        for name, data in files.items():
            path = f"{root}/{name}"
            if len(data) > PIECE:
                await self.write(path, data)
                continue
            weight = len(data) + 6 * len(path) + 40
            if size + weight > PIECE:
                await self._put(batch)
                batch, size = [], 0
            batch.append((path, data))
            size += weight
        await self._put(batch)

    async def _put(self, batch: Sequence[tuple[str, bytes]]) -> None:
        if batch:
            order = {"op": "write", "files": [[path, len(data), 0o644, 0] for path, data in batch]}
            await self._files(order, answers.nothing, b"".join(data for _, data in batch))

    async def get_tree(self, root: str = ".") -> dict[str, bytes]:
        found = [(info.path, info.size) for info in await self._entries(root, deep=True) if info.kind == "file"]
        if sum(size for _, size in found) > TREE_BYTES:
            raise SandboxPathError(f"{root} holds more than {TREE_BYTES >> 20} MB", "big")
        tree: dict[str, bytes] = {}
        batch: list[tuple[str, int]] = []
        weight = 0
        for name, size in found:
            answers.relative(name)
            if size > PIECE // 2:
                tree[name] = await self.read(f"{root}/{name}")
                continue
            if weight + size + 6 * len(name) + 40 > PIECE:
                await self._get(root, batch, tree)
                batch, weight = [], 0
            batch.append((name, size))
            weight += size + 6 * len(name) + 40
        await self._get(root, batch, tree)
        return dict(sorted(tree.items()))

    async def _get(self, root: str, batch: Sequence[tuple[str, int]], tree: dict[str, bytes]) -> None:
        if not batch:
            return
        order = {"op": "read", "files": [[f"{root}/{name}", 0, size] for name, size in batch]}
        contents = await self._files(order, answers.contents)
        tree.update((name, data) for (name, _), data in zip(batch, contents, strict=False))

    async def interrupt(self) -> None:
        if self._in_flight is not None and self._end is None:
            self._send(frames.INTERRUPT, {"call": self._in_flight})

    async def reset(self) -> None:
        header, _ = await self._call({"op": "reset"}, b"", max(self.spec.call_timeout, GRACE))
        if "error" in header:
            await self._break("gone", f"it could not be scrubbed: {header['error']}")

    async def stats(self) -> dict[str, float]:
        header, _ = await self._call({"op": "stats"}, b"", self.spec.call_timeout)
        stats = await self._sense(lambda h, _: {str(k): float(v) for k, v in h["stats"].items()}, header, b"")
        return {"uptime_s": time.monotonic() - self._born, **stats}

    async def close(self) -> None:
        if self._end is None:
            self._end = "it was closed"
        await self._removed()

    async def _greet(self, roots: Sequence[str]) -> None:
        spec = {**asdict(self.spec), "env": dict(self.spec.env)}
        hello = {"version": frames.VERSION, "key": self._key.hex(), "spec": spec, "roots": list(roots)}
        self._send(frames.HELLO, hello)
        ready = await self._receive()
        facts = ready.header.get("facts")
        if ready.kind != frames.READY or ready.header.get("version") != frames.VERSION or not isinstance(facts, dict):
            await self._break("protocol", "its first frame is no READY of our version: rebuild its image")
        self.attestation = Attestation(facts)

    async def _entries(self, path: str, *, deep: bool) -> Entries:
        """What is in a directory, or in the whole tree below it, with names relative to `path`."""
        found: dict[str, FileInfo] = {}
        while True:
            order = {"op": "list", "path": path, "deep": deep, "start": len(found)}
            page, more = await self._files(order, answers.page)
            found.update((info.path, info) for info in page)
            if not more or not page or len(found) > MOST_ENTRIES:
                return tuple(found.values())

    async def _files(self, order: dict[str, Any], read: Callable[[dict[str, Any], bytes], T], body: bytes = b"") -> T:
        """A file operation; `read` makes sense of its answer."""
        header, content = await self._call(order, body, self.spec.call_timeout)
        if "error" in header:
            raise SandboxPathError(str(header["error"]), str(header.get("reason", "other")))
        return await self._sense(read, header, content)

    async def _sense(self, read: Callable[[dict[str, Any], bytes], T], header: dict[str, Any], content: bytes) -> T:
        """A box whose answers do not mean anything is not ours any more."""
        try:
            return read(header, content)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            await self._break("protocol", f"an answer without sense ({error!r})")

    async def _run(self, order: dict[str, Any], body: bytes, timeout: float | None) -> ExecResult:
        if timeout is None:
            timeout = self.spec.call_timeout
        if not 0 < timeout < math.inf:
            raise EsplError(f"a call's timeout is {timeout}, expected a number of seconds above 0")
        if len(body) > CONTENT_BYTES:
            text = f"{len(body)} bytes are too much for one call, at most {CONTENT_BYTES}: write them to a file first"
            return ExecResult("nonzero", stderr=text)
        header, content = await self._call(order, body, timeout)
        return await self._sense(answers.result, header, content)

    async def _call(self, order: dict[str, Any], body: bytes, timeout: float) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            order["timeout"] = timeout
            if len(body) > PIECE and order["op"] != "write":
                whole, body = memoryview(body), b""
                for start in range(0, len(whole), PIECE):
                    part = {"op": "part", "first": start == 0}
                    await self._exchange(part, bytes(whole[start:start + PIECE]), timeout)
                order["parted"] = True
            return await self._exchange(order, body, timeout)

    async def _exchange(self, order: dict[str, Any], body: bytes, timeout: float) -> tuple[dict[str, Any], bytes]:
        """One CALL and its RESULT."""
        seq = self._send(frames.CALL, order, body)
        self._in_flight = seq
        late = asyncio.get_running_loop().call_later(timeout + self._grace, self._reader.set_exception, _Late())
        try:
            try:
                result = await self._receive()
            finally:
                late.cancel()
        except _Late:
            await self._break("gone", f"no result {self._grace:g} s after the call's limit of {timeout:g} s")
        except asyncio.CancelledError:
            await self._cancelled(seq)
            raise
        finally:
            self._in_flight = None
        if result.kind != frames.RESULT or result.header.get("call") != seq:
            await self._break("protocol", "a result of another call")
        return result.header, result.body

    async def _cancelled(self, seq: int) -> None:
        """The caller is gone: end the call, so that the box stays in step, or end the box."""
        try:
            self._send(frames.INTERRUPT, {"call": seq})
            async with asyncio.timeout(CANCEL_GRACE):
                result = await self._receive()
            if result.kind == frames.RESULT and result.header.get("call") == seq:
                return
        except (TimeoutError, _Late, SandboxFault):
            pass
        except asyncio.CancelledError:
            self._end = self._end or "a cancelled call did not end"
            self._removal_task()
            raise
        self._end = self._end or "a cancelled call did not end"
        with contextlib.suppress(asyncio.CancelledError):
            await self._removed()

    def _send(self, kind: int, header: dict[str, Any], body: bytes = b"") -> int:
        if self._end is not None:
            raise SandboxFault("gone", f"{self.name}: {self._end}")
        seq = self._encoder.seq
        try:
            self._writer.write(self._encoder.encode(kind, header, body))
        except FrameError as error:
            raise EsplError(f"the call is too big for a sandbox: {error}") from None
        return seq

    async def _receive(self) -> Frame:
        received: list[Frame] = []
        try:
            while not received:
                data = await self._reader.read(1 << 18)
                if not data:
                    await self._break("gone", self._last_words())
                received = self._decoder.feed(data)
        except FrameError as error:
            await self._break("protocol", str(error))
        except OSError as error:
            await self._break("gone", f"its stream broke: {error}")
        if len(received) > 1:
            await self._break("protocol", "more than one answer")
        return received[0]

    def _last_words(self) -> str:
        if time.monotonic() - self._born >= self.spec.lifetime_s:
            return f"its lifetime of {self.spec.lifetime_s:g} s is over"
        return "its stream ended"

    async def _break(self, kind: FaultKind, why: str) -> NoReturn:
        """Remove the box and raise."""
        self._end = self._end or why
        await self._removed()
        raise SandboxFault(kind, f"{self.name}: {why}")

    def _removal_task(self) -> asyncio.Task[None]:
        if self._removal is None:
            self._removal = asyncio.ensure_future(self._take_down())
        return self._removal

    async def _removed(self) -> None:
        await asyncio.shield(self._removal_task())

    async def _take_down(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()
        await self._remove()
