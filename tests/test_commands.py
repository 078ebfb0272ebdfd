"""`python -m espl_envs`: what is there, what it is worth, how it plays, and what occurs twice."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from espl_envs.commands import audit, card
from espl_envs.commands.cli import main, settings
from espl_envs.core.errors import EsplError


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture(autouse=True)
def hub_is_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def rows(path: Path, *questions: str) -> str:
    path.write_text("".join(json.dumps({"id": f"q{i}", "problem": q}) + "\n" for i, q in enumerate(questions)))
    return str(path)


def test_list_shows_sizes_and_asks_nobody(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPL_DATA_DIR", raising=False)
    assert main(["list", "conventions"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("espl/Conventions-v0  train:2,000 validation:500 test:1,000  ")
    assert main(["list", "--json", "aime2"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in read] == ["espl/AIME24-v0", "espl/AIME25-v0"]
    assert main(["list", "gms8k"]) == 2
    assert "did you mean espl/GSM8K-v0?" in capsys.readouterr().err


def test_the_card_measures_what_it_says(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_dir
    assert main(["card", "espl/AIME25-v0", "--episodes", "5", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["oracle"], read["silent"], read["deterministic"], read["episodes"]) == (1.0, 0.0, True, 5)
    assert read["splits"]["test"]["tasks"] == 30 and len(read["splits"]["test"]["hash"]) == 16
    assert read["tokens_per_episode"]["counted_by"] == card.ESTIMATE
    assert main(["card", "espl/AIME25-v0", "--episodes", "2"]) == 0
    shown = capsys.readouterr().out
    assert "oracle agent        1.000" in shown and "yentinglin/aime_2025; problems (c) MAA" in shown


def test_the_card_tells_an_environment_that_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium
    from toy import ToyEnv

    class Moody(ToyEnv):
        made = 0

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            Moody.made += 1
            self.system_prompt = f"Mood {Moody.made}."

    assert card.measure("toy/Add-v0", {}, 3)["deterministic"]
    monkeypatch.setitem(gymnasium.registry, "toy/Moody-v0", gymnasium.envs.registration.EnvSpec("toy/Moody-v0", Moody))
    measured = card.measure("toy/Moody-v0", {}, 3)
    assert not measured["deterministic"] and "NO" in card.text(measured)


def test_the_card_counts_tokens_with_the_models_own_tokenizer() -> None:
    micro = Path(__file__).parents[1] / "espl_train" / "models" / "micro"
    by_model = card.measure("espl/Conventions-v0", {"split": "test"}, 3, str(micro))["tokens_per_episode"]
    assert by_model["mean"] == int(by_model["mean"] * 3) / 3 and by_model["counted_by"] == str(micro)
    with pytest.raises(EsplError, match="cannot load the tokenizer of '/nowhere'"):
        card.measure("espl/Conventions-v0", {}, 1, "/nowhere")


def test_play_is_an_episode_with_what_was_typed(capsys: pytest.CaptureFixture[str], typed: Any) -> None:
    import toy

    assert toy.IDS
    typed("I think\n\\boxed{6}\n\n")
    assert main(["play", "toy/Add-v0", "--task", "3"]) == 0
    shown = capsys.readouterr().out
    assert "What is 3 + 3?" in shown and "answer · reward 1 · answer 6" in shown
    typed("hm\n\nhm again\n\n\\boxed{10}")
    assert main(["play", "toy/Patient-v0", "--task", "5"]) == 0
    shown = capsys.readouterr().out
    assert "reminder 1" in shown and "reminder 2" in shown and "reward 1" in shown
    typed("")
    assert main(["play", "toy/Add-v0"]) == 0
    assert capsys.readouterr().out.endswith("given up\n")


def test_play_does_not_let_a_task_move_the_cursor(capsys: pytest.CaptureFixture[str], typed: Any) -> None:
    typed("\\boxed{6}")
    assert main(["play", "toy/Add-v0", "--task", "3", "--arg", "system_prompt='\x1b[2J'"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2J" in shown


def test_the_audit_finds_what_stands_in_two_sets(data_dir: Path) -> None:
    assert data_dir
    found = audit.audit(["espl/DAPOMath17k-v0", "espl/MATH500-v0", "espl/AIMOValidationAMC-v0", "espl/AIME24-v0"])
    by_task = {pair.one.task: pair for pair in found.pairs} | {pair.other.task: pair for pair in found.pairs}
    copied = by_task["dapo-4b498d6c-64f3-46c1-a2aa-608463108289"]
    assert copied.equal and "amc-2023-12A-12" in (copied.one.task, copied.other.task)
    near = by_task["dapo-96599c5d-d581-4ad3-ac22-ffe221d13588"]
    assert not near.equal and near.leaks and near.overlap > 0.7
    assert "math500-test-counting_and_probability-430" in (near.one.task, near.other.task)


def test_the_audit_finds_all_nineteen_rows_in_another_dress(data_dir: Path, tmp_path: Path) -> None:
    """The nineteen rows of the DAPO sample that MATH's test set also has, in another LaTeX dress and cut short."""
    groups = json.loads((data_dir / "math" / "overlaps.json").read_text())
    names = {row[1] for group in groups for row in group if any("mathtest" in other[0] for other in group)}
    sample = [json.loads(line) for line in (data_dir / "math" / "dapo_sample.jsonl").read_text().splitlines()]
    twins = [row["problem"] for row in sample if row["id"] in names]
    assert len(twins) == 19
    dressed = [
        text.replace("\\frac", "\\dfrac").replace("$", " $ ").replace("\\left", "").replace("\\right", "").upper()
        .replace("\\DFRAC", "\\dfrac") for text in twins
    ]
    found = audit.audit(["espl/DAPOMath17k-v0"], [rows(tmp_path / "test.jsonl", *dressed)])
    caught = {pair.one.task if pair.one.task in names else pair.other.task
              for pair in found.pairs if str(tmp_path) in pair.one.where + pair.other.where}
    assert caught == names & {row["id"] for row in sample}


