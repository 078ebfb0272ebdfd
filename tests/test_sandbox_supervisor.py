"""What the supervisor promises of a call: its result, its end, and that only files and the session outlive it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from supervisor_kit import PATIENCE, Box, boxes

from espl_envs.core.errors import EsplError
from espl_envs.sandbox.base import SandboxPathError
from espl_envs.sandbox.worker.output import KEEP, LIMIT

STUBBORN = "while True:\n  try:\n    while True: pass\n  except BaseException: pass"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Box]]:
    yield from boxes(tmp_path)


@pytest.fixture
def box(start: Callable[..., Box]) -> Box:
    return start()


def ended(pid: int) -> bool:
    """Waits for the end of a process that somebody else started."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def number(path: Path) -> int:
    """Waits for a file with a number in it."""
    for _ in range(6000):
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def still_works(box: Box, fresh: bool | None = None) -> None:
    result = box.python("6 * 7")
    assert (result.status, result.value) == ("ok", "42")
    if fresh is not None:
        assert result.session_fresh is fresh


def test_the_last_expression_is_the_value_and_state_survives(box: Box) -> None:
    first = box.python("import math\nx = 20\nprint('hello')\nx + 1")
    assert (first.status, first.stdout, first.stderr, first.value) == ("ok", "hello\n", "", "21")
    assert (first.exit_code, first.truncated, first.bytes_out, first.session_fresh) == (None, False, 6, True)
    second = box.python("math.floor(x * 1.1)")
    assert (second.value, second.session_fresh) == ("22", False)
    assert box.python("x = 1").value is None
    assert box.python("None").value is None
    assert first.wall_s > 0
    assert first.peak_mb > 1


@pytest.mark.parametrize("source", ["kept + 1", "#" * 1_000_000 + "\nkept + 1"], ids=["short", "long"])
def test_a_session_that_was_stopped_between_calls_goes_on_at_the_next(box: Box, source: str) -> None:
    box.python("import os\nkept = 41\nopen('pid', 'w').write(str(os.getpid()))")
    os.kill(int((box.work / "pid").read_text()), signal.SIGSTOP)
    result = box.python(source, timeout=5.0)
    assert (result.status, result.value, result.session_fresh) == ("ok", "42", False)


def test_output_is_what_reaches_the_descriptors(box: Box) -> None:
    result = box.python(
        "import os, sys, subprocess\nos.write(1, b'raw ')\nprint('text', end=' ', flush=True)\n"
        "subprocess.run(['echo', 'child'])\nos.system('echo shell >&2')\nsys.stderr.write('unfinished')"
    )
    assert (result.stdout, result.stderr) == ("raw text child\n", "shell\nunfinished")


def test_a_traceback_is_of_user_code_alone(box: Box) -> None:
    box.python("def f(x):\n    return 1 / x")
    result = box.python("print('before')\nf(0)")
    assert (result.status, result.stdout, result.value) == ("nonzero", "before\n", None)
    assert [line for line in result.stderr.splitlines() if not set(line) <= set(" ~^")] == [
        "Traceback (most recent call last):",
        '  File "<call 2>", line 2, in <module>', "    f(0)",
        '  File "<call 1>", line 2, in f', "    return 1 / x",
        "ZeroDivisionError: division by zero",
    ]


def test_the_session_is_a_main_module_like_any_other(box: Box) -> None:
    box.python("import pickle, dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int")
    assert box.python("__name__, pickle.loads(pickle.dumps(Point(3)))").value == "('__main__', Point(x=3))"
    assert box.python("import inspect\ndef f(): pass\ninspect.getsource(f)").value == repr("def f(): pass\n")
    box.write("helper.py", b"answer = 42")
    assert box.python("import helper; helper.answer").value == "42"
    assert box.python("[name for name in globals() if not name.startswith('__')]").value == (
        "['pickle', 'dataclasses', 'Point', 'inspect', 'f', 'helper']"
    )


