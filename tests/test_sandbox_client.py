"""The two ends of a box's stream: what breaks it, who notices, and that a box that is given up is removed, once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from supervisor_kit import COMMAND, PATIENCE, Box, Wire, boxes

from espl_envs.core.errors import EsplError
from espl_envs.sandbox.attestation import CLAIMS, missing
from espl_envs.sandbox.base import SandboxFault, SandboxSpec
from espl_envs.sandbox.client import _Late
from espl_envs.sandbox.worker import frames
from espl_envs.sandbox.worker.frames import Encoder

ROOTS = {root: {"bytes": 64 << 20, "options": ["rw", "nosuid", "nodev"]} for root in ("/workspace", "/tmp")}
GOOD = {
    "pid": 1, "uid": 10001, "gid": 10001, "groups": [10001], "capabilities": {"CapEff": "0000000000000000"},
    "capabilities_bounding": "0000000000000000", "no_new_privileges": True, "seccomp": 2, "stacked_seccomp": True,
    "routes": [], "root_read_only": True, "writable": ["/workspace", "/tmp", "/dev/shm"], "docker_socket": False,
    "roots": ROOTS,
    "memory_bytes": 256 << 20, "memory_and_swap_bytes": 256 << 20, "pids": 64, "cpus": 1.0,
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Box]]:
    yield from boxes(tmp_path)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    wire = Wire(tmp_path)
    yield wire
    wire.close()


def gone(pid: int) -> bool:
    """Waits for the end of a process."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def fault(call: Callable[..., Any], *arguments: Any) -> SandboxFault:
    with pytest.raises(SandboxFault) as caught:
        call(*arguments)
    return caught.value


def wait_for(path: Path) -> str:
    for _ in range(6000):
        with suppress(FileNotFoundError):
            text = path.read_text()
            if text.endswith("\n"):
                return text
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def test_a_closed_box_is_gone_and_was_removed_once(start: Callable[..., Box]) -> None:
    box = start()
    assert not box.closed
    box.close()
    box.close()
    assert (box.closed, box.removed, box.process.returncode) == (True, 1, 0)
    for call in (box.python, box.shell, box.read, box.list, box.stat):
        assert fault(call, "1").kind == "gone"
    for call in (box.reset, box.stats, box.get_tree):
        assert fault(call).kind == "gone"
    box.interrupt()


def test_a_supervisor_that_dies_is_noticed_also_while_nobody_asks(start: Callable[..., Box]) -> None:
    box = start()
    box.python("import os; open('pid', 'w').write(f'{os.getpid()}\\n')")
    session = int(wait_for(box.work / "pid"))
    box.process.kill()
    box.run(box.process.wait())
    box.run(asyncio.sleep(0))
    assert gone(session)
    assert fault(box.python, "1").kind == "gone"
    assert (box.closed, box.removed) == (True, 1)


def test_a_supervisor_that_dies_in_a_call_is_a_fault_not_a_result(start: Callable[..., Box]) -> None:
    box = start()

    async def scene() -> None:
        call = asyncio.ensure_future(box.remote.shell("echo $$ > pid; sleep 1000"))
        while not (box.work / "pid").exists():
            await asyncio.sleep(0.01)
        box.process.kill()
        with pytest.raises(SandboxFault, match="gone"):
            await call

    box.run(scene())
    assert gone(int(wait_for(box.work / "pid")))
    assert box.removed == 1


def test_a_box_that_does_not_answer_in_time_is_given_up(start: Callable[..., Box]) -> None:
    box = start(how={"grace": 0.2})

    async def remove() -> None:
        box.removed += 1
        box.process.send_signal(signal.SIGCONT)
        box.process.kill()
        await box.process.wait()

    box.remote._remove = remove
    box.process.send_signal(signal.SIGSTOP)
    said = fault(box.python, "1", 0.1)
    assert (said.kind, box.removed, box.closed) == ("gone", 1, True)
    assert "limit of 0.1 s" in str(said)


def test_a_call_that_is_cancelled_as_its_time_ends_is_cancelled_and_its_box_gone(start: Callable[..., Box]) -> None:
    box = start(how={"grace": 0.1})

    async def scene() -> None:
        call = asyncio.ensure_future(box.remote.python("while True: pass", timeout=PATIENCE))
        await asyncio.sleep(0.1)
        box.remote._reader.set_exception(_Late())          # what the clock would do, in the same turn of the loop
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    box.run(scene())
    assert (box.closed, box.removed) == (True, 1)
    assert fault(box.python, "1").kind == "gone"


@pytest.mark.parametrize(("program", "kind"), [
    ("raise SystemExit", "start"),
    ("print('hello, I am no supervisor at all, but I talk a lot')", "protocol"),
    ("import sys; sys.stdout.buffer.write(bytes(1000)); sys.stdout.flush(); sys.stdin.read()", "protocol"),
    ("import sys; sys.stdin.read()", "start"),
])
def test_what_is_no_supervisor_is_removed(start: Callable[..., Box], program: str, kind: str) -> None:
    removed = []

    async def remove() -> None:
        removed.append(1)

    how = {"remove": remove, "timeout": 0.5 if "stdin.read" in program and kind == "start" else PATIENCE}
    assert fault(start, (sys.executable, "-c", program), how).kind == kind
    assert removed == [1]


