"""A run is continued with the agent that it was begun with: what an agent is made of is known by content."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import iniconfig
import pytest
from evaluate_kit import ADD, lines

from espl_envs.evaluate import fingerprint
from espl_envs.evaluate.callables import CallableDoor
from espl_envs.evaluate.cli import main
from espl_envs.evaluate.program import words_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    imports = ("json", "os.path", "numpy", "helper")
    mine = "".join(f"import {name}\n" for name in imports) + "from tools import search as s\nfrom espl_envs import x\n"
    for name, text in {
        "sub/mine.py": f"{mine}def agent(messages, tools):\n    from deep.er import thing\n    return ''\n",
        "sub/helper.py": "import mine, here_only", "sub/tools/__init__.py": "", "sub/tools/web.py": "from . import *",
        "sub/tools/search.py": "from . import web", "sub/tools/unused.py": "", "sub/deep/er.py": "not python (",
        "here_only.py": "", "sub/espl_envs/x.py": "", "sub/notes.txt": "",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def made_of(agent: str) -> dict[str, str]:
    return dict(CallableDoor(agent).config.files)


def test_an_agent_is_its_file_and_what_it_imports_from_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "helper", sys)             # nothing is run to find that out
    Path("sub/mine.py").write_text(Path("sub/mine.py").read_text().replace("from espl_envs import x", "")
                                   .replace("import helper", "try:\n    import helper\nexcept ImportError: pass")
                                   .replace("from tools import search as s", "if 0:\n    from tools import search"))
    found = made_of("sub/mine.py:agent")
    assert set(found) == {"mine.py", "helper.py", "tools/__init__.py", "tools/search.py", "tools/web.py", "deep/er.py",
                          str(Path("here_only.py").resolve())}  # fmt: skip
    assert all(len(value) == fingerprint.DIGITS and int(value, 16) >= 0 for value in found.values())
    for name in ("helper.py", "tools/web.py", "deep/er.py"):
        (Path("sub") / name).write_text("# other")
        now = made_of("sub/mine.py:agent")
        assert {one for one in found if now.get(one) != found[one]} >= {name}, "an edit is seen"
        found = now


def test_a_module_counts_with_its_packages_and_an_installed_one_alone() -> None:
    Path("pack/inner").mkdir(parents=True)
    for name, text in {"pack/__init__.py": "", "pack/inner/__init__.py": "", "pack/other.py": "",
                       "pack/inner/mod.py": "from .. import other\nagent = lambda messages, tools: ''"}.items():
        Path(name).write_text(text)
    assert set(made_of("pack.inner.mod:agent")) == {"pack/__init__.py", "pack/inner/__init__.py", "pack/inner/mod.py",
                                                    "pack/other.py"}  # fmt: skip
    found = fingerprint.of_module(iniconfig)
    assert found and all(name.startswith("iniconfig/") for name in found)
    assert fingerprint.of_module(sys) == {}


def test_a_command_is_its_program_and_the_files_among_its_words() -> None:
    Path("go.py").write_text("import helper_of_go")
    Path("helper_of_go.py").write_text("")
    words = words_of(f"{sys.executable} -O go.py --notes sub/notes.txt {{task_file}}")
    found = fingerprint.of_words(words)
    assert set(found) == {sys.executable, "go.py", "helper_of_go.py", "sub/notes.txt"}
    Path("helper_of_go.py").write_text("# other")
    changed = fingerprint.of_words(words)
    assert {name for name in found if changed[name] != found[name]} == {"helper_of_go.py"}


AGENT = "def agent(messages, tools):\n    return '{}'\n"


def evaluate(*words: str) -> int:
    return main(["--env", ADD, "--agent", "edited.py:agent", "--out", "run", "--quiet", *words])


def test_results_of_two_agents_are_not_mixed_unawares(capsys: pytest.CaptureFixture[str]) -> None:
    Path("edited.py").write_text(AGENT.format("one"))
    assert evaluate("--limit", "2") == 0 and evaluate("--limit", "2", "--resume") == 0
    digest = json.loads(Path("run/config.json").read_text())["agent"]["files"]["edited.py"]
    assert digest == fingerprint.digest(Path("edited.py")) and digest in Path("run/report.html").read_text()
    capsys.readouterr()
    Path("edited.py").write_text(AGENT.format("two"))
    before = Path("run/config.json").read_bytes()
    assert evaluate("--limit", "4", "--resume") == 2
    said = capsys.readouterr().err
    assert "another version of the agent (edited.py changed)" in said and "--same-agent" in said
    assert len(lines(Path("run"))) == 2 and Path("run/config.json").read_bytes() == before
    assert evaluate("--limit", "4", "--same-agent") == 2 and "is for --resume" in capsys.readouterr().err

    assert evaluate("--limit", "4", "--resume", "--same-agent") == 0
    assert "it may be a mixture of two agents" in capsys.readouterr().out
    assert evaluate("--limit", "4", "--resume") == 0, "those are its files from now on"
    assert "a mixture of two agents" in capsys.readouterr().out, "and it is never forgotten"
    assert "mixture of two agents" in Path("run/report.html").read_text()
    assert main(["--env", ADD, "--agent", "silent", "--out", "silent", "--limit", "4", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["compare", "silent", "run"]) == main(["leaderboard", "."]) == 0
    assert capsys.readouterr().out.count("edited.py:agent (changed)") >= 2


def test_another_temperature_is_no_matter_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("edited.py").write_text(AGENT.format("one"))
    assert evaluate("--limit", "1") == 0
    Path("edited.py").write_text(AGENT.format("two"))
    assert evaluate("--limit", "1", "--resume", "--same-agent", "--timeout", "5") == 2
    assert "agent.settings.timeout: 600.0 there, 5.0 here" in capsys.readouterr().err


def test_the_mutant_that_looks_at_names_alone_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fingerprint, "digest", lambda file: file.name)
    with pytest.raises(AssertionError):
        test_results_of_two_agents_are_not_mixed_unawares(capsys)