@pytest.mark.parametrize(("source", "status", "value"), [
    ("", "ok", None),
    ("# nothing", "ok", None),
    ("x = 1\r\nif x:\r\n    x += 1\r\nx\r\n", "ok", "2"),
    ("\ufeff1 + 1", "ok", "2"),
    ("'\u00e9\U0001f600'", "ok", "'\u00e9\U0001f600'"),
    ("chr(0xd800)", "ok", r"'\ud800'"),
    ("print(chr(0xd800))", "ok", None),
    ("a\0b", "nonzero", None),
    ("'\ud800'", "nonzero", None),
    ("1 +", "nonzero", None),
    ("def f(:", "nonzero", None),
    ("(" * 5000, "nonzero", None),
    ("10 ** 10 ** 4", "nonzero", None),
    ("input()", "nonzero", None),
    ("raise SystemExit(3)", "nonzero", None),
    ("import sys; sys.exit(0)", "ok", None),
    ("raise KeyboardInterrupt", "nonzero", None),
    ("raise BaseException('all')", "nonzero", None),
    ("def f(): f()\nf()", "nonzero", None),
    ("class R:\n  def __repr__(self): return repr(self)\nR()", "nonzero", None),
    ("class R:\n  def __repr__(self): return 1\nR()", "nonzero", None),
    ("class E(Exception):\n  def __str__(self): raise E\nraise E", "nonzero", None),
    ("x = []; x.append(x); x", "ok", "[[...]]"),
    ("raise MemoryError", "out_of_memory", None),
    ("import os\nif os.fork() == 0:\n  sys = __import__('sys').exit()\nos.wait()[1]", "ok", "0"),
])
def test_every_source_has_an_answer_and_the_session_goes_on(
    box: Box, source: str, status: str, value: str | None,
) -> None:
    box.python("kept = 'kept'")
    result = box.python(source)
    assert (result.status, result.value) == (status, value), result
    assert (result.stderr == "") == (status == "ok")
    assert box.python("kept").value == "'kept'"


@pytest.mark.parametrize("source", [
    "import os; os._exit(0)",
    "import os; os._exit(7)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import ctypes; ctypes.string_at(0)",
    "import os; os.abort()",
    "import os; os.closerange(0, 1024)",
    "import os\nfor fd in range(1024):\n  try: os.dup2(0, fd)\n  except OSError: pass",
    "import sys; sys.setrecursionlimit(10**9)\ndef f(): f.__call__()\nexec('[' * 0 + 'f()')",
])
def test_a_session_that_ends_itself_died_and_the_next_one_is_fresh(box: Box, source: str) -> None:
    box.python("lost = 1")
    result = box.python("print('last words')\n" + source)
    assert result.status in ("died", "out_of_memory"), result
    assert (result.exit_code, result.stdout) == (None, "last words\n")
    still_works(box, fresh=True)
    assert box.python("lost").status == "nonzero"


@pytest.mark.parametrize("source", [
    "import sys; sys.stdout = None; sys.stderr = 3",
    "import sys\nclass Broken:\n  def flush(self): raise ValueError\n  def __getattr__(self, name): raise OSError\n"
    "sys.stdout = sys.stderr = Broken()",
    "import os; os.write = os.read = os._exit = os.getpid = lambda *a: 1 / 0",
    "import json, struct; json.dumps = struct.pack = None",
    "import builtins\nfor name in ('compile', 'exec', 'eval', 'repr', 'len', 'isinstance', 'type', 'BaseException'):\n"
    "  setattr(builtins, name, None)",
    "import signal; signal.signal = None; signal.default_int_handler = None",
    "import sys; sys.modules.clear()",
    "import traceback, linecache; traceback.TracebackException = linecache.getlines = linecache.cache = None",
    "import sys; sys.setrecursionlimit(60)",
    "import gc\nfor o in gc.get_objects():\n  if isinstance(o, dict) and '__name__' in o and o is not globals(): pass",
    "import os; os.chdir('/'); os.environ.clear()",
    "import threading; threading.Thread(target=__import__('time').sleep, args=(1000,)).start()",
])
def test_whatever_user_code_replaces_the_next_call_is_answered(box: Box, source: str) -> None:
    box.python(source)
    result = box.python("6 * 7")
    if result.status != "ok":                # its own loss, and only its own
        assert result.status in ("nonzero", "died"), result
        box.reset()
        result = box.python("6 * 7")
    assert (result.status, result.value) == ("ok", "42")


def test_a_timeout_keeps_variables(box: Box) -> None:
    box.python("import time")
    result = box.python("x = 5\nprint('so far', end='')\ntime.sleep(1000)", timeout=0.2)
    assert (result.status, result.stdout, result.exit_code) == ("timeout", "so far", None)
    assert result.stderr.rstrip().endswith("KeyboardInterrupt")
    assert box.python("x").value == "5"
    assert box.python("while True: x += 1", timeout=0.2).status == "timeout"
    assert box.python("x > 5").value == "True"
    assert box.python("import subprocess; subprocess.run(['sleep', '1000'])", timeout=0.3).status == "timeout"
    assert box.python("import os; os.system('sleep 1000')", timeout=0.3).status == "timeout"
    still_works(box, fresh=False)


