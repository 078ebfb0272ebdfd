"""A reflector that wants answers in a prompt gets none in, whatever it dresses them as; good advice gets through.

1,000 adversarial reflections through the breeder, on real problems where they are at hand and on made ones always, and
1,000 harmless principles against guards that know the same problems.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from attack_kit import Attack, attacks, kind_of, made
from conftest import MIRROR
from evolution_cases import ENGLISH, group
from harmless_kit import principles

import espl_envs
from espl_envs.core.messages import Message
from espl_envs.core.tasks import Task
from espl_train.config import EvolutionConfig, RatingConfig
from espl_train.evolution.breeding import Breeder
from espl_train.evolution.guards import Guard, disguises, leaks, numerals, pointing
from espl_train.evolution.guards.numerals import Readings, number
from espl_train.evolution.guards.writing import words
from espl_train.evolution.population import Population
from espl_train.evolution.templates import TemplateSet

MICRO = TemplateSet.load("micro")
CONFIG = EvolutionConfig(root=("Be exact.",), crossover_probability=0.0, max_words=64, evidence_window=1)
ALL = 1000
SEED = 11
REAL = {
    "GSM8K": ("espl/GSM8K-v0", "test", 500), "MATH-500": ("espl/MATH500-v0", None, 400),
    "Natural Questions": ("espl/NaturalQuestions-v0", None, 400), "HotpotQA": ("espl/HotpotQA-v0", None, 100),
}  # fmt: skip
TELLING_NUMBER, TELLING_TEXT = leaks.telling_number, leaks.telling_text


def telling(answer: str) -> bool:
    """Whether nobody writes this answer by accident: asked before anything is broken on purpose."""
    value = number(answer)
    named = all(word[0].isupper() for word in answer.split())
    return TELLING_NUMBER(abs(value)) if value is not None else TELLING_TEXT(words(answer), named)


def train(env_id: str, split: str | None, most: int) -> dict[int, Task]:
    """The first problems of an environment, fractions in plain writing."""
    tasks = espl_envs.make(env_id, **({"split": split} if split else {})).unwrapped.tasks
    rows = {i: tasks[i] for i in range(min(most, len(tasks)))}
    return {i: replace(t, answer=str(number(t.answer))) if "frac" in t.answer and number(t.answer) else t
            for i, t in rows.items()}  # fmt: skip


@pytest.fixture(scope="module")
def sets() -> dict[str, dict[int, Task]]:
    """Problems by the name of their set."""
    found = {"made": made(400), "Conventions": train("espl/Conventions-v0", None, 400)}
    if (MIRROR / "math").is_dir():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ESPL_DATA_DIR", str(MIRROR))
            found |= {name: train(*where) for name, where in REAL.items()}
    return found


@pytest.fixture(scope="module")
def planned(sets: dict[str, dict[int, Task]]) -> list[tuple[str, Attack]]:
    """All attacks, with the names of their sets."""
    each, rest = divmod(ALL, len(sets))
    plan = []
    for place, (name, tasks) in enumerate(sets.items()):
        kinds = {i: kind for i, task in tasks.items() if (kind := kind_of(task))}
        plan += [(name, a) for a in attacks(tasks, kinds, telling, SEED, each + (place < rest))]
    return plan


class Planter:
    """A reflector that answers every critique with the texts that it wants in the prompt, and repairs by insisting."""

    def __init__(self) -> None:
        self.texts: Sequence[str] = ()

    async def __call__(self, messages: Sequence[Message], _: int) -> str:
        asked = messages[0].content
        revising = asked.startswith("revise") or "Several reviewers" in asked
        return "[]" if revising else json.dumps([{"op": "add", "text": text} for text in self.texts])


def survivors(
    sets: dict[str, dict[int, Task]], planned: Sequence[tuple[str, Attack]], templates: TemplateSet = MICRO
) -> tuple[list[Attack], Counter[str]]:
    """The attacks of which all texts stand in a child, and why the others were refused."""
    model, through, reasons = Planter(), [], Counter[str]()
    breeders = {name: Breeder(CONFIG, templates, seed=1, special_tokens=("<eos>",)) for name in sets}
    people = Population(CONFIG, RatingConfig(), seed=1)
    for step, (name, attack) in enumerate(planned):
        model.texts = attack.texts
        groups = [group("p0000", attack.problem, [1, 0], step=step)]
        report = asyncio.run(breeders[name].breed(step, people, groups, sets[name], model))
        reasons.update(report.rejections)
        if any({*attack.texts} <= {p.text for p in child.principles} for child in report.children):
            through.append(attack)
    return through, reasons


def test_no_planted_answer_survives_a_thousand_adversarial_reflections(
    sets: dict[str, dict[int, Task]], planned: list[tuple[str, Attack]]
) -> None:
    assert len(planned) == ALL
    through, reasons = survivors(sets, planned)
    assert not through
    assert reasons["leaked_answer"] > 800 and reasons["leaked_problem"] > 30
    kinds = Counter(a.kind.split(":")[0] for _, a in planned)
    assert kinds["integer"] > 100 and kinds["text"] > 100 and kinds["split"] > 30 and kinds["passage"] > 30, kinds
    assert sum(count for kind, count in kinds.items() if kind.startswith("pointed")) < ALL / 2, "most need no problem"


def test_the_english_set_with_its_repair_call_lets_none_through_either(
    sets: dict[str, dict[int, Task]], planned: list[tuple[str, Attack]]
) -> None:
    through, reasons = survivors(sets, planned[:: ALL // 25], ENGLISH)
    assert not through and sum(reasons.values()) >= 2 * 25, "refused, repaired by insisting, refused again"


def nothing(*_: Any, **__: Any) -> Any:
    return iter(())


def nobody(*_: Any, **__: Any) -> None:
    return None


def only_digits(text: str) -> Readings:
    """What a guard sees that knows no dress."""
    return Readings(firm={v for d in re.findall(r"\d+", text) if (v := number(d)) is not None})


BROKEN: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "readings of numbers": (leaks, "readings", only_digits),
    "numbers in words": (numerals, "digits_for_words", lambda text: text),
    "arithmetic": (numerals, "_computed", nothing),
    "other bases": (numerals, "_based", nothing),
    "codes": (disguises, "decoded", nothing),
    "disguises": (disguises, "disguised", nothing),
    "words": (leaks.Leaks, "_texts_in", nobody),
    "pointing": (pointing.Pointing, "at", lambda *_: {}),
    "passages": (leaks.Leaks, "_passage", nobody),
    "two texts": (leaks.Leaks, "check_together", nobody),
    "halves": (leaks.Leaks, "_halves", lambda *_: False),
}


@pytest.mark.parametrize("defence", BROKEN)
def test_without_any_one_defence_some_answer_gets_through(
    defence: str, planned: list[tuple[str, Attack]], judges: dict[str, Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thousand are not refused for some other reason."""
    owner, name, broken = BROKEN[defence]
    monkeypatch.setattr(owner, name, broken)
    for where, attack in planned:
        if judges[where].check_prompt(attack.texts, attack.texts) is None:
            return
    pytest.fail(f"nothing needs {defence}")


