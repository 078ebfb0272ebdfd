"""However the owner of boxes dies, nothing of theirs is left; whatever becomes of a box, the pool goes on.

The promise is two seconds. How long it took is printed; a machine that is slower is given half a minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from espl_envs.sandbox import cleanup, docker, images
from espl_envs.sandbox.base import SandboxFault, SandboxSpec
from espl_envs.sandbox.docker import Docker
from espl_envs.sandbox.pool import Pool

SPEC = SandboxSpec(image="terminal")
PATIENCE = 30.0


def until(true: Callable[[], bool], what: str) -> float:
    """Seconds until it is true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE, what
        time.sleep(0.02)
    return time.monotonic() - began


def boxes_of(client: Any, owner: str) -> list[str]:
    """The containers with this owner's label, those that were only created included."""
    found = client.containers(all=True, filters={"label": f"{cleanup.OWNER}={owner}"})
    return [f"{box['Names'][0]} {box['State']}" for box in found]


@pytest.fixture
def boxes(docker_engine: Any) -> Callable[[], list[str]]:
    """This process's boxes but those that were there before: environments of other tests may share a warm pool."""
    owner = str(cleanup.owner())
    before = {box.split()[0] for box in boxes_of(docker_engine, owner)}
    return lambda: [box for box in boxes_of(docker_engine, owner) if box.split()[0] not in before]


@contextmanager
def an_owner(client: Any, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with three live boxes, two of them in a call, and its label."""
    script = Path(__file__).with_name("sandbox_owner.py")
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        for name in told["busy"]:
            until(lambda name=name: len(client.top(name)["Processes"]) > 1, "the calls did not begin")  # type: ignore[misc]
        assert len(boxes_of(client, told["owner"])) == 3
        yield process, told["owner"]
    finally:
        process.kill()
        process.wait()


def end(process: subprocess.Popen[str], way: str) -> None:
    """Bring it about and wait for the death."""
    if way.startswith("SIG"):
        process.send_signal(getattr(signal, way))
    else:
        assert process.stdin is not None
        process.stdin.write(way + "\n")
        process.stdin.flush()
    process.wait(PATIENCE)


@pytest.mark.parametrize("way", ["SIGTERM", "SIGHUP", "SIGKILL", "segfault", "exit", "_exit", "forked child survives"])
def test_no_box_outlives_its_owner(docker_engine: Any, way: str) -> None:
    with an_owner(docker_engine) as (process, owner):
        end(process, way)
        took = until(lambda: not boxes_of(docker_engine, owner), f"boxes are left after {way}")
    print(f"{way}: no container {took:.2f} s after the death")
    assert process.returncode != 0, "it died as it was meant to"
    if way in ("SIGTERM", "SIGHUP"):
        assert process.returncode == -getattr(signal, way), "of the signal, as if nobody had caught it"


def test_the_applications_own_handler_is_not_stolen(docker_engine: Any) -> None:
    with an_owner(docker_engine, "own-handler") as (process, owner):
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"heard": "SIGTERM"}
        assert process.poll() is None and len(boxes_of(docker_engine, owner)) == 3
        end(process, "exit")
        until(lambda: not boxes_of(docker_engine, owner), "boxes are left")


def in_pool(scene: Callable[[Pool], Any], **settings: Any) -> None:
    """Play with a pool of real boxes; afterwards this process has none."""

    async def play() -> None:
        async with Pool(Docker(), **settings) as pool:
            await scene(pool)

    asyncio.run(play())


def test_a_box_killed_in_a_call_is_a_fault_and_the_pool_goes_on(
    docker_engine: Any, boxes: Callable[[], list[str]]
) -> None:
    async def scene(pool: Pool) -> None:
        with pytest.raises(SandboxFault) as caught:
            async with pool.lease(SPEC, timeout=300) as box:
                call = asyncio.ensure_future(box.python("while True: pass", timeout=900))
                await asyncio.sleep(0)
                await asyncio.to_thread(docker_engine.kill, box.name)
                await call
        assert caught.value.kind == "gone" and pool.faults == 1
        async with pool.lease(SPEC, timeout=300) as other:
            assert other.name != box.name
            assert (await other.python("6 * 7")).value == "42"

    in_pool(scene, max_live=1, warm=0)
    assert not boxes()


def test_a_warm_box_killed_on_the_shelf_is_not_lent(docker_engine: Any, boxes: Callable[[], list[str]]) -> None:
    async def scene(pool: Pool) -> None:
        async with pool.lease(SPEC, timeout=300):
            pass
        async with asyncio.timeout(PATIENCE):
            while not pool.warm:
                await asyncio.sleep(0.02)
        dead = pool._stock.idle[0].sandbox
        await asyncio.to_thread(docker_engine.kill, dead.name)
        async with asyncio.timeout(PATIENCE):
            while not getattr(dead, "closed", True):
                await asyncio.sleep(0.02)
        async with pool.lease(SPEC, timeout=300) as box:
            assert box.name != dead.name
            assert (await box.shell("echo here")).stdout == "here\n"

    in_pool(scene, max_live=2, warm=1)
    assert not boxes()


@pytest.mark.parametrize("busy", [False, True])
def test_a_box_whose_stream_is_cut_ends_by_itself(boxes: Callable[[], list[str]], busy: bool) -> None:
    """The owner lives, only the connection is gone: nobody removes the box, it notices."""

    async def scene(pool: Pool) -> None:
        lease = await pool.acquire(SPEC, timeout=300)
        box: Any = lease.sandbox
        gone = asyncio.Event()
        box._remove = gone.wait
        call = asyncio.ensure_future(box.python("while True: pass" if busy else "1", timeout=900))
        if not busy:
            await call
        box._writer.transport.abort()
        took = await asyncio.to_thread(until, lambda: not boxes(), "the box outlives its stream")
        print(f"cut while {'busy' if busy else 'idle'}: no container after {took:.2f} s")
        gone.set()
        if busy:
            with pytest.raises(SandboxFault):
                await call
        lease.release(broken=True)
        async with pool.lease(SPEC, timeout=300) as other:
            assert (await other.python("1 + 1")).value == "2"

    in_pool(scene, max_live=1, warm=0)
    assert not boxes()


def test_a_box_ends_itself_when_its_lifetime_is_over(boxes: Callable[[], list[str]]) -> None:
    async def scene(pool: Pool) -> None:
        lease = await pool.acquire(SandboxSpec(image="terminal", lifetime_s=2), timeout=300)
        await asyncio.to_thread(until, lambda: not boxes(), "the box outlives its lifetime")
        with pytest.raises(SandboxFault, match="lifetime of 2 s is over"):
            await lease.sandbox.python("1")
        lease.release(broken=True)

    in_pool(scene, max_live=1, warm=0)


def test_the_first_lease_of_a_pool_removes_what_the_dead_left(docker_engine: Any) -> None:
    """A container that was only created has no process that could notice anything."""
    who = cleanup.owner()
    dead = cleanup.Owner(who.boot, who.namespace, who.pid, "1")
    config = docker.configuration(SPEC, *images.resolve(docker_engine, "terminal"))
    config["Labels"][cleanup.OWNER] = str(dead)
    docker_engine.create_container_from_config(config, None)
    assert boxes_of(docker_engine, str(dead))

    async def scene(pool: Pool) -> None:
        async with pool.lease(SPEC, timeout=300):
            pass

    in_pool(scene, max_live=1, warm=0)
    assert not boxes_of(docker_engine, str(dead))
