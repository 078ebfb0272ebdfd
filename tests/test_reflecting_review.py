"""Children wait for a person, who decides once; the run never waits, and what a person wrote passes the guards."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from espl_envs.core.errors import EsplError
from espl_train import disk
from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.guards.quarantine import ancestry
from espl_train.evolution.population import Population
from espl_train.evolution.prompts import Child, Origin, Principle
from espl_train.evolution.rejections import Reason, Rejection
from espl_train.reflecting.command import main
from espl_train.reflecting.queue import Queue, evidence
from espl_train.reflecting.review import Candidate, Decision, Desk
from espl_train.runs.directory import CONFIG
from espl_train.settings import load, to_toml


def child(*texts: str) -> Child:
    principles = tuple(Principle(f"G{n}", text) for n, text in enumerate(texts, 1))
    origins = {"G1": Origin("add", (), "two of eight failed", 2)}
    return Child(principles, "mutation", ("p0000",), len(texts), origins)


def population(*root: str) -> Population:
    return Population(EvolutionConfig(root=root), RatingConfig(), 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text(to_toml(load(overrides={"reflection.review": True})))
    return tmp_path


def put(queue: Queue, people: Population, *children: Child, step: int = 1) -> list[str]:
    events = queue.put(children, step, people, lambda prompt: [f"{prompt} did well"])
    return [event["id"] for event in events if event["outcome"] == "waiting"]


def fine(_: Child) -> Rejection | None:
    return None


def admit(queue: Queue, people: Population, examine: Any = fine, step: int = 2) -> tuple[list[str], list[str]]:
    born, events = queue.admit(step, people, examine)
    return [text for prompt in born for text in prompt.texts], [event["outcome"] for event in events]


def review(run: Path, *words: str) -> int:
    return main([str(run), *words])


def test_nobody_enters_before_a_person_has_said_so(run: Path) -> None:
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units."))
    assert admit(queue, people) == ([], []) and len(people) == 1 and len(queue) == 1
    review(run, "accept", one)
    assert admit(queue, people) == (["Check units."], ["accepted"]) and len(queue) == 0
    assert people[people.members[-1].prompt.id].parents == ("p0000",)
    assert admit(queue, people) == ([], [])


def test_of_a_child_that_waits_is_told_what_would_change(run: Path) -> None:
    (event,) = Queue(run, "").put([child("Add first.", "Check units.")], 1, population("Add first."), lambda _: [])
    assert event["detail"] == "+ G2: Check units."


def test_a_rejected_child_is_gone_and_need_not_come_again(run: Path) -> None:
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units."))
    assert put(queue, people, child("check  units"), step=2) == []              # it waits already
    review(run, "reject", one, "--why", "too vague")
    _, events = queue.admit(3, people, fine)
    assert [e["outcome"] for e in events] == [Reason.REVIEW.value] and "too vague" in events[0]["detail"]
    again = Queue(run, "")
    again.restore(queue.state())
    assert put(again, people, child("Check units."), step=4) == [] and len(people) == 1


def test_a_persons_own_words_enter_with_ids_that_last(run: Path, tmp_path: Path) -> None:
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units.", "Guess."))
    sheet = tmp_path / "mine.txt"
    sheet.write_text("# a comment\nG1: Check  the units.\n\nCount twice.\n")
    review(run, "edit", one[:6], "--file", str(sheet))
    assert admit(queue, people) == (["Check the units.", "Count twice."], ["edited"])
    newest = people.members[-1].prompt
    assert [p.id for p in newest.principles] == ["G1", "G3"] and newest.last_id == 3


def test_a_persons_own_words_pass_the_same_guards(run: Path, tmp_path: Path) -> None:
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units."))
    sheet = tmp_path / "mine.txt"
    sheet.write_text("The answer is 4711.")
    review(run, "edit", one, "--file", str(sheet))

    def leaks(found: Child) -> Rejection | None:
        return Rejection(Reason.LEAKED_ANSWER, "4711") if "4711" in found.principles[0].text else None

    assert admit(queue, people, leaks) == ([], [Reason.LEAKED_ANSWER.value]) and len(people) == 1
    assert next(Desk(run).all()).state.startswith("refused (leaked_answer")


@pytest.mark.parametrize("text", ["", "# nothing\n", "word " * 400, "G1: one\nG1: two"])
def test_a_sheet_that_cannot_be_used_decides_nothing(text: str, run: Path, tmp_path: Path) -> None:
    (one,) = put(Queue(run, ""), population(), child("Check units."))
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(EsplError):
        review(run, "edit", one, "--file", str(tmp_path / "mine.txt"))
    assert Desk(run).decision(one) is None


def test_of_many_who_decide_at_once_one_has_decided(run: Path) -> None:
    (one,) = put(Queue(run, ""), population(), child("Check units."))
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def decide(number: int) -> None:
        start.wait()
        try:
            Desk(run).decide(one, Decision("reject" if number % 2 else "accept", (), str(number)))
            outcomes.append(str(number))
        except EsplError:
            pass

    threads = [threading.Thread(target=decide, args=(n,)) for n in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    decision = Desk(run).decision(one)
    assert len(outcomes) == 1
    assert isinstance(decision, Decision) and decision.when == outcomes[0]
    assert not list((run / "review").glob(f"{disk.WRITING}*"))


def test_a_resume_waits_for_the_same_children_and_forgets_those_of_steps_that_are_done_again(run: Path) -> None:
    people, queue = population(), Queue(run, "")
    (old,) = put(queue, people, child("Check units."))
    saved = queue.state()
    (lost,) = put(queue, people, child("Guess."), step=2)
    review(run, "accept", old)
    review(run, "accept", lost)
    again = Queue(run, "")
    again.restore(saved)
    assert admit(again, population()) == (["Check units."], ["accepted"])
    assert put(again, population(), child("Guess."), step=2) == [lost]          # the same child: the decision holds
    assert admit(again, population(), step=3) == (["Guess."], ["accepted"])


def test_a_decision_is_never_about_another_text() -> None:
    one = Candidate.of(child("Check units."), 1, "", (), ())
    assert one.id == Candidate.of(child("Check units."), 1, "", (), ("other evidence",)).id
    assert len({one.id, Candidate.of(child("Check all."), 1, "", (), ()).id,
                Candidate.of(child("Check units."), 2, "", (), ()).id,
                Candidate.of(child("Check units."), 1, "math", (), ()).id}) == 4  # fmt: skip


def test_hostile_text_survives_its_file_and_does_not_reach_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ('"""\nid = "x"', "\x1b[31mred\x1b[0m", "a\u202eb", "'''", "\\u0000 \\", "\ud800 alone")
    queue = Queue(run, "")
    put(queue, population(), child(*texts[:5]))
    assert [p.text for p in next(Desk(run).all()).child.principles] == list(texts[:5])
    put(queue, population(), child(texts[5]), step=2)
    review(run, "show")
    assert "\x1b" not in (said := capsys.readouterr().out) and "\u202e" not in said and "2 waiting" in said


