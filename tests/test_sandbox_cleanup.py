"""Owners are told apart from those who inherit their number; the last hooks remove what is noted, and only that."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from espl_envs.sandbox import cleanup
from espl_envs.sandbox.cleanup import EXPIRES, MARK, OWNER, Owner, abandoned, labels, owner

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="process start times are read from /proc")


def test_labels_name_this_process_and_the_end_of_the_box() -> None:
    marks = labels("docker", 100)
    assert marks[MARK] == "docker"
    assert Owner.parse(marks[OWNER]) == owner() == owner()
    assert 100 < float(marks[EXPIRES]) - time.time() < 100 + 2 * cleanup.GRACE
    assert abandoned(marks) == ""
    assert abandoned(marks, time.time() + 100) == "", "it may still end by itself"
    assert "lifetime is over" in abandoned(marks, time.time() + 1000)


def with_owner(who: Owner) -> dict[str, str]:
    return {**labels("docker", 100), OWNER: str(who)}


@linux
def test_a_dead_owner_is_found_out_also_behind_a_reused_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = cleanup._start_time(child.pid)
    assert start is not None
    who = replace(owner(), pid=child.pid, start=start)
    assert abandoned(with_owner(who)) == ""
    assert "is dead" in abandoned(with_owner(replace(who, start=str(int(start) - 1)))), "another process of this number"
    child.kill()
    while cleanup._start_time(child.pid) is not None:
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists(), "a zombie: nobody has waited for it"
    assert "is dead" in abandoned(with_owner(who))
    child.communicate()
    assert "is dead" in abandoned(with_owner(who))


def test_an_owner_elsewhere_is_judged_by_time_alone() -> None:
    """Another machine, an earlier boot, another pid namespace: its process numbers mean nothing here."""
    for who in (replace(owner(), boot="another", pid=1), replace(owner(), namespace="1", pid=1)):
        assert abandoned(with_owner(who)) == ""
        assert "lifetime is over" in abandoned(with_owner(who), time.time() + 1000)


@pytest.mark.parametrize("damage", [
    {OWNER: ""}, {OWNER: "nonsense"}, {OWNER: "a.b.c.d"}, {EXPIRES: ""}, {EXPIRES: "soon"},
])
def test_what_is_ours_but_cannot_be_read_goes(damage: dict[str, str]) -> None:
    assert abandoned({**labels("docker", 100), **damage}) == "its labels cannot be read"


def test_what_is_not_ours_stays() -> None:
    assert abandoned({}) == abandoned({EXPIRES: "0", OWNER: "x", "com.docker.compose.project": "theirs"}) == ""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """The register of boxes, empty for the length of a test."""
    mine: dict[str, object] = {}
    monkeypatch.setattr(cleanup, "_live", mine)
    yield mine


@pytest.mark.usefixtures("registry")
def test_the_last_hook_removes_what_is_noted_once_and_together() -> None:
    removed: list[list[str]] = []

    def remove(names: Sequence[str]) -> None:
        removed.append(list(names))

    def fail(names: Sequence[str]) -> None:
        remove(names)
        raise OSError("no daemon")

    cleanup.keep("other", fail)
    for name in ("a", "b", "c"):
        cleanup.keep(name, remove)
    cleanup.forget("b")
    cleanup.forget("never")
    assert cleanup.kept() == ("other", "a", "c")
    cleanup.remove_all()
    cleanup.remove_all()
    assert removed == [["other"], ["a", "c"]]


@linux
@pytest.mark.usefixtures("registry")
def test_a_forked_child_lets_go_of_the_streams() -> None:
    """Or a box would outlive its owner for as long as the owner's children live."""
    here, there = socket.socketpair()
    cleanup.keep("box", lambda _: None, here.fileno())
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stream = Path(f"/proc/self/fd/{here.fileno()}").readlink()
            os.write(tell, json.dumps([cleanup.kept(), str(stream)]).encode())
            signal.pause()
        finally:
            os._exit(0)
    try:
        kept, stream = json.loads(os.read(ready, 1000))
        assert (kept, stream) == ([], "/dev/null")
        here.sendall(b"the parent's end still works")
        assert there.recv(100)
        here.close()
        there.settimeout(60)
        assert there.recv(100) == b"", "the child does not hold it open"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@linux
def test_a_forked_child_dies_of_a_signal_whatever_it_waits_for() -> None:
    """With a handler in Python it lives on, should the signal come just before it begins to wait for a lock."""
    done = dying("""
assert cleanup.catch_signals()
def fork():
    child = os.fork()
    if child == 0:
        print(*(signal.getsignal(getattr(signal, name)) is signal.SIG_DFL for name in cleanup.SIGNALS), flush=True)
        assert cleanup.catch_signals(), "boxes of its own are removed again"
        print(*(signal.getsignal(getattr(signal, name)) is cleanup._ended_by for name in cleanup.SIGNALS), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
fork()
thread = threading.Thread(target=fork)
thread.start()
thread.join()
print(signal.getsignal(signal.SIGTERM) is cleanup._ended_by)
""")
    yes = " ".join(["True"] * len(cleanup.SIGNALS)) + "\n"
    assert (done.stdout, done.stderr) == (yes * 4 + "True\nremoved box\n", "")


def dying(program: str) -> subprocess.CompletedProcess[str]:
    start = """
import os, signal, sys, threading
from espl_envs.sandbox import cleanup
cleanup.keep("box", lambda names: print("removed", *names, flush=True))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", start + program], env=environment, capture_output=True, text=True,
                          timeout=60, check=False)


def test_the_end_of_the_process_removes_boxes() -> None:
    for program in ("", "sys.exit(0)", "raise ValueError", "raise KeyboardInterrupt"):
        assert dying(program).stdout == "removed box\n", program


@pytest.mark.parametrize("name", cleanup.SIGNALS)
def test_a_signal_removes_boxes_and_then_kills_as_it_would_have(name: str) -> None:
    done = dying(f"assert cleanup.catch_signals(); os.kill(os.getpid(), signal.{name}); print('survived')")
    assert (done.stdout, done.returncode) == ("removed box\n", -getattr(signal, name))


def test_handlers_of_the_application_are_left_alone() -> None:
    done = dying("""
signal.signal(signal.SIGTERM, lambda *_: print("its own"))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
cleanup.catch_signals()
os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGHUP)
print("it goes on", cleanup.kept())
""")
    assert done.stdout == "its own\nit goes on ('box',)\nremoved box\n"


def test_a_later_handler_that_calls_the_one_before_it_reaches_ours() -> None:
    done = dying("""
cleanup.catch_signals()
before = signal.getsignal(signal.SIGTERM)
def handler(*arguments):
    print("its own", flush=True)
    before(*arguments)
signal.signal(signal.SIGTERM, handler)
os.kill(os.getpid(), signal.SIGTERM)
""")
    assert (done.stdout, done.returncode) == ("its own\nremoved box\n", -signal.SIGTERM)


def test_only_the_main_thread_can_catch_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(cleanup.catch_signals()))
    thread.start()
    thread.join()
    assert answers == [False] and signal.getsignal(signal.SIGTERM) is before
