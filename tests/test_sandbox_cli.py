"""espl-sandbox: exit codes to rely on, one sentence for what the user can put right, JSON that parses."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.errors import EsplError
from espl_envs.sandbox import attacks, bench, cli, doctor, images, providers
from espl_envs.sandbox.base import SandboxFault, SandboxUnavailable
from espl_envs.sandbox.bubblewrap import Bubblewrap
from espl_envs.sandbox.doctor import Finding

Captured = pytest.CaptureFixture[str]


class Nothing:
    """A provider that only says whether it works."""

    name = "docker"
    claims = frozenset({"pid_namespace"})

    def __init__(self, problem: Exception | None = None, gone: int = 0) -> None:
        self.problem, self.gone, self.closed = problem, gone, False

    async def probe(self) -> dict[str, Any]:
        if self.problem is not None:
            raise self.problem
        return {"engine": "1.0"}

    async def reap(self, everything: bool = False) -> int:
        if self.problem is not None:
            raise self.problem
        return self.gone + everything

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Nothing], Nothing]:
    """Puts a provider in the place of every other."""

    def put(made: Nothing) -> Nothing:
        monkeypatch.setattr(cli, "provider", lambda name: made if providers.check(name) else None)
        return made

    return put


@pytest.mark.parametrize("words", [
    ["selftest", "--provider", "dockr"], ["attack", "no such attack"], ["bench", "nothing"],
    ["bench", "--write", "starts"], ["bench", "--write", "--provider", "bubblewrap"],
    ["selftest", "--provider", "replay"], ["doctor", "--provider", "what"], ["doctor", "--provider", "replay"],
    ["gc", "--provider", "podman"], ["attack", "--provider", "unsafe_local", "DNS"],
])
def test_bad_input_is_one_sentence_and_exit_code_two(words: list[str], capsys: Captured) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("espl-sandbox: ") and "Traceback" not in said.err and said.out == ""


@pytest.mark.parametrize(("words", "said"), [
    ([], "COMMAND"), (["docter"], "did you mean doctor?"), (["attack", "--imge", "x"], "did you mean --image?"),
    (["fly"], "choose from"), (["build", "--provider", "docker"], "espl-sandbox build --help lists all options"),
    (["build", "--wrong"], "--help lists all options"),
])
def test_words_that_no_command_knows_are_exit_code_two_with_the_nearest(
    words: list[str], said: str, capsys: Captured
) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("espl-sandbox: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in ("build", "doctor", "selftest", "attack",
                                                                             "bench", "gc"))])
def test_every_command_explains_itself(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0 and len(capsys.readouterr().out.splitlines()) > 5


def test_an_error_is_json_where_json_was_asked_for(capsys: Captured) -> None:
    assert cli.main(["selftest", "--provider", "dockr", "--json"]) == 2
    assert "did you mean 'docker'" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("problem", [SandboxUnavailable("no daemon; three remedies"), SandboxFault("start", "no box")])
@pytest.mark.parametrize("words", [["selftest"], ["attack", "DNS"], ["bench", "starts"]])
def test_a_provider_that_cannot_work_is_exit_code_two(
    words: list[str], problem: EsplError, stand_in: Callable[[Nothing], Nothing], capsys: Captured,
) -> None:
    stand_in(Nothing(problem))
    assert cli.main(words) == 2
    assert str(problem) in capsys.readouterr().err


def test_no_docker_names_the_remedies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    assert cli.main(["selftest"]) == 2
    said = capsys.readouterr().err
    assert all(remedy in said for remedy in ("(1)", "(2)", "(3)", "bubblewrap"))


def test_attacks_are_chosen_by_group_claim_or_part_of_a_name(capsys: Captured) -> None:
    def listed(*words: str) -> set[str]:
        assert cli.main(["attack", "--list", "--json", *words]) == 0
        return set(json.loads(capsys.readouterr().out))

    assert listed() == {attack.name for attack in attacks.ATTACKS}
    assert listed("files") >= {attack.name for attack in attacks.GROUPS["files"]}
    assert "DNS" in listed("network") and "busy loop" not in listed("network")
    assert listed("fork bomb") == {"fork bomb"}


@pytest.mark.parametrize(("verdict", "code"), [("held", 0), ("skipped", 0), ("breached", 1)])
def test_a_breach_is_exit_code_one(
    verdict: Any, code: int, stand_in: Callable[[Nothing], Nothing], monkeypatch: pytest.MonkeyPatch, capsys: Captured,
) -> None:
    made = stand_in(Nothing())

    async def run(provider: Any, chosen: Any, *, spec: Any, on_outcome: Any) -> None:
        assert provider is made and [attack.name for attack in chosen] == ["DNS"] and spec.image == "mine:1"
        on_outcome(attacks.Outcome("DNS", "python", "docker", verdict, "why"))

    monkeypatch.setattr(attacks, "run", run)
    assert cli.main(["attack", "DNS", "--image", "mine:1", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer[verdict] == 1 and answer["outcomes"][0]["detail"] == "why" and made.closed
    assert cli.main(["attack", "DNS", "--image", "mine:1"]) == code
    assert "why" in capsys.readouterr().out


def test_gc_says_what_each_provider_removed(stand_in: Callable[[Nothing], Nothing], capsys: Captured) -> None:
    stand_in(Nothing(gone=3))
    assert cli.main(["gc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"docker": 3, "bubblewrap": 3}
    assert cli.main(["gc", "--provider", "docker", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"docker": 4}


def test_gc_goes_on_without_docker_unless_docker_was_asked_for(
    stand_in: Callable[[Nothing], Nothing], capsys: Captured,
) -> None:
    stand_in(Nothing(SandboxUnavailable("no daemon")))
    assert cli.main(["gc"]) == 0
    assert "not available" in capsys.readouterr().out
    assert cli.main(["gc", "--provider", "docker"]) == 2


def figures(*values: bench.Figure) -> Callable[[Any], Awaitable[list[bench.Figure]]]:
    async def measure(_: Any) -> list[bench.Figure]:
        return list(values)

    return measure


@pytest.mark.parametrize(("figure", "code", "word"), [
    (bench.Figure("f", 3.0, "ms", 5.0), 0, "met"), (bench.Figure("f", 7.0, "ms", 5.0), 1, "NOT MET"),
    (bench.Figure("f", 70.0, "×", 50.0, most=False), 0, "met"),
    (bench.Figure("f", 7.0, "×", 50.0, most=False), 1, "NOT MET"), (bench.Figure("f", 7.0), 0, ""),
])
def test_a_figure_out_of_bounds_is_exit_code_one(
    figure: bench.Figure, code: int, word: str, stand_in: Callable[[Nothing], Nothing], monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    stand_in(Nothing())
    monkeypatch.setattr(bench, "MEASURES", {"one": figures(figure)})
    assert cli.main(["bench"]) == code
    assert capsys.readouterr().out.splitlines()[1].endswith(word or f"{figure.value:g}")


def test_figures_are_written_only_into_the_repository(
    stand_in: Callable[[Nothing], Nothing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured,
) -> None:
    stand_in(Nothing())
    monkeypatch.setattr(bench, "MEASURES", {"one": figures(bench.Figure("f", 3.14159, "ms", 5.0))})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--write"]) == 2
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert cli.main(["bench", "--write"]) == 0
    kept = json.loads((tmp_path / "benchmarks" / "results" / "sandbox.json").read_text())
    figure = {"name": "f", "value": 3.14, "unit": "ms", "bound": 5.0, "bound is": "at most", "met": True}
    assert kept["figures"] == [figure]
    assert {"cores", "kernel", "load", "engine"} <= set(kept["machine"])
    assert "written" in capsys.readouterr().err


def test_a_wrong_reply_is_no_figure(
    stand_in: Callable[[Nothing], Nothing], monkeypatch: pytest.MonkeyPatch, capsys: Captured,
) -> None:
    async def wrong(_: Any) -> list[bench.Figure]:
        raise bench.Wrong("a call gave 43, expected 42")

    stand_in(Nothing())
    monkeypatch.setattr(bench, "MEASURES", {"one": wrong})
    assert cli.main(["bench"]) == 2 and "expected 42" in capsys.readouterr().err


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("weak", 0), ("missing", 1)])
def test_the_doctor_fails_for_what_the_provider_cannot_do_without(
    state: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured,
) -> None:
    async def examine() -> Any:
        yield Finding("docker", "daemon", state, "", "" if state == "ok" else "start it")
        yield Finding("bubblewrap", "boxes", "ok")

    monkeypatch.setattr(doctor, "examine", examine)
    assert cli.main(["doctor"]) == code
    assert ("start it" in capsys.readouterr().out) == (state != "ok")
    assert cli.main(["doctor", "--provider", "bubblewrap"]) == 0
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["usable"]


def test_the_doctor_names_the_remedies_where_there_is_no_daemon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    assert cli.main(["doctor"]) == 1
    assert "dockerd" in capsys.readouterr().out


def test_the_doctor_finds_this_machine_fit(docker_engine: Any, capsys: Captured) -> None:
    assert docker_engine
    assert cli.main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "docker" in answer["usable"]
    assert {f"image {name}" for name in images.folders()} <= {found["what"] for found in answer["findings"]}


def test_build_with_nothing_to_do_gives_the_references(docker_engine: Any, capsys: Captured) -> None:
    assert docker_engine
    assert cli.main(["build", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(images.folders())
    assert cli.main(["build", "no_such_recipe"]) == 2


def test_a_docker_box_passes_its_selftest(docker_engine: Any, capsys: Captured) -> None:
    assert docker_engine
    assert cli.main(["selftest"]) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said and said.count("attested: ") == 14


def test_a_bubblewrap_box_passes_its_selftest(bubblewrap_provider: Bubblewrap, capsys: Captured) -> None:
    assert bubblewrap_provider
    assert cli.main(["selftest", "--provider", "bubblewrap", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["failed"] and len(answer["checks"]) > 20


def test_an_attack_from_the_command_line_on_a_real_box(bubblewrap_provider: Bubblewrap, capsys: Captured) -> None:
    assert bubblewrap_provider
    assert cli.main(["attack", "--provider", "bubblewrap", "os._exit"]) == 0
    assert "4 held, 0 breached, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["starts", "warm", "calls"])
def test_a_measure_checks_every_reply_and_holds_it_against_its_bound(
    measure: str, bubblewrap_provider: Bubblewrap, capsys: Captured,
) -> None:
    assert bubblewrap_provider
    assert cli.main(["bench", measure, "--provider", "bubblewrap", "--json"]) in (0, 1)     # as fast as this machine is
    found = json.loads(capsys.readouterr().out)["figures"]
    assert found and all(figure["value"] > 0 for figure in found)