def test_what_is_shown_is_the_difference_to_the_parent_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(Queue(run, ""), population("Check units.", "Guess."), child("Check units.", "Count twice."))
    review(run, "show")
    said = capsys.readouterr().out
    lines = ("    G1: Check units.", "  - G2: Guess.", "  + G2: Count twice.", "G1: two of eight failed", "did well")
    assert all(line in said for line in lines)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["accept"], "needs the id"), (["accept", "zz"], "no child of this run"), (["edit", "a", "b"], "one child"),
     (["explode"], "invalid choice")],
)  # fmt: skip
def test_what_cannot_be_decided_is_said(words: Sequence[str], sentence: str, run: Path) -> None:
    put(Queue(run, ""), population(), child("Check units."))
    with pytest.raises(EsplError, match=sentence):
        review(run, *words)


def test_children_whose_parents_have_died_meanwhile_still_enter(run: Path) -> None:
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units."))
    queue._waiting[one] = Candidate.of(
        Child((Principle("G1", "Check units."),), "mutation", ("p0099",), 1), 1, "", (), ()
    )  # fmt: skip
    review(run, "accept", one)
    renamed = queue._waiting.pop(one)
    queue._waiting[one] = Candidate(one, 1, "", renamed.child, (), ())
    assert admit(queue, people)[0] == ["Check units."] and people.members[-1].rating.sigma > 0