IMPOSTOR = """
import sys
sys.path.insert(0, {path!r})
from espl_envs.sandbox.worker import frames
from espl_envs.sandbox.worker.frames import Decoder, Encoder
import os
decoder, encoder = Decoder(frames.TO_BOX), None
while data := os.read(0, 1 << 18):
    for frame in decoder.feed(data):
        encoder = encoder or Encoder(frames.TO_HOST, decoder.key)
        if frame.kind == frames.HELLO:
            os.write(1, encoder.encode(frames.READY, {{"version": frames.VERSION, "facts": {{}}}}))
        elif frame.kind == frames.CALL:
            call = frame.seq
            os.write(1, {answer})
"""
RESULT = '{"call": call, "status": "ok", "exit_code": 0, "out": 0, "err": 0, "value": False, "truncated": False,' \
    ' "bytes_out": 0, "wall_us": 0, "cpu_us": 0, "peak_kib": 0'


@pytest.mark.parametrize("answer", [
    f'encoder.encode(frames.RESULT, {RESULT}, "call": call + 1}})',
    f'encoder.encode(frames.RESULT, {RESULT}, "status": "splendid"}})',
    f'encoder.encode(frames.RESULT, {RESULT}, "exit_code": "0"}})',
    f'encoder.encode(frames.RESULT, {RESULT}, "out": None}})',
    f'encoder.encode(frames.RESULT, {RESULT}, "wall_us": "0"}})',
    f'encoder.encode(frames.RESULT, {RESULT}, "cpu_us": 10 ** 400}})',
    'encoder.encode(frames.RESULT, {"call": call})',
    'encoder.encode(frames.RESULT, {})',
    'encoder.encode(frames.READY, {"call": call})',
    f'encoder.encode(frames.RESULT, {RESULT}}}) + encoder.encode(frames.RESULT, {RESULT}}})',
    f'Encoder(frames.TO_HOST, decoder.key).encode(frames.RESULT, {RESULT}}})',
    f'Encoder(frames.TO_HOST, bytes(32)).encode(frames.RESULT, {RESULT}}})',
    'data',
    'b"\\xff" * 100',
])
def test_an_answer_that_breaks_the_protocol_ends_the_box(start: Callable[..., Box], answer: str) -> None:
    program = IMPOSTOR.format(path=str(Path(__file__).parents[1]), answer=answer)
    box = start((sys.executable, "-c", program))
    assert fault(box.python, "1").kind == "protocol"
    assert (box.closed, box.removed) == (True, 1)
    assert fault(box.python, "1").kind == "gone"


@pytest.mark.parametrize("call", ["list", "stat", "read", "get_tree", "stats"])
def test_file_answers_without_sense_end_the_box(start: Callable[..., Box], call: str) -> None:
    answer = 'encoder.encode(frames.RESULT, {"call": call, "entries": 3, "entry": [1], "stats": [], "sizes": "x"})'
    box = start((sys.executable, "-c", IMPOSTOR.format(path=str(Path(__file__).parents[1]), answer=answer)))
    assert fault(getattr(box, call), *(["x"] if call in ("list", "stat", "read") else [])).kind == "protocol"


def test_a_weaker_box_than_claimed_is_refused_with_what_is_missing(start: Callable[..., Box]) -> None:
    removed = []

    async def remove() -> None:
        removed.append(1)

    said = fault(start, COMMAND, {"claims": frozenset({"pid_namespace", "memory"}), "remove": remove})
    assert said.kind == "refused"
    assert "not the first of its namespace" in str(said)
    assert "memory is not limited" in str(said)
    assert removed == [1]


def test_a_timeout_that_is_none_is_refused(start: Callable[..., Box]) -> None:
    box = start()
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(EsplError, match="timeout"):
            box.python("1", timeout)
    assert box.python("1").ok


def test_end_of_stdin_ends_an_idle_box(wire: Wire) -> None:
    wire.greet()
    wire.hang_up()
    assert wire.last_words() == ""


def test_end_of_stdin_before_hello_ends_it(wire: Wire) -> None:
    wire.hang_up()
    assert wire.last_words() == ""


@pytest.mark.parametrize(("op", "body"), [
    ("python", b"import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\n"
               b"while True:\n  try: time.sleep(1000)\n  except BaseException: pass"),
    ("shell", b"setsid sh -c 'trap \"\" INT TERM; echo $$ > pid; sleep 1000; sleep 1000' & sleep 1000"),
    ("python", b"import os\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
               b"    open('pid', 'w').write(f'{os.getpid()}\\n')\nwhile True: pass"),
])
def test_end_of_stdin_during_a_call_ends_everybody(wire: Wire, op: str, body: bytes) -> None:
    wire.greet()
    wire.call({"op": op}, body)
    pid = int(wait_for(wire.folder / "pid"))
    wire.hang_up()
    wire.last_words()
    assert gone(pid)


