"""Boxes of namespaces: what they show of the machine, what they hold, what they claim, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.errors import EsplError
from espl_envs.sandbox import bubblewrap, host
from espl_envs.sandbox.attestation import CLAIMS
from espl_envs.sandbox.base import ExecResult, Sandbox, SandboxFault, SandboxSpec, SandboxUnavailable
from espl_envs.sandbox.bubblewrap import UID, Bubblewrap, BubblewrapWarning
from espl_envs.sandbox.cgroups import Cgroups

BY_CGROUP = {"memory", "pids", "cpu"}
BY_DOCKER = {"seccomp"}


def with_box(provider: Bubblewrap, use: Callable[[Any], Awaitable[Any]], **spec: Any) -> Any:
    async def run() -> Any:
        box = await provider.start(SandboxSpec(**spec))
        try:
            return await use(box)
        finally:
            await box.close()

    return asyncio.run(run())


def python(provider: Bubblewrap, code: str, **spec: Any) -> ExecResult:
    result: ExecResult = with_box(provider, lambda box: box.python(code), **spec)
    return result


def shell(provider: Bubblewrap, command: str, **spec: Any) -> ExecResult:
    result: ExecResult = with_box(provider, lambda box: box.shell(command), **spec)
    return result


def test_a_box_runs_python_shell_programs_and_keeps_files(bubblewrap_provider: Bubblewrap) -> None:
    async def use(box: Sandbox) -> None:
        assert (await box.python("x = 6 * 7")).session_fresh
        assert (await box.python("x")).value == "42"
        await box.write("notes/a.txt", b"\x00\xff")
        assert (await box.shell("wc -c < notes/a.txt")).stdout.strip() == "2"
        assert (await box.exec(["cat"], b"hello")).stdout == "hello"
        assert await box.get_tree("notes") == {"a.txt": b"\x00\xff"}
        await box.reset()
        assert await box.list() == ()

    with_box(bubblewrap_provider, use)


def test_claims_are_no_less_than_what_namespaces_give(bubblewrap_provider: Bubblewrap) -> None:
    assert bubblewrap_provider.claims >= CLAIMS - BY_CGROUP - BY_DOCKER
    assert bubblewrap_provider.claims <= CLAIMS


def test_without_control_groups_fewer_properties_are_claimed_and_the_box_still_runs(
    bubblewrap_provider: Bubblewrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bubblewrap_provider
    monkeypatch.setattr(Cgroups, "find", lambda *_: None)
    provider = Bubblewrap()
    with pytest.warns(BubblewrapWarning, match="not held on this machine: .*memory.*pids"):
        assert asyncio.run(provider.probe())["cgroup"] is None
    assert provider.claims >= CLAIMS - BY_CGROUP - BY_DOCKER and not provider.claims & {"memory", "pids", "cpu"}
    assert python(provider, "x = bytearray(10**9)").status == "out_of_memory"
    bomb = "import os, time\nfor n in range(100):\n    if os.fork() == 0: time.sleep(100)"
    result = python(provider, bomb, pids=20)
    assert result.status == "nonzero" and "BlockingIOError" in result.stderr


def test_memory_that_a_starved_call_left_in_segments_is_given_back(bubblewrap_provider: Bubblewrap) -> None:
    if "memory" not in bubblewrap_provider.claims:
        pytest.skip("memory is not limited by a control group here")
    segment = "import ctypes; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n" \
        "def segment(mib):\n" \
        "    number = libc.shmget(0, mib << 20, 0o1600)\n" \
        "    ctypes.memset(libc.shmat(number, None, 0), 1, mib << 20)\n"
    left = "[line.split()[6] for line in open('/proc/sysvipc/shm').read().splitlines()[1:]]"     # how many hold each

    async def use(box: Sandbox) -> None:
        assert (await box.exec(["python3", "-c", segment + "segment(1)"])).status == "ok"
        assert (await box.python(segment + f"segment(1)\n{left}")).value == "['0', '1']"        # they outlive a call …
        greedy = "for _ in range(64): segment(16)"
        assert (await box.exec(["python3", "-c", segment + greedy])).status == "out_of_memory"
        assert (await box.python(left)).value == "['1']"                 # … but for one that ate all there was
        assert (await box.shell("echo fine")).stdout == "fine\n"

    with_box(bubblewrap_provider, use, memory_mb=128)


def test_one_warning_says_what_is_not_protected(bubblewrap_provider: Bubblewrap) -> None:
    assert bubblewrap_provider
    provider = Bubblewrap()
    with pytest.warns(BubblewrapWarning, match="kernel") as caught:
        asyncio.run(provider.probe())
        asyncio.run(provider.probe())
        shell(provider, "true")
    assert len([one for one in caught if one.category is BubblewrapWarning]) == 1


def test_a_box_weaker_than_claimed_is_refused(bubblewrap_provider: Bubblewrap) -> None:
    provider = Bubblewrap()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(provider.probe())
    provider.claims = bubblewrap_provider.claims | BY_DOCKER
    with pytest.raises(SandboxFault, match=r"refused.*seccomp"):
        shell(provider, "true")


def test_the_machine_is_not_to_be_seen(bubblewrap_provider: Bubblewrap) -> None:
    asked = "ls /; hostname; id -u; ls /home /root /work; ls /usr/local/lib; env"
    lines = shell(bubblewrap_provider, asked).stdout.split()
    assert {"usr", "proc", "tmp", "workspace", "box", str(UID)} <= {*lines}
    assert not {"home", "root", "work", "var", "boot", "mnt"} & {*lines}
    names = {line.partition("=")[0] for line in lines if re.match(r"[A-Z_]+=", line)}
    by_shell, by_us = {"PWD", "OLDPWD", "SHLVL", "_"}, {"PATH", "HOME", "LANG", "TMPDIR"}
    assert names <= by_shell | by_us | {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}


def test_folders_of_ones_own_can_be_written(bubblewrap_provider: Bubblewrap) -> None:
    async def use() -> ExecResult:
        box = await bubblewrap_provider.start(SandboxSpec(writable=("/data",)))
        try:
            await box.write("/data/a", b"1")
            return await box.shell("cat /data/a; echo 2 > /data/b && cat /data/b; echo 3 > /c")
        finally:
            await box.close()

    said = asyncio.run(use())
    assert said.stdout == "12\n" and "Read-only" in said.stderr


def test_only_the_roots_can_be_written(bubblewrap_provider: Bubblewrap) -> None:
    places = "/x /usr/x /usr/local/x /etc/x /etc/passwd /opt/espl/x /opt/espl/__main__.py /dev/x /sys/x"
    tried = f"for p in {places}; do (echo x > $p) 2>/dev/null && echo written: $p; done; ls /opt"
    assert shell(bubblewrap_provider, tried).stdout == "espl\n"


def test_root_outside_is_not_root_inside(bubblewrap_provider: Bubblewrap) -> None:
    switches = "/proc/sysrq-trigger /proc/sys/kernel/core_pattern /proc/sys/kernel/hostname /proc/sys/fs/mqueue/msg_max"

    async def use(box: Sandbox) -> ExecResult:
        inner = bubblewrap._live[box.name].child
        assert inner is not None
        me = inner.process.pid
        first, = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        seen, = re.findall(r"Uid:\s+(\d+)", Path(f"/proc/{first}/status").read_text())
        assert int(seen) == (os.geteuid() or UID)
        return await box.shell(f"for p in {switches}; do (echo x > $p) 2>/dev/null && echo written: $p; done")

    assert with_box(bubblewrap_provider, use).stdout == ""


def test_no_namespaces_and_no_privileges_can_be_had(bubblewrap_provider: Bubblewrap) -> None:
    tried = "unshare -U true; unshare -r true; mount -t tmpfs x /tmp; chroot / true; echo done"
    result = shell(bubblewrap_provider, tried)
    assert result.stdout == "done\n" and len(result.stderr.splitlines()) >= 4


def test_the_network_of_the_machine_is_out_of_reach(bubblewrap_provider: Bubblewrap) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nfor a in (('127.0.0.1', {port}), ('1.1.1.1', 53), ('169.254.169.254', 80)):\n"
        code += "    try: socket.create_connection(a, 2); print('reached', a)\n    except OSError: pass"
        result = python(bubblewrap_provider, code)
    assert (result.status, result.stdout) == ("ok", "")


@pytest.mark.parametrize(
    ("claim", "code", "statuses"),
    [
        ("memory", "x = bytearray(10**9)", {"out_of_memory"}),
        ("pids", "import os\nwhile True: os.fork()", {"timeout", "nonzero"}),
        ("work_size", "open('big', 'wb').write(bytes(40 << 20))", {"nonzero"}),
    ],
)
def test_a_limit_holds_and_the_next_call_works(
    bubblewrap_provider: Bubblewrap, claim: str, code: str, statuses: set[str]
) -> None:
    if claim not in bubblewrap_provider.claims:
        pytest.skip(f"{claim} does not hold on this machine")

    async def use(box: Sandbox) -> tuple[ExecResult, ExecResult]:
        first = await box.python(code, timeout=1.0 if claim == "pids" else 20.0)
        return first, await box.python("1 + 1")

    first, second = with_box(bubblewrap_provider, use, work_mb=32)
    assert first.status in statuses and second.value == "2"


def test_many_boxes_at_once_do_not_meet(bubblewrap_provider: Bubblewrap) -> None:
    async def run() -> list[str | None]:
        boxes = await asyncio.gather(*(bubblewrap_provider.start(SandboxSpec()) for _ in range(6)))
        try:
            await asyncio.gather(*(box.write("me", str(i).encode()) for i, box in enumerate(boxes)))
            answers = await asyncio.gather(*(box.python("open('/workspace/me').read()") for box in boxes))
            return [answer.value for answer in answers]
        finally:
            await asyncio.gather(*(box.close() for box in boxes))

    assert asyncio.run(run()) == [repr(str(i)) for i in range(6)]


def test_the_terminals_interrupt_does_not_reach_a_box(bubblewrap_provider: Bubblewrap) -> None:
    async def use(box: Sandbox) -> int:
        inner = bubblewrap._live[box.name].child
        assert inner is not None
        return os.getpgid(inner.process.pid)

    assert with_box(bubblewrap_provider, use) != os.getpgid(0)


def test_a_closed_box_leaves_no_process_and_no_control_group(bubblewrap_provider: Bubblewrap) -> None:
    async def run() -> tuple[int, list[Path]]:
        box = await bubblewrap_provider.start(SandboxSpec())
        inner = bubblewrap._live[box.name]
        assert inner.child is not None
        await box.shell("setsid sleep 1000 & sleep 0")
        directories = list(inner.group.directories.values()) if inner.group else []
        await box.close()
        await box.close()
        return inner.child.process.pid, directories

    pid, directories = asyncio.run(run())
    assert not Path(f"/proc/{pid}").exists() and not any(path.exists() for path in directories)


OWNER = """
import asyncio, sys
from espl_envs.sandbox import bubblewrap
from espl_envs.sandbox.base import SandboxSpec

