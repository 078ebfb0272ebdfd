"""The command line: wrong input on purpose, exit codes, and never a traceback on the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.errors import EsplError, MissingData
from espl_train import __main__, cli, preflight
from espl_train.runs.summary import Chosen, Score, Summary
from espl_train.settings.subcommands import COMMANDS

Body = Callable[[Any], None]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Body], None]:
    """Puts a small stand-in in place of the loop: five steps with a checkpoint each, then `body`, then a summary."""

    def install(body: Body) -> None:
        class Trainer:
            def __init__(self, config: Any, run: Any, console: Any, *_: Any) -> None:
                self.config, self.run, self.console = config, run, console
                restored = run.restore()
                self.step = restored[0] if restored else 0

            def train(self) -> Summary:
                self.console.begin(self.step, self.config.steps)
                while self.step < self.config.steps:
                    self.step += 1
                    self.run.log.metrics({"step": self.step, "reward/mean": self.step / 10})
                    self.run.save(self.step, {"state": {"step": self.step}})
                    self.console.step({"step": self.step, "reward/mean": self.step / 10})
                    body(self)
                return Summary(
                    self.run.path, self.step, 1.0, 10, 20, 0, (Chosen("p0001", "⊕ multiplies."),),
                    (Score("test", 0.5),),
                )

        module = types.ModuleType("espl_train.loop")
        module.Trainer = Trainer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "espl_train.loop", module)
        monkeypatch.setattr(preflight, "inspect", lambda *_: preflight.Plan((("checked", "nothing"),)))

    return install


SMALL = ["--steps", "3", "--out", "run", "--tensorboard", "no"]


def outcome(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def test_a_run_ends_with_its_plot_and_its_best_prompt(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(lambda _: None)
    code, out, err = outcome(capsys, *SMALL)
    assert code == 0 and err == ""
    assert "step 3/3  reward 0.300" in out and "⊕ multiplies." in out and "plot: run/plot.png" in out
    assert Path("run/plot.png").is_file() and Path("run/best_prompt.txt").read_text() == "⊕ multiplies."


def test_quiet_prints_the_summary_only(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(lambda _: None)
    code, out, _ = outcome(capsys, *SMALL, "--quiet")
    assert code == 0 and "reward 0.300" not in out and "⊕ multiplies." in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--env", "espl/Conventoins-v0"], ["no environment 'espl/Conventoins-v0'", "espl/Conventions-v0"]),
        (["--stesp", "3"], ["no option --stesp", "Did you mean --steps?"]),
        (["--steps", "0"], ["steps is '0'", "at least 1"]),
        (["--preset", "papper"], ["Did you mean paper?"]),
        (["--resume", "nowhere"], ["no run directory nowhere"]),
        (["--config", "absent.toml"], ["absent.toml does not exist"]),
        (["--model", "./absent"], ["./absent", "no such folder"]),
        (["--learner.loss", "ppoo"], ["learner.loss", "ppo"]),
        (["--rollout.top_p", "0.5"], ["biases the ratios"]),
        (["train"], ["Unexpected argument 'train'", "the commands are serve,"]),
        (["exprot", "run"], ["Unexpected argument 'exprot'", "Did you mean export?"]),
    ],
)
def test_wrong_input_is_a_sentence_and_exit_code_2(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = outcome(capsys, *words)
    assert code == 2 and out == "" and err.startswith("espl-train: ")
    assert [part for part in parts if part not in err] == [], err
    assert not Path("runs").exists()


def test_ctrl_c_says_where_the_run_stands_and_how_it_goes_on(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(self: Any) -> None:
        if self.step == 2:
            raise KeyboardInterrupt

    trainer(interrupt)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 130
    assert "stopped; 2 of 3 steps are saved in run; continue with: espl-train --resume run" in err
    trainer(lambda _: None)
    code, out, _ = outcome(capsys, "--resume", "run")
    assert code == 0 and "step 3/3" in out and "step 2/3" not in out
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3


def test_ctrl_c_while_the_command_line_is_still_being_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Impatient:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "espl_train.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "espl_train.cli")
    monkeypatch.delattr("espl_train.cli")
    monkeypatch.setattr(sys, "meta_path", [Impatient(), *sys.meta_path])
    assert __main__.main() == 130
    assert capsys.readouterr().err == "\nespl-train: stopped; before anything was written\n"


def test_sigterm_does_the_same_with_143(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def terminate(self: Any) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer(terminate)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 143 and "stopped by SIGTERM; 2 of 3 steps" in err and "--resume run" in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_unexpected_goes_into_a_file(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def crash(_: Any) -> None:
        raise ZeroDivisionError("division by zero\nand an essay")

    trainer(crash)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 1
    assert "ZeroDivisionError: division by zero; the traceback is in run/crash.txt" in err and "--resume run" in err
    assert "essay" not in err and "in crash" in Path("run/crash.txt").read_text()


def test_an_explained_error_in_training_tells_how_to_go_on(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(_: Any) -> None:
        raise EsplError("too many episodes failed: start the sandbox")

    trainer(fault)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 2 and "start the sandbox" in err and "1 of 3 steps are saved in run" in err


@pytest.mark.parametrize(
    ("error", "code"), [(EsplError("no memory"), 2), (ZeroDivisionError("zero"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_run_that_ends_before_its_first_checkpoint_begins_again_as_it_was(
    error: BaseException, code: int, trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something was logged, nothing is saved: what is suggested works, and is the same run."""
    trainer(lambda _: None)
    loop = sys.modules["espl_train.loop"].Trainer        # type: ignore[attr-defined]

    def early(self: Any) -> None:
        self.run.log.event(0, "problems")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", early)
        ended, _, err = outcome(capsys, *SMALL, "--seed", "5")
    again = "othing is saved yet in run; start again, with the same settings: espl-train --resume run"
    assert ended == code and again in err
    ended, out, _ = outcome(capsys, "--resume", "run")
    assert ended == 0 and "step 1/3" in out and "step 3/3" in out and "seed = 5" in Path("run/config.toml").read_text()
    assert 'dtype = "float32"' in Path("run/config.toml").read_text(), "what this machine chose is written down"
    assert Path("run/events.jsonl").read_text() == ""


