"""The books: what reflection took, per stage and per prompt, and the budgets of the whole run.

A replayed call is booked with what it took when it was recorded: budgets are a property of the experiment, and a replay
is the same experiment. What a server has really been paid for in steps that were interrupted and done again is not in
the books of a resumed run, but counts against its budgets: `spending.jsonl` has every such call and is never cut back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from espl_envs.evaluate.config import Prices
from espl_train.config import ReflectionConfig
from espl_train.runs.metrics import JsonLines, read_lines

SPENDING = "spending.jsonl"
MOST = 5                    # prompts in the table
BRIEF = ("calls", "prompt_tokens", "completion_tokens")
HEAD = ("calls", "failed", "replayed", "tokens in", "tokens out", "call seconds")


@dataclass(frozen=True, slots=True)
class Spent:
    """A sum over calls. `failed` ones brought no text; `seconds` are added up call by call, whatever ran at once."""

    calls: int = 0
    failed: int = 0
    replayed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens


def total(sums: Iterable[Spent]) -> Spent:
    """The sum of sums."""
    return sum(sums, Spent())


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a call is booked on: the environment ("" where there is one), the stage, and the prompt it was for."""

    island: str
    stage: str
    prompt: str


class Ledger:
    """Books the calls of a run. `run` is where the spending of a paid source is kept, None for one that costs nothing.
    """

    def __init__(self, config: ReflectionConfig, run: Path | None = None) -> None:
        self._config, self._file = config, run / SPENDING if run else None
        self._spending: JsonLines | None = None
        self._prices = Prices(*config.prices, config.currency) if config.prices else None
        self._books: defaultdict[Account, Spent] = defaultdict(Spent)        # of the whole run
        self._page: defaultdict[Account, Spent] = defaultdict(Spent)         # of this step
        self._under_way = 0
        self._paid = Spent()        # what stands in `spending.jsonl` and in the books
        self._lost = Spent()        # what stands in `spending.jsonl` alone
        self.step = 0

    def turn(self, step: int) -> None:
        """A new page, for `step`."""
        self.step = step
        self._page.clear()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call is under way; one that is cancelled is never booked: its step will be done again."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def book(self, account: Account, spent: Spent) -> None:
        """A call is over. `spent.cost` is filled in where there are prices."""
        cost = self._prices.cost(spent.prompt_tokens, spent.completion_tokens) if self._prices else None
        spent += Spent(cost=cost or 0.0)
        self._books[account] += spent
        self._page[account] += spent
        if self._file is not None and not spent.replayed:
            self._spending = self._spending or JsonLines(self._file)
            self._spending.write({"step": self.step, **asdict(account), **asdict(spent)})
            self._paid += spent

    def exhausted(self) -> str:
        """Which budget is used up, in words; "" while none is. Calls under way count as calls, and may still take
        tokens, seconds and money: a budget is overrun by what was under way when it was reached, at most."""
        config, spent = self._config, self.total + self._lost
        for name, limit, used in (
            ("max_calls", config.max_calls, spent.calls + self._under_way),
            ("max_tokens", config.max_tokens, spent.tokens),
            ("max_seconds", config.max_seconds, spent.seconds),
            ("max_cost", config.max_cost, spent.cost),
        ):
            if limit is not None and used >= limit:
                return f"reflection.{name} of {limit:,g} is used up"
        return ""

    @property
    def total(self) -> Spent:
        """Of the whole run."""
        return total(self._books.values())

    @property
    def page(self) -> Mapping[Account, Spent]:
        """Of this step."""
        return self._page

    def sampled(self, island: str) -> int:
        """Tokens that were written in this step for one environment."""
        return sum(spent.completion_tokens for account, spent in self._page.items() if account.island == island)

    def metrics(self) -> dict[str, float]:
        """Of this step: all, by stage, and by prompt; nothing where nothing was called.

        `call_seconds` are added up call by call; how long the step's reflection took is the phase's `seconds`.
        """
        if not self._page:
            return {}
        found = {f"reflection/{name}": value for name, value in self._shown(total(self._page.values())).items()}
        for stage, spent in grouped(self._page, "stage").items():
            found |= {f"reflection/{stage}/{name}": value for name, value in self._shown(spent).items()}
        for prompt, spent in grouped(self._page, "prompt").items():
            found |= {f"reflection/for/{prompt or 'all'}/{n}": v for n, v in self._shown(spent).items() if n in BRIEF}
        return found

    def events(self) -> list[dict[str, Any]]:
        """Of this step: who was asked for what, for events.jsonl."""
        order = sorted(self._page, key=lambda a: (a.island, a.prompt, a.stage))
        return [{**asdict(account), **self._shown(self._page[account])} for account in order]

    def table(self) -> tuple[str, ...]:
        """Of the whole run, as lines: by stage, and the prompts that took most."""
        if not self._books:
            return ()
        everything = self.total
        stages = sorted(grouped(self._books, "stage").items())
        prompts = sorted(grouped(self._books, "prompt").items(), key=lambda item: -item[1].tokens)
        rows = [*stages, *((f"for {prompt}", spent) for prompt, spent in prompts[:MOST] if prompt)]
        if len(prompts) > MOST:
            rows.append((f"for {len(prompts) - MOST} others", total(spent for _, spent in prompts[MOST:])))
        lines = _aligned([("reflection", everything), *rows], self._config.currency if self._prices else "")
        if self._lost.calls:
            lines.append(f"besides, {self._lost.calls:,} calls in steps that were interrupted and done again")
        if (spent := self.exhausted()) and self._under_way == 0:
            lines.append(f"reflection stopped there: {spent}")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        books = [{**asdict(account), **asdict(spent)} for account, spent in self._books.items()]
        return {"books": books, "paid": asdict(self._paid)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `to_json` wrote down, and from what was paid for since."""
        self._books.clear()
        self._books.update({Account(*_of(Account, row)): Spent(*_of(Spent, row)) for row in state["books"]})
        self._paid = Spent(**state["paid"])
        if self._file is not None:
            self._lost = total(Spent(*_of(Spent, row)) for row in read_lines(self._file)) - self._paid

    def close(self) -> None:
        """Close the file."""
        if self._spending is not None:
            self._spending.close()
            self._spending = None

    def _shown(self, spent: Spent) -> dict[str, float]:
        sums = {name: value for name, value in asdict(spent).items() if name != "cost" or self._prices}
        return {"call_seconds" if name == "seconds" else name: value for name, value in sums.items()}


def _of(kind: type[Any], row: Mapping[str, Any]) -> list[Any]:
    return [row[field.name] for field in fields(kind)]


def grouped(page: Mapping[Account, Spent], by: str) -> dict[str, Spent]:
    """Sums by one field of the accounts. Ids of prompts name their environment, where there are several."""
    found: defaultdict[str, Spent] = defaultdict(Spent)
    for account, spent in page.items():
        found[str(getattr(account, by))] += spent
    return dict(found)


def _aligned(rows: list[tuple[str, Spent]], currency: str) -> list[str]:
    """Rows of a table under one head, as text."""
    cells = [["", *HEAD, *([currency] if currency else [])]]
    for name, spent in rows:
        numbers = [spent.calls, spent.failed, spent.replayed, spent.prompt_tokens, spent.completion_tokens]
        money = [f"{spent.cost:,.4f}"] if currency else []
        cells.append([name, *(f"{n:,}" for n in numbers), f"{spent.seconds:,.1f}", *money])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