@pytest.mark.parametrize("source", [
    STUBBORN,
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
    "import re; re.match('(a+)+$', 'a' * 64 + 'b')",
    "x = 7 ** 10 ** 7; y = x ** 8 % (x - 1)",
])
def test_a_call_that_will_not_listen_is_killed_with_its_session(box: Box, source: str) -> None:
    box.python("begun = True")
    result = box.python("print('so far')\n" + source, timeout=0.5)
    assert (result.status, result.stdout) == ("timeout", "so far\n")
    still_works(box)


def test_a_call_that_stops_itself_is_ended(box: Box) -> None:
    assert box.python("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout=0.2).status == "timeout"
    still_works(box)
    assert box.shell("kill -STOP $$", timeout=0.2).status == "timeout"
    still_works(box)


def test_nothing_that_a_timed_out_call_started_outlives_it(box: Box) -> None:
    source = (
        "import subprocess, time\n"
        "p = subprocess.Popen(['sh', '-c', 'trap : INT TERM; echo $$ > pid; while :; do sleep 1000; done'])\n"
        "q = subprocess.Popen('setsid sh -c \"echo \\\\$\\\\$ > daemon; sleep 1000\" &', shell=True)\n"
        "import os\n"
        "while not all(os.path.exists(f) and open(f).read().strip() for f in ('pid', 'daemon')): time.sleep(0.01)\n"
        "open('ready', 'w').write('1')\n"
        + STUBBORN
    )
    assert box.python(source, timeout=5).status == "timeout"
    assert number(box.work / "ready") == 1
    assert ended(number(box.work / "pid"))
    assert ended(number(box.work / "daemon"))
    still_works(box)


def test_a_daemon_of_the_session_ends_with_the_call_and_a_child_lives_on(box: Box) -> None:
    box.python("import subprocess; child = subprocess.Popen(['sleep', '1000'])")
    box.python("subprocess.run('setsid sh -c \"echo \\\\$\\\\$ > daemon; sleep 1000\" &', shell=True)\n"
               "import os, time\nwhile not os.path.exists('daemon'): time.sleep(0.01)")
    assert ended(number(box.work / "daemon"))
    assert box.python("child.poll() is None").value == "True"
    box.shell("true")
    assert box.python("child.poll() is None").value == "True"


def test_a_shell_call_leaves_only_files(box: Box) -> None:
    result = box.shell("cd /; FOO=1; (setsid sleep 1000 & echo $! > $HOME/pid); sleep 1000 & echo made > $HOME/file")
    assert (result.status, result.exit_code) == ("ok", 0)
    assert ended(number(box.work / "pid"))
    again = box.shell("pwd; cat file; echo \"[$FOO]\"; exit 3")
    assert (again.status, again.exit_code, again.stdout) == ("nonzero", 3, f"{box.work}\nmade\n[]\n")


def test_whoever_holds_stdout_does_not_hold_the_call(box: Box) -> None:
    result = box.shell("sleep 1000 & echo $! > pid; echo done")
    assert (result.status, result.stdout) == ("ok", "done\n")
    assert ended(number(box.work / "pid"))


def test_a_program_that_outlives_its_time_is_ended_and_the_session_is_not(box: Box) -> None:
    box.python("x = 1")
    result = box.shell("trap '' INT TERM; echo $$ > pid; echo so far; while :; do sleep 1000; done", timeout=0.3)
    assert (result.status, result.exit_code, result.stdout) == ("timeout", None, "so far\n")
    assert ended(number(box.work / "pid"))
    assert box.python("x").value == "1"


def test_a_fork_bomb_ends_with_its_time(start: Callable[..., Box]) -> None:
    box = start()
    bomb = "for _ in range(5):\n  if os.fork() == 0:\n    os.setsid()\n    open(f'bomb{os.getpid()}', 'w')\n" + STUBBORN
    box.python("import os")
    assert box.python(bomb, timeout=1).status == "timeout"
    left = [int(path.name[4:]) for path in box.work.glob("bomb*")]
    assert left
    assert all(ended(pid) for pid in left)
    assert box.stats()["processes"] <= 1
    still_works(box)


def test_exec_runs_a_program_without_a_shell(box: Box) -> None:
    result = box.exec(["printf", "%s|", "a b", "$HOME", "", "*"])
    assert (result.status, result.exit_code, result.stdout) == ("ok", 0, "a b|$HOME||*|")
    assert box.exec(["cat"], stdin=b"\x00\xffbytes").bytes_out == 7
    assert box.exec(["sh", "-c", "pwd; echo $A"], cwd="/usr", env={"A": "b"}).stdout == "/usr\nb\n"
    (box.work / "sub").mkdir()
    assert box.exec(["pwd"], cwd="sub").stdout == f"{box.work}/sub\n"
    died = box.exec(["sh", "-c", "kill -TERM $$"])
    assert (died.status, died.exit_code) == ("died", 128 + 15)


def test_what_cannot_start_says_so(box: Box) -> None:
    missing = box.exec(["no-such-program"])
    assert (missing.status, missing.exit_code) == ("nonzero", 127)
    assert "no-such-program" in missing.stderr
    denied = box.exec(["/etc/passwd"])
    assert (denied.status, denied.exit_code) == ("nonzero", 126)
    assert "Permission denied" in denied.stderr
    assert box.exec(["true"], cwd="/no/such/folder").exit_code in (126, 127)
    assert box.exec(["echo", "nul\0"]).exit_code == 126
    assert box.shell("x" * 200_000).exit_code == 126
    assert box.shell("echo $(").status == "nonzero"
    with pytest.raises(EsplError, match="name of a program"):
        box.exec([])


def test_calls_bigger_than_a_frame_arrive_whole(box: Box) -> None:
    assert box.exec(["wc", "-c"], stdin=b"x" * 5_000_000).stdout.strip() == "5000000"
    assert box.exec(["sh", "-c", "echo $#", *["y" * 65536] * 16]).stdout.strip() == "15"
    assert box.python(f"x = '{'z' * 3_000_000}'\nlen(x)").value == "3000000"
    assert box.python("'x' * 5").value == "'xxxxx'"
    assert box.python("#" * (65 << 20)).status == "nonzero"
    still_works(box)


def test_long_output_keeps_its_beginning_and_its_end(box: Box) -> None:
    result = box.python("print('begin' + 'x' * 300_000 + 'end')")
    assert (result.status, result.truncated, result.bytes_out) == ("ok", True, 300_009)
    assert result.stdout.startswith("begin")
    assert result.stdout.endswith("xend\n")
    assert f"[... {300_009 - 2 * KEEP} bytes left out ...]" in result.stdout
    value = box.python("'y' * 1_000_000").value
    assert value is not None
    assert len(value) < 70_000
    shell = box.shell("head -c 300000 /dev/zero | tr '\\0' x; exit 0")
    assert (shell.status, shell.exit_code, shell.bytes_out) == ("ok", 0, 300_000)
    exact = box.python(f"print('x' * {2 * KEEP - 1})")
    assert (exact.truncated, len(exact.stdout)) == (False, 2 * KEEP)


@pytest.mark.parametrize("source", [
    "while True: print('x' * 100_000)",
    "import sys\nwhile True: sys.stderr.write('x' * 100_000)",
    "import os\nwhile True:\n  try: os.write(1, b'x' * 100_000)\n  except BaseException: pass",
])
def test_a_flood_is_ended(box: Box, source: str) -> None:
    result = box.python(source)
    assert (result.status, result.truncated) == ("output_limit", True)
    assert result.bytes_out > LIMIT
    assert len(result.stdout) + len(result.stderr) < 5 * KEEP
    still_works(box)


def test_a_flood_of_the_shell_is_ended(box: Box) -> None:
    assert box.shell("cat /dev/zero").status == "output_limit"
    still_works(box)


def test_a_flood_between_calls_ends_the_session_not_the_box(box: Box) -> None:
    box.python("import os, threading\nflood = lambda: [os.write(1, b'x' * 65536) for _ in iter(int, 1)]\n"
               "threading.Thread(target=flood, daemon=True).start()\npid = open('pid', 'w').write(str(os.getpid()))")
    assert ended(number(box.work / "pid"))
    still_works(box, fresh=True)


def test_bytes_that_are_no_text_are_replaced(box: Box) -> None:
    assert box.shell("printf 'a\\377b'").stdout == "a\N{REPLACEMENT CHARACTER}b"
    assert box.python("import os; os.write(2, bytes([0xc3])); None").stderr == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("forgery", [
    "os.write(fd, b'\\x00' * 200)",
    "os.write(fd, struct.pack('>IBIi', 2, 0, 0, 6) + b'forged')",
    "os.write(fd, struct.pack('>IBIi', 3, 0, 0, 6) + b'forged')",
    "os.write(fd, struct.pack('>IBIi', 2, 0, 0, 2**31 - 1) + b'x' * 70000)",
    "os.write(fd, struct.pack('>IBIi', 2, 0, 0, 6) + b'forged' * 1000)",
    "os.write(fd, struct.pack('>BIII16s', 4, 1, 2, 0, b'') + b'{}')",
])
def test_a_forged_reply_is_at_most_an_answer_to_the_forger(box: Box, forgery: str) -> None:
    box.python("secret = 1")
    box.python(
        f"import os, struct\nfor fd in range(3, 1024):\n  try: {forgery}\n  except OSError: pass\n'mine'"
    )
    for n in range(3):
        result = box.python(f"{n} + 40")
        assert (result.status, result.value) == ("ok", str(n + 40)) or result.status == "died", result
    still_works(box)
    assert box.shell("echo true").stdout == "true\n"


def test_the_supervisor_is_out_of_reach(box: Box) -> None:
    boss = "os.getppid()"
    attempts = [
        f"os.kill({boss}, 9)", "os.kill(-1, 0)", f"os.pidfd_open({boss})", f"os.sched_setaffinity({boss}, [0])",
        f"os.setpriority(os.PRIO_PROCESS, {boss}, 10)", "os.setpriority(os.PRIO_USER, 0, 10)",
        f"resource.prlimit({boss}, resource.RLIMIT_NOFILE, (0, 0))",
    ]
    for attempt in attempts:
        result = box.python(f"import os, resource\n{attempt}")
        assert result.stderr.rstrip().endswith("PermissionError: [Errno 1] Operation not permitted"), (attempt, result)
    assert box.process.returncode is None
    assert box.python("os.sched_setaffinity(0, os.sched_getaffinity(0))").status == "ok"


@pytest.mark.parametrize(("name", "arguments"), [
    ("unshare", (0x10000000,)), ("keyctl", (0, 0)), ("bpf", (0, 0, 0)), ("perf_event_open", (0, 0, 0, 0, 0)),
    ("userfaultfd", (0,)), ("io_uring_setup", (1, 0)), ("ptrace", (0, 0, 0, 0)), ("mount", (0, 0, 0, 0, 0)),
    ("clone", (0x10000000,)), ("setns", (0, 0)), ("process_vm_readv", (1, 0, 0, 0, 0, 0)), ("pidfd_getfd", (0, 0, 0)),
])
def test_what_no_tool_needs_the_kernel_refuses(box: Box, name: str, arguments: tuple[int, ...]) -> None:
    from espl_envs.sandbox.worker import seccomp

    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    call = seccomp._CLONE[column] if name == "clone" else seccomp._NEVER[name][column]
    box.python("import ctypes; libc = ctypes.CDLL(None, use_errno=True)")
    source = f"libc.syscall{(call, *arguments)}, ctypes.get_errno()"
    assert box.python(source).value == "(-1, 1)"


def test_only_ordinary_sockets_can_be_made(box: Box) -> None:
    assert box.python("import socket; socket.socket(socket.AF_VSOCK)").status == "nonzero"
    assert box.python("socket.socket(socket.AF_ALG)").status == "nonzero"
    assert box.python("socket.socketpair()[0].close(); socket.socket(socket.AF_INET).close()").status == "ok"


def test_the_environment_of_user_code_is_the_given_one(start: Callable[..., Box]) -> None:
    os.environ["ESPL_TEST_SECRET"] = "hunter2"
    try:
        box = start(env=(("COLOUR", "blue"),))
    finally:
        del os.environ["ESPL_TEST_SECRET"]
    for result in (box.shell("env"), box.python("import os\nfor item in os.environ.items(): print('='.join(item))")):
        assert "hunter2" not in result.stdout
        names = {line.partition("=")[0]: line.partition("=")[2] for line in result.stdout.splitlines()}
        assert (names["COLOUR"], names["HOME"], names["TMPDIR"]) == ("blue", str(box.work), str(box.tmp))


def test_interrupt_ends_the_call_in_flight(box: Box) -> None:
    async def scene(code: str) -> str:
        call = asyncio.ensure_future(box.remote.python(code))
        while not (box.work / "begun").exists():
            await asyncio.sleep(0.01)
        await box.remote.interrupt()
        (box.work / "begun").unlink()
        return (await call).status

    box.python("kept = 1")
    assert box.run(scene("import time\nopen('begun', 'w')\ntime.sleep(1000)")) == "cancelled"
    assert box.python("kept").value == "1"
    assert box.run(scene("open('begun', 'w')\n" + STUBBORN)) == "cancelled"
    box.interrupt()                      # nothing in flight: nothing happens
    still_works(box)


def test_a_call_whose_task_is_cancelled_ends_and_the_box_stays_in_step(box: Box) -> None:
    async def scene() -> None:
        call = asyncio.ensure_future(box.remote.python("import time\nopen('begun', 'w')\ntime.sleep(1000)"))
        while not (box.work / "begun").exists():
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    box.run(scene())
    assert not box.closed
    still_works(box)


def test_calls_of_many_tasks_take_turns_and_get_their_own_results(box: Box) -> None:
    async def scene() -> list[str | None]:
        results = await asyncio.gather(*(box.remote.python(f"{n} * 10") for n in range(50)))
        return [result.value for result in results]

    assert box.run(scene()) == [str(n * 10) for n in range(50)]


def test_reset_leaves_a_box_as_new(box: Box) -> None:
    box.python("import subprocess, os\np = subprocess.Popen(['sleep', '1000'])\nopen('pid', 'w').write(str(p.pid))")
    sleeper = number(box.work / "pid")
    box.python("os.mkfifo('fifo')\nos.symlink('/etc', 'link')\n"
               "os.mkdir('locked'); open('locked/file', 'w'); os.chmod('locked', 0)\nopen('.hidden', 'w')\n"
               "here = os.getcwd()\nfor _ in range(300):\n  os.mkdir('e' * 200); os.chdir('e' * 200)\nos.chdir('/')")
    box.write(f"{box.tmp}/left", b"over")
    box.reset()
    assert ended(sleeper)
    assert list(box.work.iterdir()) == []
    assert list(box.tmp.iterdir()) == []
    assert Path("/etc/passwd").exists()
    gone = box.python("import os\np")
    assert (gone.status, gone.session_fresh) == ("nonzero", True)
    assert box.python("os.getcwd()").value == repr(str(box.work))


def test_the_lifetime_ends_a_call_and_the_box(start: Callable[..., Box]) -> None:
    box = start(lifetime_s=1.0)
    result = box.python("print('so far')\nimport time\ntime.sleep(1000)")
    assert result.status == "died"
    box.run(asyncio.wait_for(box.process.wait(), PATIENCE))
    assert box.process.returncode is not None


def test_a_session_that_was_killed_between_calls_is_replaced(box: Box) -> None:
    pid = int(box.python("import os; os.getpid()").value or 0)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    result = box.python("1")
    assert result.status in ("ok", "died")
    still_works(box)


@pytest.mark.parametrize("source", [
    "import os\nfor fd in range(3, 1024):\n  try: os.set_blocking(fd, False)\n  except OSError: pass",
    "import threading, time, os\nthreading.Timer(0.05, lambda: os._exit(1)).start()",
    "import os\nfor fd in range(3, 1024):\n  try: os.fstat(fd); os.dup2(0, fd)\n  except OSError: pass",
])
def test_a_call_that_a_dying_session_never_heard_runs_in_a_fresh_one(box: Box, source: str) -> None:
    pid = int(box.python("import os; os.getpid()").value or 0)
    box.python(source)
    result = box.python("6 * 7")
    if result.session_fresh is False:        # the session was still well
        assert ended(pid)
        result = box.python("6 * 7")
    assert (result.status, result.value, result.session_fresh) == ("ok", "42", True)


def test_a_shell_that_kills_the_session_does_not_spoil_the_next_call(box: Box) -> None:
    for _ in range(3):
        box.shell("kill -KILL $(pgrep -P $PPID)")
        still_works(box, fresh=True)


def test_half_a_character_is_no_reason_to_fail(box: Box) -> None:
    assert box.shell("echo \ud800 | wc -c").stdout.strip() == "4"
    assert box.shell("printf '\udcff' | wc -c").stdout.strip() == "1"
    assert box.exec(["echo", "\ud800"]).exit_code == 126
    assert box.exec(["true"], env={"A": "\ud800"}).exit_code == 126
    assert box.exec(["true"], cwd="\ud800").exit_code == 126
    for call in (box.read, box.list, box.stat):
        with pytest.raises(SandboxPathError):
            call("\ud800")
    with pytest.raises(SandboxPathError):
        box.put_tree({"\ud800": b""})


def test_stats_tell_of_the_box(box: Box) -> None:
    box.python("1")
    stats = box.stats()
    assert stats["uptime_s"] > 0
    assert stats["processes"] == 1
