"""`espl-train lineage`: every principle that a run ever had can be asked for, and what is not there is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from espl_envs.core.errors import EsplError
from espl_train import genealogy, snapshot
from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.lineage import provenance, told
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Origin, Principle
from espl_train.export import markdown
from espl_train.export.document import _ancestry
from espl_train.reflecting.command import _shown
from espl_train.reflecting.review import Candidate, Desk
from espl_train.report import IslandReport


def run_of(*populations: Population) -> Any:
    """As much of a Snapshot as is asked for: populations by name, and the best prompt of the first."""
    named = {str(number or ""): population for number, population in enumerate(populations)}

    def find_one(which: str) -> tuple[str, Any]:
        if which not in ("best", "root"):
            raise EsplError(f"no prompt {which!r}")
        return "", populations[0].members[-1].prompt if which == "best" else populations[0].root

    return SimpleNamespace(populations=named, find_one=find_one)


def grown(name: str = "") -> Population:
    """The root and two generations; only the root and the last one are alive."""
    people = Population(EvolutionConfig(root=("Draw.",), capacity=2, elite=False), RatingConfig(), 1, name)
    for step in (1, 2):
        parent = people.members[-1].prompt
        added = Principle(f"G{step + 1}", f"Rule {step}.")
        people.add([Child((*parent.principles, added), "mutation", (parent.id,), step + 1)], step)
    return people


@pytest.mark.parametrize(
    ("which", "found"),
    [
        ("best", ("p0002", "")), ("G3", ("p0002", "G3")), ("root", ("p0000", "")), ("p0001", ("p0001", "")),
        ("p0001.G2", ("p0001", "G2")), ("root.G1", ("p0000", "G1")), ("math:p0001.G2", ("math:p0001", "G2")),
    ],
)  # fmt: skip
def test_prompts_and_principles_are_found_by_name_alive_or_not(which: str, found: tuple[str, str]) -> None:
    assert genealogy.find(run_of(grown(), grown("math")), which)[1:] == found


@pytest.mark.parametrize(
    ("which", "message"),
    [("p0077", "no prompt 'p0077'"), ("p0001.G9", "p0001 has no principle G9; it has G1, G2"), ("G9", "p0002 has no")],
)
def test_what_is_not_there_is_said(which: str, message: str) -> None:
    with pytest.raises(EsplError, match=message):
        genealogy.find(run_of(grown()), which)


def test_a_justification_does_not_reach_the_terminal_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    people = grown()
    origins = {"G1": Origin("modify", (), "\x1b[2Jtwo\u202eof \ud800")}
    people.add([Child((Principle("G1", "Draw twice."),), "mutation", ("p0000",), 1, origins)], 3)
    monkeypatch.setattr(snapshot.Snapshot, "of", lambda *_: run_of(people))
    assert genealogy.main(["run", "p0003"]) == 0
    assert "because “␛[2Jtwo⟨U+202E⟩of ⟨U+D800⟩”" in capsys.readouterr().out


def test_people_read_the_same_words_everywhere(tmp_path: Path) -> None:
    """In the run's notes, its lineage, its export and its review."""
    people = Population(EvolutionConfig(root=("Draw.", "Add.")), RatingConfig(), 1)
    pruned = Child((Principle("G2", "Add."),), "prune", ("p0000",), 2)
    newcomer = Child((Principle("G3", "Look."),), "immigrant", ("p0000",), 3)
    born = people.add([pruned, newcomer], 1)
    island = IslandReport((), None, None, born, 0, {}, "p0000")
    notes = list(island.notes(people))
    assert [note.partition(":")[0] for note in notes] == [
        "p0001 born by pruning of p0000", "p0002 born by immigration of p0000"
    ]  # fmt: skip
    history = "\n".join(told("p0002", people.lineage))
    assert "step 1, immigration of p0000: add" in history
    assert "dropped by p0001 (pruning), against p0000" in "\n".join(told("p0000", people.lineage, "G1"))
    page = "\n".join(markdown._lineage(list(_ancestry("p0002", people.lineage))))
    assert "by immigration of p0000" in page
    rows = provenance("p0002", people.lineage)
    assert "G3: add by immigration, step 1" in "\n".join(markdown._principles(rows))
    waiting = Candidate.of(pruned, 1, "", (), ())
    assert "pruning of p0000: waiting" in _shown(waiting, Desk(tmp_path), False)


def test_it_prints_lines_or_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(snapshot.Snapshot, "of", lambda *_: run_of(grown()))
    assert genealogy.main(["run", "G2"]) == 0
    assert "step 1, mutation of p0000: add" in capsys.readouterr().out
    assert genealogy.main(["run", "G2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["written"]["prompt"] == "p0001" and row["carriers"] == ["p0001", "p0002"]
    monkeypatch.setattr(snapshot.Snapshot, "of", lambda *_: run_of(Population(EvolutionConfig(), RatingConfig(), 1)))
    assert genealogy.main(["run"]) == 0 and "p0000 has no principles" in capsys.readouterr().out