def test_a_start_that_fails_leaves_no_directory(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(lambda _: None)
    loop = sys.modules["espl_train.loop"]

    def refuse(*_: Any) -> None:
        raise MissingData("GSM8K is not here: set ESPL_DATA_DIR")

    monkeypatch.setattr(loop, "Trainer", refuse)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 2 and "set ESPL_DATA_DIR" in err and "resume" not in err and not Path("run").exists()


@pytest.mark.parametrize("name", ["torch", "transformers.models", "peft"])
def test_a_missing_package_names_the_extra(
    name: str, trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    trainer(lambda _: None)
    monkeypatch.setattr(sys.modules["espl_train.loop"], "Trainer", missing)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 2 and "pip install 'espl[train]'" in err and name in err


@contextlib.contextmanager
def nobody_reads() -> Iterator[None]:
    """Standard output is a real pipe whose other end is closed."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", encoding="utf-8") as pipe, contextlib.redirect_stdout(pipe):
        yield


def test_where_nobody_reads_the_output_a_command_ends_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_reads():
        assert cli.main(["--help"]) == 141 and cli.main(["--version"]) == 0        # what comes after goes nowhere
    assert capsys.readouterr().err == ""


def test_where_nobody_reads_the_output_a_run_says_how_it_goes_on(
    trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(lambda _: None)
    with nobody_reads():
        assert cli.main(SMALL) == 141
    err = capsys.readouterr().err
    assert "stopped; nobody reads what it prints\n1 of 3 steps are saved in run; continue with: espl-train" in err
    assert "Traceback" not in err and not Path("run/crash.txt").exists()


def test_another_broken_pipe_is_something_unexpected(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def crash(_: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    trainer(crash)
    code, _, err = outcome(capsys, *SMALL)
    assert code == 1 and "something unexpected happened: BrokenPipeError" in err


def test_a_terminal_that_knows_no_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", plain)
    assert cli.main(["--help"]) == 0 and b"\\u2026" in plain.buffer.getvalue()     # type: ignore[attr-defined]


def test_the_same_directory_twice(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(lambda _: None)
    assert outcome(capsys, *SMALL)[0] == 0
    code, _, err = outcome(capsys, *SMALL)
    assert code == 2 and "continue it with: espl-train --resume run" in err
    code, _, err = outcome(capsys, *SMALL, "--seed", "1")
    assert code == 2 and "seed: 0 there, 1 here" in err
    code, _, err = outcome(capsys, "--resume", "run", "--seed", "1")
    assert code == 2 and "seed: 0 there, 1 here cannot change now" in err
    code, out, _ = outcome(capsys, "--resume", "run", "--steps", "5")
    assert code == 0 and "step 5/5" in out


def test_a_continuation_that_is_refused_changes_nothing(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: Any, *_: Any) -> None:
        raise EsplError(f"no server answers for {config.steps} steps")

    trainer(lambda _: None)
    outcome(capsys, *SMALL)
    before = Path("run/config.toml").read_bytes()
    monkeypatch.setattr(preflight, "inspect", refuse)
    code, _, err = outcome(capsys, "--resume", "run", "--steps", "5")
    assert code == 2 and "for 5 steps" in err and Path("run/config.toml").read_bytes() == before


def test_a_damaged_newest_checkpoint_is_told_and_survived(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(lambda _: None)
    outcome(capsys, *SMALL)
    Path("run/checkpoints/step-000003/state.json").write_text("")
    code, out, _ = outcome(capsys, "--resume", "run", "--quiet")
    assert code == 0 and "warning: The checkpoint run/checkpoints/step-000003 is damaged" in out.replace("\n", " ")


def test_a_dry_run_prints_the_configuration_and_writes_nothing(
    trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(lambda _: None)
    code, out, _ = outcome(capsys, "--dry-run", "--preset", "paper", "--seed", "7")
    assert code == 0 and "seed = 7" in out and 'selection = "softmax"' in out and "checked  nothing" in out
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help_and_explains_unknown_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0 and f"usage: espl-train {name}" in capsys.readouterr().out
    code, out, err = outcome(capsys, name, "run", "--no-such-option", "x")
    assert code == 2 and out == "" and "--no-such-option" in err and err.count("\n") == 1


def test_help_and_version_are_quick_and_import_nothing_heavy() -> None:
    code = """
import sys
from espl_train import cli
assert [cli.main([word]) for word in ("--help", "--version", "--oops")] == [0, 0, 2]
sys.exit(bool({"torch", "transformers", "rich", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--learner.learning_rate" in done.stdout and "espl 0." in done.stdout
    assert done.stderr == "espl-train: There is no option --oops. espl-train --help lists all of them.\n"
