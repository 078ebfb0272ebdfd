"""The Docker engine: how it is reached, and what to say where it is not.

The daemon is the one that DOCKER_HOST names (with DOCKER_TLS_VERIFY and DOCKER_CERT_PATH), else the local socket.
docker-py makes and removes containers; the attached stream is plain asyncio (`attach`), so that a call in a box costs
no thread and holds no connection of docker-py's pool.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from espl_envs.core.errors import MissingExtra
from espl_envs.sandbox.base import SandboxFault, SandboxUnavailable

LOCAL = "unix:///var/run/docker.sock"
REMEDIES = (
    "(1) start Docker, or install it: `apt-get install docker.io`, then `systemctl start docker` or plain `dockerd`; "
    "set DOCKER_HOST for a daemon elsewhere. (2) choose the provider 'bubblewrap' explicitly: a weaker box, but no "
    "daemon. (3) in tests, play recorded calls with the provider 'replay'."
)
LIMIT = 1 << 20                # bytes of a box's output that may wait for their reader, doubled; then the box waits
STDOUT, STDERR = 1, 2
_STDOUT = bytes((STDOUT, 0, 0, 0))


def host() -> str:
    """The address of the daemon."""
    return os.environ.get("DOCKER_HOST") or LOCAL


def client(timeout: float = 60.0) -> Any:
    """A docker-py APIClient that has spoken to the daemon. Raises MissingExtra, or SandboxUnavailable with remedies."""
    try:
        from docker import APIClient
        from docker.errors import DockerException
        from docker.utils import kwargs_from_env
    except ImportError as error:
        raise MissingExtra("docker", "the sandbox provider 'docker'") from error
    try:
        return APIClient(version="auto", timeout=timeout, max_pool_size=64, **kwargs_from_env())
    except DockerException as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> SandboxUnavailable:
    """The daemon cannot be spoken to: why, and the remedies."""
    denied = "Permission denied" in str(error)
    hint = "This user may not use the socket: `usermod -aG docker $USER` allows it. " if denied else ""
    return SandboxUnavailable(f"no Docker daemon at {host()}: {reason(error)}. {hint}What helps: {REMEDIES}")


def reason(error: Exception) -> str:
    """Docker's own words, without the layers of exceptions around them."""
    words = getattr(error, "explanation", None) or str(error) or type(error).__name__
    if isinstance(words, bytes):
        words = words.decode(errors="replace")
    for name in ("No such file or directory", "Connection refused", "Permission denied"):
        if name in words and not getattr(error, "explanation", None):
            return name
    return str(words).strip().rstrip(".")


class Stream(asyncio.StreamReaderProtocol):
    """The hijacked connection of an attached container: an HTTP answer, then pieces of stdout and stderr under heads of
    eight bytes (kind, three zeros, length). Stdout goes to the reader; of stderr the last words are kept."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(LIMIT, loop)
        super().__init__(self.reader, loop=loop)
        self.answer: asyncio.Future[str] = loop.create_future()
        self._head = bytearray()
        self._kind, self._left = 0, 0
        self._stderr = b""

    @property
    def last_words(self) -> str:
        """The end of what the container wrote to stderr."""
        return self._stderr.decode(errors="replace").strip()

    def data_received(self, data: bytes) -> None:
        whole = data[:4] == _STDOUT and int.from_bytes(data[4:8], "big") == len(data) - 8 > 0
        if whole and not self._left and not self._head:
            self.reader.feed_data(data[8:])        # one whole piece: nearly always, and every call waits for this
            return
        rest = memoryview(data)
        if not self.answer.done():
            rest = self._answered(data)
        while rest:
            if self._left == 0:
                wanted = 8 - len(self._head)
                self._head += rest[:wanted]
                rest = rest[wanted:]
                if len(self._head) < 8:
                    return
                self._kind, self._left = self._head[0], int.from_bytes(self._head[4:], "big")
                self._head.clear()
                continue
            piece, rest = rest[:self._left], rest[self._left:]
            self._left -= len(piece)
            if self._kind == STDOUT:
                self.reader.feed_data(piece)
            elif self._kind == STDERR:
                self._stderr = (self._stderr + piece)[-2000:]

    def _answered(self, data: bytes) -> memoryview:
        """Take the head of the HTTP answer; returns what follows it."""
        self._head += data
        head, end, rest = bytes(self._head).partition(b"\r\n\r\n")
        if not end:
            return memoryview(b"")
        self._head.clear()
        self.answer.set_result(head.partition(b"\r\n")[0].decode("latin-1"))
        return memoryview(rest)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_result("the connection was closed")
        super().connection_lost(exc)


async def attach(name: str, version: str) -> tuple[Stream, asyncio.StreamWriter]:
    """Attach to a container that is not started yet: its stdout and stderr, and a writer to its stdin."""
    loop = asyncio.get_running_loop()
    kind, place, context = _address()
    if kind == "unix":
        transport, stream = await loop.create_unix_connection(Stream, place)
    else:
        transport, stream = await loop.create_connection(Stream, *_pair(place), ssl=context)
    writer = asyncio.StreamWriter(transport, stream, stream.reader, loop)
    try:
        path = f"/v{version}/containers/{quote(name)}/attach?stream=1&stdin=1&stdout=1&stderr=1"
        writer.write(f"POST {path} HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n".encode())
        answer = await stream.answer
        if " 101 " not in answer and " 200 " not in answer:
            raise SandboxFault("start", f"docker does not attach to {name}: {answer}")
    except BaseException:
        writer.close()
        raise
    return stream, writer


def remove_now(names: Sequence[str]) -> None:
    """Remove containers from a process that is about to end: no loop, no threads, no docker-py, two seconds at most."""
    connections = []
    for name in names:
        with suppress(OSError):
            connection = _connect(timeout=2.0)
            request = f"DELETE /containers/{quote(name)}?force=1&v=1 HTTP/1.0\r\nHost: docker\r\n\r\n"
            connection.sendall(request.encode())
            connections.append(connection)
    for connection in connections:
        with suppress(OSError), connection:
            connection.recv(256)


def _connect(timeout: float) -> socket.socket:
    kind, place, context = _address()
    if kind == "unix":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        connection.connect(place)
        return connection
    connection = socket.create_connection(_pair(place), timeout)
    return context.wrap_socket(connection, server_hostname=_pair(place)[0]) if context else connection


def _address() -> tuple[str, str, ssl.SSLContext | None]:
    """"unix" and a path, or "tcp" and host:port with what TLS needs. Raises SandboxUnavailable for other kinds."""
    kind, _, place = host().partition("://")
    if kind in ("unix", "http+unix"):
        return "unix", place, None
    if kind not in ("tcp", "http", "https"):
        raise SandboxUnavailable(
            f"DOCKER_HOST is {host()}: boxes speak over unix:// and tcp:// addresses. Forward the socket instead: "
            "`ssh -nNT -L /tmp/docker.sock:/var/run/docker.sock HOST`, then DOCKER_HOST=unix:///tmp/docker.sock"
        )
    folder = os.environ.get("DOCKER_CERT_PATH") or ""
    verify = bool(os.environ.get("DOCKER_TLS_VERIFY"))
    if not (folder or verify or kind == "https"):
        return "tcp", place, None
    certificates = Path(folder or Path.home() / ".docker")
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem") if verify else None)
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    return "tcp", place, context


def _pair(place: str) -> tuple[str, int]:
    parts = urlsplit(f"//{place}")
    return parts.hostname or "localhost", parts.port or 2375
