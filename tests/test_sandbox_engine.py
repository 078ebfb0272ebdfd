"""The daemon is spoken to wherever it is; gone, it is a fault; its stream is taken apart byte for byte."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_kit import SPEC, mine

from espl_envs.sandbox import engine
from espl_envs.sandbox.base import SandboxFault, SandboxUnavailable
from espl_envs.sandbox.docker import Docker


class Relay:
    """A door before the daemon that can be shut: what a client sees of a daemon that goes away and comes back."""

    def __init__(self, address: str | int) -> None:
        self.address = address
        self.open: set[asyncio.StreamWriter] = set()
        self.server: asyncio.Server

    async def start(self) -> None:
        if isinstance(self.address, int):
            self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.address)
            self.address = self.server.sockets[0].getsockname()[1]
        else:
            self.server = await asyncio.start_unix_server(self._serve, self.address)

    async def stop(self) -> None:
        self.server.close()
        for writer in self.open:
            writer.transport.abort()
        if isinstance(self.address, str):
            Path(self.address).unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(engine.LOCAL.removeprefix("unix://"))
        self.open |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            return
        finally:
            writer.close()


@pytest.fixture
def local_daemon(docker_engine: Any) -> Iterator[Any]:
    """The daemon behind the local socket, which a Relay can stand before."""
    if engine.host() != engine.LOCAL:
        pytest.skip(f"the daemon is at {engine.host()}, not behind the local socket")
    yield docker_engine


async def _none_left(client: Any) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(mine, client):
            await asyncio.sleep(0.05)


def test_a_daemon_that_goes_away_is_a_fault_and_then_it_works_again(
    local_daemon: Any, docker_provider: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    relay = Relay(str(tmp_path / "docker.sock"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{relay.address}")

    async def play() -> None:
        await relay.start()
        idle, busy = await asyncio.gather(docker_provider.start(SPEC), docker_provider.start(SPEC))
        call = asyncio.ensure_future(busy.python("while True: pass", timeout=60))
        await asyncio.sleep(0)
        await relay.stop()
        for attempt in (call, idle.python("1"), docker_provider.start(SPEC)):
            with pytest.raises(SandboxFault):
                await attempt
        await _none_left(local_daemon)
        await relay.start()
        box = await docker_provider.start(SPEC)
        assert (await box.python("6 * 7")).value == "42"
        await box.close()
        await relay.stop()

    asyncio.run(play())
    assert mine(local_daemon) == []


def test_a_daemon_at_a_tcp_address(
    local_daemon: Any, docker_provider: Docker, monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        relay = Relay(0)
        await relay.start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{relay.address}")
        box = await docker_provider.start(SPEC)
        assert (await box.python("6 * 7")).value == "42"
        engine.remove_now([box.name])
        await box.close()
        await relay.stop()

    asyncio.run(play())
    assert mine(local_daemon) == []


def test_an_address_that_boxes_cannot_speak_over_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "ssh://somebody@somewhere")
    with pytest.raises(SandboxUnavailable, match="ssh -nNT -L"):
        asyncio.run(engine.attach("espl-x", "1.41"))


def _imitation(rng: random.Random) -> bytes:
    """Content that looks like a whole piece of stdout."""
    content = rng.randbytes(rng.choice((1, 300)))
    return bytes([1, 0, 0, 0]) + len(content).to_bytes(4, "big") + content


@pytest.mark.parametrize("seed", range(20))
def test_the_stream_is_taken_apart_however_it_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    contents = [rng.choice((rng.randbytes(rng.choice((0, 1, 7, 9, 300))), _imitation(rng))) for _ in range(40)]
    pieces = [(rng.choice((1, 1, 2)), content) for content in contents]
    whole = [bytes([kind, 0, 0, 0]) + len(data).to_bytes(4, "big") + data for kind, data in pieces]
    wire = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\n\r\n" + b"".join(whole)
    ends = [len(wire) - len(b"".join(whole[number:])) for number in range(len(whole) + 1)]

    async def play() -> tuple[str, bytes, bytes]:
        stream = engine.Stream()
        rest = wire
        while rest:
            begun = len(wire) - len(rest)
            to_end = min(end for end in ends if end > begun) - begun        # then whole pieces come, as they do mostly
            cut = rng.choice((1, 2, 7, 8, 9, 100, 1000, *[to_end] * 9))
            stream.data_received(rest[:cut])
            rest = rest[cut:]
        stream.eof_received()
        return await stream.answer, await stream.reader.read(), stream._stderr

    answer, out, err = asyncio.run(play())
    assert "101" in answer
    assert out == b"".join(data for kind, data in pieces if kind == 1)
    assert err == b"".join(data for kind, data in pieces if kind == 2)[-2000:]


def test_output_that_nobody_reads_makes_the_box_wait() -> None:
    class Transport(asyncio.Transport):
        paused = False

        def pause_reading(self) -> None:
            self.paused = True

        def resume_reading(self) -> None:
            self.paused = False

        def is_closing(self) -> bool:
            return False

    async def play() -> None:
        stream, transport = engine.Stream(), Transport()
        stream.connection_made(transport)
        stream.data_received(b"HTTP/1.1 101 UPGRADED\r\n\r\n")
        while not transport.paused:
            stream.data_received(bytes([1, 0, 0, 0]) + (1 << 16).to_bytes(4, "big") + bytes(1 << 16))
        size = len(stream.reader._buffer)  # type: ignore[attr-defined]
        assert size <= 2 * engine.LIMIT + (1 << 16)
        await stream.reader.readexactly(size)
        assert not transport.paused

    asyncio.run(play())
