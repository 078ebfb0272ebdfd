"""The micro world: arithmetic with made-up operators whose meanings are fixed per world and told to nobody.

A chain such as "Start at 47. (1) ⊕ 12. (2) ⊗ 8. (3) stop." has one right answer once the operators are known. Meanings
are cheap to state and dear to find by gradient (the declarative gap); carrying a chain out with the calculator can only
be practised (the procedural gap). Both gaps are dials. The bundled micro model speaks exactly this dialect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from espl_envs.core.env import TextEnv
from espl_envs.core.errors import EsplError
from espl_envs.core.family import Family
from espl_envs.core.protocol import Placement
from espl_envs.core.tasks import Split, Task
from espl_envs.grading.verdict import Verdict
from espl_envs.tools.base import make_tools

FAMILY = 0xC0241  # names this family in every SeedSequence
SPLITS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
SIZES: dict[Split, int] = {"train": 2000, "validation": 500, "test": 1000}
OPERATORS = 8
LARGEST = 10**6
Chain = tuple[int, list[tuple[str, int]]]      # the start value, and operators with their operands


@dataclass(frozen=True, slots=True)
class Rule:
    """What an operator may mean. `form` is the expression that a calculator takes; `value` computes the same."""

    form: str
    value: Callable[[int, int], int]

    def expression(self, a: int, b: int) -> str:
        return self.form.format(a=a, b=b)


RULES: dict[str, Rule] = {
    "adds": Rule("{a} + {b}", lambda a, b: a + b),
    "subtracts": Rule("{a} - {b}", lambda a, b: a - b),
    "multiplies": Rule("{a} * {b}", lambda a, b: a * b),
    "reverses": Rule("{b} - {a}", lambda a, b: b - a),
    "doubles": Rule("2 * {a} + {b}", lambda a, b: 2 * a + b),
    "triples": Rule("3 * {a} + {b}", lambda a, b: 3 * a + b),
    "echoes": Rule("{a} + 2 * {b}", lambda a, b: a + 2 * b),
    "trims": Rule("2 * {a} - {b}", lambda a, b: 2 * a - b),
    "drains": Rule("{a} - 2 * {b}", lambda a, b: a - 2 * b),
    "peaks": Rule("max({a}, {b})", lambda a, b: max(a, b)),
    "dips": Rule("min({a}, {b})", lambda a, b: min(a, b)),
    "scales": Rule("{a} * {b} + {a}", lambda a, b: a * b + a),
}
SYMBOLS = tuple("⊕⊖⊗⊘⊙⊚⊛⊞⊟⊠⊡⋄⋆⋈⋉⋊△▽◇☆")
CONVENTIONAL: dict[str, str] = {"+": "adds", "-": "subtracts", "×": "multiplies", "↑": "peaks", "↓": "dips"}


def held_out(symbol: str, rule: str) -> bool:
    """Whether this pair is kept for worlds: about a third of all pairs, never a meaning in pretraining."""
    return hashlib.blake2b(f"537 {symbol} {rule}".encode(), digest_size=2).digest()[0] % 3 == 0


@cache
def world_rules(world: int, declarative: float = 1.0) -> Mapping[str, str]:
    """Operator → rule of one world. A share of 1 - `declarative` of the operators is conventional (+ - × ↑ ↓)."""
    random = np.random.default_rng(np.random.SeedSequence([FAMILY, 1 << 20, world]))
    symbols = [SYMBOLS[i] for i in random.permutation(len(SYMBOLS))[:OPERATORS]]
    hidden = {s: str(random.choice([r for r in RULES if held_out(s, r)])) for s in symbols}
    kept = symbols[: round(declarative * OPERATORS)]
    known = list(CONVENTIONAL)[: OPERATORS - len(kept)]
    return {s: hidden[s] for s in kept} | {s: CONVENTIONAL[s] for s in known}


def oracle_principles(world: int, declarative: float = 1.0) -> tuple[str, ...]:
    """What a perfect system prompt says about this world: one principle per hidden operator."""
    return tuple(f"{s} {r}" for s, r in world_rules(world, declarative).items() if s not in CONVENTIONAL)


def question(start: int, steps: list[tuple[str, int]]) -> str:
    """The wording of a problem: a start value, numbered steps, and a last numbered line that says stop."""
    lines = [f"({k}) {symbol} {operand}." for k, (symbol, operand) in enumerate(steps, 1)]
    return " ".join([f"Start at {start}.", *lines, f"({len(steps) + 1}) stop."])


def solve(start: int, steps: list[tuple[str, int]], rules: Mapping[str, str]) -> list[int]:
    """The value after each step."""
    values, value = [], start
    for symbol, operand in steps:
        value = RULES[rules[symbol]].value(value, operand)
        values.append(value)
    return values


class ConventionTasks:
    """The tasks of one split of one world: a pure function of (world, split, index) and the two dials.

    The `twin` of a task has the same operators in the same order over other numbers.
    """

    def __init__(self, world: int, split: Split, declarative: float, procedural: float, twin: int = 0) -> None:
        self.world, self.declarative, self.twin = world, declarative, twin
        self.split = split
        self.rules = world_rules(world, declarative)
        self.procedural = procedural
        extra = [twin] if twin else []
        content = [world, split, procedural, sorted(self.rules.items()), SIZES[split], *extra]
        dials = json.dumps(content, ensure_ascii=False)
        self.hash = hashlib.sha256(dials.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> Task:
        """The task at `index`; IndexError outside `range(len(self))`."""
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} is outside 0..{len(self) - 1}")
        start, steps = self._drawn(index)
        name = f"w{self.world}-{self.split}-{index}"
        if self.twin:
            start, steps = self._drawn(index, (start, steps))
            name += f"-twin-{self.twin}"
        answer = solve(start, steps, self.rules)[-1]
        data = {"start": start, "steps": [list(step) for step in steps], "rules": {s: self.rules[s] for s, _ in steps}}
        return Task(name, self.split, question(start, steps), str(answer), data)

    def twins(self, key: int) -> ConventionTasks:
        """The same chains over other numbers."""
        return ConventionTasks(self.world, self.split, self.declarative, self.procedural, key)

    def _drawn(self, index: int, original: Chain | None = None) -> Chain:
        """The chain of an index; with an `original` its twin."""
        key = [FAMILY, self.world, SPLITS[self.split], index, *([self.twin] if original else [])]
        random = np.random.default_rng(np.random.SeedSequence(key))
        while True:
            start, steps = self._draw(random)
            if original is not None:
                start, steps = self._renumbered(original[1], random)
            values = solve(start, steps, self.rules)
            fits = max(map(abs, values)) < LARGEST and _telling(start, steps, self.rules, values)
            if fits and (start, steps) != original:
                return start, steps

    def _renumbered(self, steps: list[tuple[str, int]], random: np.random.Generator) -> Chain:
        """The same operators with numbers of their own."""
        numbers = [int(n) for n in random.integers(*workload(self.split, self.procedural)[1], size=len(steps) + 1)]
        return numbers[0], [(symbol, number) for (symbol, _), number in zip(steps, numbers[1:], strict=True)]

    def _draw(self, random: np.random.Generator) -> Chain:
        """A start value and steps, as long and as large as the procedural dial says."""
        lengths, largest = workload(self.split, self.procedural)
        length = int(random.choice(lengths))
        numbers = [int(n) for n in random.integers(*largest, size=length + 1)]
        symbols = [str(s) for s in random.choice(sorted(self.rules), size=length)]
        return numbers[0], list(zip(symbols, numbers[1:], strict=True))


def workload(split: Split, procedural: float) -> tuple[list[int], tuple[int, int]]:
    """The chain lengths that occur (repeated as often as they are likely) and the half-open range of the numbers.

    With the dial at 0 every problem is one step over one-digit numbers, on every split. Train stays short: mostly one
    step. Validation and test grow with the dial, up to 5 and 6 steps over three-digit numbers.
    """
    if procedural == 0:
        return [1], (2, 10)
    digits = 10 ** (1 + (procedural > 0.25) + (procedural > 0.75))
    if split == "train":
        return [1, 1, 1, 2] if procedural > 0.25 else [1], (2, min(digits, 100))
    longest = 1 + round((4 if split == "validation" else 5) * procedural)
    return list(range(max(1, longest - 1), longest + 1)), (2, digits)


def _telling(start: int, steps: list[tuple[str, int]], rules: Mapping[str, str], values: list[int]) -> bool:
    """Whether neither stopping early nor taking one operator for another rule gives the answer by coincidence."""
    return values[-1] not in values[:-1] and all(
        solve(start, steps, {**rules, symbol: other})[-1] != values[-1]
        for symbol in dict.fromkeys(s for s, _ in steps)
        for other in RULES
        if other != rules[symbol]
    )


async def grade(task: Task, answer: str) -> Verdict:
    """1.0 for exactly the right integer."""
    said = answer.strip().removeprefix("+")
    return Verdict(float(said == task.answer), "ok", said, task.answer)


@cache
def _tasks(world: int, split: Split, declarative: float, procedural: float) -> ConventionTasks:
    return ConventionTasks(world, split, declarative, procedural)


class ConventionsEnv(TextEnv):
    r"""Carry out chains of made-up operators whose meanings are fixed per world and told to nobody.

    Observation: the conversation, opened by "Start at 47. (1) ⊕ 12. (2) ⊗ 8. (3) stop.": start with 47, apply ⊕ with
    12, then ⊗ with 8. Action: a reply; `\boxed{…}` answers and ends the episode, and the calculator is asked by
    `<tool_call>{"name": "calculator", "arguments": {"expression": "47 * 12"}}</tool_call>`. Reward: 1.0 for the right
    integer, else 0.0; no single misunderstood operator leads to the right answer by coincidence.

    Arguments
        world: which world; 0-299 are for development, 1000 and above for reports. A world has eight operators.
        declarative: share of its operators whose meaning is hidden; the others are conventional (+ - × ↑ ↓).
        procedural: 0 = one step over one-digit numbers everywhere; towards 1 train has larger numbers and some
            two-step chains, validation and test have longer chains (up to 5 and 6 steps) over larger numbers.
        others: see `TextEnv`. No protocol text by default, because the bundled model knows the format.

    Splits: train 2000, validation 500, test 1000. Version 0: the first.
    """

    def __init__(
        self,
        world: int = 0,
        declarative: float = 1.0,
        procedural: float = 0.5,
        *,
        protocol: Placement = "none",
        **settings: Any,
    ) -> None:
        if world < 0:
            raise EsplError(f"world is {world}, expected 0 or more")
        for name, dial in (("declarative", declarative), ("procedural", procedural)):
            if not 0 <= dial <= 1:
                raise EsplError(f"{name} is {dial}, expected a number from 0 to 1")
        family = Family(
            sources={split: partial(_tasks, world, split, float(declarative), float(procedural)) for split in SPLITS},
            grade=grade,
            tools=make_tools(("calculator",)),
            max_turns=12,
        )
        super().__init__(family, protocol=protocol, **settings)