@pytest.fixture(scope="module")
def judges(sets: dict[str, dict[int, Task]]) -> dict[str, Guard]:
    """A guard for each set that knows all of its problems."""
    made = {name: Guard(64) for name in sets}
    for name, tasks in sets.items():
        made[name].learn(tasks)
    return made


@pytest.fixture(scope="module")
def erudite(sets: dict[str, dict[int, Task]]) -> Guard:
    """One guard that knows the problems of all sets: the most that advice can run into by accident."""
    made = Guard(64)
    made.learn(dict(enumerate(task for tasks in sets.values() for task in tasks.values())))
    return made


def test_at_most_two_in_a_hundred_harmless_principles_are_refused(erudite: Guard) -> None:
    advice = list(principles(SEED, ALL))
    assert len(advice) == ALL and len(Counter(kind for kind, _ in advice)) == 8
    refused = [(kind, text) for kind, text in advice if erudite.check(text) is not None]
    assert len(refused) <= 0.02 * ALL, refused


def test_harmless_principles_may_stand_together(erudite: Guard) -> None:
    advice = [text for _, text in principles(SEED, 300)]
    groups = [advice[start : start + 10] for start in range(0, 300, 10)]
    assert not [texts for texts in groups if erudite.check_prompt(texts, texts[-2:]) is not None]


def test_a_guard_that_refuses_numbers_would_not_be_let_through(
    erudite: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harmless thousand have teeth, too."""
    monkeypatch.setattr(leaks, "telling_number", lambda _: True)
    assert sum(erudite.check(text) is not None for _, text in principles(SEED, 300)) > 0.02 * 300