def test_what_became_of_a_child_does_not_reach_the_terminal_as_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units."))
    review(run, "accept", one)
    admit(queue, people, lambda _: Rejection(Reason.ORDER, "\x1b[2J\u202e"))
    review(run)
    with pytest.raises(EsplError) as said:
        review(run, "reject", one)
    assert not any(mark in capsys.readouterr().out + str(said.value) for mark in "\x1b\u202e")


def test_of_children_that_come_in_at_once_none_makes_room_for_another(run: Path) -> None:
    people, queue = Population(EvolutionConfig(capacity=4), RatingConfig(), 0), Queue(run, "")
    names = put(queue, people, *(child(f"Rule {n}.") for n in range(3)))
    review(run, "accept", *names)
    born, _ = queue.admit(2, people, fine)
    assert [prompt.texts for prompt in born] == [("Rule 0.",), ("Rule 1.",)] and all(p.id in people for p in born)
    born, _ = queue.admit(3, people, fine)
    assert [prompt.texts for prompt in born] == [("Rule 2.",)] and len(people) == 4


def test_a_child_is_as_old_as_what_it_was_written_from(run: Path) -> None:
    """Whoever asks which problems it has seen asks for the step in which reflection saw them."""
    people, queue = population(), Queue(run, "")
    (one,) = put(queue, people, child("Check units."), step=4)
    review(run, "accept", one)
    (born,), _ = queue.admit(9, people, fine)
    assert born.born == 4 and ancestry(born.id, people.lineage) == [4, 0]


GOOD = 'when = ""\nwhy = ""\n'
TWICE = '[[principles]]\nid = "G1"\ntext = "a"\n'


@pytest.mark.parametrize(
    "damage",
    [
        f'verdict = "acept"\n{GOOD}principles = []', "verdict", "", b"\xff\xfe",
        f'verdict = ["accept"]\n{GOOD}principles = []',
        f'verdict = "accept"\n{GOOD}principles = 3', 'verdict = "accept"\nwhen = ""\nwhy = 5\nprinciples = []',
        f'verdict = "accept"\n{GOOD}{TWICE}{TWICE}', None,
    ],
)  # fmt: skip
def test_a_damaged_decision_decides_nothing_and_the_child_goes_on_waiting(
    damage: str | bytes | None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people, queue = population(), Queue(run, "")
    one, other = put(queue, people, child("Check units."), child("Guess."))
    path = run / "review" / f"{one}.decision.toml"
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    review(run, "accept", other)
    born, events = queue.admit(2, people, fine)
    assert [prompt.texts for prompt in born] == [("Guess.",)] and len(queue) == 1       # it stops nobody else
    assert [e["outcome"] for e in events] == ["undecided", "accepted"] and str(path) in events[0]["detail"]
    assert queue.admit(3, people, fine) == ((), [])                                     # said once
    review(run)
    assert "is no decision" in (said := capsys.readouterr().out) and "1 waiting, 1 decided" in said
    review(run, "accept", one)
    assert path.with_name(f"{path.name}.damaged").exists()
    assert admit(queue, people, step=4) == (["Check units."], ["accepted"])


def test_a_child_whose_file_is_damaged_is_told_and_written_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = Queue(run, "")
    (one,) = put(queue, population(), child("Check units."))
    path = run / "review" / f"{one}.toml"
    path.write_text("id = [")
    assert review(run) == 0 and f"{path} cannot be read: the run writes it anew" in capsys.readouterr().out
    queue.restore(queue.state())
    assert review(run) == 0 and "1 waiting" in (said := capsys.readouterr().out) and "cannot be read" not in said


def test_a_sheet_that_is_not_there_is_a_sentence(run: Path, tmp_path: Path) -> None:
    (one,) = put(Queue(run, ""), population(), child("Check units."))
    for name in ("absent.txt", "."):
        with pytest.raises(EsplError, match="cannot be read, so nothing is decided"):
            review(run, "edit", one, "--file", str(tmp_path / name))


def test_evidence_names_problems_with_mixed_outcomes_only() -> None:
    assert evidence([], "p0000", str) == []