async def main():
    provider = bubblewrap.Bubblewrap()
    boxes = [await provider.start(SandboxSpec()) for _ in range(2)]
    for inner in bubblewrap._live.values():
        print(inner.child.process.pid, *(inner.group.directories.values() if inner.group else ()))
    print("ready", flush=True)
    await boxes[0].python("while True: pass", timeout=1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_boxes_end_with_their_owner(bubblewrap_provider: Bubblewrap, number: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-W", "ignore", "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    lines = []
    for line in owner.stdout:
        if line == "ready\n":
            break
        lines.append(line.split())
    owner.send_signal(number)
    owner.wait()
    owner.stdout.close()
    assert len(lines) == 2
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid, *_ in lines):
        assert time.monotonic() < until, "a box outlived its owner"
        time.sleep(0.01)
    asyncio.run(bubblewrap_provider.reap())
    assert not [path for _, *paths in lines for path in paths if Path(path).exists()]


def test_the_reaper_leaves_living_boxes_alone(bubblewrap_provider: Bubblewrap) -> None:
    async def use(box: Sandbox) -> ExecResult:
        await Bubblewrap().reap()
        return await box.shell("echo here")

    assert with_box(bubblewrap_provider, use).stdout == "here\n"


def test_where_bubblewrap_is_missing_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.shutil, "which", lambda _: None)
    with pytest.raises(SandboxUnavailable, match=r"apt-get install bubblewrap.*docker.*replay"):
        asyncio.run(Bubblewrap().start(SandboxSpec()))