def test_a_host_that_does_not_listen_blocks_nobody(wire: Wire) -> None:
    """The results of file reads fill the pipe; stdin is heeded all the same."""
    wire.greet()
    (wire.folder / "big").write_bytes(bytes(1 << 19))
    wire.call({"op": "read", "files": [["big", 0, 1 << 19]]})
    wire.hang_up()
    wire.last_words()


@pytest.mark.parametrize("violation", [
    b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n" + b"\r\n" * 20, Encoder(frames.TO_BOX, bytes(32)).encode(frames.CALL, {}),
])
def test_what_is_no_frame_ends_the_box(wire: Wire, violation: bytes) -> None:
    wire.greet()
    wire.send(violation)
    assert "espl supervisor:" in wire.last_words()


def test_a_frame_that_is_played_again_ends_the_box(wire: Wire) -> None:
    wire.greet()
    call = wire.encoder.encode(frames.CALL, {"op": "stats", "timeout": 1})
    wire.send(call)
    assert wire.receive().header["call"] == 1
    wire.send(call)
    assert "frame 1 where frame 2 is due" in wire.last_words()


def test_a_second_call_while_one_is_in_flight_ends_the_box(wire: Wire) -> None:
    wire.greet()
    wire.call({"op": "shell"}, b"sleep 1000")
    wire.call({"op": "shell"}, b"true")
    assert "in flight" in wire.last_words()


def test_an_unknown_operation_ends_the_box(wire: Wire) -> None:
    wire.greet()
    wire.call({"op": "format the disk"})
    assert "unknown operation" in wire.last_words()


def test_a_call_that_dribbles_in_is_answered(wire: Wire) -> None:
    wire.greet()
    data = wire.encoder.encode(frames.CALL, {"op": "python", "timeout": PATIENCE}, b"6 * 7")
    for position in range(len(data)):
        wire.send(data[position:position + 1])
    answer = wire.receive()
    assert (answer.header["status"], answer.body) == ("ok", b"42")


def test_signals_do_not_reach_the_supervisor(wire: Wire) -> None:
    wire.greet()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE, signal.SIGALRM):
        os.kill(wire.process.pid, number)
    for _ in range(100):
        os.kill(wire.process.pid, signal.SIGCHLD)
    wire.call({"op": "python"}, b"6 * 7")
    assert wire.receive().body == b"42"


def test_parts_of_a_call_that_was_given_up_are_not_part_of_the_next(wire: Wire) -> None:
    wire.greet()
    wire.call({"op": "part", "first": True}, b"1 + ")
    wire.receive()
    wire.call({"op": "python"}, b"41")
    assert wire.receive().body == b"41"
    for part in (b"1 + ", b"2 + "):
        wire.call({"op": "part", "first": part == b"1 + "}, part)
        wire.receive()
    wire.call({"op": "python", "parted": True}, b"3")
    assert wire.receive().body == b"6"


def test_a_good_box_lacks_nothing() -> None:
    assert missing(GOOD, SandboxSpec(), CLAIMS) == ()


@pytest.mark.parametrize(("claim", "fact"), [
    ("pid_namespace", {"pid": 7}), ("network", {"routes": ["eth0"]}), ("read_only_root", {"root_read_only": False}),
    ("read_only_root", {"writable": ["/workspace", "/host"]}), ("no_capabilities", {"capabilities": {"CapEff": "01"}}),
    ("no_capabilities", {"capabilities_bounding": "00000000a80425fb"}),
    ("no_capabilities", {"capabilities_bounding": "?"}),
    ("no_new_privileges", {"no_new_privileges": False}), ("seccomp", {"seccomp": 0}),
    ("stacked_seccomp", {"stacked_seccomp": False}), ("unprivileged_uid", {"uid": 0}),
    ("unprivileged_uid", {"groups": [0]}), ("memory", {"memory_bytes": 512 << 20}), ("memory", {"memory_bytes": None}),
    ("memory", {"memory_and_swap_bytes": None}),
    ("pids", {"pids": None}), ("pids", {"pids": 4096}), ("cpu", {"cpus": 2.0}), ("cpu", {"cpus": None}),
    ("work_size", {"roots": {**ROOTS, "/workspace": {"bytes": 1 << 40, "options": ["nosuid", "nodev"]}}}),
    ("work_size", {"roots": {**ROOTS, "/tmp": {"options": ["nosuid", "nodev"]}}}),
    ("work_mounts", {"roots": {**ROOTS, "/tmp": {"bytes": 1, "options": ["rw", "nosuid"]}}}),
    ("no_docker_socket", {"docker_socket": True}),
])
def test_each_weakness_is_named(claim: str, fact: dict[str, Any]) -> None:
    facts = {**GOOD, **fact}
    assert len(missing(facts, SandboxSpec(), frozenset({claim}))) == 1
    assert missing(facts, SandboxSpec(), CLAIMS - {claim}) == ()


def test_what_a_box_does_not_say_it_does_not_have() -> None:
    assert len(missing({}, SandboxSpec(), CLAIMS)) == len(CLAIMS)
    with pytest.raises(ValueError, match="no such claims: bulletproof"):
        missing(GOOD, SandboxSpec(), frozenset({"bulletproof"}))