def test_near_means_a_share_of_thirteen_grams(tmp_path: Path) -> None:
    words = [f"w{i}x" for i in range(400)]
    long = " ".join(words[:60])
    half = " ".join(words[100:124]) + " " + " ".join(words[:36])
    little = " ".join(words[200:250]) + " " + " ".join(words[:16])
    other = " ".join(words[300:360])
    found = audit.audit([], [rows(tmp_path / "a.jsonl", long), rows(tmp_path / "b.jsonl", half, little, other)], 0.4)
    assert [(pair.one.task, pair.other.task, pair.equal) for pair in found.pairs] == [("q0", "q0", False)]
    grams = 3 * 36 - 12       # "w0x" is three tokens: w, 0, x
    assert found.pairs[0].overlap == pytest.approx(grams / (3 * 60 - 12))


def test_boilerplate_of_a_set_is_no_finding(tmp_path: Path) -> None:
    frame = "Answer the following question as well as you can and give your reasons in two or three sentences please"
    same = rows(tmp_path / "a.jsonl", *(f"{frame}: number {i}" for i in range(30)))
    assert not audit.audit([], [same]).pairs
    few = rows(tmp_path / "b.jsonl", *(f"{frame}: number {i}" for i in range(3)))
    assert len(audit.audit([], [few]).pairs) == 3


def test_strict_fails_where_a_test_problem_may_be_trained_on(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_dir
    both = ["audit", "espl/AIME24-v0", "espl/AIMOValidationAIME-v0"]
    assert main([*both, "--strict"]) == 1
    assert "30 pairs, 30 of them between a test split and a training one" in capsys.readouterr().out
    assert main(both) == 0
    assert main(["audit", "espl/AIME24-v0", "espl/AIME25-v0", "--strict"]) == 0


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    for argv, words in (
        (["card", "espl/MATH50-v0"], "did you mean espl/MATH500-v0?"),
        (["card", "espl/Conventions-v0", "-a", "split"], "expected NAME=VALUE"),
        (["card", "espl/Conventions-v0", "-a", "splt=3"], "has no argument 'splt'"),
        (["card", "espl/Conventions-v0", "-a", "split=3"], "split is 3, expected one of"),
        (["play", "espl/Conventions-v0", "--task", "99999"], "outside 0..1999"),
        (["audit", "--against", "/nowhere/x.jsonl", "espl/Conventions-v0"], "cannot read /nowhere/x.jsonl"),
        (["audit", "--against", str(tmp_path / "bad.jsonl"), "espl/Conventions-v0"], "line 1: expected an object"),
        ([], "COMMAND"),
        (["lst"], "did you mean list?"),
        (["card", "espl/Conventions-v0", "--espisodes", "3"], "did you mean --episodes?"),
        (["card", "espl/Conventions-v0", "--episodes", "0"], "0 is not a positive number"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert words in said and said.startswith("espl_envs: ") and said.count("\n") == 1


@pytest.mark.parametrize("command", ["list", "card", "play", "audit"])
def test_every_argument_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    lines = shown.partition("positional arguments:")[2].splitlines()
    for line, following in pairwise([*lines, ""]):
        if re.match(r"  [-A-Z]", line):
            assert re.search(r"\S {2,}\S", line) or following.startswith("        "), f"{line} says nothing"


def test_arguments_are_literals_or_text() -> None:
    assert settings(["a=3", "b=('x', 'y')", "c=test", "d=None"]) == {"a": 3, "b": ("x", "y"), "c": "test", "d": None}


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "espl_envs", "list", "Conventions"], capture_output=True, text=True, check=True
    )
    assert "espl/Conventions-v0" in done.stdout