FORBIDDEN = """#!/bin/sh
case "$1" in
    --version|--help) echo bwrap 0.8.0;;
    *) echo "bwrap: No permissions to create new namespace" >&2; exit 1;;
esac
"""


def test_where_namespaces_are_forbidden_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:             # not pytest's, which nobody else may enter
        fake = Path(folder, "bwrap")
        fake.write_text(FORBIDDEN)
        for path in (fake, fake.parent):
            path.chmod(0o755)
        monkeypatch.setattr(host.shutil, "which", lambda _: str(fake))
        with pytest.raises(SandboxUnavailable, match=r"(?s)No permissions.*user_namespaces.*docker"):
            asyncio.run(Bubblewrap().probe())


def test_an_image_that_this_machine_cannot_stand_for_is_refused() -> None:
    with pytest.raises(EsplError, match=r"no images.*'node' use the provider 'docker'"):
        asyncio.run(Bubblewrap().start(SandboxSpec(image="node")))


def hierarchy(tmp_path: Path, mine: str, shared: str) -> Path:
    """A /proc/self and a cgroup2 tree of plain files in which the group above `mine` passes on `shared`."""
    tree = tmp_path / "cgroup"
    (tree / mine).mkdir(parents=True)
    (tree / mine).with_name("cgroup.subtree_control").write_text(shared)
    (tree / mine / "cgroup.subtree_control").write_text("")
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(f"0::/{mine}\n")
    (proc / "mountinfo").write_text(f"30 1 0:1 / {tree} rw - cgroup2 cgroup2 rw\n")
    return proc


def test_version_2_groups_stand_beside_our_own_with_the_limits_in_them(tmp_path: Path) -> None:
    cgroups = Cgroups.find(hierarchy(tmp_path, "user.slice/session.scope", "cpu memory pids\n"))
    assert cgroups is not None and cgroups.version == 2 and set(cgroups.roots) == BY_CGROUP
    group = cgroups.create(SandboxSpec(memory_mb=64, pids=9, cpus=0.5))
    directory, = set(group.directories.values())
    assert directory.parent == tmp_path / "cgroup" / "user.slice"
    written = {path.name: path.read_text() for path in directory.iterdir()}
    assert written == {"memory.max": str(64 << 20), "pids.max": "9", "cpu.max": "50000 100000"}
    assert group.mounts() == [(directory, "/sys/fs/cgroup")]


def test_what_is_not_passed_on_is_not_limited(tmp_path: Path) -> None:
    cgroups = Cgroups.find(hierarchy(tmp_path, "user.slice/session.scope", "memory pids\n"))
    assert cgroups is not None and set(cgroups.roots) == {"memory", "pids"}
    assert Cgroups.find(hierarchy(tmp_path / "none", "user.slice/session.scope", "io\n")) is None
    assert Cgroups.find(tmp_path / "nowhere") is None
